"""Targets: several models behind one worker, and updates of some of the weights."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from weight_transfer.testing.conformance.cast import PLAIN, Cast
from weight_transfer.testing.conformance.kit import Kit, assert_same
from weight_transfer.testing.models import Weight, weight

DRAFT: list[Weight] = [weight("embed", "float32", 300, 256), *(weight(f"w{i}", "bfloat16", 64, 33) for i in range(5))]
"""Shares a name and a shape with `PLAIN`, and spans several buckets."""

PARTS: list[Weight] = [
    part for plain in PLAIN for part in (plain, weight(f"{plain[0]}_scale", "float32", 8)) if part[0] != "embed_scale"
]
"""`PLAIN`, with small weights between."""

loaders = pytest.mark.parametrize("in_place", [True, False], ids=["in place", "loader"])


class TargetsTests(Kit):
    """An engine sees one manifest after another; each time its bytes go where that manifest's weights are."""

    @loaders
    def test_two_models_are_updated_by_turns(self, cast: Cast, in_place: bool) -> None:
        """A model and a draft beside it, each with a version of its own; neither has bytes of the other.

        If this fails: a plan, a table of addresses or a buffer of the update before is used though the manifest, or the
        ``destinations_of`` the loader, is another object. Compare both at each update.
        """
        worker = cast.worker(draft=DRAFT, in_place=in_place)
        trainer = cast.trainer([worker], draft=DRAFT)
        drafts = trainer.ask("send_draft", seed=1, version=10)
        for round_ in range(3):
            model = trainer.ask("send", seed=2 + round_, version=round_)["hashes"]
            assert_same(model, worker.ask("hashes"))
            assert_same(drafts, worker.ask("draft_hashes"))
            drafts = trainer.ask("send_draft", seed=20 + round_, version=11 + round_)
            assert_same(model, worker.ask("hashes"))
            assert_same(drafts, worker.ask("draft_hashes"))
        assert worker.ask("status")["versions"] == {"model": 2, "draft": 13}

    @loaders
    def test_some_weights_are_sent_and_the_others_keep_every_bit(self, cast: Cast, in_place: bool) -> None:
        """All, then a part, another part, and all again.

        If this fails: the engine takes the weights that are to be sent from something else than the manifest of this
        update, or writes into the whole of a region in which only some weights are new, such as over a small weight
        between two that are sent.
        """
        worker = cast.worker(PARTS, in_place=in_place)
        trainer = cast.trainer([worker], PARTS)
        expected = trainer.ask("send", seed=1, version=1)["hashes"]
        for version, only in (
            (2, ["layer3_*"]),
            (3, ["embed", "layer0_bias"]),
            (4, ["layer3_*"]),
            (5, ["embed", "*_weight", "*_bias"]),  # all but small ones between them
            (6, ["*_scale"]),
        ):
            sent = trainer.ask("send_part", seed=version, version=version, only=only)
            expected |= {name: value for name, value in sent.items() if any(fnmatchcase(name, each) for each in only)}
            assert_same(expected, worker.ask("hashes"))
            assert worker.ask("status")["version"] == version
        assert_same(trainer.ask("send", seed=9, version=9)["hashes"], worker.ask("hashes"))
