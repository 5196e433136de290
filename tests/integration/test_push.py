"""``weight-transfer push``: a checkpoint comes to all workers bit for bit, or the exit status says so."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

import weight_transfer as wt
from weight_transfer.cli import main
from weight_transfer.cli.push_bars import WorkerBars, asking
from weight_transfer.testing.actors import eventually

CONFIG: dict[str, Any] = {"backend": "ipc", "timeout": 30, "init_timeout": 5}


def model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(70, 90), nn.Linear(90, 30))


def save(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True)
    temporary = folder / "model.safetensors.part"
    save_file(model(seed).state_dict(), temporary)
    temporary.rename(folder / "model.safetensors")
    return folder


def same(served: nn.Module, seed: int) -> bool:
    pairs = zip(served.state_dict().values(), model(seed).state_dict().values(), strict=True)
    return all(torch.equal(ours.cpu(), theirs) for ours, theirs in pairs)


class Served:
    """Two workers of this process, behind HTTP."""

    def __init__(self, stack: ExitStack, device: str = "cpu") -> None:
        self.models = [model(0).to(device), model(0).to(device)]
        self.receivers = [stack.enter_context(wt.WeightReceiver(CONFIG, each)) for each in self.models]
        self.servers = [stack.enter_context(wt.serve(receiver)) for receiver in self.receivers]
        self.to = [text for server in self.servers for text in ("--to", server.url)]

    def have(self, seed: int, version: int | str) -> bool:
        versions = [receiver.version for receiver in self.receivers]
        return versions == [version] * 2 and all(same(each, seed) for each in self.models)


@pytest.fixture
def served() -> Iterator[Served]:
    with ExitStack() as stack:
        yield Served(stack)


def push(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["push", *arguments])


def test_checkpoints_arrive_from_a_to_b_and_back(served: Served, tmp_path: Path) -> None:
    paths = [save(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2))]
    done = push(str(paths[0]), *served.to, "--version", "7")
    assert done.exit_code == 0, done.output
    assert served.have(1, 7)
    first, *workers = done.stdout.splitlines()
    assert f"{paths[0]} is version 7: 36.5 KB" in first
    assert [line.split()[:2] for line in workers] == [[server.url, "published"] for server in served.servers]
    done = push(str(paths[1] / "model.safetensors"), *served.to, "--verify", "loaded", "--json")
    row = json.loads(done.stdout)
    assert (row["version"], row["nbytes"], row["error"], len(row["workers"])) == (8, 36480, None, 2)
    assert served.have(2, 8)
    assert push(str(paths[0]), *served.to, "--version", "first").exit_code == 0
    assert served.have(1, "first")


def test_a_worker_that_fails_is_named_and_the_exit_status_is_1(served: Served, tmp_path: Path) -> None:
    path = save(tmp_path / "a", 1)
    with wt.WeightReceiver(CONFIG, nn.Linear(3, 3)) as other, wt.serve(other) as server:
        done = push(str(path), *served.to, "--to", server.url, "--json")
        row = json.loads(done.stdout)
        assert (done.exit_code, row["peer"]) == (1, server.url)
        assert served.receivers[0].version is None
        file = tmp_path / "sync.toml"
        file.write_text('[weight_transfer]\nbackend = "ipc"\non_worker_failure = "continue"\n')
        done = push(str(path), *served.to, "--to", server.url, "--config", str(file), "--version", "1")
        assert done.exit_code == 1
        assert f"{server.url}  lost" in done.stdout
        assert served.have(1, 1)


def test_what_cannot_be_sent_is_one_sentence(served: Served, tmp_path: Path) -> None:
    damaged = save(tmp_path / "damaged", 1)
    with (damaged / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    (tmp_path / "empty").mkdir()
    for path, word, code in ((damaged, "truncated", 2), (tmp_path / "empty", "no safetensors file", 2)):
        done = push(str(path), *served.to)
        assert done.exit_code == code
        assert len(done.stderr.splitlines()) == 1 and word in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_workers_on_a_gpu_get_a_checkpoint_through_one(tmp_path: Path) -> None:
    paths = {seed: save(tmp_path / str(seed), seed) for seed in (1, 2)}
    with ExitStack() as stack:
        served = Served(stack, "cuda")
        for version, seed in enumerate((1, 2, 1)):
            command = [sys.executable, "-m", "weight_transfer", "push", str(paths[seed]), "--version", str(version)]
            done = subprocess.run([*command, *served.to], capture_output=True, text=True, timeout=100, check=False)
            assert done.returncode == 0, done.stderr
            assert served.have(seed, version)


def test_a_device_that_is_not_there_is_refused(served: Served, tmp_path: Path) -> None:
    done = push(str(save(tmp_path / "a", 1)), *served.to, "--device", "nowhere:3")
    assert done.exit_code == 2
    assert "torch has no device 'nowhere:3' here" in done.stderr
    assert served.receivers[0].version is None


@pytest.mark.parametrize("arguments", [[], ["--watch", ".", "."], ["--watch", ".", "--version", "3"]])
def test_what_is_sent_must_be_said_once(arguments: list[str]) -> None:
    assert push(*arguments, "--to", "http://127.0.0.1:9").exit_code == 2


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_each_new_checkpoint_of_a_run_is_sent(served: Served, tmp_path: Path, ending: signal.Signals) -> None:
    save(tmp_path / "step-1", 3)
    save(tmp_path / "step-2", 1)
    command = [sys.executable, "-m", "weight_transfer", "push", "--watch", str(tmp_path), "--settle", "0.1", "--json"]
    with subprocess.Popen([*command, *served.to], stdout=subprocess.PIPE, text=True, env=os.environ | {}) as watching:
        try:
            assert watching.stdout is not None
            rows = [json.loads(watching.stdout.readline())]
            assert served.have(1, 2), "the newest of those that were there"
            for step, seed in ((3, 2), (4, 1)):
                save(tmp_path / f"step-{step}", seed)
                rows.append(json.loads(watching.stdout.readline()))
                assert served.have(seed, step)
            watching.send_signal(ending)
            assert watching.wait(30) == 0
        finally:
            watching.kill()
    assert [row["version"] for row in rows] == [2, 3, 4]


def test_each_worker_has_a_bar_of_its_own_on_a_terminal(tmp_path: Path) -> None:
    screen, go_on = io.StringIO(), threading.Event()

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        assert go_on.wait(30)

    with ExitStack() as stack:
        receivers = [stack.enter_context(wt.WeightReceiver(CONFIG, model(0), load_weights=load)) for _ in range(2)]
        urls = [stack.enter_context(wt.serve(receiver)).url for receiver in receivers]
        asks = stack.enter_context(asking(urls, wt.load_config(CONFIG)))
        bars = WorkerBars(asks, Console(file=screen, force_terminal=True, width=120))
        sender = stack.enter_context(wt.WeightSender(CONFIG, urls, observers=(bars,)))
        sending = stack.enter_context(ThreadPoolExecutor(1)).submit(sender.send, model(1), version=1)
        stack.callback(go_on.set)
        shown = [f"{url} .*36.5/36.5 kB" for url in urls]
        assert eventually(lambda: all(re.search(bar, screen.getvalue()) for bar in shown), within=30)
        assert [ask()["state"] for ask in asks.values()] == ["updating"] * 2
        go_on.set()
        assert sending.result(30).version == 1


@pytest.mark.parametrize("told", [{}, {"progress": 3}, {"progress": {"done": "1", "total": None}}, None])
def test_a_worker_that_does_not_tell_how_far_it_is_has_a_bar_that_stands_still(told: Any) -> None:
    screen = io.StringIO()
    bars = WorkerBars({"http://worker": lambda: told}, Console(file=screen, force_terminal=True, width=120))
    bars.weight_transfer_started(
        wt.TransferStarted(role="trainer", backend="ipc", version=1, nbytes=2000, params=1, workers=1)
    )
    assert eventually(lambda: "0.0/2.0 kB" in screen.getvalue(), within=30)
    bars.weight_transfer_finished(wt.TransferFinished(role="trainer", backend="ipc", version=1, nbytes=2000, seconds=1))
    assert not bars._thread.is_alive()


CHANNEL = """
from weight_transfer.control import HttpChannel

class Channel(HttpChannel):
    closed = 0

    def close(self):
        super().close()
        Channel.closed += 1
"""


def test_workers_may_be_behind_a_channel_of_their_own(
    served: Served, tmp_path: Path, install: Callable[..., Path]
) -> None:
    install("acme", {"weight_transfer.channels": {"acme": "acme_channel:Channel"}}, {"acme_channel": CHANNEL})
    addresses = [f"acme+{server.url}" for server in served.servers]
    done = push(str(save(tmp_path / "a", 1)), "--to", addresses[0], "--to", addresses[1], "--version", "1")
    assert done.exit_code == 0, done.output
    assert served.have(1, 1)
    assert sys.modules["acme_channel"].Channel.closed == 2
    assert CliRunner().invoke(main, ["status", addresses[0]]).exit_code == 0
    done = push(str(tmp_path / "a"), "--to", "other+http://127.0.0.1:9")
    assert done.exit_code == 2
    assert "no installed distribution provides channels called 'other'" in done.stderr
