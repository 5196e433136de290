"""Recorded copies that are made together leave the bits that they leave one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from weight_transfer import Manifest, ParamMeta, TransferError
from weight_transfer.model.copies import Batch, Landing, Move, adjacent
from weight_transfer.model.load_plan import LoadPlan
from weight_transfer.model.manifest import dtype_name
from weight_transfer.model.recorder import record
from weight_transfer.model.targets import as_bits

if TYPE_CHECKING:
    from weight_transfer.model.recording import Recording

Load = Callable[[dict[str, Tensor], str, Tensor], object]


class Case:
    """A loader, what it loads, and where to.

    Args:
        sent: shapes of the weights.
        kept: shapes of the targets; all are of one layer, but those with a dot.
        load: copies one weight.
        dtype: of the weights.
        target: dtype of the targets, if that is another one.
    """

    def __init__(
        self,
        sent: dict[str, Sequence[int]],
        kept: dict[str, Sequence[int]],
        load: Load,
        dtype: torch.dtype = torch.bfloat16,
        target: torch.dtype | None = None,
    ) -> None:
        self.sent, self.kept, self.load, self.dtype = sent, kept, load, dtype
        self.target = target or dtype

    def record(self) -> Recording:
        targets = self.targets("meta")
        manifest = Manifest(
            [ParamMeta(name, dtype_name(self.dtype), tuple(shape)) for name, shape in self.sent.items()]
        )
        return record(lambda weights: [self.load(targets, *pair) for pair in weights] and None, manifest, targets)

    def targets(self, device: str = "cpu", before: int = 0) -> dict[str, Tensor]:
        """Return targets that begin some elements behind the start of their storage."""
        return {name: placed(shape, self.target, before, device) for name, shape in self.kept.items()}

    def weights(self, before: int = 0) -> dict[str, Tensor]:
        """Return weights of random bits, NaNs among them."""
        generator = torch.Generator().manual_seed(5)
        found = {}
        for name, shape in self.sent.items():
            found[name] = placed(shape, self.dtype, before)
            bits = torch.randint(0, 256, (found[name].nbytes,), generator=generator, dtype=torch.uint8)
            found[name].copy_(bits.view(self.dtype).view(tuple(shape)))
        return found


def placed(shape: Sequence[int], dtype: torch.dtype, before: int, device: str = "cpu") -> Tensor:
    size = 1
    for one in shape:
        size *= one
    return torch.zeros(before + size, dtype=dtype, device=device)[before:].view(tuple(shape))


def columns(targets: dict[str, Tensor], name: str, weight: Tensor) -> object:
    return targets["experts.w2"][int(name)].copy_(weight[:, 8:24])


def stacked(targets: dict[str, Tensor], name: str, weight: Tensor) -> object:
    half = targets["qkv"][:8] if name == "q" else targets["qkv"][8:]
    return half.copy_(weight)


def alone(targets: dict[str, Tensor], name: str, weight: Tensor) -> object:
    return targets[name].copy_(weight)


def transposed(targets: dict[str, Tensor], name: str, weight: Tensor) -> object:
    return targets[name].copy_(weight.t())


def interleaved(targets: dict[str, Tensor], name: str, weight: Tensor) -> object:
    return targets["both"][:, "ab".index(name) :: 2].copy_(weight)


def part(targets: dict[str, Tensor], name: str, weight: Tensor) -> object:
    return targets[name].copy_(weight[3:6])


def aslant(targets: dict[str, Tensor], name: str, weight: Tensor) -> object:
    return targets[name].copy_(weight.view(-1)[:60].view(6, 10)[:, :4])


CASES = {
    "experts' columns": Case({str(n): (12, 32) for n in range(6)}, {"experts.w2": (6, 12, 16)}, columns),
    "experts' columns, in fp32": Case(
        {str(n): (12, 32) for n in range(6)}, {"experts.w2": (6, 12, 16)}, columns, torch.float32
    ),
    "stacked rows": Case({"q": (8, 16), "kv": (4, 16)}, {"qkv": (12, 16)}, stacked),
    "stacked rows of odd length": Case({"q": (8, 5), "kv": (4, 5)}, {"qkv": (12, 5)}, stacked),
    "whole": Case(
        {"a": (4, 4), "b": (7,), "c": (), "d": (0, 3), "e": (1, 8)},
        {"a": (4, 4), "b": (7,), "c": (), "d": (0, 3), "e": (1, 8)},
        alone,
    ),
    "bytes": Case({"a": (4, 8), "b": (3,)}, {"a": (4, 8), "b": (3,)}, alone, torch.uint8),
    "eight bytes": Case({"a": (4, 3)}, {"a": (4, 3)}, alone, torch.int64),
    "transposed": Case({"a": (4, 8)}, {"a": (8, 4)}, transposed),
    "interleaved": Case({"a": (4, 8), "b": (4, 8)}, {"both": (4, 16)}, interleaved),
    "rows": Case({"a": (9, 8)}, {"a": (3, 8)}, part),
    "rows of odd length": Case({"a": (9, 3)}, {"a": (3, 3)}, part),
    "steps between elements of eight bytes": Case({"a": (8, 8)}, {"a": (6, 4)}, aslant),
    "cast": Case({"a": (4, 4)}, {"a": (4, 4)}, alone, torch.float32, torch.bfloat16),
}


def apply(
    case: Case, recording: Recording, weights: dict[str, Tensor], targets: dict[str, Tensor], grouped: bool
) -> None:
    plan = LoadPlan.of(recording, lambda name: name.partition(".")[0])
    landings = {layer: Landing(moves, targets, recording.targets) for layer, moves in plan.into.items()}
    batch = Batch(grouped=grouped)
    for name, moves in plan.copies.items():
        batch.add(moves, landings, weights[name])
    batch.make()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("there", "here"), [(0, 0), (1, 0), (0, 1), (1, 1), (4, 8)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bits_are_those_of_copies_made_one_by_one(case: Case, there: int, here: int, grouped: bool) -> None:
    recording = case.record()
    weights, targets, expected = case.weights(there), case.targets(before=here), case.targets()
    recording.replay(weights, expected)
    assert any(as_bits(tensor).any() for tensor in expected.values())
    apply(case, recording, weights, targets, grouped)
    for name, tensor in targets.items():
        assert torch.equal(as_bits(tensor), as_bits(expected[name])), name


def test_a_source_that_is_not_contiguous_is_read_as_it_is() -> None:
    case = CASES["stacked rows"]
    recording = case.record()
    weights, targets, expected = case.weights(), case.targets(), case.targets()
    recording.replay(weights, expected)
    apply(case, recording, {name: tensor.t().contiguous().t() for name, tensor in weights.items()}, targets, False)
    assert torch.equal(as_bits(targets["qkv"]), as_bits(expected["qkv"]))


@pytest.mark.parametrize("case", ["stacked rows", "whole", "rows", "experts' columns"])
def test_a_list_that_cuda_batches_has_only_dense_pairs_of_one_dtype(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lists: list[tuple[list[Tensor], list[Tensor]]] = []
    joined: list[list[Tensor]] = []
    copy, cat = torch._foreach_copy_, torch.cat

    def note_copies(to: list[Tensor], frm: list[Tensor]) -> None:
        lists.append((to, frm))
        copy(to, frm)

    def note_cat(tensors: list[Tensor], **options: Any) -> Tensor:
        joined.append(tensors)
        return cat(tensors, **options)

    monkeypatch.setattr(torch, "_foreach_copy_", note_copies)
    monkeypatch.setattr(torch, "cat", note_cat)
    apply(CASES[case], CASES[case].record(), CASES[case].weights(), CASES[case].targets(), True)
    assert lists or joined
    for to, frm in lists:
        assert len({tensor.dtype for tensor in (*to, *frm)}) == 1
        assert [tensor.stride() for tensor in to] == [tensor.stride() for tensor in frm]
        assert all(tensor.is_contiguous() for tensor in to)
    if case == "experts' columns":
        assert [len(tensors) for tensors in joined] == [6]
        assert not lists
        assert {tensor.dtype for tensor in joined[0]} == {torch.int64}


def test_targets_that_follow_each_other_are_one_group_in_the_order_of_addresses() -> None:
    whole, other = torch.zeros(6, 2, 3), torch.zeros(2, 3)
    targets = [whole[4], whole[1], other, whole[2], whole[0][:, :2], whole[5], whole[0, :1]]
    assert sorted(adjacent(targets)) == [[0, 5], [1, 3], [2], [4], [6]]
    assert not list(adjacent([]))


def test_a_target_that_looks_otherwise_than_it_was_recorded_is_refused() -> None:
    case = CASES["stacked rows"]
    recording = case.record()
    targets = {"qkv": torch.zeros(12, 20, dtype=torch.bfloat16)[:, :16]}
    message = (
        r"recorded as bfloat16 \[12, 16\] with strides \[16, 1\], and is bfloat16 \[12, 16\] with strides \[20, 1\]"
    )
    with pytest.raises(TransferError, match=message):
        apply(case, recording, case.weights(), targets, False)


def test_bits_go_in_integers_of_eight_bytes_where_they_can() -> None:
    recording = CASES["experts' columns"].record()
    form = recording.targets["experts.w2"]
    copy = recording.copies[0]
    assert Move.of(copy, "", 0, (12, 32), form, 2).wide is not None
    assert Move.of(copy, "", 0, (12, 32), form, 8).wide is None
    recording = CASES["stacked rows of odd length"].record()
    assert Move.of(recording.copies[0], "", 0, (8, 5), recording.targets["qkv"], 2).wide is None
