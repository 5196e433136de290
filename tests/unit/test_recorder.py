"""Recorder: what it says of a loader, replayed and compared bit for bit with what the loader does to real tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weight_transfer.errors import ConfigError, TransferError
from weight_transfer.model.manifest import Manifest, ParamMeta, dtype_name
from weight_transfer.model.recorder import record
from weight_transfer.model.recording import Recording
from weight_transfer.model.strided import Strided

COUNTED = settings(max_examples=150, deadline=None, derandomize=True)

Tensors = Mapping[str, torch.Tensor]
Weights = Sequence[tuple[str, torch.Tensor]]
Loader = Callable[[Tensors], Callable[[Weights], object]]


def manifest_of(sources: Tensors) -> Manifest:
    return Manifest(ParamMeta(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in sources.items())


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Any bits: NaNs with payloads, infinities and denormal numbers among them."""
    size = torch.empty((), dtype=dtype).element_size()
    found = torch.randint(0, 256, (*shape, size), dtype=torch.uint8).view(dtype).reshape(shape)
    assert found.is_contiguous()
    return found


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def checked(loader: Loader, sources: Tensors, shapes: Tensors, refused: Sequence[str] = ()) -> Recording:
    """Record with targets on ``meta`` and with real ones, and compare a replay with the loader itself."""
    manifest = manifest_of(sources)
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in shapes.items()}
    recording = record(loader(meta), manifest, meta)
    own = {name: torch.full_like(tensor, 3) for name, tensor in shapes.items()}
    again = record(loader(own), manifest, own)
    assert again.to_wire() == recording.to_wire() and again.digest == recording.digest
    assert Recording.from_wire(json.loads(json.dumps(recording.to_wire())), manifest).digest == recording.digest
    for name, tensor in own.items():
        assert bits(tensor) == bits(torch.full_like(tensor, 3)), f"recording wrote into {name}"
    real = {name: torch.full_like(tensor, 3) for name, tensor in shapes.items()}
    with torch.no_grad():
        loader(real)([(name, tensor.clone()) for name, tensor in sources.items()])
    recording.replay(sources, own)
    assert set(recording.refused) == set(refused), recording.refused
    for name, tensor in own.items():
        if name not in refused:
            assert bits(tensor) == bits(real[name]), name
    check_boxes(recording, sources)
    return recording


def check_boxes(recording: Recording, sources: Tensors) -> None:
    """Boxes of a source hold what its copies move, and lead to the same places."""
    for name, source in sources.items():
        boxes = recording.boxes(name)
        if boxes is None:
            continue
        moved, copied = {}, {}
        numbers = torch.arange(source.numel()).reshape(source.shape)
        for region, target, view in boxes:
            places = places_of(view)
            assert places.shape == region.shape
            moved |= {
                (target, place): int(value)
                for place, value in zip(places.flatten().tolist(), numbers[region.slices].flatten(), strict=True)
            }
        for copy in recording.by_source.get(name, ()):
            pairs = zip(places_of(copy.to).flatten().tolist(), places_of(copy.frm).flatten().tolist(), strict=True)
            copied |= {(copy.target, to): frm for to, frm in pairs}
        assert moved == copied, name


def places_of(view: Strided) -> torch.Tensor:
    return torch.arange(max(view.end, 1)).as_strided(view.shape, view.stride, view.offset)


def test_parts_of_fused_weights_are_recorded() -> None:
    def loader(own: Tensors) -> Callable[[Weights], object]:
        def load(weights: Weights) -> None:
            for name, weight in weights:
                own["p"].narrow(0, 8 * "qkv".index(name), 8).copy_(weight.chunk(2, 1)[1])

        return load

    sources = {name: random(8, 8, dtype=torch.bfloat16) for name in "qkv"}
    recording = checked(loader, sources, {"p": torch.empty(24, 4, dtype=torch.bfloat16)})
    assert [copy.to for copy in recording.copies] == [Strided(32 * n, (8, 4), (4, 1)) for n in range(3)]
    assert [copy.frm for copy in recording.copies] == [Strided(4, (8, 4), (8, 1))] * 3
    assert not recording.uncovered and not recording.unused and not recording.failed
    (box,) = recording.boxes("v") or []
    assert str(box[0]) == "[0:8, 4:8]" and box[1:] == ("p", Strided(64, (8, 4), (4, 1)))


def test_a_fused_source_is_split_over_targets_and_experts_are_stacked() -> None:
    def loader(own: Tensors) -> Callable[[Weights], object]:
        def load(weights: Weights) -> None:
            for name, weight in weights:
                if name == "qkv":
                    for target, part in zip("qkv", weight.split([4, 2, 2]), strict=True):
                        own[target].copy_(part)
                elif int(name) < 3:  # the others are another rank's
                    own["w"][int(name)].copy_(weight[:, 2:4].t())

        return load

    sources = {"qkv": random(8, 3)} | {str(expert): random(3, 6) for expert in range(6)}
    shapes = {"q": torch.empty(4, 3), "k": torch.empty(2, 3), "v": torch.empty(2, 3), "w": torch.empty(3, 2, 3)}
    recording = checked(loader, sources, shapes)
    assert recording.unused == {"3", "4", "5"} and recording.boxes("4") == []
    assert [str(region) for region, _, _ in recording.boxes("qkv") or []] == ["[0:4, 0:3]", "[4:6, 0:3]", "[6:8, 0:3]"]
    assert [str(region) for region, _, _ in recording.boxes("2") or []] == ["[0:3, 2:4]"]


LOADS: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "transposed": lambda own, w: own.copy_(w.t()),
    "transposed and contiguous": lambda own, w: own.view(-1).copy_(w.t().contiguous().view(-1)),
    "reshaped after a transposition": lambda own, w: own.copy_(w.t().reshape(-1).view(6, 4)),
    "cloned, then cut": lambda own, w: [
        own[:, n].copy_(w.t().clone().view(3, 2, 4)[:, :, n].reshape(-1)) for n in range(4)
    ],
    "moved": lambda own, w: own.copy_(w.t().to(own.device, copy=True)),
    "by foreach": lambda own, w: torch._foreach_copy_([own[:2], own[2:]], [w.t()[:2], w.t()[2:]]),
    "by assignment": lambda own, w: own.__setitem__(slice(None), w.t()),
    "as integers on both sides": lambda own, w: own.view(torch.int32).copy_(w.view(torch.int32).t()),
    "in inference mode": lambda own, w: torch.inference_mode()(lambda: own.copy_(w.t().contiguous()))(),
    "row by row": lambda own, w: [own[row].copy_(w[:, row]) for row in range(6)],
    "with gradients on": lambda own, w: torch.enable_grad()(lambda: own.data.copy_(w.t()))(),
}


@pytest.mark.parametrize("how", LOADS)
def test_ways_to_copy(how: str) -> None:
    def loader(own: Tensors) -> Callable[[Weights], object]:
        return lambda weights: [LOADS[how](own["p"], weight) for _, weight in weights]

    recording = checked(loader, {"w": random(4, 6)}, {"p": torch.empty(6, 4)})
    assert not recording.uncovered and recording.boxes("w")


COMPUTED: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "doubled": lambda own, w: own.copy_(w * 2),
    "by index": lambda own, w: own.copy_(w[[1, 0]]),
    "by index_select": lambda own, w: own.copy_(torch.index_select(w, 0, torch.tensor([1, 0]))),
    "multiplied in place afterwards": lambda own, w: own.copy_(w).mul_(2),
    "doubled in a copy": lambda own, w: own.copy_(w.clone().mul_(2)),
    "doubled in the source": lambda own, w: own.copy_(w.mul_(2)),
    "by way of a buffer": lambda own, w: own.copy_(torch.empty(2, 2).copy_(w)),
    "by out=": lambda own, w: torch.mul(w, 2, out=own),
    "by index_copy_": lambda own, w: own.index_copy_(0, torch.tensor([0, 1]), w),
    "there and back": lambda own, w: own.copy_(w.to(torch.float64)),
    "by way of fewer bits": lambda own, w: own.copy_(w.to(torch.bfloat16).to(torch.float32)),
    "as other bits": lambda own, w: own.copy_(w.view(torch.int32)),
    "with an offset of its own": lambda own, w: own.copy_(w + own),
    "read back": lambda own, w: own.copy_(own.copy_(w).t().clone()),
    "from a target that it has written": lambda own, w: own.copy_(torch.empty(2, 2).copy_(own.copy_(w)).t()),
    "stacked": lambda own, w: own.copy_(torch.stack([w[0], w[1]])),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_what_is_computed_is_refused_by_name(how: str) -> None:
    def loader(own: Tensors) -> Callable[[Weights], object]:
        def load(weights: Weights) -> None:
            for name, weight in weights:
                if name == "w":
                    COMPUTED[how](own["p"], weight)
                else:
                    own["other"].copy_(weight)

        return load

    sources = {"w": random(2, 2), "plain": random(3)}
    recording = checked(loader, sources, {"p": torch.empty(2, 2), "other": torch.empty(3)}, refused=["p"])
    assert recording.refused["p"].sources == ("w",) and recording.refused["p"].reason
    assert recording.boxes("w") is None and recording.for_loader == {"w"}
    assert not recording.unused and not recording.uncovered and [copy.source for copy in recording.copies] == ["plain"]


def test_an_operation_on_two_sources_names_both() -> None:
    def loader(own: Tensors) -> Callable[[Weights], object]:
        return lambda weights: own["p"].copy_(torch.cat([dict(weights)["a"], dict(weights)["b"]]))

    recording = checked(loader, {"a": random(2), "b": random(2)}, {"p": torch.empty(4)}, refused=["p"])
    assert recording.refused["p"].sources == ("a", "b") and "'a' and 'b'" in recording.refused["p"].reason


def test_what_is_computed_from_another_target_needs_the_sources_of_that() -> None:
    def loader(own: Tensors) -> Callable[[Weights], object]:
        def load(weights: Weights) -> None:
            own["p"].copy_(weights[0][1])
            own["double"].copy_(own["p"] * 2)
            own["same"].copy_(own["p"])

        return load

    shapes = {name: torch.empty(2) for name in ("p", "double", "same")}
    recording = checked(loader, {"w": random(2)}, shapes, refused=["double", "same"])
    assert recording.refused["double"].sources == recording.refused["same"].sources == ("w",)


def test_four_dimensions_are_too_many() -> None:
    def loader(own: Tensors) -> Callable[[Weights], object]:
        return lambda weights: own["p"].copy_(weights[0][1].permute(3, 2, 1, 0))

    recording = checked(loader, {"w": random(2, 3, 2, 3)}, {"p": torch.empty(3, 2, 3, 2)}, refused=["p"])
    assert "no even steps" in recording.refused["p"].reason


def test_a_box_whose_rows_lie_apart_in_the_target_goes_whole() -> None:
    def loader(own: Tensors) -> Callable[[Weights], object]:
        return lambda weights: own["p"][:, :4].copy_(weights[0][1].view(2, 4))

    recording = checked(loader, {"w": random(8)}, {"p": torch.empty(2, 5)})
    assert recording.boxes("w") is None and len(recording.copies) == 1


def test_casts_in_one_step_are_recorded() -> None:
    def loader(own: Tensors) -> Callable[[Weights], object]:
        def load(weights: Weights) -> None:
            for name, weight in weights:
                own[name].copy_(weight if name == "a" else weight.to(torch.float32).t())

        return load

    sources = {"a": random(4, 4, dtype=torch.bfloat16), "b": random(4, 4, dtype=torch.bfloat16)}
    recording = checked(loader, sources, {"a": torch.empty(4, 4), "b": torch.empty(4, 4)})
    assert [copy.casts for copy in recording.copies] == [True, True]
    assert recording.boxes("a") is None and not recording.for_loader


def test_fills_gaps_and_double_writes() -> None:
    def loader(own: Tensors) -> Callable[[Weights], object]:
        def load(weights: Weights) -> None:
            for name, weight in weights:
                if name == "padded":
                    own[name][:2].copy_(weight)
                    own[name][2:3].fill_(float("nan"))
                    own[name][3:4].zero_()
                    own[name][4:] = -1.5
                elif name == "gap":
                    own[name][1:].copy_(weight)
                elif name == "twice":
                    own[name].zero_()
                    own[name][:1].copy_(weight)

        return load

    sources = {"padded": random(2, 3), "gap": random(2, 3), "twice": random(1, 3), "nowhere": random(2)}
    shapes = {
        "padded": torch.empty(6, 3),
        "gap": torch.empty(4, 3)[1:],
        "twice": torch.empty(2, 3),
        "left": torch.empty(5),
    }
    recording = checked(loader, sources, shapes, refused=["twice"])
    assert [fill.value for fill in recording.fills[1:]] == [0, -1.5] and len(recording.fills) == 3
    assert recording.uncovered == {"gap": (6, 9), "left": (0, 5)} and recording.unused == {"nowhere"}
    assert recording.refused["twice"].reason == "it is written twice in one place, from the value 0 and from 'twice'"
    assert recording.refused["twice"].sources == ("twice",)


def test_a_source_that_is_overwritten_with_a_value_is_a_fill() -> None:
    def loader(own: Tensors) -> Callable[[Weights], object]:
        def load(weights: Weights) -> None:
            for name, weight in weights:
                if name == "cleared":  # as biases are on all ranks but the first
                    weight.zero_()
                elif name == "rounded":
                    weight.fill_(0.1)
                elif name == "in part":
                    weight[0].zero_()
                own[name].copy_(weight)

        return load

    sources = {name: random(2, 3, dtype=torch.bfloat16) for name in ("cleared", "rounded", "in part")}
    shapes = {name: torch.empty(2, 3) for name in sources}
    recording = checked(loader, sources, shapes, refused=["in part"])
    assert [fill.value for fill in recording.fills] == [0, 0.10009765625] and not recording.copies
    assert recording.unused == {"cleared", "rounded"} and not recording.uncovered


def test_interleaved_writes_lie_apart() -> None:
    def loader(own: Tensors) -> Callable[[Weights], object]:
        def load(weights: Weights) -> None:
            for name, weight in weights:
                own["p"][:, int(name) :: 2].copy_(weight)

        return load

    recording = checked(loader, {"0": random(2, 4, 3), "1": random(2, 4, 3)}, {"p": torch.empty(2, 8, 3)})
    assert not recording.uncovered and len(recording.copies) == 2
    assert recording.boxes("1") is not None


def test_writes_between_the_rows_of_a_target_do_not_count() -> None:
    target = torch.zeros(2, 3)[:, :2]
    recording = record(lambda _: target.as_strided((4,), (1,)).fill_(1), Manifest(()), {"p": target})
    assert recording.uncovered == {"p": (3, 4)}
    folded = record(lambda _: target.as_strided((2, 2), (1, 1)).fill_(1), Manifest(()), {"p": target})
    assert folded.refused["p"].reason == "it is written twice in one place, from the value 1 and from the value 1"
    dense = torch.zeros(3)
    folded = record(lambda _: dense.as_strided((2, 2), (1, 1)).fill_(1), Manifest(()), {"p": dense})
    assert set(folded.refused) == {"p"}


def test_a_literal_that_is_changed_is_no_constant() -> None:
    def loader(own: Tensors) -> Callable[[Weights], object]:
        def load(weights: Weights) -> None:
            value = torch.tensor(2.0)
            own["p"].fill_(value)
            own["q"].fill_(value.mul_(2))

        return load

    recording = checked(loader, {}, {"p": torch.empty(2), "q": torch.empty(2)}, refused=["q"])
    assert [fill.value for fill in recording.fills] == [2]


def test_two_writes_that_cross_are_refused() -> None:
    def loader(own: Tensors) -> Callable[[Weights], object]:
        def load(weights: Weights) -> None:
            for name, weight in weights:
                (own["p"][::2] if name == "a" else own["p"][::3]).copy_(weight)

        return load

    recording = checked(loader, {"a": random(6, 2), "b": random(4, 2)}, {"p": torch.empty(12, 2)}, refused=["p"])
    assert recording.refused["p"].reason == "it is written twice in one place, from 'a' and from 'b'"


def test_scalars_and_empty_weights() -> None:
    def loader(own: Tensors) -> Callable[[Weights], object]:
        def load(weights: Weights) -> None:
            for name, weight in weights:
                own[name].fill_(weight) if name == "spread" else own[name].copy_(weight)

        return load

    sources = {"scalar": random(), "one": random(1), "empty": random(0, 3), "spread": random()}
    shapes = {"scalar": torch.empty(()), "one": torch.empty(1), "empty": torch.empty(0, 3), "spread": torch.empty(2, 3)}
    recording = checked(loader, sources, shapes)
    assert not recording.uncovered and recording.unused == {"empty"} and recording.boxes("spread") is None
    ((region, _, view),) = recording.boxes("scalar") or []
    assert region.shape == view.shape == ()


def test_weights_of_one_buffer_are_told_apart() -> None:
    buffer = torch.zeros(10, 4)

    def loader(own: Tensors) -> Callable[[Weights], object]:
        def load(weights: Weights) -> None:
            for name, weight in weights:
                own[name].copy_(weight)

        return load

    own = {"a": buffer[1:4], "b": buffer[4:9]}
    sources = {"a": random(3, 4), "b": random(5, 4)}
    recording = record(loader(own), manifest_of(sources), own)
    assert not recording.uncovered and not recording.refused and not buffer.any()
    recording.replay(sources, own)
    assert bits(buffer[1:9]) == bits(torch.cat([sources["a"], sources["b"]]))
    beyond = record(lambda weights: buffer[:3].copy_(weights[0][1]), manifest_of(sources), own)
    assert set(beyond.refused) == {"a"} and "other memory" in beyond.refused["a"].reason
    both = record(lambda weights: buffer[3:5].copy_(weights[0][1][:2]), manifest_of(sources), own)
    assert set(both.refused) == {"a", "b"} and both.refused["b"].sources == ("a",) and both.unused == {"b"}


def test_one_memory_under_two_names_is_an_error() -> None:
    tensor = torch.zeros(3)
    with pytest.raises(ConfigError, match=r"'a' and 'b' are one tensor"):
        record(lambda weights: None, Manifest(()), {"a": tensor, "b": tensor.detach()})


def copying(own: Tensors) -> Callable[[Weights], object]:
    return lambda weights: [own[name].copy_(weight) for name, weight in weights]


def test_a_source_that_is_looked_into_is_left_out() -> None:
    def load(weights: Weights) -> None:
        for name, weight in weights:
            if name.startswith("looked") and weight.max() > 0:
                raise AssertionError
            if name == "caught":
                try:
                    weight.sum().item()
                except RuntimeError:
                    continue
            if name == "unfit":
                weight.view(17)
            own[name].copy_(weight)

    sources = {name: random(2, 2) for name in ("a", "looked at", "b", "looked too", "unfit", "caught", "c")}
    own = {name: torch.zeros(2, 2) for name in sources}
    recording = record(load, manifest_of(sources), own)
    assert list(recording.failed) == ["looked at", "looked too", "unfit", "caught"]
    assert "Tensor.item()" in recording.failed["looked too"] and "17" in recording.failed["unfit"]
    assert "looks into it" in recording.failed["caught"]
    assert set(recording.uncovered) == set(recording.failed) and not recording.unused
    assert {copy.source for copy in recording.copies} == {"a", "b", "c"} and recording.boxes("unfit") is None


def test_a_source_that_may_be_needed_beside_a_failed_one_is_not_unused() -> None:
    def load(weights: Weights) -> None:
        waiting = {}
        for name, weight in weights:
            if name == "looked at":
                weight.tolist()
            waiting[name] = weight
        if len(waiting) == 2:
            own["p"].copy_(waiting["other"])

    own = {"p": torch.zeros(2)}
    recording = record(load, manifest_of({"other": random(2), "looked at": random(2)}), own)
    assert set(recording.failed) == {"looked at", "other"} and not recording.unused


def test_a_loader_that_never_works_is_an_error() -> None:
    def broken(weights: Weights) -> None:
        raise OSError("no disk")

    def chained(weights: Weights) -> None:
        if len(weights) > 2:
            weights[-1][1].item()

    def generator(weights: Weights) -> object:
        yield from weights

    manifest = manifest_of({str(n): random(1) for n in range(20)})
    with pytest.raises(ConfigError, match=r"fails before it takes a weight.*no disk"):
        record(broken, manifest, {})
    with pytest.raises(ConfigError, match=r"fails at 8 weights without bytes, such as '19'"):
        record(chained, manifest, {})
    with pytest.raises(ConfigError, match="generator function"):
        record(generator, manifest, {})
    with pytest.raises(TransferError, match="must be done when it returns"):
        record(iter, manifest, {})


def test_what_the_loader_keeps_is_not_unused() -> None:
    kept: list[object] = []
    buffer = torch.zeros(2)

    def load(weights: Weights) -> None:
        for name, weight in weights:
            if name == "view":
                kept.append(weight[:1])
            elif name == "sum":
                kept.append(weight.sum())
                own["p"].copy_(weight)
            elif name == "buffered":
                buffer.copy_(weight)
            elif name == "dropped":
                weight.sum()

    own = {"p": torch.zeros(2)}
    sources = {name: random(2) for name in ("view", "sum", "buffered", "dropped")}
    recording = record(load, manifest_of(sources), own)
    assert set(recording.failed) == set(sources) and not recording.unused and not buffer.any()
    assert (
        recording.refused["p"].sources == ("sum",) and "also keeps something of 'sum'" in recording.refused["p"].reason
    )
    assert "may need it along" in recording.failed["dropped"] and "buffered" in recording.failed["buffered"]


class Quantising(nn.Module):
    """Replaces its parameters while it loads, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a = nn.Parameter(torch.zeros(4, 4, device="meta"))
        self.b = nn.Parameter(torch.zeros(4, 4, device="meta"))

    def load_weights(self, weights: Weights) -> None:
        for name, weight in weights:
            getattr(self, name).data.copy_(weight)
            if name == "b":
                continue
            if self.how == "object":
                self.a = nn.Parameter(torch.zeros(4, 4, dtype=torch.float16))
            elif self.how == "data":
                self.a.data = self.a.data * 2
            elif self.how == "source":
                self.a.data = weight
            elif self.how == "transposed":
                self.a.data = self.a.data.t()
            elif self.how == "removed":
                del self.a


@pytest.mark.parametrize("how", ["object", "data", "source", "transposed", "removed"])
def test_a_target_that_the_loader_replaces_is_refused(how: str) -> None:
    model = Quantising(how)
    own = dict(model.named_parameters())
    manifest = manifest_of({name: tensor.detach() for name, tensor in own.items()})
    recording = record(model.load_weights, manifest, lambda: dict(model.named_parameters()))
    assert set(recording.refused) == {"a"} and recording.refused["a"].sources == ("a",)
    assert "the loader replaces it" in recording.refused["a"].reason or "other memory" in recording.refused["a"].reason
    assert [copy.target for copy in recording.copies] == ["b"] and not recording.unused


def test_what_is_no_plain_tensor_is_refused() -> None:
    own = {"sparse": torch.zeros(2, 2).to_sparse(), "plain": torch.zeros(2)}
    recording = record(lambda weights: own["plain"].copy_(weights[0][1]), manifest_of({"w": random(2)}), own)
    assert set(recording.refused) == {"sparse"} and "sparse" in recording.refused["sparse"].reason
    assert recording.by_target.keys() == {"plain"}
    assert Recording.from_wire(recording.to_wire(), recording.manifest).digest == recording.digest


def test_tied_weights_are_given_once() -> None:
    given: list[str] = []

    def load(weights: Weights) -> None:
        given.extend(name for name, _ in weights)
        for name, weight in weights:
            if name == "embed":
                own["embed"].copy_(weight)

    own = {"embed": torch.zeros(3, 2)}
    recording = record(load, Manifest([ParamMeta("embed", "float32", (3, 2))], {"head": "embed"}), own)
    assert given == ["embed"] and not recording.uncovered and not recording.unused


STEPS = ("narrow", "transpose", "chunk", "view", "select", "step", "clone", "contiguous", "cast")


@st.composite
def views(draw: st.DrawFn, depth: int) -> list[tuple[str, int, int]]:
    number = st.integers(0, 5)
    return [draw(st.tuples(st.sampled_from(STEPS), number, number)) for _ in range(depth)]


def seen(tensor: torch.Tensor, steps: Sequence[tuple[str, int, int]], copies: bool) -> torch.Tensor:
    """Apply steps that fit the tensor's shape, whatever it is."""
    for step, a, b in steps:
        dims = tensor.dim()
        dim, size = (a % dims, tensor.shape[a % dims]) if dims else (0, 0)
        if step == "narrow" and size:
            tensor = tensor.narrow(dim, b % size, 1 + (size - b % size - 1) // 2)
        elif step == "transpose" and dims:
            tensor = tensor.transpose(dim, b % dims)
        elif step == "chunk" and dims:
            parts = tensor.chunk(2, dim)
            tensor = parts[b % len(parts)]
        elif step == "view" and dims and size % 2 == 0:
            tensor = tensor.unflatten(dim, (2, size // 2)) if b % 2 else tensor
        elif step == "select" and size > 1:
            tensor = tensor.select(dim, b % size)
        elif step == "step" and dims:
            index = [slice(None)] * dims
            index[dim] = slice(b % 2, None, 2)
            tensor = tensor[tuple(index)]
        elif step in ("clone", "contiguous") and copies:
            tensor = tensor.clone() if step == "clone" else tensor.contiguous()
    return tensor


@given(st.data())
@COUNTED
def test_any_view_of_a_source_in_any_view_of_a_target_is_replayed(data: st.DataObject) -> None:
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int16, torch.uint8])
    shape = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)
    count = data.draw(st.integers(1, 3))
    to_dtype, frm_dtype = data.draw(dtypes), data.draw(dtypes)
    if frm_dtype.is_floating_point != to_dtype.is_floating_point:
        frm_dtype = to_dtype
    sources = {str(n): random(*data.draw(shape), dtype=frm_dtype) for n in range(count)}
    shapes = {str(n): torch.empty(data.draw(shape), dtype=to_dtype) for n in range(count)}
    steps = {name: (data.draw(views(5)), data.draw(views(5))) for name in sources}

    def loader(own: Tensors) -> Callable[[Weights], object]:
        def load(weights: Weights) -> None:
            for name, weight in weights:
                frm, to = seen(weight, steps[name][0], copies=True), seen(own[name], steps[name][1], copies=False)
                while frm.dim() != to.dim():
                    frm, to = (frm[..., None], to) if frm.dim() < to.dim() else (frm, to[..., None])
                both = tuple(slice(min(one, two)) for one, two in zip(frm.shape, to.shape, strict=True))
                to[both].copy_(frm[both])

        return load

    with torch.no_grad():
        recording = record(loader(shapes), manifest_of(sources), shapes)
    uneven = [name for name, refusal in recording.refused.items() if "no even steps" in refusal.reason]
    checked(loader, sources, shapes, refused=uneven)
    assert not recording.failed


@given(st.data())
@COUNTED
def test_overlaps_and_gaps_are_those_of_the_elements(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3))
    steps = data.draw(st.lists(views(4), min_size=1, max_size=4))
    padded = data.draw(st.booleans())

    def own() -> torch.Tensor:
        whole = torch.zeros(shape, dtype=torch.int32)
        return torch.zeros([*shape[:-1], shape[-1] + 1], dtype=torch.int32)[..., :-1] if padded else whole

    counted = own()
    for each in steps:
        seen(counted, each, copies=False).add_(1)
    target = own()
    recording = record(
        lambda _: [seen(target, each, copies=False).fill_(n) for n, each in enumerate(steps)],
        Manifest(()),
        {"p": target},
    )
    if bool((counted > 1).any()):
        assert "written twice" in recording.refused["p"].reason
    else:
        written = int(counted.sum())
        expected = {} if written == counted.numel() else {"p": (written, counted.numel())}
        assert not recording.refused and recording.uncovered == expected
