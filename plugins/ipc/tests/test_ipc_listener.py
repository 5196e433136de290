"""Where workers connect: strangers neither come in, nor hold up or fail those who show the token."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from weight_transfer import HandshakeError, ParallelConfig, PeerLostError, WorkerSlot, load_backend, load_config
from weight_transfer.values.deadline import Deadline
from weight_transfer_ipc import connection as connections
from weight_transfer_ipc.connection import Connection
from weight_transfer_ipc.listener import Listener, say_hello

SOON = 1.5
"""Seconds within which a worker is let in, and in which a stranger could still be waited for."""


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


def visit(listener: Listener) -> socket.socket:
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stranger.settimeout(10)
    stranger.connect("\0" + listener.address)
    return stranger


def admit(listener: Listener) -> float:
    """Let a worker in, and out; return the seconds that it took."""
    since = time.monotonic()
    worker = Connection.connect(listener.address, Deadline(20))
    say_hello(worker, listener.token, 7, "f" * 32, Deadline(20))
    accepted = listener.accept(Deadline(20))
    took = time.monotonic() - since
    assert accepted is not None
    rank, trainer = accepted
    assert (rank, trainer.gpu) == (7, "f" * 32)
    trainer.signal(Deadline(5))
    worker.await_signal(Deadline(5))
    trainer.close()
    worker.close()
    return took


@pytest.mark.parametrize(
    "said",
    [b"0" * 32, "\u00e9".encode() * 34, (900_000).to_bytes(4, "big") + b"[" * 900_000, b"\xff" * 68],
    ids=["a wrong token", "accents", "brackets", "noise"],
)
def test_who_says_something_else_is_sent_away(listener: Listener, said: bytes) -> None:
    with visit(listener) as stranger:
        stranger.setblocking(False)
        with contextlib.suppress(OSError):  # more than the socket holds
            stranger.sendall(said)
        if len(said) < 68:
            stranger.shutdown(socket.SHUT_WR)
        assert admit(listener) < SOON
        stranger.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""


def test_a_wrong_token_is_told_to_its_worker(listener: Listener) -> None:
    worker = Connection.connect(listener.address, Deadline(5))
    say_hello(worker, "\ud800" + listener.token[1:], 1, None, Deadline(5))
    admit(listener)
    with pytest.raises(PeerLostError):
        worker.receive(Deadline(5))
    worker.close()


def test_silent_strangers_delay_no_worker(listener: Listener) -> None:
    strangers = [visit(listener) for _ in range(100)]
    assert admit(listener) < SOON
    for stranger in strangers:
        stranger.close()


def test_slow_strangers_delay_no_worker_and_are_sent_away(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weight_transfer_ipc.listener._TIME", 0.3)
    ended = threading.Event()
    stranger = visit(listener)

    def trickle() -> None:
        with contextlib.suppress(BrokenPipeError):
            while not ended.wait(0.02):
                stranger.send(b"x")

    trickling = threading.Thread(target=trickle)
    trickling.start()
    assert admit(listener) < SOON
    assert listener.accept(Deadline(5), wanted=trickling.is_alive) is None  # it has been sent away
    ended.set()
    stranger.close()


def test_a_queue_full_of_strangers_is_waited_out(listener: Listener) -> None:
    strangers = []
    while True:  # until Linux lets nobody queue any more
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        strangers.append(stranger)
        stranger.setblocking(False)
        try:
            stranger.connect("\0" + listener.address)
        except BlockingIOError:
            break
        except OSError as error:  # as many descriptors as this process may have
            assert error.errno == errno.EMFILE  # noqa: PT017
            break
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(Connection.connect, listener.address, Deadline(20))
        assert listener.accept(Deadline(20), wanted=lambda: not joining.done()) is None
        joining.result().close()
    for stranger in strangers:
        stranger.close()


def test_a_worker_is_let_in_once_this_process_may_open_files_again(listener: Listener) -> None:
    worker = Connection.connect(listener.address, Deadline(5))
    say_hello(worker, listener.token, 1, None, Deadline(5))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    lifting = threading.Timer(0.2, resource.setrlimit, (resource.RLIMIT_NOFILE, limits))
    lifting.start()
    try:
        joined = listener.accept(Deadline(5))
    finally:
        lifting.join()
    assert joined is not None
    assert joined[0] == 1
    joined[1].close()
    worker.close()


def test_descriptors_of_strangers_are_not_kept(listener: Listener) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with visit(listener) as stranger:
        socket.send_fds(stranger, [b"x" * 68], [stranger.fileno()] * 50)
        admit(listener)
    assert len(os.listdir("/proc/self/fd")) == before


def test_processes_of_other_users_are_sent_away(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "credentials", lambda _sock: (1, os.getuid() + 1))
    with pytest.raises(HandshakeError, match="run both as one user"):
        Connection.connect(listener.address, Deadline(5))
    monkeypatch.undo()
    monkeypatch.setattr("weight_transfer_ipc.listener.credentials", lambda _sock: (1, os.getuid() + 1))
    with visit(listener) as stranger:
        assert listener.accept(Deadline(1), wanted=lambda: not gone(stranger)) is None


def gone(stranger: socket.socket) -> bool:
    """Return whether the other end has closed the connection."""
    stranger.setblocking(False)
    try:
        return stranger.recv(1) == b""
    except BlockingIOError:
        return False


def test_root_may_be_at_the_other_end() -> None:
    assert connections.is_trusted(0)
    assert connections.is_trusted(os.getuid())
    assert not connections.is_trusted(os.getuid() + 1)


def test_nobody_can_connect_but_while_workers_join() -> None:
    config, slot = load_config(backend="ipc"), WorkerSlot(peer="worker", rank_offset=1, count=1, world_size=2)
    backend = load_backend("ipc")
    trainer = backend.create_trainer_engine(config, ParallelConfig(device="cpu"))
    worker = backend.create_worker_engine(config, ParallelConfig(device="cpu"))
    [invitation] = trainer.open_endpoint([slot], Deadline(5))
    info = {name: value for name, value in invitation.items() if value is not None}
    info |= {"rank_offset": 1, "world_size": 2, "timeout": 5}
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(worker.init_transfer_engine, worker.parse_init_info(info))
        trainer.join_workers(Deadline(5))
        joining.result()
    with pytest.raises(PeerLostError, match="cannot be reached"):
        Connection.connect(info["address"], Deadline(1))
    trainer.shutdown()
    worker.shutdown()
