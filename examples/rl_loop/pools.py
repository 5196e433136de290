"""The workers, as processes of this machine or as actors of a Ray cluster."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rollouts import Rollouts

if TYPE_CHECKING:
    import torch

_PATIENCE = 120.0  # seconds that samples may take


class Pool(Protocol):
    """Workers that draw samples while the trainer does something else.

    Attributes:
        channels: for a `WeightSender`.
    """

    channels: list[Any]

    def ask(self, prompts: torch.Tensor) -> None:
        """Have prompts answered; each worker gets a part of them."""

    def take(self) -> list[Rollouts]:
        """Return the samples of those workers that have answered what was asked before."""

    def close(self) -> None:
        """End them."""


class Processes:
    """Worker processes, which are spoken to over pipes.

    Args:
        count: how many.
        backend: of weight-transfer.
    """

    def __init__(self, count: int, backend: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), backend]
        self._workers = [
            subprocess.Popen([*command, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for seed in range(count)
        ]
        self._lines: list[queue.SimpleQueue[str]] = [queue.SimpleQueue() for _ in self._workers]
        for worker, lines in zip(self._workers, self._lines, strict=True):
            threading.Thread(target=_read, args=(worker, lines), daemon=True).start()
        self.channels: list[Any] = [self._answer(lines)["url"] for lines in self._lines]

    def ask(self, prompts: torch.Tensor) -> None:
        for worker, part in zip(self._workers, prompts.chunk(len(self._workers)), strict=True):
            assert worker.stdin is not None
            worker.stdin.write(json.dumps(part.tolist()) + "\n")
            worker.stdin.flush()

    def take(self) -> list[Rollouts]:
        return [Rollouts.from_lists(self._answer(lines)) for lines in self._lines]

    def close(self) -> None:
        for worker in self._workers:
            worker.terminate()
            worker.wait(10)

    def _answer(self, lines: queue.SimpleQueue[str]) -> Any:
        line = lines.get(timeout=_PATIENCE)
        if not line:
            raise RuntimeError("A worker process has ended; its own output says why.")
        return json.loads(line)


def _read(worker: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.put(line)
    lines.put("")
