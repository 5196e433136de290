"""The manifest: what is sent, in which order, with a digest that both sides can compare."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_transfer import Manifest, ManifestMismatchError, ParamMeta
from weight_transfer.model.manifest import dtype_name, torch_dtype

DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "int8", "bool", "complex64")
METAS = st.builds(
    ParamMeta,
    name=st.text(min_size=1, max_size=12),
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 9), max_size=4),
)
MANIFESTS = st.lists(METAS, min_size=1, max_size=6, unique_by=lambda meta: meta.name).map(Manifest)
THREE = (ParamMeta("a", "float32", (2, 3)), ParamMeta("b", "bfloat16", (4,)), ParamMeta("c", "int8", ()))


@given(MANIFESTS)
@settings(max_examples=60, deadline=None)
def test_a_manifest_comes_back_from_json_with_the_same_digest(manifest: Manifest) -> None:
    again = Manifest.from_wire(json.loads(json.dumps(manifest.to_wire())))
    assert again == manifest
    assert again.digest == manifest.digest
    assert len(manifest.digest) == 32


@given(MANIFESTS, st.data())
@settings(max_examples=60, deadline=None)
def test_the_digest_notices_every_change(manifest: Manifest, data: st.DataObject) -> None:
    params = list(manifest.params)
    index = data.draw(st.integers(0, len(params) - 1))
    meta = params[index]
    changed = data.draw(
        st.sampled_from(
            [
                ParamMeta(meta.name + "x", meta.dtype, meta.shape),
                ParamMeta(meta.name, "float64", meta.shape),
                ParamMeta(meta.name, meta.dtype, (*meta.shape, 1)),
                ParamMeta(meta.name, meta.dtype, (1, *meta.shape))
                if set(meta.shape) != {1}
                else ParamMeta(meta.name, "int16", ()),
            ]
        )
    )
    others = {other.name for other in params} - {meta.name}
    if changed.name not in others:
        assert Manifest([*params[:index], changed, *params[index + 1 :]]).digest != manifest.digest
    assert Manifest([*params[:index], *params[index + 1 :]]).digest != manifest.digest


@given(MANIFESTS, st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_digest_depends_on_the_order(manifest: Manifest, random: Any) -> None:
    shuffled = list(manifest.params)
    random.shuffle(shuffled)
    assert (Manifest(shuffled).digest == manifest.digest) is (tuple(shuffled) == manifest.params)


def test_the_digest_is_the_same_in_every_process_and_release() -> None:
    assert Manifest(THREE).digest == "3d243839087e0ed1b1d09eacca807875"


def test_shapes_that_hold_equally_many_elements_differ_in_digest() -> None:
    digests = {Manifest([ParamMeta("a", "float32", shape)]).digest for shape in [(6,), (2, 3), (3, 2), (1, 6), (6, 1)]}
    assert len(digests) == 5


def test_a_names_border_cannot_move_unnoticed() -> None:
    first = Manifest([ParamMeta("a,b", "int8", ()), ParamMeta("c", "int8", ())])
    second = Manifest([ParamMeta("a", "int8", ()), ParamMeta("b,c", "int8", ())])
    assert first.digest != second.digest


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.complex64, torch.uint16]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (5, 7)])
def test_the_bytes_of_a_parameter_are_those_of_torchs_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.empty(shape, dtype=dtype)
    assert ParamMeta("a", dtype_name(dtype), shape).nbytes == tensor.numel() * tensor.element_size()
    assert torch_dtype(dtype_name(dtype)) is dtype


def test_the_bytes_of_a_manifest_are_the_sum() -> None:
    assert Manifest(THREE).nbytes == 24 + 8 + 1
    assert Manifest([]).nbytes == 0


@pytest.mark.parametrize("dtype", ["float31", "", "Tensor", "torch.float32", "nn"])
def test_a_dtype_that_torch_does_not_have_is_named(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"torch has no dtype '{dtype}'"):
        ParamMeta("a", dtype, ())


@pytest.mark.parametrize("shape", [(-1,), (2, -3), (2.0,), (True,), ("2",), (None,), ([2],), "23"])
def test_a_size_is_a_whole_number_of_at_least_0(shape: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="a shape holds whole numbers of at least 0, got "):
        ParamMeta("a", "float32", shape)


def test_a_name_can_be_listed_only_once() -> None:
    with pytest.raises(ValueError, match="parameter 'b' is listed twice"):
        Manifest([*THREE, ParamMeta("b", "float32", ())])


def test_a_manifest_takes_lists_and_keeps_tuples() -> None:
    manifest = Manifest([ParamMeta("a", "int8", [1, 2])])
    assert manifest.params[0].shape == (1, 2)
    assert isinstance(manifest.params, tuple)
    assert Manifest.from_wire(manifest) is manifest


# Comparing with what the other side has.


def complaint(sent: list[ParamMeta], expected: list[ParamMeta]) -> str:
    with pytest.raises(ManifestMismatchError) as caught:
        Manifest(sent).require(expected, "the worker's model")
    return str(caught.value)


def test_the_same_parameters_in_another_order_fit() -> None:
    Manifest(THREE).require(reversed(THREE), "the worker's model")


def test_a_missing_parameter_is_named() -> None:
    assert complaint([*THREE[:2]], [*THREE]) == "The weights do not fit: 'c' is missing from the update."
    assert complaint([THREE[0]], [*THREE]) == "The weights do not fit: 'b' and 1 more are missing from the update."


def test_an_extra_parameter_is_named() -> None:
    assert complaint([*THREE], [*THREE[:2]]) == "The weights do not fit: 'c' does not exist in the worker's model."


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (ParamMeta("a", "float32", (3, 2)), "a: float32 [2, 3] was sent, but the worker's model has float32 [3, 2]"),
        (ParamMeta("a", "float16", (2, 3)), "a: float32 [2, 3] was sent, but the worker's model has float16 [2, 3]"),
    ],
)
def test_another_shape_or_dtype_is_named_with_both_sides(theirs: ParamMeta, words: str) -> None:
    assert words in complaint([*THREE], [theirs, *THREE[1:]])


def test_a_model_of_another_kind_gives_a_short_sentence() -> None:
    sent = [ParamMeta(f"x.{i}", "float32", (2,)) for i in range(100)]
    theirs = [ParamMeta(f"y.{i}", "float32", (2,)) for i in range(50)] + [
        ParamMeta(f"x.{i}", "float32", (3,)) for i in range(50)
    ]
    text = complaint(sent, theirs)
    assert "'y.0' and 49 more are missing from the update" in text
    assert "'x.50' and 49 more do not exist in the worker's model" in text
    assert "x.0: float32 [2] was sent, but the worker's model has float32 [3]" in text
    assert text.endswith("(and 49 more differences).")
    assert len(text) < 300
