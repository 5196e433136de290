"""Rings that are no larger than needed, views in bounded parts, and goodbyes on the socket."""

from __future__ import annotations

import threading

import pytest
import torch

from weight_transfer import HandshakeError, ManifestMismatchError
from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
from weight_transfer.memory.export import Export, Segment
from weight_transfer.model.manifest import Manifest, ParamMeta
from weight_transfer.values.deadline import Deadline
from weight_transfer_ipc.config import IpcOptions
from weight_transfer_ipc.connection import Connection
from weight_transfer_ipc.engine import IpcWorkerEngine
from weight_transfer_ipc.infos import IpcInitInfo
from weight_transfer_ipc.listener import Listener, say_hello
from weight_transfer_ipc.ring import RingLayout
from weight_transfer_ipc.views import chunks, views_of

MANIFEST = Manifest([ParamMeta("a", "float32", (64,)), ParamMeta("b", "uint8", (10,))])


def _pair() -> tuple[Connection, Connection]:
    listener = Listener()
    worker = Connection.connect(listener.address, Deadline(5))
    say_hello(worker, listener.token, 1, None, Deadline(5))
    accepted = listener.accept(Deadline(5))
    listener.close()
    assert accepted is not None
    return accepted[1], worker


@pytest.mark.parametrize(("bucket", "expected"), [(1 << 20, 512), (300, 300), (512, 512)])
def test_a_ring_is_no_larger_than_what_goes_through_it(bucket: int, expected: int) -> None:
    assert RingLayout.fitting(MANIFEST, bucket, 2).bucket_bytes == expected


def test_a_ring_for_empty_tensors_alone_is_the_smallest() -> None:
    assert RingLayout.fitting(Manifest([ParamMeta("e", "float32", (0,))]), 1 << 20, 2).bucket_bytes == 256


def test_parts_are_bounded_and_keep_the_order() -> None:
    views = [(str(size), torch.empty(size, dtype=torch.uint8)) for size in (10, 90, 1, 500, 99)]
    assert [[name for name, _ in part] for part in chunks(views, 100)] == [["10", "90"], ["1"], ["500"], ["99"]]


@pytest.mark.parametrize(
    "export",
    [
        Export((Segment(1, 300),), (1,), (0,), {}),
        Export((Segment(1, 300),), (1, 1), (0, 295), {}),
        Export((Segment(1, 300),), (1, 2), (0, 0), {}),
    ],
    ids=["too short", "beyond the segment", "unknown segment"],
)
def test_a_table_of_addresses_that_does_not_fit_is_refused(export: Export) -> None:
    with pytest.raises(ManifestMismatchError, match="table of addresses"):
        views_of(export, MANIFEST, {1: torch.zeros(300, dtype=torch.uint8)})


def test_signals_are_counted_without_waiting() -> None:
    trainer, worker = _pair()
    assert worker.take_signals() == 0
    for _ in range(3):
        trainer.signal(Deadline(5))
    assert worker.take_signals() == 3
    trainer.close()
    worker.close()


def test_a_goodbye_wakes_the_other_end_and_waits_for_its_answer() -> None:
    trainer, worker = _pair()
    order = []

    def watch() -> None:
        assert Connection.await_end([worker]) is worker
        order.append("unmapped")
        worker.interrupt()

    thread = threading.Thread(target=watch)
    thread.start()
    trainer.say_goodbye()
    trainer.await_goodbye(Deadline(5))
    order.append("freed")
    thread.join(5)
    assert order == ["unmapped", "freed"]
    trainer.close()
    worker.close()


def test_a_worker_on_the_cpu_does_not_join_a_trainer_on_a_gpu() -> None:
    engine = IpcWorkerEngine(WeightTransferConfig(backend="ipc", options=IpcOptions()), ParallelConfig())
    info = IpcInitInfo(rank_offset=1, world_size=2, timeout=5, address="nowhere", token="t", gpu="00" * 16)
    with pytest.raises(HandshakeError, match="like with like"):
        engine.init_transfer_engine(info)
    engine.shutdown()
