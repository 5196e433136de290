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


@pytest.mark.parametrize(("backend", "workers"), [("ipc", 2), ("loopback", 2), ("rdma", 2)])
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
