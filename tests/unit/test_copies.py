"""Recorded copies that are made together leave the bits that they leave one by one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from weight_transfer import Manifest, ParamMeta, TransferError
from weight_transfer.copying.table import ELEMENTS, joined, rows_of
from weight_transfer.model import copies, kernel_copies
from weight_transfer.model.bits import as_bits
from weight_transfer.model.copies import Landing, Move, Sources
from weight_transfer.model.kernel_copies import KernelCopies
from weight_transfer.model.load_plan import LoadPlan
from weight_transfer.model.manifest import dtype_name
from weight_transfer.model.recorder import record

if TYPE_CHECKING:
    from weight_transfer.copying.boxes import Boxes
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

    def weights(self, before: int = 0, seed: int = 5) -> dict[str, Tensor]:
        """Return weights of random bits, NaNs among them."""
        generator = torch.Generator().manual_seed(seed)
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


class WalkedCopies:
    """Stands for `GpuCopies` where there is no GPU: does what the kernel does."""

    def __init__(self, boxes: Boxes, _device: torch.device, relative: bool = False) -> None:
        self._launches = rows_of(boxes if relative else joined(boxes), 4096)

    def run(self, bases: Tensor | None = None) -> None:
        for rows in self._launches:
            size = ELEMENTS[rows.unit]
            for source, target, run, count, source_step, target_step, piece in rows.table.tolist():
                to_source, to_target = (0, 0) if bases is None else bases[piece].tolist()
                for index in range(count):
                    far = index * size
                    begin, end = source + to_source + source_step * far, target + to_target + target_step * far
                    assert not (begin % rows.unit or end % rows.unit)
                    ctypes.memmove(end, begin, run * size)


def apply(case: Case, recording: Recording, weights: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    plan = LoadPlan.of(recording, lambda name: name.partition(".")[0])
    landings = {layer: Landing(moves, targets, recording.targets) for layer, moves in plan.into.items()}
    sources = Sources([*weights.values()])
    for step in plan.delivery(tuple(weights)).steps:
        step.make(landings, sources)


def walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU for a GPU whose kernel is `WalkedCopies`."""
    monkeypatch.setattr(copies, "gpu_of", lambda _tensors: torch.device("cpu"))
    monkeypatch.setattr(kernel_copies, "has_kernel", lambda: True)
    monkeypatch.setattr(kernel_copies, "GpuCopies", WalkedCopies)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)


@pytest.fixture(params=["torch", "kernel"])
def _by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with torch's copies, and with the kernel's plan, which is walked here as the kernel would."""
    if request.param == "kernel":
        walk(monkeypatch)


@pytest.mark.usefixtures("_by")
@pytest.mark.parametrize(("there", "here"), [(0, 0), (1, 0), (0, 1), (1, 1), (4, 8)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bits_are_those_of_copies_made_one_by_one(case: Case, there: int, here: int) -> None:
    recording = case.record()
    weights, targets, expected = case.weights(there), case.targets(before=here), case.targets()
    recording.replay(weights, expected)
    assert any(as_bits(tensor).any() for tensor in expected.values())
    apply(case, recording, weights, targets)
    for name, tensor in targets.items():
        assert torch.equal(as_bits(tensor), as_bits(expected[name])), name


def test_a_source_that_is_not_contiguous_is_read_as_it_is() -> None:
    case = CASES["stacked rows"]
    recording = case.record()
    weights, targets, expected = case.weights(), case.targets(), case.targets()
    recording.replay(weights, expected)
    apply(case, recording, {name: tensor.t().contiguous().t() for name, tensor in weights.items()}, targets)
    assert torch.equal(as_bits(targets["qkv"]), as_bits(expected["qkv"]))


@pytest.mark.parametrize("case", ["stacked rows", "whole", "rows"])
def test_a_list_that_cuda_batches_has_only_dense_pairs_of_one_dtype(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lists: list[tuple[list[Tensor], list[Tensor]]] = []
    copy = torch._foreach_copy_

    def note_copies(to: list[Tensor], frm: list[Tensor]) -> None:
        lists.append((to, frm))
        copy(to, frm)

    monkeypatch.setattr(torch, "_foreach_copy_", note_copies)
    apply(CASES[case], CASES[case].record(), CASES[case].weights(), CASES[case].targets())
    assert lists
    for to, frm in lists:
        assert len({tensor.dtype for tensor in (*to, *frm)}) == 1
        assert [tensor.stride() for tensor in to] == [tensor.stride() for tensor in frm]
        assert all(tensor.is_contiguous() for tensor in to)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("there", "here"), [(0, 0), (1, 0), (0, 1), (8, 16)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_gpu_leaves_the_same_bits(case: Case, there: int, here: int) -> None:
    recording = case.record()
    expected, targets = case.targets(), case.targets("cuda", here)
    for seed in (5, 6, 5):
        weights = case.weights(there, seed)
        recording.replay(weights, expected)
        on_gpu = {name: placed(tensor.shape, case.dtype, there, "cuda") for name, tensor in weights.items()}
        for name, tensor in weights.items():
            as_bits(on_gpu[name]).copy_(as_bits(tensor))
        apply(case, recording, on_gpu, targets)
        for name, tensor in targets.items():
            assert torch.equal(as_bits(tensor.cpu()), as_bits(expected[name])), name


def test_memory_that_lies_elsewhere_the_next_time_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["experts' columns"]
    recording, expected = case.record(), case.targets()
    plan = LoadPlan.of(recording, lambda name: name.partition(".")[0])
    weights = case.weights()
    recording.replay(weights, expected)
    walk(monkeypatch)
    made = KernelCopies([(int(name), move) for name, [move] in plan.copies.items()])
    for before in (0, 8, 8, 1, 0):
        targets = case.targets(before=before)
        landings = {"experts": Landing(plan.into["experts"], targets, recording.targets)}
        made.make(landings, Sources([tensor.clone() for tensor in weights.values()]))
        assert torch.equal(as_bits(targets["experts.w2"]), as_bits(expected["experts.w2"]))
    with pytest.raises(TransferError, match="A weight of 192 bytes came where one of 768 was recorded"):
        made.make(landings, Sources([tensor[:3].clone() for tensor in weights.values()]))


def test_a_target_that_looks_otherwise_than_it_was_recorded_is_refused() -> None:
    case = CASES["stacked rows"]
    recording = case.record()
    targets = {"qkv": torch.zeros(12, 20, dtype=torch.bfloat16)[:, :16]}
    message = (
        r"recorded as bfloat16 \[12, 16\] with strides \[16, 1\], and is bfloat16 \[12, 16\] with strides \[20, 1\]"
    )
    with pytest.raises(TransferError, match=message):
        apply(case, recording, case.weights(), targets)


def test_bits_go_in_integers_of_eight_bytes_where_they_can() -> None:
    recording = CASES["experts' columns"].record()
    form = recording.targets["experts.w2"]
    copy = recording.copies[0]
    assert Move.of(copy, "", 0, (12, 32), form, 2).wide is not None
    assert Move.of(copy, "", 0, (12, 32), form, 8).wide is None
    recording = CASES["stacked rows of odd length"].record()
    assert Move.of(recording.copies[0], "", 0, (8, 5), recording.targets["qkv"], 2).wide is None
