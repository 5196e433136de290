"""The rendezvous: who is missing is named, and the default group is not touched."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from weight_transfer import ConfigError, HandshakeError, PeerLostError, TransferTimeoutError, load_backend, load_config
from weight_transfer.config.settings import ParallelConfig
from weight_transfer.values.deadline import Deadline
from weight_transfer_nccl.engine import NcclInitInfo
from weight_transfer_nccl.group import Group
from weight_transfer_nccl.meeting_place import MeetingPlace
from weight_transfer_nccl.plan import Layout

CPU = torch.device("cpu")


@pytest.fixture
def place() -> Iterator[MeetingPlace]:
    place = MeetingPlace("127.0.0.1", 0)
    yield place
    place.close()


def joined(place: MeetingPlace) -> tuple[Group, Group]:
    """Return the groups of a trainer and of a worker, which have met."""
    root, worker = (Group(place.meeting("gloo"), rank, 2, CPU) for rank in range(2))
    thread = threading.Thread(target=root.join, args=(Deadline(20), str))
    thread.start()
    worker.join(Deadline(20), str)
    thread.join()
    return root, worker


def test_several_groups_live_in_one_process_and_leave_the_default_group_alone() -> None:
    sums = []
    for value in (3, 5):
        place = MeetingPlace("127.0.0.1", 0)
        root, worker = joined(place)
        sent, received = torch.full((9,), value, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8)
        works = [root.broadcast([sent], Deadline(10)), worker.broadcast([received], Deadline(10))]
        for work in works:
            work.wait()
        sums.append(int(received.sum()))
        root.abort()
        worker.abort()
        place.close()
    assert sums == [27, 45]
    assert not dist.is_initialized()


def test_a_trainer_does_not_wait_for_the_end_of_a_broadcast_that_was_aborted(
    place: MeetingPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gloo does not notice all writes that fail; here it notices nothing, since its connections stay."""
    monkeypatch.setattr("weight_transfer_nccl.group.break_connections", lambda _ends: None)
    root, worker = joined(place)
    begun, raised = threading.Event(), []

    def send() -> None:
        try:
            with root.guard(Deadline(60)):
                work = root.broadcast([torch.ones(2**26, dtype=torch.uint8)], Deadline(60))
                begun.set()
                work.wait()
        except PeerLostError as error:
            raised.append(str(error))

    sending = threading.Thread(target=send)
    sending.start()
    assert begun.wait(20)
    root.abort()
    sending.join(20)
    is_over = not sending.is_alive()
    received = torch.zeros(2**26, dtype=torch.uint8)
    worker.broadcast([received], Deadline(60)).wait()  # else the group could not be torn down
    sending.join()
    worker.abort()
    assert is_over
    assert "aborted" in raised[0]


def test_members_that_are_missing_are_named(place: MeetingPlace) -> None:
    group = Group(place.meeting("gloo"), 0, 3, CPU)
    with pytest.raises(TransferTimeoutError, match="worker 1, worker 2 to join") as caught:
        group.join(Deadline(1), lambda rank: f"worker {rank}")
    assert caught.value.peer == "worker 1, worker 2"


def test_an_address_of_another_host_cannot_be_opened() -> None:
    with pytest.raises(HandshakeError, match="cannot open its rendezvous"):
        MeetingPlace("192.0.2.1", 0)


def test_an_aborted_group_refuses_to_broadcast(place: MeetingPlace) -> None:
    group = Group(place.meeting("gloo"), 0, 1, CPU)
    group.join(Deadline(10), str)
    group.abort()
    with pytest.raises(PeerLostError, match="aborted"):
        group.broadcast([torch.zeros(1, dtype=torch.uint8)], Deadline(1))


def test_nccl_for_cpu_weights_is_refused_in_one_sentence() -> None:
    config = load_config(backend="nccl", options={"transport": "nccl"})
    engine = load_backend("nccl").create_trainer_engine(config, ParallelConfig(device="cpu"))
    from weight_transfer import WorkerSlot

    with pytest.raises(ConfigError, match="transport: 'nccl' does not fit weights on cpu"):
        engine.open_endpoint([WorkerSlot(peer="w", rank_offset=1, count=1, world_size=2)], Deadline(1))


def test_the_probe_names_nccl_and_gloo() -> None:
    probe = load_backend("nccl").probe()
    assert probe.available
    assert set(probe.details) == {"NCCL", "gloo"}


def test_a_worker_of_another_protocol_says_so_and_does_not_join(place: MeetingPlace) -> None:
    engine = load_backend("nccl").create_worker_engine(load_config(backend="nccl"), ParallelConfig(device="cpu"))
    fields = {"rendezvous": place.meeting("gloo"), "layout": Layout(2**20, 2, 2**10)}
    info = NcclInitInfo(**fields, rank_offset=1, world_size=2, timeout=20)  # as of a trainer that says nothing of it
    with pytest.raises(HandshakeError, match=r"The trainer speaks protocol 1 .* this worker 2; install one version"):
        engine.init_transfer_engine(info)
