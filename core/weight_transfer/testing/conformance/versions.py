"""Versions: a worker serves a whole one, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weight_transfer.testing.conformance.kit import Kit
from weight_transfer.testing.models import combined

if TYPE_CHECKING:
    from weight_transfer.testing.conformance.cast import Cast

_UPDATES = 8


class VersionsTests(Kit):
    """What a thread sees that samples while updates come in."""

    def test_no_reader_ever_sees_a_torn_update(self, cast: Cast) -> None:
        """A thread of the worker hashes all weights again and again; each version has one hash, the trainer's.

        If this fails: ``receive_weights`` returned before the last byte was in place, or something wrote after it.
        Wait for every copy, and synchronise streams, before it returns.
        """
        worker = cast.worker(in_place=True)
        trainer = cast.trainer([worker])
        expected = {0: combined(trainer.ask("send", seed=0, version=0)["hashes"])}
        worker.ask("read")
        for version in range(1, _UPDATES):
            expected[version] = combined(trainer.ask("send", seed=version, version=version)["hashes"])
            worker.ask("await_reading", version=version)
        seen = dict(worker.ask("readings"))
        torn = {version: digests for version, digests in seen.items() if digests != [expected[version]]}
        assert not torn, f"versions {sorted(torn)} were seen with other bytes than were sent"
        assert seen.keys() >= set(range(1, _UPDATES))

    def test_no_version_is_served_while_weights_are_written(self, cast: Cast) -> None:
        """Between the first byte and the publication ``status`` tells of no version.

        If this fails: the engine called ``load_weights`` outside ``receive_weights``.
        """
        worker = cast.worker()
        trainer = cast.trainer([worker])
        trainer.ask("send", seed=1, version="one")
        worker.ask("arm", block_at=1)
        trainer.tell("send", seed=2, version="two")
        assert worker.reply() == "blocked"
        worker.tell("status")
        assert worker.reply()["version"] is None
        worker.ask("release")
        trainer.reply()
        assert worker.ask("status")["version"] == "two"
