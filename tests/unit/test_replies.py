"""Answers that workers give over lines of their own: who is heard, who is dropped, and how long anybody waits."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from unittest.mock import Mock

import pytest

import weight_transfer as wt
from weight_transfer.control import Asked, Replies, Reply, ReplyTo, reply_lines, send_reply
from weight_transfer.values.deadline import Deadline


@pytest.fixture
def replies() -> Iterator[Replies]:
    with Replies() as replies:
        yield replies


def connected(to: ReplyTo) -> socket.socket:
    host, _, port = to.address.rpartition(":")
    return socket.create_connection((host, int(port)), 5)


def is_dropped(line: socket.socket) -> bool:
    """Wait until the listener has closed a connection."""
    line.settimeout(5)
    try:
        return line.recv(1) == b""
    except ConnectionError:
        return True


def head(to: ReplyTo) -> bytes:
    return f"{to.token} {to.id}\n".encode()


def heard_still(asked: Asked) -> bool:
    """Return whether a good answer comes through, and no other one did."""
    send_reply(asked.to, Reply(rank=0, workers=1, result="good"))
    return [reply.result for reply in asked.gather(1, Deadline(5))] == ["good"]


def test_answers_come_in_the_order_of_ranks_whatever_the_order_in_which_they_were_given(replies: Replies) -> None:
    with replies.ask() as asked:
        for rank in (2, 0, 1):
            send_reply(asked.to, Reply(rank=rank, workers=3, result={"rank": rank, "text": "ü" * rank}))
        got = asked.gather(3, Deadline(5))
    assert [(reply.rank, reply.result) for reply in got] == [
        (0, {"rank": 0, "text": ""}),
        (1, {"rank": 1, "text": "ü"}),
        (2, {"rank": 2, "text": "üü"}),
    ]


def test_an_answer_of_megabytes_comes_whole(replies: Replies) -> None:
    names = [f"layers.{index}.weight" for index in range(200_000)]
    with replies.ask() as asked:
        send_reply(asked.to, Reply(rank=0, workers=1, result=names))
        assert asked.gather(1, Deadline(10))[0].result == names


def test_an_error_arrives_with_its_type_and_its_fields(replies: Replies) -> None:
    error = wt.IntegrityError("These are not the bytes.", param="a.weight", expected="1", got="2", phase="update")
    with replies.ask() as asked:
        send_reply(asked.to, Reply(rank=0, workers=1, error=error))
        [reply] = asked.gather(1, Deadline(5))
    assert isinstance(reply.error, wt.IntegrityError) and reply.result is None
    assert (reply.error.message, reply.error.param, reply.error.phase) == (error.message, "a.weight", "update")


def test_the_workers_say_how_many_they_are_if_nobody_else_does(replies: Replies) -> None:
    with replies.ask() as asked:
        assert not asked.wait(None, Deadline(0))
        send_reply(asked.to, Reply(rank=1, workers=2))
        assert not asked.wait(None, Deadline(0.2))
        send_reply(asked.to, Reply(rank=0, workers=2))
        assert len(asked.gather(None, Deadline(5))) == 2


def test_a_rank_that_counts_other_workers_is_refused_by_name(replies: Replies) -> None:
    with replies.ask() as asked:
        send_reply(asked.to, Reply(rank=0, workers=4))
        with pytest.raises(wt.HandshakeError, match=r"Rank 0 says that there are 4 workers, and 1 were expected\."):
            asked.gather(1, Deadline(5))


def test_a_rank_that_says_nothing_is_named_when_the_deadline_has_passed(replies: Replies) -> None:
    with replies.ask() as asked:
        send_reply(asked.to, Reply(rank=1, workers=3))
        with pytest.raises(wt.TransferTimeoutError, match=r"rank 0, 2 of 3 answers at 127\.0\.0\.1:\d+"):
            asked.gather(3, Deadline(0.2))
        with pytest.raises(wt.TransferTimeoutError, match="waiting for what rank 0, 2 of 3"):
            asked.gather(None, Deadline(0.2))
    with replies.ask() as asked, pytest.raises(wt.TransferTimeoutError, match="waiting for what any rank answers"):
        asked.gather(None, Deadline(0.05))


def test_a_second_answer_of_a_rank_does_not_replace_the_first(replies: Replies) -> None:
    with replies.ask() as asked:
        for result in ("first", "second"):
            send_reply(asked.to, Reply(rank=0, workers=2, result=result))
        send_reply(asked.to, Reply(rank=1, workers=2, result="other"))
        assert [reply.result for reply in asked.gather(2, Deadline(5))] == ["first", "other"]


def test_an_answer_to_a_call_that_is_over_or_never_was_is_dropped(replies: Replies) -> None:
    with replies.ask() as late:
        pass
    with replies.ask() as asked:
        for to in (late.to, ReplyTo(asked.to.address, asked.to.token, "never")):
            with connected(to) as line:
                line.sendall(head(to) + json.dumps(Reply(rank=0, workers=1).to_wire()).encode() + b"\n")
                assert is_dropped(line)
        assert not asked.came and not late.came
        assert heard_still(asked)


@pytest.mark.parametrize(
    "said",
    [
        b"\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 40,
        b"x" * 100_000,
        b"wrong ID\n{}",
        b"TOKEN",
        b"TOKEN ID",
        b"TOKEN \xff\xfe\n{}\n",
        b"TOKEN ID\n",
        b"TOKEN ID\n\n",
        b"TOKEN ID\n[]\n",
        b"TOKEN ID\n" + b"[" * 100_000 + b"\n",
        b"TOKEN ID\n{\n",
        b'TOKEN ID\n{"rank": 0, "workers": 1',
        b'TOKEN ID\n{"rank": true, "workers": 1}\n',
        b'TOKEN ID\n{"rank": 1, "workers": 1}\n',
        b'TOKEN ID\n{"rank": -1, "workers": 1}\n',
        b'TOKEN ID\n{"rank": 0, "workers": 1, "error": "text"}\n',
    ],
)
def test_who_says_anything_else_is_dropped_and_the_others_are_heard(replies: Replies, said: bytes) -> None:
    with replies.ask() as asked, connected(asked.to) as line:
        line.sendall(said.replace(b"TOKEN", asked.to.token.encode()).replace(b"ID", asked.to.id.encode()))
        line.shutdown(socket.SHUT_WR)
        assert is_dropped(line)
        assert not asked.came
        assert heard_still(asked)


def test_an_answer_may_be_cut_anywhere() -> None:
    whole = b'TOKEN ID\n{"rank":0,"workers":1,"result":"whole"}\n'
    for cut in range(1, len(whole)):
        line, hear = reply_lines._Line(), Mock()
        assert line.feed(whole[:cut], b"TOKEN", hear)
        assert not line.feed(whole[cut:], b"TOKEN", hear)
        hear.assert_called_once_with("ID", Reply(rank=0, workers=1, result="whole"))


def test_an_answer_that_comes_byte_by_byte_is_one(replies: Replies) -> None:
    reply = Reply(rank=0, workers=1, result="slowly")
    with replies.ask() as asked, connected(asked.to) as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in head(asked.to) + json.dumps(reply.to_wire()).encode() + b"\n":
            line.sendall(bytes([byte]))
        assert asked.gather(1, Deadline(5))[0].result == "slowly"


def test_who_says_nothing_holds_nobody_up_and_is_dropped_in_time(
    replies: Replies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply_lines, "_PATIENCE", 0.1)
    with replies.ask() as asked, connected(asked.to) as line:
        assert heard_still(asked)
        assert is_dropped(line)


def test_a_crowd_that_says_nothing_keeps_no_worker_out(replies: Replies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reply_lines, "_MAX_LINES", 3)
    with replies.ask() as asked:
        crowd = [connected(asked.to) for _ in range(8)]
        assert heard_still(asked)
        assert is_dropped(crowd[0])
        for line in crowd:
            line.close()


def test_many_ranks_may_answer_at_once(replies: Replies) -> None:
    with replies.ask() as asked:
        threads = [
            threading.Thread(target=send_reply, args=(asked.to, Reply(rank=rank, workers=32, result=rank)))
            for rank in range(32)
        ]
        for thread in threads:
            thread.start()
        assert [reply.result for reply in asked.gather(32, Deadline(10))] == [*range(32)]
        for thread in threads:
            thread.join()


def test_a_worker_that_cannot_reach_the_trainer_says_so(replies: Replies) -> None:
    with replies.ask() as asked:
        replies.close()
        with pytest.raises(wt.PeerLostError, match=rf"cannot be reached at {asked.to.address}, where it waits"):
            send_reply(asked.to, Reply(rank=0, workers=1), timeout=2)


def test_a_listener_that_takes_nothing_is_given_up_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        to = ReplyTo(f"127.0.0.1:{deaf.getsockname()[1]}", "token", "id")
        with pytest.raises(wt.TransferTimeoutError, match=r"The deadline of 0\.2 s passed while answering the trainer"):
            send_reply(to, Reply(rank=0, workers=1, result="x" * 2**25), timeout=0.2)


def test_it_listens_on_ipv6_too() -> None:
    with Replies("::1") as replies, replies.ask() as asked:
        assert asked.to.address.startswith("[::1]:")
        assert heard_still(asked)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1"])
def test_an_address_that_is_none_of_this_host_is_refused(host: str) -> None:
    with pytest.raises(wt.ConfigError, match=r"name (the one|an address) of this host"):
        Replies(host)


@pytest.mark.parametrize("address", ["", "127.0.0.1", ":80", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:x"])
def test_a_worker_that_is_told_no_address_says_so(address: str) -> None:
    with pytest.raises(wt.ConfigError, match="expected HOST:PORT"):
        send_reply(ReplyTo(address, "token", "id"), Reply(rank=0, workers=1))


def test_where_to_answer_travels_with_the_call_and_its_token_is_in_no_log(replies: Replies) -> None:
    with replies.ask() as asked:
        assert ReplyTo.from_wire(json.loads(json.dumps(asked.to.to_wire()))) == asked.to
        assert asked.to.token not in repr(asked.to) and asked.to.address in repr(asked.to)
    with pytest.raises(wt.ConfigError, match="reply: id: this key is required and missing"):
        ReplyTo.from_wire({"address": "a:1", "token": "t"})


def test_closing_ends_the_thread_and_drops_who_is_connected() -> None:
    replies = Replies()
    with replies.ask() as asked, connected(asked.to) as line:
        replies.close()
        replies.close()
        assert is_dropped(line)
    assert not any(asked.to.address in thread.name for thread in threading.enumerate())
