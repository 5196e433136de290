"""The actor that plays workers which keep regions: it can stop amid what comes whole, and amid the regions."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from weight_transfer.control.http_server import serve
from weight_transfer.plugins.hookspecs import hookimpl
from weight_transfer.testing.keeping import Kept
from weight_transfer.testing.resources import MemoryMark
from weight_transfer.testing.worker import Loader, Receiver

if TYPE_CHECKING:
    from weight_transfer.testing.actors import Stage
    from weight_transfer.testing.models import Weight


class _Gate:
    """Hears of the first bytes of an update; armed, it says so and waits until it is released."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._armed = False
        self._released = threading.Event()

    def arm(self) -> None:
        self._armed = True
        self._released.clear()

    def release(self) -> None:
        self._released.set()

    @hookimpl
    def weight_transfer_progress(self) -> None:
        if self._armed:
            self._armed = False
            self._stage.say("blocked")
            self._released.wait()


class _Receiver(Receiver):
    """Keeps its last answer to ``update_weights``."""

    answer: dict[str, Any] | None = None

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        self.answer = None
        self.answer = super().update_weights(update_info)
        return self.answer


class Keeper:
    """One receiver with its targets and its server.

    Args:
        config: of the receiver.
        kind: what it keeps; see `weight_transfer.testing.keeping`.
        weights: of which.
        worker: its number.
        count: how many there are.
        device: a torch device.
        alone: None, or how the weight without a target is loaded: by its ``"name"``, or by a ``"loader"``.
    """

    def __init__(
        self,
        stage: Stage,
        config: dict[str, Any],
        kind: str,
        weights: Sequence[Weight],
        worker: int,
        count: int,
        device: str = "cpu",
        alone: str | None = None,
    ) -> None:
        self.kept = Kept(kind, weights, worker, count, device, alone is not None)
        self.gate = _Gate(stage)
        self.loader = Loader(self.kept.model, stage)
        self._open = ExitStack()
        self.receiver = _Receiver(
            config,
            self.kept.model,
            load_weights=self.loader if alone == "loader" else None,
            needs=self.kept.needs,
            observers=(self.gate,),
        )
        self._open.callback(self.receiver.close)
        self.url = self._open.enter_context(serve(self.receiver)).url

    def block(self, amid: str) -> None:
        """Stop in the next update: ``"whole"``, after the first weight that comes so, or in the ``"regions"``."""
        if amid == "whole":
            self.loader.arm(block_at=1)
        else:
            self.gate.arm()

    def release(self) -> None:
        """Go on, in this update and the next ones."""
        self.loader.release()
        self.gate.release()

    @property
    def extra_memory(self) -> int:
        """Bytes that the engine says it holds."""
        joined = self.receiver._joined  # noqa: SLF001  (what its engine says is the question)
        assert joined is not None
        return joined.engine.extra_memory

    def close(self) -> None:
        """Close the server and the receiver."""
        self.release()
        self._open.close()


def main(stage: Stage, threads: int | None = None) -> None:
    """Serve commands; each names the receiver that it is about."""
    if threads is not None:
        torch.set_num_threads(threads)
    keepers: dict[str, Keeper] = {}
    marks: list[MemoryMark] = []

    def open_(name: str, **spec: Any) -> str:
        keepers[name] = Keeper(stage, **spec)
        return keepers[name].url

    stage.say("ready")
    stage.serve(
        {
            "open": open_,
            "close": lambda name: keepers.pop(name).close(),
            "unlike": lambda name, seed: keepers[name].kept.unlike(seed),
            "kept": lambda name: keepers[name].kept.nbytes,
            "answer": lambda name: keepers[name].receiver.answer,
            "status": lambda name: keepers[name].receiver.status(),
            "extra_memory": lambda name: keepers[name].extra_memory,
            "block": lambda name, amid: keepers[name].block(amid),
            "release": lambda name: keepers[name].release(),
            "mark": lambda name: marks.append(MemoryMark()),
            "growth": lambda name: marks[-1].growth(),
        }
    )
    for keeper in keepers.values():
        keeper.close()
