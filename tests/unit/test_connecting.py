"""The shortest way to a sender, and what objects say of themselves at a prompt."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import nn

import weight_transfer as wt


@pytest.fixture
def receiver() -> Iterator[wt.WeightReceiver]:
    with wt.WeightReceiver({"backend": "loopback"}, nn.Linear(4, 2)) as receiver:
        yield receiver


def test_a_sender_is_connected_and_configured_by_keywords(receiver: wt.WeightReceiver) -> None:
    with wt.connect(receiver, backend="loopback", timeout=9) as sender:
        assert (receiver.state, sender.config.timeout) == ("ready", 9)
        assert sender.send(nn.Linear(4, 2)).version == 0
    with wt.connect(receiver, config={"backend": "loopback"}) as sender:
        assert sender.send(nn.Linear(4, 2)).version == 1


def test_a_sender_that_cannot_connect_is_closed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[wt.WeightSender] = []

    class Sender(wt.WeightSender):
        def close(self) -> None:
            super().close()
            closed.append(self)

    monkeypatch.setattr("weight_transfer.session.connecting.WeightSender", Sender)
    with pytest.raises(wt.PeerLostError):
        wt.connect("http://127.0.0.1:9", backend="loopback", init_timeout=0.1)
    assert len(closed) == 1
    with pytest.raises(wt.ConfigError, match="needs a list of workers"):
        wt.connect(backend="loopback")
    with pytest.raises(wt.ConfigError, match=r"unpack the list: connect\(\*workers\)"):
        wt.connect(["http://127.0.0.1:9"], backend="loopback")  # type: ignore[arg-type]


def test_objects_say_what_they_are(receiver: wt.WeightReceiver) -> None:
    told = "<WeightReceiver loopback: created, version None>"
    assert repr(receiver) == told
    assert repr(wt.LocalChannel(receiver)) == f"<LocalChannel to {told}>"
    assert repr(wt.HttpChannel("http://127.0.0.1:9/")) == "<HttpChannel to http://127.0.0.1:9>"
    assert repr(wt.ModuleSource(nn.Linear(4, 2)).manifest()) == "<Manifest of 2 weights, 40 B>"
    assert repr(wt.load_backend("loopback")).startswith("<LoadedBackend loopback of weight-transfer 0.1.0 [")
    with wt.serve(receiver) as server, wt.HttpChannel(server.url) as channel:
        channel.status()
        channel.status()
        assert repr(channel) == f"<HttpChannel to {server.url} over a line>"
    assert repr(server) == f"<Server {server.url}, closed>"
