"""The trainer's half against a double of vLLM around real receivers: two ranks, real bytes, a failure in each phase."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from torch import nn

import weight_transfer as wt
from support.fake_vllm import FakeAsyncLlm, FakeLlm, FakeVllm, Whole, app_of, running_loop
from weight_transfer.control import Server
from weight_transfer.testing.actors import eventually
from weight_transfer_vllm import AsyncServer, HttpServer, VllmChannel, channel

A, B = Whole(1), Whole(2)

Open = Callable[..., VllmChannel]


@pytest.fixture
def backend() -> str:
    return "loopback"


@pytest.fixture
def config(backend: str) -> wt.WeightTransferConfig:
    return wt.load_config(backend=backend, timeout=10, init_timeout=5)


@pytest.fixture
def vllm(config: wt.WeightTransferConfig) -> Iterator[FakeVllm]:
    vllm = FakeVllm(config)
    yield vllm
    vllm.close()


@pytest.fixture
def open_channel(vllm: FakeVllm) -> Iterator[Open]:
    """Open a channel to the double, in one of the forms in which vLLM is met."""
    with ExitStack() as stack:

        def open_channel(form: str = "http", **options: Any) -> VllmChannel:
            target: Any
            if form == "http":
                target = stack.enter_context(Server(app_of(vllm), "127.0.0.1", 0)).url
            elif form == "llm":
                target = FakeLlm(vllm)
            else:
                target = AsyncServer(FakeAsyncLlm(vllm), stack.enter_context(running_loop()))
            return stack.enter_context(VllmChannel(target, **options))

        yield open_channel


@pytest.fixture
def sender(open_channel: Open, config: wt.WeightTransferConfig) -> Iterator[wt.WeightSender]:
    with wt.WeightSender(config, [open_channel()]) as sender:
        yield sender


def serves(vllm: FakeVllm, model: Whole, version: str) -> bool:
    """Return whether all ranks have a model's bits, and vLLM generates with them."""
    assert not vllm.leftovers(), "an answer was left behind, and will be taken for one to the next call"
    return all(part.is_of(model) for part in vllm.parts) and not vllm.paused and vllm.version == version


@pytest.mark.parametrize("form", ["http", "llm", "async"])
@pytest.mark.parametrize("backend", ["loopback", "ipc"])
def test_each_rank_gets_the_bits_that_it_keeps_whichever_way_vllm_is_met(
    vllm: FakeVllm, open_channel: Open, config: wt.WeightTransferConfig, backend: str, form: str
) -> None:
    vllms = open_channel(form)
    with wt.WeightSender(config, [vllms]) as sender:
        for version, model in enumerate((A, B, A)):
            report = sender.send(model, version=version)
            assert serves(vllm, model, str(version))
    status = vllms.status()
    assert report.workers == (vllms.address,)
    receipts = report.receipts[vllms.address]
    assert [receipt.worker for receipt in receipts] == [0, 1]
    assert all(receipt.digest for receipt in receipts), "bytes are compared by default"
    assert (status["workers"], status["version"], status["backend"]) == (2, 2, backend)
    if backend == "ipc":  # by region: together the ranks keep each matrix once, and nothing else went by region
        assert report.kept == {vllms.address: A.up.weight.nbytes + A.down.weight.nbytes}


def test_ranks_of_another_version_are_refused_before_generation_is_paused(
    vllm: FakeVllm, sender: wt.WeightSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    joins = wt.WeightReceiver.init_weight_transfer_engine
    monkeypatch.setattr(wt.WeightReceiver, "init_weight_transfer_engine", lambda *given: joins(*given) and None)
    with pytest.raises(wt.HandshakeError, match=r"another version of weight-transfer\. Hand the answers on"):
        sender.send(A)
    assert not vllm.paused and not any(event.startswith("pause") for event in vllm.events)
    monkeypatch.undo()
    sender.send(B, version=1)
    assert serves(vllm, B, "1")


@pytest.mark.parametrize("backend", ["ipc"])  # it asks what the workers keep
def test_an_update_pauses_publishes_forgets_what_was_computed_and_resumes(
    vllm: FakeVllm, sender: wt.WeightSender
) -> None:
    sender.send(A, version="first")
    sender.send(B, version="second")
    one = ["status", "pause keep", "start_weight_update", "update", "status", "finish_weight_update"]
    one += ["reset all", "reset encoder", "resume"]
    assert vllm.events == ["status", "init", "weight_needs", *one, "weight_needs", *one]
    assert serves(vllm, B, "second")


def test_requests_may_go_on_with_what_was_computed_and_that_is_told(
    vllm: FakeVllm, open_channel: Open, config: wt.WeightTransferConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with wt.WeightSender(config, [open_channel("llm", recompute=False, pause_mode="wait")]) as sender:
        sender.send(A)
    assert "pause wait" in vllm.events and "reset idle" in vllm.events
    assert "keeps its prefix cache" in caplog.text


def test_weights_for_the_draft_model_open_a_session_of_the_draft_model(vllm: FakeVllm, open_channel: Open) -> None:
    vllms = open_channel()
    vllms.status()
    with pytest.raises(wt.WeightTransferError):
        vllms.update_weights({"target": "draft", "timeout": 5})
    assert "start_draft_weight_update" in vllm.events and "start_weight_update" not in vllm.events


def test_the_next_update_joins_a_vllm_that_was_started_anew(vllm: FakeVllm, sender: wt.WeightSender) -> None:
    sender.send(A, version=1)
    vllm.restart()
    sender.send(B, version=2)
    assert serves(vllm, B, "2")


@pytest.mark.parametrize("mute", [False, True], ids=["answered", "told by the exception alone"])
def test_what_is_refused_before_the_first_byte_leaves_the_old_version_serving(
    vllm: FakeVllm, sender: wt.WeightSender, monkeypatch: pytest.MonkeyPatch, mute: bool
) -> None:
    monkeypatch.setattr(channel, "_TRAILING", 0.05)
    sender.send(A, version=1)
    for part in vllm.parts:  # a rank that does not refuse may have loaded its weights when the other one does
        part.refuses = True
    vllm.engines[0].mute = vllm.engines[1].mute = mute
    with pytest.raises(wt.ManifestMismatchError, match=r"Rank \d takes no such model"):
        sender.send(B, version=2)
    assert serves(vllm, A, "1")
    vllm.engines[0].mute = vllm.engines[1].mute = False
    sender.send(B, version=2)
    assert serves(vllm, B, "2")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_after_the_first_byte_stays_paused_until_the_next_good_update(
    vllm: FakeVllm, sender: wt.WeightSender, caplog: pytest.LogCaptureFixture, rank: int
) -> None:
    sender.send(A, version=1)
    vllm.parts[rank].fails = True
    with pytest.raises(wt.TransferError, match=f"rank {rank} ran out of luck"):
        sender.send(B, version=2)
    assert vllm.paused and vllm.version == "1"
    assert "generation stays paused until the next good one" in caplog.text
    assert not vllm.leftovers()
    sender.send(A, version=3)
    assert serves(vllm, A, "3")
    sender.send(B, version=4)
    assert serves(vllm, B, "4")


def test_what_fails_where_nothing_answers_is_told_by_the_exceptions_text(
    vllm: FakeVllm, sender: wt.WeightSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_TRAILING", 0.05)
    sender.send(A, version=1)
    vllm.parts[0].fails = True
    vllm.engines[0].mute = vllm.engines[1].mute = True
    with pytest.raises(wt.TransferError, match="rank 0 ran out of luck") as caught:
        sender.send(B, version=2)
    assert caught.value.phase == "update"


def test_a_failure_to_join_is_told_with_its_type_and_the_next_update_heals(
    vllm: FakeVllm, sender: wt.WeightSender
) -> None:
    vllm.engines[1].failing["init"] = wt.BackendUnavailableError("It cannot join.")
    with pytest.raises(wt.BackendUnavailableError, match="It cannot join"):
        sender.send(A, version=1)
    assert not vllm.paused
    sender.send(A, version=1)
    assert serves(vllm, A, "1")


@pytest.mark.parametrize("backend", ["ipc"])
def test_a_failure_to_say_what_is_kept_is_told_with_its_type_and_the_next_update_heals(
    vllm: FakeVllm, sender: wt.WeightSender
) -> None:
    vllm.engines[0].failing["weight_needs"] = wt.IntegrityError("It cannot say.")
    with pytest.raises(wt.IntegrityError, match="It cannot say"):
        sender.send(A, version=1)
    sender.send(B, version=1)
    assert serves(vllm, B, "1")


def test_weights_that_fit_no_worker_change_nothing(vllm: FakeVllm, sender: wt.WeightSender) -> None:
    sender.send(A, version=1)
    with pytest.raises(wt.ManifestMismatchError):
        sender.send(nn.ModuleDict({"up": nn.Linear(8, 64, bias=False)}), version=2)
    assert serves(vllm, A, "1")


@pytest.mark.parametrize("method", ["start_weight_update", "finish_weight_update"])
def test_a_failure_of_vllms_own_heals_at_the_next_update(vllm: FakeVllm, sender: wt.WeightSender, method: str) -> None:
    sender.send(A, version=1)
    vllm.failing = method
    with pytest.raises(wt.TransferError, match=rf"vLLM failed.*{method} broke"):
        sender.send(B, version=2)
    assert vllm.version == "1"
    assert vllm.paused == (method == "finish_weight_update")  # then the new weights are there, and were not published
    sender.send(B, version=3)
    assert serves(vllm, B, "3")


def test_another_workers_failure_aborts_what_has_begun_here(
    vllm: FakeVllm, open_channel: Open, config: wt.WeightTransferConfig
) -> None:
    with wt.WeightReceiver(config, Whole(3)) as other, wt.WeightSender(config, [open_channel(), other]) as sender:
        sender.send(A, version=1)
        other.start_weight_update = broken  # type: ignore[method-assign]
        with pytest.raises(wt.BackendUnavailableError, match="It cannot start"):
            sender.send(B, version=2)
        assert "pause keep" in vllm.events[vllm.events.index("resume") :]
        assert serves(vllm, A, "1")


def broken(session: str | None = None) -> None:
    raise wt.BackendUnavailableError("It cannot start.")


@pytest.mark.parametrize("call", ["init", "update"])
def test_the_failure_from_which_the_others_follow_is_the_one_that_is_told(
    vllm: FakeVllm, sender: wt.WeightSender, call: str
) -> None:
    sender.send(A, version=1)
    for first in (0, 1):  # vLLM's exception tells what the last rank says
        if call == "init":
            vllm.restart()
        vllm.engines[0].answers_after = 0.1
        vllm.engines[first].failing[call] = wt.IntegrityError("Bad bytes.")
        vllm.engines[1 - first].failing[call] = wt.PeerLostError("Another rank is gone.")
        with pytest.raises(wt.IntegrityError, match="Bad bytes"):
            sender.send(B, version=2)
    vllm.engines[0].answers_after = 0.0
    sender.send(B, version=2)
    assert serves(vllm, B, "2")


@pytest.mark.parametrize("backend", ["ipc"])  # it goes on without a worker
def test_a_replica_that_is_left_behind_serves_on_if_it_is_untouched(
    vllm: FakeVllm, open_channel: Open, backend: str
) -> None:
    config = wt.load_config(backend=backend, timeout=10, on_worker_failure="continue")
    with wt.WeightReceiver(config, Whole(3)) as other, wt.WeightSender(config, [open_channel(), other]) as sender:
        sender.send(A, version=1)
        for engine in vllm.engines:
            engine.failing["update"] = wt.IntegrityError("Bad bytes.")
        report = sender.send(B, version=2)
        assert len(report.lost) == 1 and "Bad bytes" in report.lost[0][1]
        assert other.version == 2
        assert eventually(lambda: not vllm.paused, within=10), "it is resumed behind the sender's back"
        assert serves(vllm, A, "1")
        sender.send(B, version=3)
        assert serves(vllm, B, "3")


def test_a_new_trainer_takes_vllm_over_and_the_old_one_is_refused(
    vllm: FakeVllm, open_channel: Open, config: wt.WeightTransferConfig
) -> None:
    with wt.WeightSender(config, [open_channel()]) as one, wt.WeightSender(config, [open_channel("llm")]) as other:
        for version, (sender, model) in enumerate([(one, A), (other, B), (other, A)]):
            sender.send(model, version=version)
            assert serves(vllm, model, str(version))
        with pytest.raises(wt.ReplacedError):
            one.send(B, version=3)
        assert serves(vllm, A, "2")
    with wt.WeightSender(config, [open_channel()]) as back:
        assert back.send(B).version == 3
        assert serves(vllm, B, "3")


def test_a_trainer_that_was_replaced_can_neither_publish_nor_abort_nor_pause(
    vllm: FakeVllm, open_channel: Open, config: wt.WeightTransferConfig
) -> None:
    old = open_channel("llm")
    with wt.WeightSender(config, [open_channel()]) as sender:
        sender.send(A, version=1)
        vllm.gate.clear()
        sending = threading.Thread(target=lambda: sender.send(B, version=2))
        sending.start()
        assert vllm.at_gate.wait(5)
        late = threading.Thread(target=refused, args=(old.finish_weight_update, 7, "an old one"))
        late.start()  # vLLM hears it when the update has ended
        vllm.gate.set()
        late.join()
        sending.join()
        refused(old.start_weight_update, "an old one")
        refused(old.abort_weight_update, "why", "an old one")
    assert serves(vllm, B, "2")
    assert vllm.events.count("pause keep") == 2


def refused(call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(wt.SessionError):
        call(*arguments)


def test_a_session_that_cannot_be_closed_is_told(vllm: FakeVllm, sender: wt.WeightSender) -> None:
    sender.send(A, version=1)
    vllm.collective_rpc("start_weight_update")
    vllm.failing = "finish_weight_update"
    with pytest.raises(wt.TransferError, match="finish_weight_update broke"):
        sender.send(B, version=2)
    sender.send(B, version=2)
    assert serves(vllm, B, "2")


def test_a_trainer_that_died_in_an_update_leaves_no_open_session_to_the_next(
    vllm: FakeVllm, open_channel: Open, config: wt.WeightTransferConfig
) -> None:
    with wt.WeightSender(config, [open_channel("llm")]) as sender:
        sender.send(A, version=1)
    vllm.collective_rpc("start_weight_update")  # and then it died
    vllm.pause("keep")
    with wt.WeightSender(config, [open_channel()]) as sender:
        sender.send(B, version=2)
    assert serves(vllm, B, "2")


def test_the_session_that_stays_open_on_all_ranks_but_the_last_is_closed(
    vllm: FakeVllm, open_channel: Open, config: wt.WeightTransferConfig
) -> None:
    with wt.WeightSender(config, [open_channel("llm")]) as sender:
        sender.send(A, version=1)
        vllm.parts[0].fails = True
        with pytest.raises(wt.TransferError):
            sender.send(B, version=2)
    assert [engine.open for engine in vllm.engines] == [False, False]
    assert vllm.events[vllm.events.index("abort") + 1] == "finish_weight_update"
    assert vllm.version == "1"


def test_an_abort_during_an_update_returns_at_once_since_vllm_would_not_hear_it(
    vllm: FakeVllm, open_channel: Open, config: wt.WeightTransferConfig
) -> None:
    vllms = open_channel("llm")
    with wt.WeightSender(config, [vllms]) as sender:
        sender.send(A, version=1)
        vllm.gate.clear()
        sending = threading.Thread(target=lambda: sender.send(B, version=2))
        sending.start()
        assert vllm.at_gate.wait(5)
        before = len(vllm.events)
        vllms.abort_weight_update("because")
        assert len(vllm.events) == before
        vllm.gate.set()
        sending.join()
    assert serves(vllm, B, "2")


def test_a_second_call_waits_for_the_first_no_longer_than_its_own_deadline(
    vllm: FakeVllm, open_channel: Open, config: wt.WeightTransferConfig
) -> None:
    vllms = open_channel("llm")
    with wt.WeightSender(config, [vllms]) as sender:
        sender.send(A, version=1)
        vllm.gate.clear()
        sending = threading.Thread(target=lambda: sender.send(B, version=2))
        sending.start()
        assert vllm.at_gate.wait(5)
        with pytest.raises(wt.TransferTimeoutError, match="another call to it was under way; init has not begun"):
            vllms.init_weight_transfer_engine({"timeout": 0.1})
        vllm.gate.set()
        sending.join()
    assert serves(vllm, B, "2")


@pytest.mark.parametrize("form", ["http", "llm", "async"])
def test_an_update_that_vllm_does_not_end_ends_at_the_deadline_and_the_next_one_heals(
    vllm: FakeVllm, open_channel: Open, config: wt.WeightTransferConfig, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(channel, "_GIVING_UP", 0.2)
    monkeypatch.setattr("weight_transfer_vllm.servers.http._MARGIN", 0.1)
    vllms = open_channel(form)
    hasty = wt.load_config(backend="loopback", timeout=0.5, init_timeout=5)
    vllm.gate.clear()
    with wt.WeightSender(hasty, [vllms]) as sender, pytest.raises(wt.TransferTimeoutError):
        sender.send(B, version=1)
    vllm.gate.set()
    with wt.WeightSender(config, [vllms]) as sender:
        sender.send(A, version=2)
    assert serves(vllm, A, "2")


def test_a_rank_that_does_not_answer_is_named(
    vllm: FakeVllm, open_channel: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_ANSWERING", 0.1)
    vllm.engines[1].drowned = True
    with pytest.raises(wt.TransferTimeoutError, match=r"waiting for what rank 1 of 2 answers at 127\.0\.0\.1"):
        open_channel().status()


def test_a_rank_that_answers_late_is_waited_for(vllm: FakeVllm, open_channel: Open) -> None:
    vllm.engines[0].answers_after = 0.3
    assert open_channel().status()["workers"] == 2


def test_an_engine_that_has_died_is_a_lost_peer(vllm: FakeVllm, open_channel: Open) -> None:
    vllm.dead = True
    for form in ("http", "llm", "async"):
        with pytest.raises(wt.PeerLostError, match="vLLM's engine has died"):
            open_channel(form).init_weight_transfer_engine({})


def test_a_server_that_is_not_up_yet_is_waited_for(
    vllm: FakeVllm, config: wt.WeightTransferConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    with ExitStack() as stack:
        vllms = stack.enter_context(VllmChannel(f"http://127.0.0.1:{port}"))
        with pytest.raises(wt.PeerLostError, match="vLLM cannot be reached"):
            vllms.status()
        sender = stack.enter_context(wt.WeightSender(config, [vllms]))
        sending = threading.Thread(target=lambda: sender.send(A, version=1))
        sending.start()
        stack.enter_context(Server(app_of(vllm), "127.0.0.1", port))
        sending.join()
    assert serves(vllm, A, "1")


def test_a_wrong_key_is_told_and_the_right_one_is_let_in(vllm: FakeVllm) -> None:
    with Server(app_of(vllm, api_key="right"), "127.0.0.1", 0) as server:
        for key in (None, "wrong"):
            refused = pytest.raises(wt.HandshakeError, match=r"refuses the API key \(HTTP status 401\)")
            with VllmChannel(HttpServer(server.url, key)) as vllms, refused:
                vllms.status()
        with VllmChannel(HttpServer(server.url, "right")) as vllms:
            assert vllms.status()["workers"] == 2


def test_the_text_of_the_error_does_not_hold_the_key(vllm: FakeVllm) -> None:
    with pytest.raises(wt.ConfigError) as caught:
        HttpServer("http://127.0.0.1:1", "sécret-€")
    assert "sécret" not in str(caught.value)


def test_importing_and_using_the_trainers_half_needs_no_vllm() -> None:
    code = (
        "import sys, weight_transfer_vllm as wv\n"
        "assert not [name for name in sys.modules if name.startswith(('torch', 'httpx', 'weight_transfer.'))]\n"
        "with wv.VllmChannel('http://127.0.0.1:1') as channel: repr(channel)\n"
        "assert 'vllm' not in sys.modules and 'ray' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class Buggy:
    """A server of a user's own that raises something foreign, and has a failure between publishing and forgetting."""

    address = "mine"

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.broken = ""
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._inner, name)

        def called(*arguments: Any) -> Any:
            self.called.append(name)
            if name == self.broken:
                self.broken = ""
                raise RuntimeError(f"a bug in {name}")
            return call(*arguments)

        return called if callable(call) else call


@pytest.fixture
def buggy(vllm: FakeVllm) -> Buggy:
    from weight_transfer_vllm import LlmServer

    return Buggy(LlmServer(FakeLlm(vllm)))


@pytest.mark.parametrize("method", ["start", "update"])
def test_whatever_a_server_raises_ends_the_update_and_the_next_one_heals(
    vllm: FakeVllm, buggy: Buggy, config: wt.WeightTransferConfig, method: str
) -> None:
    with VllmChannel(buggy) as mine, wt.WeightSender(config, [mine]) as sender:
        sender.send(A, version=1)
        buggy.broken = method
        with pytest.raises(wt.TransferError, match=f"a bug in {method}"):
            sender.send(B, version=2)
        sender.send(B, version=2)
        assert serves(vllm, B, "2")


def test_generation_goes_on_only_after_what_old_weights_have_computed_is_forgotten(
    vllm: FakeVllm, buggy: Buggy, config: wt.WeightTransferConfig
) -> None:
    with VllmChannel(buggy) as mine, wt.WeightSender(config, [mine]) as sender:
        sender.send(A, version=1)
        buggy.broken = "reset_caches"
        buggy.called.clear()
        with pytest.raises(wt.WeightTransferError, match="a bug in reset_caches"):
            sender.send(B, version=2)
        after = buggy.called[buggy.called.index("reset_caches") + 1 :]
        assert "resume" not in after or after.index("reset_caches") < after.index("resume")
        sender.send(A, version=3)
        assert serves(vllm, A, "3")
