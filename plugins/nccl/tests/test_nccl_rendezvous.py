"""The rendezvous lets nobody in who does not know the secret, tells them nothing, and never waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import attrs
import pytest
import torch

from weight_transfer import HandshakeError, PeerLostError, TransferTimeoutError
from weight_transfer.authoring import keyed_digest
from weight_transfer.values.deadline import Deadline
from weight_transfer_nccl.group import Group
from weight_transfer_nccl.meeting_place import MeetingPlace
from weight_transfer_nccl.member_store import MemberStore
from weight_transfer_nccl.rendezvous import Rendezvous

CPU = torch.device("cpu")
TOLD = 32
"""Bytes that a stranger is told: a nonce."""


@pytest.fixture
def place() -> Iterator[MeetingPlace]:
    place = MeetingPlace("127.0.0.1", 0)
    yield place
    place.close()


@pytest.fixture
def meeting(place: MeetingPlace) -> Rendezvous:
    return place.meeting("gloo")


def visit(meeting: Rendezvous) -> socket.socket:
    return socket.create_connection((meeting.address, meeting.port), timeout=10)


def everything(connection: socket.socket) -> bytes:
    """Return what comes until the other end closes the connection."""
    told = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(4096):
            told += part
    return told


def join_both(meeting: Rendezvous) -> float:
    """Let two members join and leave; return the seconds that joining took."""
    groups = [Group(meeting, rank, 2, CPU) for rank in range(2)]
    since = time.monotonic()
    threads = [threading.Thread(target=group.join, args=(Deadline(20), str)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - since
    assert not any(group.aborted for group in groups)
    for group in groups:
        group.abort()
    return took


def test_members_share_values(meeting: Rendezvous) -> None:
    one, other = MemberStore(meeting, Deadline(10)), MemberStore(meeting, Deadline(10))
    assert not one.check(["key"])
    threading.Timer(0.05, other.set, ("key", b"\0\xff")).start()
    assert one.get("key") == b"\0\xff"
    assert other.check(["key"])
    one.close()
    other.close()


@pytest.mark.parametrize(
    "said",
    [
        b"\xff" * 64,
        b"[" * 100_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nUser-Agent: a browser\r\n\r\n",
        b'{"get": ["here/0", "here/1"]}\n' * 3,
    ],
    ids=["noise", "brackets", "http", "a request"],
)
def test_a_stranger_is_told_nothing_and_sent_away(meeting: Rendezvous, said: bytes) -> None:
    member = MemberStore(meeting, Deadline(10))
    member.set("here/0", "precious")
    with visit(meeting) as stranger:
        with contextlib.suppress(OSError):
            stranger.sendall(said)
        assert len(everything(stranger)) in (0, TOLD)
    assert member.get("here/0") == b"precious"
    member.close()


def test_many_members_may_come_at_once() -> None:
    place = MeetingPlace("127.0.0.1", 0, members=150)
    meeting = place.meeting("gloo")
    with contextlib.ExitStack() as stack:
        members = [stack.enter_context(visit(meeting)) for _ in range(150)]
        nonces = [member.recv(TOLD) for member in members]
        assert all(nonces)  # before any has proved anything
        for member, nonce in zip(members, nonces, strict=True):
            ours = b"o" * TOLD
            member.sendall(ours + keyed_digest(meeting.secret, "connects", nonce, ours))
        assert all(len(member.recv(TOLD)) == TOLD for member in members)
    place.close()


def test_the_proof_of_one_connection_is_none_on_another(meeting: Rendezvous) -> None:
    with visit(meeting) as overheard, visit(meeting) as stranger:
        nonce, ours = overheard.recv(TOLD), b"o" * TOLD
        stranger.recv(TOLD)
        proof = keyed_digest(meeting.secret, "connects", nonce, ours)
        stranger.sendall(ours + proof)
        assert everything(stranger) == b""
        overheard.sendall(ours + proof)
        assert overheard.recv(TOLD) == keyed_digest(meeting.secret, "listens", nonce, ours)


def test_without_the_secret_nobody_joins(meeting: Rendezvous) -> None:
    with pytest.raises(HandshakeError, match="does not share this member's secret"):
        Group(attrs.evolve(meeting, secret="0" * 32), 1, 2, CPU).join(Deadline(5), str)
    with pytest.raises(TransferTimeoutError, match="waiting for 1 to join"):
        Group(meeting, 0, 2, CPU).join(Deadline(1), str)


def test_members_send_the_secret_to_nobody_and_refuse_who_does_not_know_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        heard = []

        def pretend() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"n" * TOLD)
                heard.append(connection.recv(4096))
                connection.sendall(b"c" * TOLD)

        pretending = threading.Thread(target=pretend)
        pretending.start()
        port = listener.getsockname()[1]
        meeting = Rendezvous(address="127.0.0.1", port=port, secret="5" * 32, transport="gloo")
        with pytest.raises(HandshakeError, match="does not share"):
            MemberStore(meeting, Deadline(5))
        pretending.join()
    assert len(heard[0]) == 64
    assert b"5555" not in heard[0]


def test_silent_and_slow_strangers_delay_no_member(meeting: Rendezvous) -> None:
    ended = threading.Event()
    strangers = [visit(meeting) for _ in range(150)]

    def trickle() -> None:
        while not ended.wait(0.05):
            for stranger in strangers[-20:]:
                with contextlib.suppress(OSError):
                    stranger.send(b"x")

    trickling = threading.Thread(target=trickle)
    trickling.start()
    assert join_both(meeting) < 3
    ended.set()
    trickling.join()
    for stranger in strangers:
        stranger.close()


def test_of_many_strangers_the_oldest_are_sent_away(meeting: Rendezvous) -> None:
    strangers = [visit(meeting) for _ in range(70)]
    for stranger in strangers[:6]:
        assert len(everything(stranger)) in (0, TOLD)
    for stranger in strangers:
        stranger.close()


def test_a_silent_stranger_is_sent_away_in_time(meeting: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weight_transfer_nccl.meeting_place._PROOF", 0.2)
    with visit(meeting) as stranger:
        assert len(everything(stranger)) == TOLD


def test_when_all_have_joined_nobody_is_let_in_any_more(place: MeetingPlace, meeting: Rendezvous) -> None:
    member = MemberStore(meeting, Deadline(10))
    place.stop_listening()
    member.set("key", b"value")  # asked after it has stopped
    with pytest.raises(PeerLostError, match="cannot be reached"):
        MemberStore(meeting, Deadline(5))
    assert member.get("key") == b"value"
    place.close()
    with pytest.raises(PeerLostError):
        member.get("key")
    member.close()


def test_a_port_can_be_used_again_at_once() -> None:
    port = 0
    for _ in range(3):
        place = MeetingPlace("127.0.0.1", port)
        port = place.port
        member = MemberStore(place.meeting("gloo"), Deadline(10))
        with pytest.raises(HandshakeError, match="cannot open its rendezvous"):
            MeetingPlace("127.0.0.1", port)
        place.close()
        member.close()


def test_a_trainer_that_runs_an_event_loop_can_listen() -> None:
    async def main() -> None:
        place = MeetingPlace("127.0.0.1", 0)
        MemberStore(place.meeting("gloo"), Deadline(10)).close()
        place.close()

    asyncio.run(main())


def test_a_trainer_that_stands_still_is_a_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        meeting = Rendezvous(address="127.0.0.1", port=port, secret="5" * 32, transport="gloo")
        with pytest.raises(TransferTimeoutError, match=r"rendezvous at 127\.0\.0\.1"):
            MemberStore(meeting, Deadline(0.2))


def test_an_abort_ends_the_wait_for_a_value(meeting: Rendezvous) -> None:
    member = MemberStore(meeting, Deadline(60))
    threading.Timer(0.1, member.close).start()
    since = time.monotonic()
    with pytest.raises(PeerLostError):
        member.get("never")
    assert time.monotonic() - since < 10
