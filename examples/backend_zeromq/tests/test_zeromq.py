"""What the kit cannot ask of every backend: strangers, stale messages, and how soon a peer is missed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zmq

from weight_transfer.config.settings import ParallelConfig
from weight_transfer.engine import WorkerSlot
from weight_transfer.errors import ManifestMismatchError, PeerLostError, TransferTimeoutError
from weight_transfer.model.source import ModuleSource
from weight_transfer.plugins.manager import load_backend
from weight_transfer.plugins.read_config import load_config
from weight_transfer.values.deadline import Deadline

SLOT = WorkerSlot(peer="worker", rank_offset=1, count=1, world_size=2)
COMMON = {"rank_offset": 1, "world_size": 2, "timeout": 5.0}


class Pair:
    """A trainer engine and a worker engine of one process, not yet joined."""

    def __init__(self, encrypt: bool) -> None:
        config = load_config({"backend": "zeromq", "bucket_bytes": 65536, "zeromq": {"encrypt": encrypt}})
        backend = load_backend("zeromq")
        self.trainer: Any = backend.create_trainer_engine(config, ParallelConfig())
        self.worker: Any = backend.create_worker_engine(config, ParallelConfig())
        [self.invitation] = self.trainer.open_endpoint([SLOT], Deadline(5))

    def join(self) -> None:
        joining = threading.Thread(target=self.trainer.join_workers, args=(Deadline(5),))
        joining.start()
        self.worker.init_transfer_engine(self.worker.parse_init_info(self.invitation | COMMON))
        joining.join()

    def update(self, source: ModuleSource, serial: int, timeout: float = 5.0) -> Any:
        info = {"manifest": source.manifest(), "timeout": timeout, "serial": serial}
        return self.worker.parse_update_info(info)


@pytest.fixture(params=[True, False], ids=["encrypted", "plain"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(request.param)
    yield pair
    pair.worker.shutdown()
    pair.trainer.shutdown()


@pytest.fixture
def source() -> ModuleSource:
    return ModuleSource(torch.nn.Linear(300, 300))


def test_weights_arrive_encrypted_or_not(pair: Pair, source: ModuleSource) -> None:
    pair.join()
    serial = pair.trainer.describe_update(source, source.manifest(), Deadline(5))["serial"]
    sending = threading.Thread(
        target=pair.trainer.send_weights, args=(source, source.manifest(), Deadline(5), lambda nbytes: None)
    )
    sending.start()
    got: dict[str, torch.Tensor] = {}
    pair.worker.receive_weights(
        pair.update(source, serial), lambda part: got.update((name, weight.clone()) for name, weight in part)
    )
    sending.join()
    assert all(torch.equal(got[name], weight) for name, weight in source)


def test_a_stranger_is_not_taken_for_a_worker(pair: Pair) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(pair.invitation["endpoint"])
        stranger.send(b"x" * 32 + (1).to_bytes(4, "big"))
        with pytest.raises(TransferTimeoutError, match="waiting for worker"):
            pair.trainer.join_workers(Deadline(0.5))


def test_a_message_of_another_update_is_refused(pair: Pair, source: ModuleSource) -> None:
    pair.join()
    pair.trainer.describe_update(source, source.manifest(), Deadline(5))
    sending = threading.Thread(target=_until_aborted, args=(pair.trainer, source))
    sending.start()
    with pytest.raises(ManifestMismatchError, match="not the next one"):
        pair.worker.receive_weights(pair.update(source, 2), lambda part: None)
    pair.trainer.abort_update()
    sending.join()


def test_a_trainer_that_goes_is_missed_long_before_the_deadline(pair: Pair, source: ModuleSource) -> None:
    pair.join()
    pair.trainer.shutdown()
    since = time.monotonic()
    with pytest.raises(PeerLostError, match="trainer: The connection broke"):
        pair.worker.receive_weights(pair.update(source, 1, timeout=60), lambda part: None)
    assert time.monotonic() - since < 5


def test_a_worker_that_goes_is_named_long_before_the_deadline(pair: Pair, source: ModuleSource) -> None:
    pair.join()
    pair.worker.shutdown()
    since = time.monotonic()
    with pytest.raises(PeerLostError, match="worker"):
        pair.trainer.send_weights(source, source.manifest(), Deadline(60), lambda nbytes: None)
    assert time.monotonic() - since < 5


def _until_aborted(trainer: Any, source: ModuleSource) -> None:
    with pytest.raises(PeerLostError, match="aborted"):
        trainer.send_weights(source, source.manifest(), Deadline(60), lambda nbytes: None)
