"""Scale: more workers and more bytes than the other tests have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weight_transfer.testing.conformance.kit import Kit, assert_same
from weight_transfer.testing.models import weight

if TYPE_CHECKING:
    from weight_transfer.testing.conformance.cast import Cast


class ScaleTests(Kit):
    """Several workers at once, and tens of megabytes. Speed is not judged."""

    def test_tens_of_megabytes_reach_several_workers(self, cast: Cast, most: int) -> None:
        """48 MiB in 300 weights to the largest number of workers, through buckets of 1 MiB, twice.

        If this fails: look for a size that does not fit into 16 or 24 bits, a queue of bounded length that both sides
        fill, or a wait that should have been for all workers and is for one.
        """
        weights = [weight(f"w{index}", "bfloat16", 256, 256 + 65 * (index % 8)) for index in range(200)]
        weights += [weight(f"b{index}", "float32", 4097) for index in range(100)]
        config = {"bucket_bytes": 2**20}
        workers = cast.workers(most, weights, in_place=True, config=config)
        trainer = cast.trainer(workers, weights, config=config)
        for seed in (1, 2):
            sent = trainer.ask("send", seed=seed, version=seed)["hashes"]
            assert_same(sent, *(worker.ask("hashes") for worker in workers))
