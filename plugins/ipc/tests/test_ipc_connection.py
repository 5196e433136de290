"""The socket between the trainer and a worker: who may connect, and how a death is noticed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from weight_transfer import (
    HandshakeError,
    ParallelConfig,
    PeerLostError,
    TransferTimeoutError,
    WorkerSlot,
    load_backend,
    load_config,
)
from weight_transfer.memory.shared_memory import PrivateView, SharedMemory
from weight_transfer.testing.actors import eventually
from weight_transfer.values.deadline import Deadline
from weight_transfer_ipc.connection import Connection
from weight_transfer_ipc.listener import Listener, say_hello


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Connection]]:
    """Return the trainer's and the worker's end."""
    listener = Listener()
    worker = Connection.connect(listener.address, Deadline(5))
    say_hello(worker, listener.token, 3, None, Deadline(5))
    accepted = listener.accept(Deadline(5))
    assert accepted is not None
    rank, trainer = accepted
    assert rank == 3
    yield trainer, worker
    trainer.close()
    worker.close()
    listener.close()


def test_messages_carry_file_descriptors(pair: tuple[Connection, Connection]) -> None:
    trainer, worker = pair
    memory = SharedMemory(4096)
    memory.storage(0, 4096).fill_(7)
    trainer.send({"segment": 1}, [memory.fd], Deadline(5))
    message, fds = worker.receive(Deadline(5))
    assert message == {"segment": 1}
    assert PrivateView(fds[0], 4096).data.tolist() == [7] * 4096


def test_a_segment_that_is_smaller_than_announced_is_refused() -> None:
    memory = SharedMemory(4096)
    with pytest.raises(OSError, match="4096 bytes, 8192 were announced"):
        PrivateView(os.dup(memory.fd), 8192)


def test_a_silent_peer_is_a_timeout_and_a_dead_one_is_lost(pair: tuple[Connection, Connection]) -> None:
    trainer, worker = pair
    worker.check_alive()
    with pytest.raises(TransferTimeoutError, match="waiting for"):
        worker.await_signal(Deadline(0.05))
    trainer.close()
    with pytest.raises(PeerLostError):
        worker.await_signal(Deadline(5))
    with pytest.raises(PeerLostError):
        worker.check_alive()


def test_an_interrupt_from_another_thread_ends_a_wait(pair: tuple[Connection, Connection]) -> None:
    _, worker = pair
    threading.Timer(0.05, worker.interrupt).start()
    with pytest.raises(PeerLostError):
        worker.await_signal(Deadline(30))


def test_garbage_is_a_handshake_error(pair: tuple[Connection, Connection]) -> None:
    trainer, worker = pair
    trainer._socket.sendall(b"\0\0\0\4nope")
    with pytest.raises(HandshakeError, match="does not speak this protocol"):
        worker.receive(Deadline(5))


def test_brackets_without_end_are_a_handshake_error(pair: tuple[Connection, Connection]) -> None:
    trainer, worker = pair
    sending = threading.Thread(
        target=trainer.send_bytes, args=((900_000).to_bytes(4, "big") + b"[" * 900_000, Deadline(5))
    )
    sending.start()
    with pytest.raises(HandshakeError, match="does not speak this protocol"):
        worker.receive(Deadline(5))
    sending.join()


def test_a_message_that_trickles_in_is_a_timeout_in_time(pair: tuple[Connection, Connection]) -> None:
    trainer, worker = pair
    ended = threading.Event()

    def trickle() -> None:
        while not ended.wait(0.1):
            trainer.send_bytes(b"\0", Deadline(5))

    trickling = threading.Thread(target=trickle)
    trickling.start()
    since = time.monotonic()
    with pytest.raises(TransferTimeoutError):
        worker.receive(Deadline(0.25))
    assert time.monotonic() - since < 0.6
    ended.set()
    trickling.join()


def test_an_address_that_nobody_listens_on_is_a_lost_peer() -> None:
    with pytest.raises(PeerLostError, match="one host"):
        Connection.connect("weight-transfer-nobody", Deadline(1))


@pytest.mark.parametrize("how", ["timed out", "interrupted before", "interrupted"])
def test_a_join_that_was_given_up_does_not_spoil_the_next_one(how: str) -> None:
    config, slot = load_config(backend="ipc"), WorkerSlot(peer="worker", rank_offset=1, count=1, world_size=2)
    backend = load_backend("ipc")
    trainer = backend.create_trainer_engine(config, ParallelConfig(device="cpu"))
    worker = backend.create_worker_engine(config, ParallelConfig(device="cpu"))
    trainer.open_endpoint([slot], Deadline(5))
    if how == "interrupted before":
        trainer.abort_update()
    elif how == "interrupted":
        threading.Timer(0.1, trainer.abort_update).start()
    with pytest.raises((PeerLostError, TransferTimeoutError)):
        trainer.join_workers(Deadline(0.2 if how == "timed out" else 20))
    trainer.abort_update()
    [invitation] = trainer.open_endpoint([slot], Deadline(5))
    common = {"rank_offset": 1, "world_size": 2, "timeout": 5}
    joining = threading.Thread(
        target=lambda: worker.init_transfer_engine(worker.parse_init_info(unstructured(invitation) | common))
    )
    joining.start()
    trainer.join_workers(Deadline(5))
    joining.join(5)
    assert not worker.lost
    trainer.shutdown()
    assert eventually(lambda: worker.lost, 5)
    worker.shutdown()


def unstructured(invitation: dict[str, object]) -> dict[str, object]:
    """Return it as it arrives."""
    return {name: value for name, value in invitation.items() if value is not None}
