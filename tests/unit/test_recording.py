"""Recordings and strided views as values: what is merged, what is split, what comes over the wire."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_transfer import Recording, record
from weight_transfer.errors import ConfigError, ManifestMismatchError
from weight_transfer.model.manifest import Manifest, ParamMeta
from weight_transfer.model.recording import RecordedCopy, Refusal
from weight_transfer.model.strided import Strided, coalesce, walks_of

COUNTED = settings(max_examples=150, deadline=None, derandomize=True)


def places(view: Strided) -> np.ndarray:
    """The offset of each element."""
    found = np.full(view.shape, view.offset)
    for dim, (size, step) in enumerate(zip(view.shape, view.stride, strict=True)):
        found += (np.arange(size) * step).reshape([-1 if other == dim else 1 for other in range(len(view.shape))])
    return found


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Strided, Strided]:
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 0]), max_size=4)))
    number = st.integers(0, 12)
    one, two = (
        Strided.contiguous(shape)
        if draw(st.booleans())
        else Strided(draw(number), shape, tuple(draw(number) for _ in shape))
        for _ in range(2)
    )
    return one, two


@given(pairs())
@COUNTED
def test_coalescing_keeps_the_pairs_of_elements(both: tuple[Strided, Strided]) -> None:
    merged = coalesce(*both)
    assert merged[0].shape == merged[1].shape and 1 not in merged[0].shape
    assert list(merged[0].stride) == sorted(merged[0].stride, reverse=True) or not merged[0].numel
    before = sorted(zip(*(places(view).flatten().tolist() for view in both), strict=True))
    after = sorted(zip(*(places(view).flatten().tolist() for view in merged), strict=True))
    assert before == after
    if both[0].stride == both[1].stride == Strided.contiguous(both[0].shape).stride and both[0].numel:
        assert len(merged[0].shape) <= 1


TENSORS = {
    "3 by 4": Strided.contiguous((3, 4)),
    "2 by 5": Strided.contiguous((2, 5)),
    "2 by 2 by 3": Strided.contiguous((2, 2, 3)),
    "padded": Strided(0, (3, 3), (4, 1)),
    "transposed": Strided(0, (4, 3), (1, 4)),
    "of one dimension": Strided.contiguous((11,)),
}


@pytest.mark.parametrize("which", TENSORS)
def test_walks_visit_the_elements_of_the_view_in_its_order(which: str) -> None:
    tensor = TENSORS[which]
    inside = set(places(tensor).flatten().tolist())
    found = 0
    for offset, one, step, two, far in itertools.product(range(4), (1, 2, 3, 4), range(7), (2, 3), range(1, 9)):
        view, other = Strided(offset, (two, one), (far, step)), Strided(7, (two, one), (100, 10))
        walks = walks_of(view, tensor, other)
        if walks is None:
            continue
        found += 1
        shape = tuple(walk.size for walk in walks.walks)
        steps = tuple(walk.step * tensor.stride[walk.axis] for walk in walks.walks)
        begin = sum(index * step for index, step in zip(walks.start, tensor.stride, strict=True))
        assert all(index < size for index, size in zip(walks.start, tensor.shape, strict=True))
        seen = places(Strided(begin, shape, steps)).flatten().tolist()
        along = places(Strided(7, shape, tuple(walk.other for walk in walks.walks))).flatten().tolist()
        pairs = zip(places(view).flatten().tolist(), places(other).flatten().tolist(), strict=True)
        assert sorted(zip(seen, along, strict=True)) == sorted(pairs) and set(seen) <= inside, view
    assert found > 20


@given(st.data())
@COUNTED
def test_every_box_of_a_tensor_is_found_again_however_its_dimensions_were_merged(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=4))
    start = [data.draw(st.integers(0, size - 1)) for size in shape]
    sizes = [data.draw(st.integers(1, size - first)) for size, first in zip(shape, start, strict=True)]
    tensor = torch.empty(shape)
    box = tensor[tuple(slice(first, first + size) for first, size in zip(start, sizes, strict=True))]
    order = data.draw(st.permutations(range(len(shape))))
    target = torch.empty([sizes[dim] for dim in order]).permute([order.index(dim) for dim in range(len(shape))])
    to, frm = coalesce(Strided.of(target), Strided.of(box))
    walks = walks_of(frm, Strided.contiguous(shape), to)
    joined = walks.per_axis() if walks is not None else None
    assert walks is not None and joined is not None and [walk.size for walk in joined] == sizes
    assert all(first == given for first, given in zip(walks.start, start, strict=True))
    assert all(walk.step == 1 for walk in joined if walk.size > 1)
    view = Strided(to.offset, tuple(sizes), tuple(walk.other for walk in joined))
    assert places(view).flatten().tolist() == places(Strided.of(target)).flatten().tolist()


def test_what_goes_aslant_has_no_walks() -> None:
    square = Strided.contiguous((4, 4))
    assert walks_of(Strided(0, (4,), (5,)), square) is None  # the diagonal
    assert walks_of(Strided(2, (4,), (1,)), square) is None  # the end of one row and the beginning of the next
    assert walks_of(Strided(16, (1,), (1,)), square) is None  # beyond the end
    assert walks_of(Strided(0, (2, 4), (0, 1)), square) is None  # expanded
    assert walks_of(Strided(0, (2,), (1,)), Strided(0, (2, 2), (1, 1))) is None  # of no tensor of that kind


def test_views_lie_where_the_tensors_lie() -> None:
    buffer = torch.arange(24.0)
    target = torch.empty(2, 3)
    found = RecordedCopy("p", Strided(1, (2,), (3,)), "w", Strided(2, (2,), (4,)), casts=False)
    to, frm = found.views(buffer[4:].view(4, 5), target)
    to.copy_(frm)
    assert target[:, 1].tolist() == [6, 10]
    with pytest.raises(ValueError, match=r"'w' must be contiguous, but has strides \[1, 4\]"):
        found.views(torch.empty(4, 5).t().contiguous().t()[:, :4], target)


@pytest.fixture(scope="module")
def recording() -> Recording:
    own = {name: torch.empty(6, 4, device="meta") for name in ("a", "b", "c", "gap")}

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            if name == "a":
                own["a"][:3].copy_(weight.t())
                own["a"][3:4].fill_(float("-inf"))
                own["a"][4:].fill_(True)
            elif name == "cast":
                own["b"].copy_(weight)
            elif name in ("c", "looked"):
                own["c"].copy_(weight * (2 if name == "c" else weight.item()))
            elif name == "gap":
                own["gap"][:, 1:3].copy_(weight)

    manifest = Manifest(
        [
            ParamMeta("a", "float32", (4, 3)),
            ParamMeta("cast", "bfloat16", (6, 4)),
            ParamMeta("c", "float32", (6, 4)),
            ParamMeta("gap", "float32", (6, 2)),
            ParamMeta("looked", "float32", ()),
            ParamMeta("other", "float32", (2,)),
        ]
    )
    return record(load, manifest, own)


def test_a_recording_survives_the_wire(recording: Recording) -> None:
    again = Recording.from_wire(json.loads(json.dumps(recording.to_wire(), allow_nan=False)), recording.manifest)
    for field in ("manifest", "targets", "copies", "fills", "refused", "failed", "unused", "uncovered", "digest"):
        assert getattr(again, field) == getattr(recording, field), field
    assert [fill.value for fill in again.fills] == [float("-inf"), True]
    assert again.refused == {"c": Refusal("c", ("c",), "aten.mul computes with 'c'")}
    assert again.boxes("gap") == recording.boxes("gap") and again.boxes("cast") is None
    assert set(again.failed) == {"looked", "other"} and again.uncovered == {"gap": (12, 24)}


def test_other_loads_have_other_digests(recording: Recording) -> None:
    data = recording.to_wire()
    data["copies"][0][1] += 1
    data["copies"][0][6] = [1, 1]
    assert len(recording.digest) == 32
    assert Recording.from_wire(data, recording.manifest).digest != recording.digest


def put(*path: object, value: object) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


WRONG = {
    "a key too many": (put("more", value=1), "holds exactly manifest, targets"),
    "copies as a table": (put("copies", value={}), "a list was expected"),
    "a row too short": (put("copies", 0, value=["a"]), "malformed"),
    "an unknown source": (put("copies", 0, 3, value="nobody"), "names the unknown 'nobody'"),
    "an unknown target": (put("copies", 0, 0, value="nobody"), "names the unknown 'nobody'"),
    "a source that is no text": (put("copies", 0, 3, value=[]), "a text was expected"),
    "a negative stride": (put("copies", 0, 2, value=[-1]), "whole numbers of at least 0"),
    "a fraction": (put("copies", 0, 1, value=1.0), "whole numbers of at least 0"),
    "a truth value for a number": (put("copies", 0, 1, value=True), "whole numbers of at least 0"),
    "a target overrun": (put("copies", 0, 1, value=13), "written beyond the end of 'a'"),
    "a source overrun": (put("copies", 0, 4, value=1), "reads beyond the end of 'a'"),
    "too many dimensions": (put("copies", 0, 6, value=[1, 1, 1, 1]), "at most 3"),
    "a fill overrun": (put("fills", 0, 1, value=24), "written beyond the end of 'a'"),
    "a text for a value": (put("fills", 0, 4, value="1"), "a fill needs a number"),
    "a refused target that is written": (put("fills", 0, 0, value="c"), "target 'c' is refused and written"),
    "a failed source that is copied": (put("failed", "a", value="why"), "'a' is copied, and left to the loader"),
    "a dtype that does not exist": (put("targets", "a", 0, value="float33"), "torch has no dtype 'float33'"),
    "strides too few": (put("targets", "a", 2, value=[1]), "has shape"),
    "a reason that is no text": (put("refused", "c", 1, value=None), "a text was expected"),
    "a refusal of nobody": (put("refused", "nobody", value=[[], "why"]), "names the unknown 'nobody'"),
    "an unused stranger": (put("unused", value=["nobody"]), "names the unknown 'nobody'"),
    "three counts": (put("uncovered", "gap", value=[1, 2, 3]), "malformed"),
}


@pytest.mark.parametrize("what", WRONG)
def test_malformed_recordings_are_refused_in_words(recording: Recording, what: str) -> None:
    change, message = WRONG[what]
    data = copy.deepcopy(recording.to_wire())
    change(data)
    with pytest.raises(ConfigError, match=message) as caught:
        Recording.from_wire(data, recording.manifest)
    assert str(caught.value).endswith("record the loader again.") and "\n" not in str(caught.value)


def test_recordings_of_other_weights_are_refused(recording: Recording) -> None:
    with pytest.raises(ManifestMismatchError, match="of other weights"):
        Recording.from_wire(recording.to_wire(), recording.manifest.without(["other"]))
    with pytest.raises(ConfigError, match="holds exactly"):
        Recording.from_wire([], recording.manifest)
