"""Sources: a tensor that is yielded is valid until the next one is asked for, and not longer."""

from __future__ import annotations

import pytest

from weight_transfer.plugins.backend import Capability
from weight_transfer.testing.conformance.bits import ZOO, loaders
from weight_transfer.testing.conformance.cast import LARGE, PLAIN, Cast
from weight_transfer.testing.conformance.kit import Kit, assert_same, needs
from weight_transfer.testing.models import Weight, weight

_SPANNING: list[Weight] = [*PLAIN, weight("large", "float32", 5 * 16384 + 1), *ZOO]

memories = pytest.mark.parametrize("memory", ["reused", "freed"])


class SourcesTests(Kit):
    """What a source may do with the memory of the tensors that it yields."""

    @loaders
    @memories
    def test_a_tensor_need_not_outlive_the_next_one(self, cast: Cast, memory: str, in_place: bool) -> None:
        """The source uses one buffer for all tensors, or frees each one's memory when the next is asked for.

        If this fails: the engine refers to a tensor when it has asked for the next one, to send it later. Unless
        ``source.reuses_memory`` is false, copy its bytes first, or wait until they have left.
        """
        worker = cast.worker(_SPANNING, in_place=in_place)
        trainer = cast.trainer([worker], _SPANNING, passing=True, memory=memory)
        for seed in (1, 2):
            assert_same(trainer.ask("send", seed=seed, version=seed)["hashes"], worker.ask("hashes"))

    @memories
    def test_tensors_of_one_buffer_pass_verification(self, cast: Cast, memory: str) -> None:
        """With ``verify`` each tensor is digested before the engine gets it, while the source is read once.

        If this fails: as above.
        """
        worker = cast.worker(config={"verify": "wire"})
        trainer = cast.trainer([worker], passing=True, memory=memory, config={"verify": "wire"})
        assert_same(trainer.ask("send", seed=1, version=1)["hashes"], worker.ask("hashes"))

    @needs(Capability.CROSS_PROCESS)
    def test_copies_of_passing_tensors_are_bounded(self, cast: Cast) -> None:
        """64 MiB through one buffer of the source and two buckets of 1 MiB: the trainer grows by less than half of it.

        If this fails: copy a tensor when there is room to send it, and not all of them at once.
        """
        worker = cast.worker(LARGE, in_place=True, config={"bucket_bytes": 2**20})
        trainer = cast.trainer([worker], LARGE, passing=True, memory="reused", config={"bucket_bytes": 2**20})
        trainer.ask("send", seed=1, version=1)
        trainer.ask("mark")
        trainer.ask("send", seed=2, version=2)
        assert trainer.ask("growth")["peak"] < 32 * 2**20
