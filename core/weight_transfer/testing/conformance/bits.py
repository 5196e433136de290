"""Bits: every one of them arrives, whatever the dtype, the shape, the layout and the number of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from weight_transfer.testing.conformance.kit import Kit, assert_same
from weight_transfer.testing.models import Weight, weight

if TYPE_CHECKING:
    from weight_transfer.testing.conformance.cast import Cast, Member

_DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128"),
]
_SHAPES = [[], [0], [0, 7], [1], [3, 5], [33], [2, 3, 4]]
ZOO: list[Weight] = [
    *(
        (f"{dtype}_{'x'.join(map(str, shape)) or 'scalar'}", dtype, shape, "contiguous")
        for dtype in _DTYPES
        for shape in _SHAPES
    ),
    *(weight(f"{dtype}_transposed", dtype, 6, 4, layout="transposed") for dtype in _DTYPES),
    *(weight(f"{dtype}_strided", dtype, 9, layout="strided") for dtype in _DTYPES),
    weight("tied", "float32", 3, 5, layout="tied float32_3x5"),
]
"""Every dtype in every shape: 0-d, empty, odd, transposed, strided, tied; 128 weights of a few bytes."""

MASTERS: list[Weight] = [
    weight("embed", "float32", 5, 16385),
    weight("router", "float32", 33, 7),
    weight("norm", "float32", 9, layout="strided"),
    weight("turned", "float32", 6, 40, layout="transposed"),
    weight("empty", "float32", 0, 7),
    weight("scale", "float32"),
    weight("steps", "int64", 3),
]
SERVED: list[Weight] = [
    (name, "bfloat16" if dtype == "float32" and name != "router" else dtype, shape, layout)
    for name, dtype, shape, layout in MASTERS
]
"""What a trainer keeps, and what a server has."""

_one_weight = st.tuples(
    st.sampled_from(_DTYPES),
    st.lists(st.integers(0, 40), max_size=3),
    st.sampled_from(["contiguous", "contiguous", "transposed", "strided"]),
)
_manifests = st.lists(_one_weight, min_size=1, max_size=20).map(
    lambda rows: [(f"w{index}", *row) for index, row in enumerate(rows)]
)

loaders = pytest.mark.parametrize("in_place", [True, False], ids=["in place", "loader"])
sources = pytest.mark.parametrize("passing", [False, True], ids=["module", "passing tensors"])


class BitsTests(Kit):
    """The worker reads its own memory and answers with SHA-256 per weight; no engine is asked."""

    @loaders
    def test_every_bit_arrives_from_a_to_b_and_back(self, cast: Cast, count: int, in_place: bool) -> None:
        """Three updates, A, B and A again, each changed by the trainer as soon as ``send`` has returned.

        If this fails: bytes are lost, swapped or stale. Compare the names in the message with the plan of buckets; if
        only the second or third update is wrong, something is kept from the one before.
        """
        workers = cast.workers(count, in_place=in_place)
        trainer = cast.trainer(workers)
        seen = []
        for version, seed in enumerate((1, 2, 1)):
            sent = trainer.ask("send", seed=seed, version=version)
            assert_same(sent["hashes"], *(worker.ask("hashes") for worker in workers))
            assert sent["changed"] == [], "the trainer's own weights were changed"
            assert [worker.ask("status")["version"] for worker in workers] == [version] * count
            seen.append(sent["hashes"])
        assert seen[0] == seen[2] != seen[1]

    @sources
    @loaders
    def test_every_dtype_shape_and_layout_arrives(self, cast: Cast, in_place: bool, passing: bool) -> None:
        """0-d, empty, odd, transposed, strided and tied weights of 14 dtypes; nothing is written between strides.

        If this fails: move bytes, and never values: view tensors as ``uint8``, take the size from the manifest, and
        make non-contiguous tensors contiguous before their bytes are read.
        """
        worker = cast.worker(ZOO, in_place=in_place)
        trainer = cast.trainer([worker], ZOO, passing=passing)
        sent = trainer.ask("send", seed=1, version=1)
        assert_same(sent["hashes"], worker.ask("hashes"))
        assert worker.ask("strays") == [], "something was written between the elements of strided weights"
        assert sent["changed"] == [], "the trainer's own weights were changed"

    @sources
    @loaders
    def test_masters_arrive_cast(self, cast: Cast, in_place: bool, passing: bool) -> None:
        """fp32 masters, small, odd, strided and larger than a bucket, reach bfloat16 weights and an fp32 router.

        If this fails: iterate the source, which yields what the manifest says. An engine that looks at
        ``source.masters()`` has to convert them: ``target.copy_(master)``.
        """
        config = {"cast": {"*": "bfloat16", "*router*": "float32"}}
        worker = cast.worker(SERVED, in_place=in_place)
        trainer = cast.trainer([worker], MASTERS, passing=passing, config=config, served=SERVED)
        for version, seed in enumerate((1, 2, 1)):
            sent = trainer.ask("send", seed=seed, version=version)
            assert_same(sent["hashes"], worker.ask("hashes"))
            assert sent["changed"] == [], "the trainer's own weights were changed"

    def test_a_weight_larger_than_all_buckets_arrives(self, cast: Cast) -> None:
        """One weight spans twenty buckets; small ones stand before and behind it.

        If this fails: cut weights that do not fit into a bucket, as `plan_buckets` does.
        """
        weights = [weight("small", "int8", 5), weight("large", "float32", 20 * 16384 + 1), weight("last", "int8", 7)]
        worker = cast.worker(weights)
        trainer = cast.trainer([worker], weights)
        for seed in (1, 2):
            assert_same(trainer.ask("send", seed=seed, version=seed)["hashes"], worker.ask("hashes"))

    def test_thousands_of_tiny_weights_arrive(self, cast: Cast) -> None:
        """4,000 weights of 1 to 12 bytes.

        If this fails: look for a limit on the number of pieces in a message, such as that of ``sendmsg``.
        """
        weights = [weight(f"w{index}", ("float32", "int8", "bfloat16")[index % 3], index % 4) for index in range(4000)]
        worker = cast.worker(weights)
        trainer = cast.trainer([worker], weights)
        assert_same(trainer.ask("send", seed=1, version=1)["hashes"], worker.ask("hashes"))

    def test_any_manifest_arrives(self, cast: Cast) -> None:
        """Manifests, bucket sizes, sources and loaders that Hypothesis makes up; the same ones at each run.

        If this fails: Hypothesis prints the smallest set of weights that it found to be wrong.
        """
        stage: list[Member] = []

        @settings(
            max_examples=12,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(_manifests, st.sampled_from([256, 1000, 65536]), st.booleans(), st.booleans())
        def arrives(weights: list[Weight], bucket_bytes: int, in_place: bool, passing: bool) -> None:
            spec: dict[str, Any] = {"config": {"bucket_bytes": bucket_bytes}}
            worker = cast.worker(weights, in_place=in_place, beside=stage[0] if stage else None, **spec)
            trainer = cast.trainer([worker], weights, passing=passing, beside=stage[1] if stage else None, **spec)
            stage[:] = [worker, trainer]
            try:
                assert_same(trainer.ask("send", seed=1, version=1)["hashes"], worker.ask("hashes"))
                assert worker.ask("strays") == []
            finally:
                trainer.ask("close")
                worker.ask("close")

        arrives()

    @loaders
    def test_verified_updates_arrive(self, cast: Cast, in_place: bool) -> None:
        """With ``verify`` the core digests each tensor on both sides: here, when the engine hands it over.

        If this fails: the tensors that are given to ``load_weights`` do not hold the sent bytes at that moment.
        """
        worker = cast.worker(ZOO, in_place=in_place, config={"verify": "wire"})
        trainer = cast.trainer([worker], ZOO, config={"verify": "wire"})
        for seed in (1, 2):
            assert_same(trainer.ask("send", seed=seed, version=seed)["hashes"], worker.ask("hashes"))

    def test_kernel_format_arrives(self, cast: Cast) -> None:
        """With ``is_checkpoint_format = false`` weights are copied into the worker's own tensors.

        If this fails: the engine loads by something else than the ``load_weights`` that it was given.
        """
        worker = cast.worker(ZOO, config={"is_checkpoint_format": False})
        trainer = cast.trainer([worker], ZOO, config={"is_checkpoint_format": False})
        assert_same(trainer.ask("send", seed=1, version=1)["hashes"], worker.ask("hashes"))

    def test_a_parameter_that_was_replaced_is_noticed(self, cast: Cast) -> None:
        """Between two updates the trainer puts a new tensor, with new memory, in the place of a parameter.

        If this fails: what was exported or registered once is still sent. Compare storages at each update.
        """
        worker = cast.worker()
        trainer = cast.trainer([worker])
        trainer.ask("send", seed=1, version=1)
        for seed, name in ((2, "layer2_weight"), (3, "embed")):
            trainer.ask("replace", weight=name)
            assert_same(trainer.ask("send", seed=seed, version=seed)["hashes"], worker.ask("hashes"))

    def test_a_parameter_that_moved_is_written_where_it_is_now(self, cast: Cast) -> None:
        """Between two updates parameters of the worker get other memory, and nothing is written where they were.

        If this fails: addresses that were looked up once are written to. Compare them at each update, before the
        first byte.
        """
        worker = cast.worker(in_place=True)
        trainer = cast.trainer([worker])
        trainer.ask("send", seed=1, version=1)
        for seed, name in ((2, "layer2_weight"), (3, "embed")):
            worker.ask("move", weight=name)
            assert_same(trainer.ask("send", seed=seed, version=seed)["hashes"], worker.ask("hashes"))
            assert worker.ask("overwritten") == []
