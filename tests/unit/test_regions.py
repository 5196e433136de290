"""Regions: boxes of a parameter, compared with numpy's own indexing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.layouts import SHAPES, cuts
from weight_transfer.model.regions import Region

COUNTED = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    offset = [draw(st.integers(0, size)) for size in shape]
    return Region(offset, [draw(st.integers(0, size - start)) for size, start in zip(shape, offset, strict=True)])


def marked(region: Region, shape: tuple[int, ...]) -> np.ndarray:
    found = np.zeros(shape, dtype=bool)
    found[region.slices] = True
    return found


@given(st.data(), SHAPES)
@COUNTED
def test_an_intersection_is_what_both_regions_index(data: st.DataObject, shape: tuple[int, ...]) -> None:
    one, other = data.draw(boxes(shape)), data.draw(boxes(shape))
    common = one.intersect(other)
    both = marked(one, shape) & marked(other, shape)
    assert one.volume == marked(one, shape).sum()
    if common is None:
        assert not both.any()
    else:
        assert (marked(common, shape) == both).all() and common == other.intersect(one)


@given(st.data(), SHAPES)
@COUNTED
def test_cuts_cover_a_parameter_once(data: st.DataObject, shape: tuple[int, ...]) -> None:
    count = np.zeros(shape, dtype=int)
    for region in data.draw(cuts(shape)):
        assert region.fits(shape)
        count[region.slices] += 1
    assert (count == 1).all()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 5), st.data())
@COUNTED
def test_a_split_has_the_sizes_of_torch_chunk_and_empty_parts_after_them(
    shape: list[int], count: int, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    whole = torch.arange(int(np.prod(shape))).reshape(shape)
    chunks = [chunk for chunk in whole.chunk(count, dim) if chunk.numel()]
    for index in range(count):
        region = Region.split(shape, dim, index, count)
        part = whole[region.slices]
        assert region.fits(shape) and region.shape == tuple(part.shape)
        assert torch.equal(part, chunks[index]) if index < len(chunks) else not part.numel()


def test_a_scalar_has_one_region() -> None:
    region = Region.whole(())
    assert region == Region((), ()) and region.volume == 1 and region.fits(()) and not region.fits((1,))
    assert region.intersect(region) == region and str(region) == "[]" and np.array(7)[region.slices] == 7


def test_a_region_fits_no_smaller_parameter() -> None:
    region = Region((1, 0), (2, 3))
    assert region.fits((3, 3)) and str(region) == "[1:3, 0:3]"
    assert not region.fits((2, 3)) and not region.fits((3, 2)) and not region.fits((3, 3, 1)) and not region.fits((3,))


@pytest.mark.parametrize(("offset", "shape"), [((0,), (1, 2)), ((-1,), (2,)), ((0,), (-2,)), ((), (1,))])
def test_offset_and_shape_go_together(offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"an offset and a size per dimension, of at least 0, got \["):
        Region(offset, shape)


def test_halves_of_an_element_are_refused() -> None:
    with pytest.raises(TypeError):
        Region((0,), (1.5,))
    assert Region(torch.Size([0]), np.array([3])) == Region((0,), (3,))


@pytest.mark.parametrize(("dim", "index", "count"), [(2, 0, 1), (-3, 0, 1), (0, 2, 2), (0, -1, 2), (0, 0, 0)])
def test_a_part_that_does_not_exist_is_refused(dim: int, index: int, count: int) -> None:
    with pytest.raises(ValueError, match=rf"part {index} of {count} along dimension {dim} of \[4, 4\] does not exist"):
        Region.split((4, 4), dim, index, count)
