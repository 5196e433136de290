"""NIXL agents: in processes of their own and in this one; what they read, what they cost, and how they end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from weight_transfer import PeerLostError, TransferError, TransferTimeoutError
from weight_transfer.memory.shared_memory import SharedMemory
from weight_transfer.testing.actors import eventually
from weight_transfer.values.deadline import Deadline
from weight_transfer_rdma.config import RdmaOptions
from weight_transfer_rdma.nixl import VRAM, Place, transport_in
from weight_transfer_rdma.process import AgentProcess

if TYPE_CHECKING:
    import torch

NBYTES = 2**20
HERE = Place()


@pytest.fixture
def deadline() -> Deadline:
    return Deadline(30)


@pytest.fixture
def agents(deadline: Deadline) -> Iterator[tuple[AgentProcess, AgentProcess]]:
    owner = AgentProcess("owner", RdmaOptions(), "reader", deadline)
    reader = AgentProcess("reader", RdmaOptions(), "owner", deadline)
    yield owner, reader
    reader.close()
    owner.close()


def _shared(agent: AgentProcess, value: int, deadline: Deadline) -> tuple[torch.Tensor, int]:
    memory = SharedMemory(NBYTES)
    data = memory.storage(0, NBYTES).fill_(value)
    return data, agent.share(memory, deadline)


def _row(local: int, remote: int, nbytes: int = NBYTES) -> np.ndarray:
    return np.array([[local, remote, nbytes]], dtype=np.uint64)


def test_one_agent_reads_what_another_one_shares(agents: tuple[AgentProcess, AgentProcess], deadline: Deadline) -> None:
    owner, reader = agents
    source, there = _shared(owner, 7, deadline)
    target, here = _shared(reader, 0, deadline)
    peer = reader.connect(owner.metadata(deadline), deadline)
    assert peer == "owner"
    handle = reader.prepare("READ", peer, _row(here, there), HERE, HERE, deadline)
    for value in (7, 9, 7):
        source.fill_(value)
        reader.start(handle, 0, deadline)
        reader.finish(deadline)
        assert (target == value).all()
    assert reader.transport(HERE).kind in {"shm", "tcp"}


def test_agents_that_have_nothing_to_do_leave_the_processor_alone(
    agents: tuple[AgentProcess, AgentProcess], deadline: Deadline
) -> None:
    owner, reader = agents
    _, there = _shared(owner, 7, deadline)
    target, here = _shared(reader, 0, deadline)
    peer = reader.connect(owner.metadata(deadline), deadline)
    reader.start(reader.prepare("READ", peer, _row(here, there), HERE, HERE, deadline), 0, deadline)
    reader.finish(deadline)
    assert (target == 7).all()
    before = [_processor_seconds(agent.pid) for agent in agents]
    time.sleep(1)  # is measured, not waited for
    spent = [_processor_seconds(agent.pid) - start for agent, start in zip(agents, before, strict=True)]
    assert max(spent) <= 0.1


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_regions_added_later_are_reached_through_newer_metadata(
    agents: tuple[AgentProcess, AgentProcess], deadline: Deadline
) -> None:
    owner, reader = agents
    reader.connect(owner.metadata(deadline), deadline)
    _, there = _shared(owner, 7, deadline)
    target, here = _shared(reader, 0, deadline)
    peer = reader.connect(owner.metadata(deadline), deadline, replaced="owner")
    reader.start(reader.prepare("READ", peer, _row(here, there), HERE, HERE, deadline), 0, deadline)
    reader.finish(deadline)
    assert (target == 7).all()


def test_memory_that_was_never_shared_is_not_read(
    agents: tuple[AgentProcess, AgentProcess], deadline: Deadline
) -> None:
    owner, reader = agents
    _, here = _shared(reader, 0, deadline)
    peer = reader.connect(owner.metadata(deadline), deadline)
    with pytest.raises(TransferError, match="NIXL failed at 'prepare'"):
        reader.prepare("READ", peer, _row(here, 4096), HERE, HERE, deadline)


def test_metadata_of_an_agent_that_died_is_a_lost_peer(
    agents: tuple[AgentProcess, AgentProcess], deadline: Deadline
) -> None:
    owner, reader = agents
    metadata = owner.metadata(deadline)
    owner.kill()
    with pytest.raises(PeerLostError, match="cannot be reached"):
        reader.connect(metadata, deadline)


def test_a_call_that_takes_too_long_is_a_timeout_and_killing_it_leaves_no_process(deadline: Deadline) -> None:
    agent = AgentProcess("still", RdmaOptions(), "nobody", deadline)
    process = agent.pid
    os.kill(process, signal.SIGSTOP)
    with pytest.raises(TransferTimeoutError, match=r"0\.2 s"):
        agent.metadata(Deadline(0.2))
    agent.kill()
    with contextlib.suppress(OSError):  # the kernel has cleared up already
        assert Path(f"/proc/{process}/maps").read_text() == "", "it has memory"
    assert not agent.alive
    with pytest.raises(TransferError, match="was stopped"):
        agent.metadata(deadline)
    agent.close()
    assert eventually(lambda: not Path(f"/proc/{process}").exists(), 30)


def test_an_agent_that_dies_is_an_error_that_says_how(deadline: Deadline) -> None:
    agent = AgentProcess("victim", RdmaOptions(), "nobody", deadline)
    os.kill(agent.pid, signal.SIGSEGV)
    with pytest.raises(TransferError, match="signal 11"):
        agent.metadata(deadline)
    agent.close()


def test_an_agent_that_cannot_start_says_why_and_leaves_nothing(deadline: Deadline) -> None:
    fds = set(os.listdir("/proc/self/fd"))
    with pytest.raises(TransferError, match="NIXL failed at 'start'"):
        AgentProcess("hopeless", RdmaOptions(ucx={"TLS": "no_such_transport"}), "nobody", deadline)
    assert set(os.listdir("/proc/self/fd")) == fds


def test_agents_go_with_their_engine_also_in_the_middle_of_a_call() -> None:
    """The engine stops its agent, so that it cannot see the end of its socket, and is killed."""
    code = (
        "import os, signal, time\n"
        "from weight_transfer.values.deadline import Deadline\n"
        "from weight_transfer_rdma.config import RdmaOptions\n"
        "from weight_transfer_rdma.process import AgentProcess\n"
        "agent = AgentProcess('orphan', RdmaOptions(), 'nobody', Deadline(30))\n"
        "print(agent.pid, flush=True)\n"
        "os.kill(agent.pid, signal.SIGSTOP)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    process, until = int(done.stdout), time.monotonic() + 10
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < until


def test_agents_survive_the_thread_that_started_them(deadline: Deadline) -> None:
    import threading

    made: list[AgentProcess] = []
    thread = threading.Thread(target=lambda: made.append(AgentProcess("heir", RdmaOptions(), "nobody", deadline)))
    thread.start()
    thread.join()
    assert made[0].metadata(deadline)
    made[0].close()


def test_an_agent_says_nothing_on_the_engine_s_output_and_all_of_it_in_the_log_if_told_to(
    deadline: Deadline,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with caplog.at_level(logging.INFO, "weight_transfer_rdma"):
        AgentProcess("quiet", RdmaOptions(), "nobody", deadline).close()
        assert not caplog.records
        monkeypatch.setenv("WEIGHT_TRANSFER_TRACE", "1")
        AgentProcess("loud", RdmaOptions(), "nobody", deadline).close()
    assert any("agent loud" in record.getMessage() for record in caplog.records)
    assert capfd.readouterr() == ("", "")


def test_an_agent_process_imports_no_torch(deadline: Deadline) -> None:
    agent = AgentProcess("light", RdmaOptions(), "nobody", deadline)
    maps = Path(f"/proc/{agent.pid}/maps").read_text()
    agent.close()
    assert "libucp" in maps
    assert "libtorch" not in maps


def test_two_agents_in_this_process_read_from_each_other_and_end() -> None:
    """What serves CUDA memory, on host memory; in a process of its own, for NIXL's threads and variables."""
    code = (
        "import logging, os, numpy as np\n"
        "from weight_transfer.values.deadline import Deadline\n"
        "from weight_transfer.errors import TransferError\n"
        "from weight_transfer_rdma.config import RdmaOptions\n"
        "from weight_transfer_rdma.device import LocalAgent\n"
        "from weight_transfer_rdma.nixl import Place\n"
        "before = dict(os.environ)\n"
        "deadline = Deadline(30)\n"
        "owner = LocalAgent('owner', RdmaOptions(), 'peer', reads=False)\n"
        "reader = LocalAgent('reader', RdmaOptions(), 'peer', reads=True)\n"
        "assert dict(os.environ) == before and logging.raiseExceptions\n"
        "source, target = np.full(2**20, 7, np.uint8), np.zeros(2**20, np.uint8)\n"
        "owner.register(source.ctypes.data, source.nbytes, Place())\n"
        "reader.register(target.ctypes.data, target.nbytes, Place())\n"
        "peer = reader.connect(owner.metadata(deadline), deadline)\n"
        "ends = [array.ctypes.data for array in (target, source)]\n"
        "rows = np.array([[end + at for end in ends] + [2**18] for at in range(0, 2**20, 2**18)], np.uint64)\n"
        "handle = reader.prepare('READ', peer, rows, Place(), Place(), deadline)\n"
        "for value in (7, 9):\n"
        "    source[:] = value\n"
        "    reader.start(handle, 0, deadline)\n"
        "    reader.finish(deadline)\n"
        "    assert (target == value).all()\n"
        "assert reader.transport(Place()).kind != 'unknown', open(reader._log).read()\n"
        "reader.kill()\n"
        "try:\n"
        "    reader.start(handle, 0, deadline)\n"
        "except TransferError as error:\n"
        "    assert 'stopped' in str(error)\n"
        "reader.close(); owner.close()\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1:] == ["done"], done.stdout + done.stderr


def test_a_read_that_does_not_end_names_its_peer_though_another_ones_began_later() -> None:
    """In a process of its own, for NIXL's threads and variables."""
    code = (
        "import os, signal, numpy as np\n"
        "from weight_transfer.errors import TransferTimeoutError\n"
        "from weight_transfer.memory.shared_memory import SharedMemory\n"
        "from weight_transfer.values.deadline import Deadline\n"
        "from weight_transfer_rdma.config import RdmaOptions\n"
        "from weight_transfer_rdma.device import LocalAgent\n"
        "from weight_transfer_rdma.nixl import Place\n"
        "from weight_transfer_rdma.process import AgentProcess\n"
        "deadline, options = Deadline(40), RdmaOptions(transport='tcp')\n"
        "reader = LocalAgent('reader', options, 'trainer', reads=True)\n"
        "owners, handles, targets = [], [], []\n"
        "for rank in range(2):\n"
        "    owner = AgentProcess(f'owner {rank}', options, 'reader', deadline)\n"
        "    memory = SharedMemory(2**20)\n"
        "    memory.storage(0, 2**20).fill_(7)\n"
        "    there = owner.share(memory, deadline)\n"
        "    target = np.zeros(2**20, np.uint8)\n"
        "    reader.register(target.ctypes.data, target.nbytes, Place())\n"
        "    peer = reader.connect(owner.metadata(deadline), deadline, label=f'trainer rank {rank}')\n"
        "    rows = np.array([[target.ctypes.data, there, 2**20]], np.uint64)\n"
        "    handles.append(reader.prepare('READ', peer, rows, Place(), Place(), deadline))\n"
        "    owners.append(owner); targets.append(target)\n"
        "    reader.start(handles[-1], 0, deadline)\n"
        "    reader.finish(deadline)\n"
        "    assert (target == 7).all()\n"
        "targets[1][:] = 0\n"
        "os.kill(owners[0].pid, signal.SIGSTOP)\n"
        "for handle in handles:\n"
        "    reader.start(handle, 0, deadline)\n"
        "try:\n"
        "    reader.finish(Deadline(3))\n"
        "except TransferTimeoutError as error:\n"
        "    assert error.peer == 'trainer rank 0', error\n"
        "    assert (targets[1] == 7).all()\n"
        "    print('done', flush=True)\n"
        "for owner in owners:\n"
        "    owner.kill(); owner.close()\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1:] == ["done"], done.stdout + done.stderr


LOG = """
[1.2] [vm:1:0]   +--------+-------------+-----------------------------------+
[1.2] [vm:1:0]   | reader self cfg#0                                        |
[1.2] [vm:1:0]   | remote memory read by ucp_get* into host memory from host |
[1.2] [vm:1:0]   +--------+-------------+-----------------------------------+
[1.2] [vm:1:0]   | Range  | Description |              Config               |
[1.2] [vm:1:0]   +--------+-------------+-----------------------------------+
[1.2] [vm:1:0]   | 0..inf | zero-copy   | self/memory                       |
[1.2] [vm:1:0]   +--------+-------------+-----------------------------------+
[1.2] [vm:1:0]   +--------+-------------+-----------------------------------+
[1.2] [vm:1:0]   | reader inter-node cfg#1                                  |
[1.2] [vm:1:0]   | remote memory read by ucp_get*(multi) into {memory} from host  |
[1.2] [vm:1:0]   +--------+-------------+-----------------------------------+
[1.2] [vm:1:0]   | Range  | Description |              Config               |
[1.2] [vm:1:0]   +--------+-------------+-----------------------------------+
[1.2] [vm:1:0]   | 0..100 | copy-in     | tcp/lo                            |
[1.2] [vm:1:0]   | 101..inf | {how} | {path} |
[1.2] [vm:1:0]   +--------+-------------+-----------------------------------+
"""


@pytest.mark.parametrize(
    ("how", "path", "kind"),
    [
        ("zero-copy", "cma/memory", "shm"),
        ("zero-copy", "rc_mlx5/mlx5_0:1 50% on path0 and 50% on path1", "rdma"),
        ("zero-copy", "rc_verbs/rxe0:1", "rdma"),
        ("software emulation", "tcp/eth0", "tcp"),
        ("zero-copy", "cuda_ipc/cuda", "nvlink"),
        ("zero-copy", "something/new", "unknown"),
    ],
)
def test_the_transport_is_read_from_the_protocol_report(how: str, path: str, kind: str) -> None:
    for memory, place in (("host memory", Place()), ("cuda/GPU0", Place(VRAM, 0))):
        found = transport_in(LOG.format(memory=memory, how=how, path=path), place)
        assert (found.kind, found.path) == (kind, f"{how} over {path}")
    assert transport_in(LOG, Place(VRAM, 0)).kind == "unknown"
