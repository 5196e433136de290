"""``weight-transfer demo``: a real trainer, real workers, and what becomes of them."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from weight_transfer.demo.view import Facts, Sample
from weight_transfer.values.report import TransferReport

IDENTICAL = re.compile(
    r"^(worker \S+): version 4, weights bit-identical to the trainer's \(sha256 [0-9a-f]{16}\.\.\.\), "
    r"generates the same 64 tokens$",
    re.MULTILINE,
)
SHORT = ("--plain", "--steps", "4", "--every", "2")
ORPHAN = """
import sys
from weight_transfer.demo.process import ProcessWorker
import weight_transfer as wt
worker = ProcessWorker(wt.load_config(backend="ipc"), 0)
print(worker.where, flush=True)
sys.stdin.read()
"""


@contextmanager
def started(*command: str) -> Iterator[Any]:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, *command], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def pids(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"process (\d+)", text)]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("backend", "workers"),
    [
        ("ipc", 2),
        pytest.param("loopback", 2, marks=pytest.mark.slow),
        pytest.param("rdma", 2, marks=pytest.mark.slow),
    ],
)
def test_every_worker_ends_with_the_trainers_bits_and_tokens(backend: str, workers: int) -> None:
    whole = [sys.executable, "-m", "weight_transfer", "demo", "--backend", backend, "--workers", str(workers), *SHORT]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    last = done.stdout.splitlines()[-workers:]
    assert len({IDENTICAL.fullmatch(line)[1] for line in last}) == workers
    for version in (0, 2, 4):
        assert f"version {version} to {workers} workers in " in done.stdout
    assert not [pid for pid in pids(done.stdout) if alive(pid)], "no worker is left behind"


def test_a_worker_that_dies_is_named_and_ends_the_run() -> None:
    command = ("-m", "weight_transfer", "demo", "--workers", "1", "--plain", "--steps", "100000", "--every", "2")
    with started(*command) as demo:
        seen = ""
        while "version 0 to 1 worker " not in seen:
            line = demo.stdout.readline()
            assert line, demo.stderr.read()
            seen += line
        (pid,) = pids(seen)
        (url,) = re.findall(r"^worker (http\S+):", seen, re.MULTILINE)
        os.kill(pid, signal.SIGKILL)
        _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 2
    assert errors == f"error: worker {url} (process {pid}) was killed by SIGKILL.\n"


def test_a_worker_does_not_outlive_a_trainer_that_was_killed() -> None:
    with started("-c", ORPHAN) as trainer:
        (pid,) = pids(trainer.stdout.readline())
        worker = os.pidfd_open(pid)
        try:
            trainer.kill()
            assert select.select([worker], [], [], 60)[0], "the worker is still there after a minute"
        finally:
            os.close(worker)


def test_the_optimizer_computes_in_float32_alone() -> None:
    """Lower precisions are emulated on processors without AVX-512, thirty times slower."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from weight_transfer.demo.muon import Muon

    seen: set[torch.dtype] = set()

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                seen.add(result.dtype)
            return result

    matrices = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((8, 8), (32, 8), (8, 32))]
    for matrix in matrices:
        matrix.grad = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0))
    with Listening():
        Muon(matrices, lr=1.0).step()
    assert seen == {torch.float32}
    for matrix in matrices:
        rate = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        values = torch.linalg.svdvals(matrix.detach()) / rate
        assert ((values > 0.3) & (values < 1.3)).all(), "the step has singular values near one"


@pytest.mark.slow
def test_the_model_learns_the_sonnets_by_heart_in_a_minute() -> None:
    whole = [sys.executable, "-m", "weight_transfer", "demo", "--plain"]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=110, check=True)
    assert float(re.search(r"^step 120/120, loss (\S+):", done.stdout, re.MULTILINE)[1]) < 0.3
    assert (
        "version 120: Shall I compare thee to a summer's day? / Thou art more lovely and more temperate:" in done.stdout
    )


def test_the_live_view_fits_sixty_columns() -> None:
    from rich.console import Console

    from weight_transfer.demo.live import LiveView

    console = Console(width=60, height=40, force_terminal=True, color_system=None, highlight=False, record=True)
    view = LiveView(console)
    place = ("worker http://127.0.0.1:37133", "process 19825")
    view.begin(Facts(backend="loopback", provider="acme 1.0 [acme]", parameters=2_163_968, steps=120, workers=(place,)))
    for step in range(120):
        view.stepped(step, 5 / (1 + step))
    view._trained = 19.4
    phases = {"init": 0.0981, "start": 0.0025, "update": 0.0296, "finish": 0.0026}
    sizes = {"nbytes": 8_655_872, "params": 20, "extra_memory": 0}
    report = TransferReport(backend="loopback", version=120, workers=("a", "b"), seconds=phases, **sizes)
    view.updated(report, 1.2345)
    view.sampled(Sample(worker=place[0], version=120, state="ready", prompt="Shall I", text=" compare"))
    console.print(view._render())
    text = console.export_text()
    assert "\u2026" not in text, "nothing is cut off"
    for words in ("120/120", "steps/s", "version 120 \u00b7 ready", "update finish"):
        assert words in text
