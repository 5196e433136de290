"""Gloo's connections are found among all others of the process, and they alone are broken."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from weight_transfer import HandshakeError, PeerLostError, TransferError
from weight_transfer.values.deadline import Deadline
from weight_transfer_nccl.group import Group
from weight_transfer_nccl.meeting_place import MeetingPlace
from weight_transfer_nccl.members import prove_each_other
from weight_transfer_nccl.sockets import published_end

CPU = torch.device("cpu")
LARGE = 64 * 2**20  # bytes; more than connections hold


def joined(count: int = 2) -> list[Group]:
    place = MeetingPlace("127.0.0.1", 0)
    groups = [Group(place.meeting("gloo"), rank, count, CPU) for rank in range(count)]
    threads = [threading.Thread(target=group.join, args=(Deadline(20), str)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    place.close()
    return groups


@pytest.fixture
def pair() -> Iterator[list[Group]]:
    groups = joined()
    yield groups
    for group in groups:
        group.abort()


@pytest.mark.parametrize("side", [0, 1], ids=["trainer", "worker"])
def test_an_abort_ends_a_running_broadcast_at_once(pair: list[Group], side: int) -> None:
    work = pair[side].broadcast([torch.zeros(LARGE, dtype=torch.uint8)], Deadline(60))
    since = time.monotonic()
    threading.Timer(0.2, pair[side].abort).start()
    with pytest.raises(PeerLostError):
        work.wait()
    assert time.monotonic() - since < 10


def test_an_abort_leaves_other_connections_and_groups_alone(pair: list[Group]) -> None:
    others = joined()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()
        with far:
            for group in pair:
                group.abort()
            near.sendall(b"x")
            far.settimeout(5)
            assert far.recv(1) == b"x"
    sent, received = torch.full((9,), 7, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8)
    works = [others[0].broadcast([sent], Deadline(10)), others[1].broadcast([received], Deadline(10))]
    for work in works:
        work.wait()
    assert received.tolist() == [7] * 9
    for group in others:
        group.abort()


def test_joining_can_be_aborted_and_leaves_no_group_behind() -> None:
    place = MeetingPlace("127.0.0.1", 0)
    group = Group(place.meeting("gloo"), 1, 2, CPU)
    threading.Timer(0.2, group.abort).start()
    with pytest.raises(TransferError, match="aborted"):
        group.join(Deadline(60), str)
    with pytest.raises(PeerLostError, match="aborted"):
        group.broadcast([torch.zeros(1, dtype=torch.uint8)], Deadline(1))
    place.close()


@pytest.mark.parametrize("kind", [RuntimeError, ConnectionError, KeyError])
def test_what_is_raised_in_a_guard_is_raised(pair: list[Group], kind: type[Exception]) -> None:
    with pytest.raises(kind, match="mine"), pair[0].guard(Deadline(10)):
        raise kind("mine")
    assert pair[0].aborted


def test_a_guard_whose_group_was_aborted_meanwhile_is_no_success(pair: list[Group]) -> None:
    with pytest.raises(PeerLostError, match="aborted"), pair[0].guard(Deadline(10)):
        pair[0].abort()


def test_once_all_have_joined_strangers_are_not_even_accepted(pair: list[Group]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for end in pair[0]._ends:
        with socket.socket() as stranger:
            stranger.setblocking(False)
            assert stranger.connect_ex(end) == errno.EINPROGRESS
            assert not select.select([], [stranger], [], 0.2)[1]
    assert len(os.listdir("/proc/self/fd")) == before
    sent, received = torch.full((9,), 7, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8)
    works = [pair[0].broadcast([sent], Deadline(10)), pair[1].broadcast([received], Deadline(10))]
    for work in works:
        work.wait()
    assert received.tolist() == [7] * 9


def test_who_does_not_know_the_secret_is_found_at_the_other_end_of_a_connection(pair: list[Group]) -> None:
    def prove(rank: int, secret: str) -> None:
        prove_each_other(pair[rank]._backend, secret, rank, {1 - rank}, str, Deadline(10))

    with ThreadPoolExecutor() as pool:
        for secrets, found in ((("a", "a"), None), (("a", "b"), HandshakeError)):
            both = [pool.submit(prove, rank, secret) for rank, secret in enumerate(secrets)]
            assert [type(one.exception()) for one in both] == [found or type(None)] * 2


def test_ipv4_and_ipv6_addresses_are_read_from_records() -> None:
    four = b"\0" * 18 + b"\2\0\x1f\x90\x7f\0\0\1" + b"\0" * 120
    six = b"\0" * 18 + b"\n\0\x1f\x90" + b"\0" * 4 + b"\0" * 15 + b"\1" + b"\0" * 120
    assert published_end(four) == ("127.0.0.1", 8080)
    assert published_end(six) == ("::1", 8080)


@pytest.mark.parametrize("record", [b"", b"\0" * 178])
def test_a_record_that_looks_otherwise_says_nothing(record: bytes) -> None:
    assert published_end(record) is None
