"""Blame: an error names its real cause, its side and the phase, at once; what was not touched is still served."""

from __future__ import annotations

from typing import Any

import pytest

from weight_transfer.errors import ManifestMismatchError, PeerLostError, TransferError
from weight_transfer.testing.conformance.bits import loaders, sources
from weight_transfer.testing.conformance.cast import PLAIN, Cast, plays
from weight_transfer.testing.conformance.kit import Kit, assert_same
from weight_transfer.testing.models import Weight, weight

_KINDS = ["RuntimeError", "ConnectionError", "OSError", "TimeoutError", "KeyError"]
_LARGE = weight("large", "uint8", 24 * 2**20)  # more than the buffers of a connection hold
_OTHER: list[Weight] = [*PLAIN[:-1], _LARGE, weight("layer5_bias", "float32", 127)]

places = pytest.mark.parametrize("at", [0, len(PLAIN) // 2, len(PLAIN) - 1], ids=["first", "middle", "last"])


class BlameTests(Kit):
    """What loaders and sources raise, whatever it is, and refusals before the first byte."""

    def test_whatever_a_loader_raises_is_the_workers_own_error(self, cast: Cast) -> None:
        """`TransferError` with the loader's text, the worker's name and the phase: it is not taken for a lost peer.

        If this fails: an ``except`` around the whole of ``receive_weights`` maps what ``load_weights`` raises. Map
        errors where the transport's own operations are called, and let everything else through.
        """
        worker = cast.worker()
        trainer = cast.trainer([worker], passing=True)
        for version, kind in enumerate(_KINDS):
            trainer.ask("send", seed=version, version=version)
            worker.ask("arm", fail_at=1 + version % 2, error=kind)
            trainer.tell("send", seed=9, version=9)
            error = trainer.error(self.grace)
            assert isinstance(error, TransferError) and not isinstance(error, PeerLostError), repr(error)
            assert kind in str(error) and "the loader was told to fail" in str(error)
            assert (error.peer, error.phase, error.version) == (worker.url, "update", 9)
            assert self.settled(worker)["version"] is None
            worker.ask("arm")
        assert_same(trainer.ask("send", seed=20, version=20)["hashes"], worker.ask("hashes"))

    @loaders
    @places
    def test_whatever_a_source_raises_is_the_trainers_own_error(self, cast: Cast, at: int, in_place: bool) -> None:
        """`TransferError` with the source's text, long before the deadline, which blames the trainer and no worker.

        A worker that serves its old version afterwards has all of its bytes, and does so if no tensor was yielded.

        If this fails: an ``except`` around the whole of ``send_weights`` maps what the source raises; or
        ``abort_update`` does not end the worker's waiting; or the worker says ``write_in_place()`` before it knows that
        bytes are coming.
        """
        worker = cast.worker(in_place=in_place)
        trainer = cast.trainer([worker], passing=True)
        for version, kind in enumerate(_KINDS):
            served = trainer.ask("send", seed=version, version=version)["hashes"]
            trainer.ask("arm", block_at=at, fail_at=at, error=kind)
            trainer.tell("send", seed=9, version=9)
            assert trainer.reply() == "blocked"
            worker.await_update()
            trainer.tell("release")
            error = trainer.error(self.grace)
            assert isinstance(error, TransferError) and not isinstance(error, PeerLostError), repr(error)
            assert kind in str(error) and "the source was told to fail" in str(error)
            assert (error.peer, error.phase, error.version) == ("trainer", "update", 9)
            status = self.settled(worker)
            assert status["version"] in ([version] if at == 0 else [version, None])
            if status["version"] == version:
                assert_same(served, worker.ask("hashes"))
            trainer.ask("arm")
        assert_same(trainer.ask("send", seed=20, version=20)["hashes"], worker.ask("hashes"))

    @sources
    def test_a_refusal_before_the_first_byte_is_told_at_once(self, cast: Cast, passing: bool) -> None:
        """A worker whose model does not fit says so, and the trainer does not wait for the deadline.

        If this fails: the trainer sends, or waits, in a call that ``abort_update`` cannot end. Let no such call begin
        before all workers are in ``receive_weights``.
        """
        worker = cast.worker(in_place=True)
        served = cast.trainer([worker]).ask("send", seed=1, version=1)["hashes"]
        trainer = cast.trainer([worker], _OTHER, passing=passing, config=self._patient())
        trainer.tell("send", seed=2, version=2)
        error = trainer.error(self.grace)
        assert isinstance(error, ManifestMismatchError), repr(error)
        assert (error.peer, error.phase) == (worker.url, "update")
        assert self.settled(worker)["version"] == 1
        assert_same(served, worker.ask("hashes"))

    @plays(workers=2)
    def test_one_workers_refusal_is_not_blamed_on_the_others(self, cast: Cast) -> None:
        """Of two workers one refuses while the other waits for bytes: the error names the first, at once.

        If this fails: as above; or the healthy worker fails with something else than `PeerLostError` or
        `TransferTimeoutError`, which the core knows for echoes.
        """
        fitting, other = cast.worker(_OTHER, in_place=True), cast.worker(rank=2, in_place=True)
        trainer = cast.trainer([fitting, other], _OTHER, passing=True, config=self._patient())
        trainer.tell("send", seed=1, version=1)
        error = trainer.error(self.grace)
        assert isinstance(error, ManifestMismatchError), repr(error)
        assert error.peer == other.url
        alone = cast.trainer([fitting], _OTHER)
        assert_same(alone.ask("send", seed=2, version=2)["hashes"], fitting.ask("hashes"))

    @plays(workers=2)
    def test_one_workers_loader_is_not_blamed_on_the_others(self, cast: Cast) -> None:
        """Of two workers one fails to load in the middle of an update: the error names it, and what it raised.

        If this fails: as above.
        """
        workers = cast.workers(2, [*PLAIN, _LARGE])
        trainer = cast.trainer(workers, [*PLAIN, _LARGE], passing=True, config=self._patient())
        for version, worker in enumerate(workers):
            worker.ask("arm", fail_at=2)
            trainer.tell("send", seed=version, version=version)
            error = trainer.error(self.grace)
            assert isinstance(error, TransferError) and "the loader was told to fail" in str(error), repr(error)
            assert error.peer == worker.url
            worker.ask("arm")
        assert_same(trainer.ask("send", seed=9, version=9)["hashes"], *(worker.ask("hashes") for worker in workers))

    def _patient(self) -> dict[str, Any]:
        return {"timeout": 4 * self.grace}
