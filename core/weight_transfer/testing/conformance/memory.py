"""Memory that is not only the backend's: whose it was before, who else has it, and what is done with it meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from weight_transfer.errors import TransferError
from weight_transfer.plugins.backend import Capability
from weight_transfer.testing.conformance.bits import loaders, sources
from weight_transfer.testing.conformance.cast import PLAIN, Cast, Member, plays
from weight_transfer.testing.conformance.kit import Kit, assert_same, needs
from weight_transfer.testing.models import Weight, weight

_EMPTY = weight("nothing", "float32", 0, 7)
_SOME = [weight("one", "float32", 5, 3), weight("two", "bfloat16", 64)]
_EMPTIES: dict[str, list[Weight]] = {
    "alone": [_EMPTY],
    "several": [_EMPTY, weight("none", "int8", 0), weight("no more", "bfloat16", 3, 0)],
    "first": [_EMPTY, *_SOME],
    "last": [*_SOME, _EMPTY],
    "among others": [_SOME[0], _EMPTY, _SOME[1]],
}


class MemoryTests(Kit):
    """The trainer's and the worker's models stay theirs, with all that they do with them."""

    @needs(Capability.CPU)
    def test_weights_that_the_trainer_shares_with_a_child_stay_shared(self, cast: Cast) -> None:
        """After ``share_memory()`` and a fork (Hogwild), what the child writes reaches the trainer and the workers.

        If this fails: the engine has moved the weights to other memory, and the child writes where they were. Leave
        storages alone that are not the module's only (``storage.is_shared()``), and copy them at each update.
        """
        worker = cast.worker(device="cpu")
        trainer = cast.trainer([worker], device="cpu")
        trainer.ask("share")
        trainer.ask("fork", child="hogwild")
        for version in (1, 2):
            _order(trainer, "hogwild", "randomise", seed=version)
            written = _order(trainer, "hogwild", "hashes")
            sent = trainer.ask("send", seed=None, version=version)
            assert sent["hashes"] == written, "what the child wrote did not reach the trainer"
            assert_same(written, worker.ask("hashes"))
        assert _order(trainer, "hogwild", "hashes") == trainer.ask("hashes")

    @needs(Capability.CPU)
    @pytest.mark.parametrize("side", ["trainer", "worker"])
    def test_children_that_were_forked_after_an_update_have_weights_of_their_own(self, cast: Cast, side: str) -> None:
        """They keep the bytes of the moment of the fork, and what they write is nobody else's; updates go on.

        If this fails: the weights lie in shared memory, which a fork does not copy. `SharedMemory` parts segments of
        weights at a fork; look again, at each update, whether those that you know were parted.
        """
        worker = cast.worker(device="cpu", in_place=True)
        trainer = cast.trainer([worker], device="cpu")
        forks = trainer if side == "trainer" else worker
        trainer.ask("send", seed=1, version=1)
        forks.ask("fork", child="writes")
        forks.ask("fork", child="looks")
        then = forks.ask("hashes")
        _order(forks, "writes", "randomise", seed=50)
        written = _order(forks, "writes", "hashes")
        assert forks.ask("hashes") == then, f"a child wrote into the weights of the {side}"
        assert _order(forks, "looks", "hashes") == then, "a child wrote into the weights of another one"
        for version in (2, 3, 1):
            sent = trainer.ask("send", seed=version, version=version)
            assert sent["changed"] == []
            assert_same(sent["hashes"], worker.ask("hashes"))
            assert _order(forks, "looks", "hashes") == then, f"a child sees what the {side} did later"
            assert _order(forks, "writes", "hashes") == written, f"the {side} wrote into the weights of a child"

    @sources
    def test_memory_that_was_given_away_between_updates_is_noticed(self, cast: Cast, passing: bool) -> None:
        """The trainer resizes the storages of its weights to nothing after an update, and back before the next one.

        If this fails: the weights lie in a storage that torch cannot resize, or an address from before is still sent.
        """
        worker = cast.worker()
        trainer = cast.trainer([worker], passing=passing)
        for seed in (1, 2, 1):
            assert_same(trainer.ask("send", seed=seed, version=seed)["hashes"], worker.ask("hashes"))
            trainer.ask("resize", away=True)
            trainer.ask("resize", away=False)

    @loaders
    @sources
    def test_inference_mode_of_the_trainer_leaves_no_trace(self, cast: Cast, in_place: bool, passing: bool) -> None:
        """The first ``send`` inside ``torch.inference_mode()``, the next one outside, and again.

        If this fails: a tensor that lives on was made in the caller's mode. The core leaves it before it calls an
        engine, so look for a mode that the engine enters.
        """
        worker = cast.worker(in_place=in_place)
        trainer = cast.trainer([worker], passing=passing)
        for version, inference in enumerate((True, False, True)):
            sent = trainer.ask("send", seed=version, version=version, inference=inference)
            assert_same(sent["hashes"], worker.ask("hashes"))
            assert trainer.ask("inference_tensors") == [], "the trainer's weights have become inference tensors"

    @loaders
    def test_a_model_that_was_built_in_inference_mode_is_updated(self, cast: Cast, in_place: bool) -> None:
        """The worker's weights are inference tensors, which can be written in inference mode only.

        If this fails: the engine writes on a thread of its own, which has not the mode that the core has entered.
        """
        weights = [*PLAIN, weight("strided", "float32", 30, layout="strided"), weight("large", "float32", 50_000)]
        worker = cast.worker(weights, in_place=in_place, inference=True)
        trainer = cast.trainer([worker], weights)
        for seed in (1, 2, 1):
            assert_same(trainer.ask("send", seed=seed, version=seed)["hashes"], worker.ask("hashes"))
            assert worker.ask("status")["version"] == seed

    @loaders
    @sources
    def test_weights_without_elements_arrive(self, cast: Cast, in_place: bool, passing: bool) -> None:
        """An empty weight alone, several, first, last and among others.

        If this fails: hand empty weights to ``load_weights`` too; nothing has to be read or waited for before.
        """
        stage: list[Member | None] = [None, None]
        for where, weights in _EMPTIES.items():
            worker = cast.worker(weights, in_place=in_place, beside=stage[0])
            trainer = cast.trainer([worker], weights, passing=passing, beside=stage[1])
            stage = [worker, trainer]
            for version in (1, 2):
                sent = trainer.ask("send", seed=version, version=version)
                assert_same(sent["hashes"], worker.ask("hashes"))
                assert worker.ask("status")["version"] == version, where
            trainer.ask("close")
            worker.ask("close")

    @sources
    @plays(workers=3)
    def test_a_loader_may_write_into_what_it_is_given(self, cast: Cast, passing: bool) -> None:
        """The trainer, the other workers and later updates, of equal bytes too, do not see it.

        If this fails: ``load_weights`` is given memory that others read. Map it privately and `PrivateView.renew` it,
        or give `private_copies`, unless the loader only copies (`destinations_of`).
        """
        scribbler = cast.worker(habit="scribble")
        others = [cast.worker(rank=2), cast.worker(rank=3, in_place=True)]
        trainer = cast.trainer([scribbler, *others], passing=passing)
        for version, seed in enumerate((1, 1, 2, 1)):
            sent = trainer.ask("send", seed=seed, version=version)
            assert sent["changed"] == [], "a worker wrote into the trainer's weights"
            assert_same(sent["hashes"], *(worker.ask("hashes") for worker in (scribbler, *others)))

    def test_a_loader_that_keeps_what_it_is_given_is_refused(self, cast: Cast) -> None:
        """The tensors are only valid during the call; the error names one, and no version is published.

        If this fails: the core compares references before and after the call, so the engine drops one meanwhile.
        """
        worker = cast.worker(habit="keep")
        trainer = cast.trainer([worker])
        trainer.tell("send", seed=1, version=1)
        error = trainer.error()
        assert isinstance(error, TransferError)
        assert "has kept 'embed'" in str(error)
        assert worker.ask("status")["version"] is None

    @loaders
    @sources
    def test_engines_that_were_shut_down_hold_no_weights(self, cast: Cast, in_place: bool, passing: bool) -> None:
        """No tensor and no memory of either model lives on while only the engines do.

        If this fails: ``shutdown`` keeps a source, a tensor or a view. Forget what ``describe_update`` and
        ``receive_weights`` keep from update to update.
        """
        worker = cast.worker(in_place=in_place)
        trainer = cast.trainer([worker], passing=passing)
        for seed in (1, 2):
            trainer.ask("send", seed=seed, version=seed)
        assert trainer.ask("remains") == [], "weights that the trainer's engine still holds"
        assert worker.ask("remains") == [], "weights that the worker's engine still holds"


def _order(member: Member, child: str, order: str, **arguments: Any) -> Any:
    """Have a forked child of a member do something."""
    return member.ask("child", child=child, order=order, **arguments)
