"""A checkpoint on disk as a source: read bit for bit, never wholly in memory, and never a mixture of two."""

from __future__ import annotations

import json
import logging
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weight_transfer import CheckpointSource, ConfigError, IntegrityError
from weight_transfer.plan.buckets import as_bytes

MIB = 2**20

Tensors = dict[str, torch.Tensor]


def some_tensors(names: list[str]) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    dtypes = [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.bool]
    return {
        name: torch.randn(5, 3, generator=generator).to(dtypes[index % len(dtypes)]) for index, name in enumerate(names)
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., tuple[Path, Tensors]]:
    """Write a checkpoint of two files."""

    def _checkpoint(index: bool = True) -> tuple[Path, Tensors]:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        tensors = some_tensors([f"layers.{i}.weight" for i in range(8)] + ["scalar", "empty"])
        tensors["scalar"], tensors["empty"] = torch.tensor(3.5, dtype=torch.float64), torch.empty(0, 4)
        files = {f"model-0000{i}-of-00002.safetensors": dict(list(tensors.items())[i - 1 :: 2]) for i in (1, 2)}
        for file, part in files.items():
            save_file(part, folder / file)
        if index:
            weight_map = {name: file for file, part in files.items() for name in part}
            (folder / CheckpointSource.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder, tensors

    return _checkpoint


def assert_same(source: CheckpointSource, tensors: Tensors) -> None:
    metas = source.manifest().params
    assert {meta.name for meta in metas} == set(tensors)
    for meta, (name, tensor) in zip(metas, source, strict=True):
        assert (meta.name, meta.shape, meta.dtype) == (name, tensor.shape, str(tensor.dtype).removeprefix("torch."))
        assert tensor.dtype is tensors[name].dtype
        assert torch.equal(as_bytes(tensor), as_bytes(tensors[name]))


@pytest.mark.parametrize("index", [True, False])
def test_a_checkpoint_is_read_bit_for_bit_again_and_again(
    checkpoint: Callable[..., tuple[Path, Tensors]], index: bool
) -> None:
    folder, tensors = checkpoint(index)
    source = CheckpointSource(folder)
    for _ in range(2):
        assert_same(source, tensors)
    assert source.manifest() is source.manifest()
    assert source.resident() == {}


def test_a_single_file_is_a_checkpoint(tmp_path: Path) -> None:
    tensors = some_tensors(["a", "b"])
    save_file(tensors, tmp_path / "weights.safetensors")
    assert_same(CheckpointSource(tmp_path / "weights.safetensors"), tensors)
    assert_same(CheckpointSource(str(tmp_path)), tensors)


def test_only_the_files_of_the_index_are_read(checkpoint: Callable[..., tuple[Path, Tensors]]) -> None:
    folder, tensors = checkpoint(True)
    save_file(some_tensors(["layers.0.weight", "adapter"]), folder / "consolidated.safetensors")
    assert_same(CheckpointSource(folder), tensors)


@pytest.mark.parametrize("keep", [0, 5, 40, 0.5, -1])
def test_a_truncated_file_is_named(checkpoint: Callable[..., tuple[Path, Tensors]], keep: float) -> None:
    folder, _ = checkpoint()
    file = folder / "model-00002-of-00002.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(IntegrityError) as caught:
        CheckpointSource(folder)
    assert str(caught.value).startswith(f"{file} is truncated or damaged; copy or download it again. (cause: ")


def test_a_file_that_the_index_names_and_that_is_missing_is_named(
    checkpoint: Callable[..., tuple[Path, Tensors]],
) -> None:
    folder, _ = checkpoint()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError) as caught:
        CheckpointSource(folder)
    index, file = folder / CheckpointSource.INDEX, "model-00002-of-00002.safetensors"
    assert str(caught.value) == f"{index} names {file}, which does not exist; complete the checkpoint."


def test_a_parameter_that_the_index_promises_and_no_file_has_is_named(
    checkpoint: Callable[..., tuple[Path, Tensors]],
) -> None:
    folder, tensors = checkpoint()
    file = folder / "model-00001-of-00002.safetensors"
    save_file(dict(list(tensors.items())[2::2]), file)
    with pytest.raises(IntegrityError) as caught:
        CheckpointSource(folder)
    assert f"{file} lacks 'layers.0.weight', which {CheckpointSource.INDEX} promises" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": ["a"]}', "\x00"])
def test_a_damaged_index_is_named(checkpoint: Callable[..., tuple[Path, Tensors]], text: str) -> None:
    folder, _ = checkpoint()
    (folder / CheckpointSource.INDEX).write_text(text)
    with pytest.raises(IntegrityError) as caught:
        CheckpointSource(folder)
    assert f"{folder / CheckpointSource.INDEX} is not a valid index of safetensors files" in str(caught.value)


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_safetensors_is_named(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "checkpoint"
    if exists:
        folder.mkdir()
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError) as caught:
        CheckpointSource(folder)
    assert f"{folder} holds no safetensors file" in str(caught.value)


def test_a_parameter_in_two_files_without_an_index_is_named(tmp_path: Path) -> None:
    for file in ("a", "b"):
        save_file(some_tensors(["layers.0.weight"]), tmp_path / f"{file}.safetensors")
    with pytest.raises(ConfigError) as caught:
        CheckpointSource(tmp_path)
    assert f"{tmp_path} cannot be sent: parameter 'layers.0.weight' is listed twice" in str(caught.value)


def test_a_checkpoint_is_never_wholly_in_memory(tmp_path: Path) -> None:
    count, size = 24, 4 * MIB
    save_file(
        {f"p{i}": torch.full((size,), i, dtype=torch.uint8) for i in range(count)}, tmp_path / "model.safetensors"
    )
    tracemalloc.start()
    try:
        source = CheckpointSource(tmp_path)
        assert source.manifest().nbytes == count * size
        assert tracemalloc.get_traced_memory()[1] < MIB, "opening reads the header alone"
        for _, tensor in source:
            assert int(tensor.min()) == int(tensor.max()), "every byte is the constant that it should be"
        assert size <= tracemalloc.get_traced_memory()[1] < 3 * size, "about one tensor at a time is in memory"
    finally:
        tracemalloc.stop()


# Files that change.


def rewrite(file: Path, tensors: Tensors) -> None:
    """Put another file in its place, as a trainer does that writes checkpoints."""
    save_file(tensors, file.with_suffix(".new"))
    os.replace(file.with_suffix(".new"), file)


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    a, b = {"w": torch.randn(5, 3)}, {"w": torch.randn(5, 3)}
    save_file(a, file)
    source = CheckpointSource(tmp_path)
    manifest = source.manifest()
    for tensors in (b, a):
        rewrite(file, tensors)
        assert source.manifest() is manifest
        assert_same(source, tensors)
    rewrite(file, {"other": torch.zeros(2)})
    assert [param.name for param in source.manifest().params] == ["other"]


def test_a_file_that_was_overwritten_in_place_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(4)}, file)
    source = CheckpointSource(tmp_path)
    later = file.stat().st_mtime_ns + 10**9
    save_file({"w": torch.ones(7)}, file)
    os.utime(file, ns=(later, later))
    assert source.manifest().params[0].shape == (7,)
    assert torch.equal(dict(source)["w"], torch.ones(7))


def test_a_new_file_beside_the_others_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "one.safetensors")
    source = CheckpointSource(tmp_path)
    save_file({"b": torch.ones(4)}, tmp_path / "two.safetensors")
    assert_same(source, {"a": torch.zeros(4), "b": torch.ones(4)})


def test_an_index_that_was_rewritten_is_read_anew(checkpoint: Callable[..., tuple[Path, Tensors]]) -> None:
    folder, tensors = checkpoint()
    source = CheckpointSource(folder)
    save_file({"only": torch.ones(3)}, folder / "model-00003-of-00003.safetensors")
    (folder / CheckpointSource.INDEX).write_text(
        json.dumps({"weight_map": {"only": "model-00003-of-00003.safetensors"}})
    )
    assert_same(source, {"only": torch.ones(3)})
    assert "only" not in tensors


CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda file: rewrite(file, {"a": torch.ones(1000), "b": torch.ones(1000)}), "was replaced"),
    (lambda file: file.unlink(), "was removed"),
    (lambda file: os.truncate(file, file.stat().st_size - 1), "was replaced"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=[words for _, words in CHANGES])
def test_a_file_that_changes_between_manifest_and_bytes_is_an_error(
    tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000), "b": torch.zeros(1000)}, file)
    source = CheckpointSource(tmp_path)
    source.manifest()
    change(file)
    with pytest.raises(IntegrityError, match=f"{words} while it was being sent; send it again"):
        list(source)


def test_a_file_that_is_truncated_while_it_is_read_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(MIB) for name in "abc"}, file)
    stream = iter(CheckpointSource(tmp_path))
    next(stream)
    os.truncate(file, 2 * MIB)
    with pytest.raises(IntegrityError, match="is truncated or damaged"):
        list(stream)


def test_a_file_that_is_written_to_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1000) for name in "abc"}, file)
    stream = iter(CheckpointSource(tmp_path))
    next(stream)
    later = file.stat().st_mtime_ns + 10**9
    with file.open("r+b") as stale:
        stale.seek(-1, os.SEEK_END)
        stale.write(b"x")
    os.utime(file, ns=(later, later))
    with pytest.raises(IntegrityError, match="was written to while it was being sent"):
        list(stream)


def test_a_checkpoint_that_vanished_is_named_at_the_next_update(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "model.safetensors")
    source = CheckpointSource(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds no safetensors file"):
        source.manifest()


def test_a_single_file_beside_an_index_of_others_is_taken_and_said(
    checkpoint: Callable[..., tuple[Path, Tensors]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, tensors = checkpoint()
    source = CheckpointSource(folder)
    assert_same(source, tensors)
    new = some_tensors(["layers.0.weight"])
    save_file(new, folder / CheckpointSource.SINGLE)
    with caplog.at_level(logging.WARNING):
        assert_same(source, new)
    assert f"{CheckpointSource.SINGLE} beside {CheckpointSource.INDEX}; the single file is sent" in caplog.text


def test_an_index_may_not_name_files_outside_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"a": torch.zeros(4)}, tmp_path / "secret.safetensors")
    (folder / CheckpointSource.INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(IntegrityError, match="is not the name of a file in this folder"):
        CheckpointSource(folder)


def header(fields: object, data: bytes = b"") -> bytes:
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + data


WRONG = {
    "overlapping": header({name: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for name in "ab"}, bytes(4)),
    "a hole": header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}}, bytes(6)),
    "too long": header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, bytes(5)),
    "another size": header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}, bytes(4)),
    "a negative size": header({"a": {"dtype": "U8", "shape": [-4, -1], "data_offsets": [0, 4]}}, bytes(4)),
    "unknown dtype": header({"a": {"dtype": "I4", "shape": [4], "data_offsets": [0, 4]}}, bytes(4)),
    "a dtype that is a list": header({"a": {"dtype": ["U8"], "shape": [4], "data_offsets": [0, 4]}}, bytes(4)),
    "no offsets": header({"a": {"dtype": "U8", "shape": [4]}}, bytes(4)),
    "text for offsets": header({"a": {"dtype": "U8", "shape": [4], "data_offsets": "04"}}, bytes(4)),
    "a list": header([1, 2]),
    "deep nesting": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "huge header": (2**62).to_bytes(8, "little") + bytes(100),
    "not text": (4).to_bytes(8, "little") + b"\xff\xff\xff\xff",
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG.keys())
def test_a_file_whose_header_lies_is_named(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match="is truncated or damaged"):
        CheckpointSource(file)
