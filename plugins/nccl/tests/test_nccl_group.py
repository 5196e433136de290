"""The rendezvous: who is missing is named, nobody joins without the secret, and the default group is not touched."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist

from weight_transfer import ConfigError, HandshakeError, PeerLostError, TransferTimeoutError, load_backend, load_config
from weight_transfer.config.settings import ParallelConfig
from weight_transfer.values.deadline import Deadline
from weight_transfer_nccl.group import Group
from weight_transfer_nccl.rendezvous import Rendezvous, new_secret, open_store, reach_store

CPU = torch.device("cpu")


def _meeting(port: int) -> Rendezvous:
    return Rendezvous(address="127.0.0.1", port=port, secret=new_secret(), transport="gloo")


def test_several_groups_live_in_one_process_and_leave_the_default_group_alone() -> None:
    sums = []
    for value in (3, 5):
        store, port = open_store("127.0.0.1", 0)
        meeting = _meeting(port)
        root, worker = (
            Group(store if rank == 0 else reach_store(meeting, Deadline(10)), meeting, rank, 2, CPU)
            for rank in range(2)
        )
        thread = threading.Thread(target=root.join, args=(Deadline(20), str))
        thread.start()
        worker.join(Deadline(20), str)
        thread.join()
        sent, received = torch.full((9,), value, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8)
        works = [root.broadcast([sent], Deadline(10)), worker.broadcast([received], Deadline(10))]
        for work in works:
            work.wait()
        sums.append(int(received.sum()))
        root.abort()
        worker.abort()
    assert sums == [27, 45]
    assert not dist.is_initialized()


def test_members_that_are_missing_are_named() -> None:
    store, port = open_store("127.0.0.1", 0)
    group = Group(store, _meeting(port), 0, 3, CPU)
    with pytest.raises(TransferTimeoutError, match="worker 1, worker 2 to join") as caught:
        group.join(Deadline(0.2), lambda rank: f"worker {rank}")
    assert caught.value.peer == "worker 1, worker 2"


def test_without_the_secret_nobody_joins() -> None:
    store, port = open_store("127.0.0.1", 0)
    root = Group(store, _meeting(port), 0, 2, CPU)
    stranger = Group(reach_store(_meeting(port), Deadline(5)), _meeting(port), 1, 2, CPU)
    with pytest.raises(TransferTimeoutError):
        stranger.join(Deadline(0.3), str)
    with pytest.raises(TransferTimeoutError):
        root.join(Deadline(0.3), str)


def test_a_rendezvous_that_nobody_opened_is_a_lost_peer() -> None:
    store, port = open_store("127.0.0.1", 0)
    del store
    with pytest.raises(PeerLostError, match="cannot be reached"):
        reach_store(_meeting(port), Deadline(0.5))


def test_an_address_of_another_host_cannot_be_opened() -> None:
    with pytest.raises(HandshakeError, match="cannot open its rendezvous"):
        open_store("192.0.2.1", 0)


def test_an_aborted_group_refuses_to_broadcast() -> None:
    store, port = open_store("127.0.0.1", 0)
    group = Group(store, _meeting(port), 0, 1, CPU)
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
