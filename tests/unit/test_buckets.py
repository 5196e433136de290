"""The bucket plan: every byte has one place, both sides find it, and the bits come back as they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_transfer import ParamMeta
from weight_transfer.model.manifest import dtype_name, torch_dtype
from weight_transfer.plan.buckets import (
    ALIGNMENT,
    BucketPlan,
    Packer,
    Unpacker,
    as_bytes,
    plan_buckets,
    typed_view,
)

DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int8, torch.float64)
SHAPES = st.one_of(st.just(()), st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple))
SPECS = st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=12)
BUCKET_BYTES = st.sampled_from((256, 512, 1000, 1024, 4096, 1 << 20))

Tensors = dict[str, torch.Tensor]


def metas_of(tensors: Mapping[str, torch.Tensor]) -> list[ParamMeta]:
    return [ParamMeta(name, dtype_name(tensor.dtype), tensor.shape) for name, tensor in tensors.items()]


def random_tensors(specs: list[tuple[torch.dtype, tuple[int, ...]]], seed: int) -> Tensors:
    """Return tensors of random bits, NaNs included."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for index, (dtype, shape) in enumerate(specs):
        tensor = torch.empty(shape, dtype=dtype)
        top = 2 if dtype is torch.bool else 256
        as_bytes(tensor).copy_(
            torch.randint(0, top, (tensor.numel() * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        )
        tensors[f"p{index}"] = tensor
    return tensors


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype is right.dtype and left.shape == right.shape and torch.equal(as_bytes(left), as_bytes(right))


class CopyingLoader:
    """Takes weights as a model's own loader would: it keeps copies, and lets nobody write in place."""

    def __init__(self) -> None:
        self.got: Tensors = {}
        self.batches: list[int] = []

    def __call__(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.batches.append(len(weights))
        for name, tensor in weights:
            assert name not in self.got
            self.got[name] = tensor.clone()


class InPlaceLoader(CopyingLoader):
    """Lets an engine write into tensors of its own, as a receiver's ``load_weights`` does in kernel format."""

    def __init__(self, targets: Tensors) -> None:
        super().__init__()
        self.targets = targets
        self.announced = 0
        self.in_place: list[str] = []

    def destinations(self) -> Tensors:
        return self.targets

    def write_in_place(self) -> None:
        self.announced += 1

    def written(self, nbytes: int) -> None:
        raise AssertionError("the tensors themselves are handed over")

    copy = written

    def __call__(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        super().__call__(weights)
        for name, tensor in weights:
            if tensor is self.targets[name]:
                self.in_place.append(name)
            else:
                self.targets[name].copy_(tensor)


class Pipe:
    """Both sides of a transfer: a plan each, and buffers between them that are used again and again."""

    def __init__(self, metas: list[ParamMeta], bucket_bytes: int, buckets: int = 2) -> None:
        self.buffers = [torch.full((bucket_bytes,), 0xAA, dtype=torch.uint8) for _ in range(buckets)]
        self.plan = plan_buckets(metas, bucket_bytes)
        self.packer = Packer(self.plan, self.buffers)
        self.unpacker = Unpacker(plan_buckets(metas, bucket_bytes), self.buffers)
        self.kept = True

    def send(self, tensors: Tensors, load: Callable[[list[tuple[str, torch.Tensor]]], None]) -> None:
        self.kept = not self.kept  # one copy for each tensor and one for each bucket, by turns
        for index, _ in enumerate(self.packer.packing(iter(tensors.values()), self.kept)):
            self.unpacker.load(index, load)


# The plan.


@given(SPECS, BUCKET_BYTES)
@settings(max_examples=80, deadline=None)
def test_every_byte_of_every_parameter_has_exactly_one_place(
    specs: list[tuple[torch.dtype, tuple[int, ...]]], bucket_bytes: int
) -> None:
    plan = plan_buckets(metas_of(random_tensors(specs, 0)), bucket_bytes)
    covered = dict.fromkeys(range(len(plan.params)), 0)
    ended: list[int] = []
    for bucket in plan.buckets:
        assert bucket
        free = 0
        for slot in bucket:
            assert slot.offset >= free, "slots overlap or are out of order"
            free = slot.offset + slot.nbytes
            assert free <= bucket_bytes
            assert slot.start == covered[slot.param], "pieces of a parameter come in order, without gap"
            covered[slot.param] += slot.nbytes
            assert slot.last == (covered[slot.param] == plan.params[slot.param].nbytes)
            ended += [slot.param] * slot.last
    assert covered == {index: meta.nbytes for index, meta in enumerate(plan.params)}
    assert ended == list(range(len(plan.params)))


@given(SPECS, BUCKET_BYTES)
@settings(max_examples=60, deadline=None)
def test_every_piece_begins_at_a_multiple_of_256_bytes(
    specs: list[tuple[torch.dtype, tuple[int, ...]]], bucket_bytes: int
) -> None:
    plan = plan_buckets(metas_of(random_tensors(specs, 0)), bucket_bytes)
    assert all(slot.offset % ALIGNMENT == 0 for bucket in plan.buckets for slot in bucket)
    assert ALIGNMENT == 256


@given(SPECS, BUCKET_BYTES)
@settings(max_examples=40, deadline=None)
def test_both_sides_make_the_same_plan(specs: list[tuple[torch.dtype, tuple[int, ...]]], bucket_bytes: int) -> None:
    metas = metas_of(random_tensors(specs, 0))
    copies = [ParamMeta(meta.name, meta.dtype, list(meta.shape)) for meta in metas]
    assert plan_buckets(iter(metas), bucket_bytes) == plan_buckets(copies, bucket_bytes)


@given(SPECS, BUCKET_BYTES)
@settings(max_examples=40, deadline=None)
def test_no_bucket_is_wasted(specs: list[tuple[torch.dtype, tuple[int, ...]]], bucket_bytes: int) -> None:
    plan = plan_buckets(metas_of(random_tensors(specs, 0)), bucket_bytes)
    for bucket, following in zip(plan.buckets, plan.buckets[1:], strict=False):
        end = max(slot.offset + slot.nbytes for slot in bucket)
        assert following[0].start or -(-end // ALIGNMENT) * ALIGNMENT >= bucket_bytes


def test_no_parameters_need_no_bucket() -> None:
    assert plan_buckets([], 1024).buckets == ()


@pytest.mark.parametrize("bucket_bytes", [255, 1, 0, -1])
def test_a_bucket_below_the_alignment_is_refused(bucket_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"a bucket needs at least 256 bytes, got {bucket_bytes}"):
        plan_buckets([], bucket_bytes)


# The bits.


@given(SPECS, BUCKET_BYTES, st.integers(2, 4), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_bits_go_from_a_to_b_and_back_to_a_through_the_same_buffers(
    specs: list[tuple[torch.dtype, tuple[int, ...]]], bucket_bytes: int, buckets: int, seed: int
) -> None:
    a, b = random_tensors(specs, seed), random_tensors(specs, seed + 1)
    pipe = Pipe(metas_of(a), bucket_bytes, buckets)
    for version in (a, b, a):
        loader = CopyingLoader()
        pipe.send(version, loader)
        assert loader.got.keys() == version.keys()
        assert all(same_bits(loader.got[name], version[name]) for name in version)


@given(SPECS, BUCKET_BYTES, st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_bits_arrive_in_the_workers_own_tensors(
    specs: list[tuple[torch.dtype, tuple[int, ...]]], bucket_bytes: int, seed: int
) -> None:
    a, b = random_tensors(specs, seed), random_tensors(specs, seed + 1)
    targets = {name: torch.zeros_like(tensor) for name, tensor in a.items()}
    pipe = Pipe(metas_of(a), bucket_bytes)
    for version in (a, b, a):
        loader = InPlaceLoader(targets)
        pipe.send(version, loader)
        assert loader.got.keys() == version.keys()
        assert all(same_bits(targets[name], version[name]) for name in version)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (129,), (64, 33), (4000,)])
def test_every_dtype_and_shape_survives(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    specs = [(torch.int8, (1,)), (dtype, shape), (torch.int8, (1,))]
    a, b = random_tensors(specs, 1), random_tensors(specs, 2)
    pipe = Pipe(metas_of(a), 4096)
    for version in (a, b, a):
        loader = CopyingLoader()
        pipe.send(version, loader)
        assert all(same_bits(loader.got[name], version[name]) for name in version)


def test_an_update_that_failed_midway_leaves_nothing_behind() -> None:
    specs = [(torch.bfloat16, (5_000,)), (torch.float32, (3_000,))]
    a, b = random_tensors(specs, 1), random_tensors(specs, 2)
    pipe = Pipe(metas_of(a), 1024)
    buckets = pipe.plan.buckets
    pipe.plan = BucketPlan(pipe.plan.params, 1024, buckets[:-1])  # the last bucket never arrives
    pipe.send(a, CopyingLoader())
    pipe.plan = BucketPlan(pipe.plan.params, 1024, buckets)
    loader = CopyingLoader()
    pipe.send(b, loader)
    assert all(same_bits(loader.got[name], b[name]) for name in b)


def test_a_parameter_larger_than_all_buckets_together_arrives() -> None:
    specs = [(torch.int8, (100,)), (torch.bfloat16, (50_000,)), (torch.int8, (100,))]
    a, b = random_tensors(specs, 1), random_tensors(specs, 2)
    pipe = Pipe(metas_of(a), 1024, buckets=2)
    assert len(pipe.plan.buckets) > 90
    for version in (a, b, a):
        loader = CopyingLoader()
        pipe.send(version, loader)
        assert all(same_bits(loader.got[name], version[name]) for name in version)


def test_many_tiny_parameters_arrive_in_few_calls() -> None:
    specs = [(torch.bfloat16, (5,))] * 3000
    a, b = random_tensors(specs, 1), random_tensors(specs, 2)
    pipe = Pipe(metas_of(a), 64 * 1024)
    for version in (a, b, a):
        loader = CopyingLoader()
        pipe.send(version, loader)
        assert all(same_bits(loader.got[name], version[name]) for name in version)
        assert len(loader.batches) == len(pipe.plan.buckets) == 12


# Where the bytes go, and who is asked.


def test_a_spanning_parameter_is_written_straight_into_its_destination() -> None:
    a = random_tensors([(torch.int8, (100,)), (torch.bfloat16, (5_000,)), (torch.int8, (100,))], 1)
    targets = {name: torch.zeros_like(tensor) for name, tensor in a.items()}
    loader = InPlaceLoader(targets)
    Pipe(metas_of(a), 1024).send(a, loader)
    assert loader.in_place == ["p1"]
    assert loader.announced == 1


def test_nothing_is_written_into_a_destination_before_it_was_announced() -> None:
    class Refusing(InPlaceLoader):
        def write_in_place(self) -> None:
            raise RuntimeError("aborted")

    a = random_tensors([(torch.bfloat16, (5_000,))], 1)
    loader = Refusing({"p0": torch.zeros(5_000, dtype=torch.bfloat16)})
    with pytest.raises(RuntimeError, match="aborted"):
        Pipe(metas_of(a), 1024).send(a, loader)
    assert not as_bytes(loader.targets["p0"]).any()


def test_a_destination_that_is_not_contiguous_gets_a_temporary_tensor() -> None:
    a = random_tensors([(torch.bfloat16, (40, 50))], 1)
    target = torch.zeros(50, 40, dtype=torch.bfloat16).t()
    loader = InPlaceLoader({"p0": target})
    Pipe(metas_of(a), 1024).send(a, loader)
    assert loader.in_place == []
    assert same_bits(target.contiguous(), a["p0"])


def test_whole_parameters_are_handed_over_as_views_without_a_copy() -> None:
    a = random_tensors([(torch.float32, (7, 3))], 1)
    pipe = Pipe(metas_of(a), 1024)
    seen: list[int] = []
    pipe.send(a, lambda weights: seen.append(weights[0][1].data_ptr()))
    assert seen == [pipe.buffers[0].data_ptr()]


def test_a_view_has_the_type_and_shape_of_its_parameter() -> None:
    buffer = torch.arange(24, dtype=torch.uint8)
    view = typed_view(buffer, ParamMeta("a", "float32", (2, 3)))
    assert (view.dtype, view.shape, view.data_ptr()) == (torch.float32, (2, 3), buffer.data_ptr())
    assert typed_view(buffer[:0], ParamMeta("a", "float32", (0, 3))).shape == (0, 3)


def test_what_a_packer_fills_an_unpacker_finds_whatever_spans_buckets() -> None:
    tensors = [torch.arange(size, dtype=torch.uint8) + size for size in (10, 700, 0, 300)]
    params = [ParamMeta(f"p{index}", "uint8", tensor.shape) for index, tensor in enumerate(tensors)]
    plan = plan_buckets(params, 512)
    buffers = [torch.zeros(512, dtype=torch.uint8) for _ in range(2)]
    packer, unpacker = Packer(plan, buffers), Unpacker(plan, buffers)
    loaded: dict[str, torch.Tensor] = {}

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        loaded.update((name, tensor.clone()) for name, tensor in weights)

    for shift in (0, 1, 0):
        sent = [tensor + shift for tensor in tensors]
        loaded.clear()
        for index, nbytes in enumerate(packer.packing(iter(sent))):
            assert nbytes == sum(slot.nbytes for slot in plan.buckets[index])
            unpacker.load(index, load)
        assert [loaded[param.name].tolist() for param in params] == [tensor.tolist() for tensor in sent]


@pytest.mark.parametrize("bucket_bytes", [256, 512, 4096, 257, 1001, 1 << 16])
@pytest.mark.parametrize(
    ("before", "sent"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float64", "float8_e4m3fn")]
)
def test_a_packer_converts_as_it_copies_with_the_bits_of_to(bucket_bytes: int, before: str, sent: str) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(300,), (), (0, 3), (7, 33), (1000,), (1,)]
    tensors = [torch.randn(shape, generator=generator).to(torch_dtype(before)) for shape in shapes]
    tensors[3] = tensors[3].t().contiguous().t()
    metas = [ParamMeta(f"w{i}", sent if i % 3 else before, shape) for i, shape in enumerate(shapes)]
    wanted = [tensor.to(torch_dtype(meta.dtype)) for tensor, meta in zip(tensors, metas, strict=True)]
    plan = plan_buckets(metas, bucket_bytes)
    buffers = [torch.zeros(bucket_bytes, dtype=torch.uint8) for _ in range(2)]
    packer, unpacker = Packer(plan, buffers), Unpacker(plan, buffers)
    found: dict[str, torch.Tensor] = {}
    for index, _ in enumerate(packer.packing(iter(tensors))):
        unpacker.load(index, lambda weights: found.update((name, tensor.clone()) for name, tensor in weights))
    for meta, tensor in zip(metas, wanted, strict=True):
        assert torch.equal(as_bytes(found[meta.name].contiguous()), as_bytes(tensor.contiguous())), meta.name
