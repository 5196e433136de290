"""Where the trainer's ranks meet: who is let in, what strangers learn, and that nobody waits for them."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

import weight_transfer as wt
from weight_transfer.control.proofs import ANSWER_BYTES, DIGEST_BYTES, Challenge, prove_secret
from weight_transfer.session import meeting
from weight_transfer.session.lines import Line, read_message, say
from weight_transfer.session.meeting import Address, Meeting, find_leader, meet_leader
from weight_transfer.session.secret import secret_of
from weight_transfer.values.deadline import Deadline

dist: Any = torch.distributed  # what it holds depends on the build
TOKEN = "precious"
ODD = {"rank": "\ud800", "world_size": []}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    shared = dist.HashStore()
    monkeypatch.setattr(meeting, "_torch_store", lambda: shared)
    return shared


@pytest.fixture
def place(store: Any) -> Iterator[Meeting]:
    place = Meeting(2, "a sender", None, TOKEN)
    yield place
    place.close()


@pytest.fixture
def visit(place: Meeting) -> Iterator[Callable[[], socket.socket]]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(socket.create_connection(("127.0.0.1", place.port), 10))


def ignore(_rank: int) -> Callable[[object], None]:
    return lambda _message: None


class Gathering:
    """Rank 0 on a thread of its own, until all have come or the seconds are over."""

    def __init__(self, place: Meeting, seconds: float) -> None:
        self.lines: dict[int, Line] = {}
        self.error: BaseException | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, args=(place, seconds))
        self._thread.start()

    def _run(self, place: Meeting, seconds: float) -> None:
        since = time.monotonic()
        try:
            place.gather(self.lines, ignore, Deadline(seconds))
        except wt.WeightTransferError as error:
            self.error = error
        self.seconds = time.monotonic() - since

    def end(self) -> None:
        self._thread.join(30)
        for line in self.lines.values():
            line.close()


def come(place: Meeting, rank: int = 1, world_size: int = 2, token: str = TOKEN) -> Line:
    return meet_leader(rank, world_size, Address("127.0.0.1", place.port), token, lambda _message: None, Deadline(10))


def everything(connection: socket.socket) -> bytes:
    told = b""
    try:
        while part := connection.recv(4096):
            told += part
    except ConnectionResetError:
        pass
    return told


def test_the_store_tells_where_and_nothing_else(place: Meeting, store: Any) -> None:
    assert json.loads(store.get("a sender")) == ["127.0.0.1", place.port]
    assert find_leader("a sender", None, Deadline(5)) == Address("127.0.0.1", place.port)


@pytest.mark.parametrize(
    "said", [b"\xff" * 64, b"[" * 10**5, b"GET / HTTP/1.1\r\n\r\n" * 9, b"x" * ANSWER_BYTES], ids=range(4)
)
def test_a_stranger_is_told_a_random_number(place: Meeting, visit: Callable[[], socket.socket], said: bytes) -> None:
    gathering = Gathering(place, 0.5)
    stranger = visit()
    stranger.sendall(said)
    assert len(everything(stranger)) in (0, 32)
    gathering.end()
    assert isinstance(gathering.error, wt.TransferTimeoutError)
    assert "trainer rank 1" in str(gathering.error)
    assert TOKEN not in str(gathering.error)


def test_nobody_waits_for_strangers(place: Meeting, visit: Callable[[], socket.socket]) -> None:
    for number in range(150):
        visit().sendall(b"x" * (number % ANSWER_BYTES))
    gathering = Gathering(place, 20)
    line = come(place)
    gathering.end()
    line.close()
    assert gathering.error is None
    assert gathering.seconds < 2


def test_silent_strangers_are_hung_up_on(
    place: Meeting, visit: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weight_transfer.session.admission._PROOF", 0.1)
    gathering = Gathering(place, 1)
    assert [len(everything(stranger)) for stranger in (visit(), visit())] == [32, 32]
    gathering.end()


def test_the_secret_is_not_sent_and_who_does_not_know_it_is_found_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        heard: list[bytes] = []

        def pretend() -> None:
            sock, _ = listener.accept()
            stack.enter_context(sock)
            sock.sendall(Challenge().nonce)
            heard.append(sock.recv(4096))
            sock.sendall(b"\0" * DIGEST_BYTES)
            heard.append(sock.recv(4096))

        pretending = threading.Thread(target=pretend)
        pretending.start()
        with pytest.raises(wt.HandshakeError, match=r"does not share this rank's secret: .* set the same token"):
            meet_leader(1, 2, Address(*listener.getsockname()), TOKEN, lambda _message: None, Deadline(10))
        pretending.join(10)
    assert [len(part) for part in heard] == [ANSWER_BYTES, 0]
    assert TOKEN.encode() not in heard[0]


def test_a_rank_of_another_token_is_refused_and_the_right_one_let_in(place: Meeting) -> None:
    gathering = Gathering(place, 20)
    with pytest.raises(wt.HandshakeError, match="does not share this rank's secret") as caught:
        come(place, token="another")
    assert caught.value.peer == "trainer rank 0"
    line = come(place)
    gathering.end()
    line.close()
    assert gathering.error is None


def test_a_proof_is_one_for_its_own_connection_only() -> None:
    one, other = Challenge(), Challenge()
    here, there = socket.socketpair()
    with here, there:
        there.sendall(one.nonce)
        proving = threading.Thread(target=prove_secret, args=(here, TOKEN, Deadline(10)))
        proving.start()
        answer = there.recv(ANSWER_BYTES)
        there.sendall(one.reply(answer, TOKEN) or b"")
        proving.join(10)
    assert one.reply(answer, TOKEN) is not None
    assert other.reply(answer, TOKEN) is None
    assert one.reply(answer, "another") is None
    assert one.reply(answer[:-1], TOKEN) is None


@pytest.mark.parametrize(
    "hello", [{}, {"rank": True, "world_size": 2}, {"rank": 10**400, "world_size": 2}, {"rank": "\ud800"}]
)
def test_a_rank_that_says_odd_things_is_refused(
    place: Meeting, visit: Callable[[], socket.socket], hello: dict[str, Any]
) -> None:
    gathering = Gathering(place, 20)
    rank = visit()
    assert prove_secret(rank, TOKEN, Deadline(10))
    say(rank, hello, Deadline(10))
    assert "counts" in (read_message(rank) or {})["refused"]
    gathering.end()
    assert isinstance(gathering.error, wt.HandshakeError)
    assert len(str(gathering.error)) < 500


@pytest.mark.parametrize("value", ["", "5", '["h"]', '["h", "p"]', '["h", 1e400]', "[" * 10**5, '{"a": 1, "b": 2}'])
def test_a_store_that_holds_something_else_is_a_sentence(store: Any, value: str) -> None:
    store.set("a sender", value)
    with pytest.raises(wt.HandshakeError, match="is no address of trainer rank 0"):
        find_leader("a sender", None, Deadline(5))


@pytest.mark.parametrize("rendezvous", ["nowhere", "127.0.0.1:0", "127.0.0.1:x", ":5", "127.0.0.1:²", "h:99999"])
def test_a_rendezvous_says_where(rendezvous: str) -> None:
    with pytest.raises(wt.ConfigError, match='expected "HOST:PORT"'):
        Meeting(2, "a sender", rendezvous, TOKEN)


# What the ranks know without a token.


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "weight-transfer" / "secret"


def test_the_users_own_secret_is_made_once_and_for_them_alone(state: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(secret_of(None))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(found[0]) == 64
    assert (state.stat().st_mode & 0o777, state.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert os.listdir(state.parent) == ["secret"]
    assert secret_of(TOKEN) == TOKEN


@pytest.mark.parametrize("how", ["open", "short", "link", "folder"])
def test_a_file_that_others_may_have_made_is_no_secret(state: Path, how: str) -> None:
    secret_of(None)
    if how == "open":
        state.chmod(0o644)
    elif how == "short":
        state.write_text("")
    else:
        state.rename(state.with_name("other"))
        state.symlink_to("other") if how == "link" else state.mkdir()
    with pytest.raises(wt.ConfigError, match="set a token, the same on all ranks"):
        secret_of(None)


def test_without_a_home_a_token_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
    with pytest.raises(wt.ConfigError, match="cannot be kept; set a token"):
        Meeting(2, "a sender", "127.0.0.1:5", None)
