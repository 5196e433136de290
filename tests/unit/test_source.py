"""Where weights come from: a live module, or a checkpoint on disk that never fits into memory."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from weight_transfer import CheckpointSource, ConfigError, IntegrityError, ModuleSource, WeightSource
from weight_transfer.buckets import as_bytes
from weight_transfer.source import as_source

MIB = 2**20


class Tied(nn.Module):
    """A little language model: tied embeddings, a persistent buffer, and two that are not to be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("rotary", torch.ones(5), persistent=False)
        self.inner = nn.Module()
        self.inner.register_buffer("mask", torch.ones(2), persistent=False)
        self.inner.register_buffer("absent", None)


SENT = [
    "embed.weight",
    "norm.weight",
    "norm.bias",
    "scale",
    "norm.running_mean",
    "norm.running_var",
    "norm.num_batches_tracked",
]


def names_of(source: WeightSource) -> list[str]:
    return [param.name for param in source.manifest().params]


# A module.


def test_tied_weights_are_sent_once_and_transient_buffers_not_at_all() -> None:
    source = ModuleSource(Tied())
    assert names_of(source) == SENT
    assert [name for name, _ in source] == SENT


def test_every_name_is_one_of_the_state_dict() -> None:
    module = Tied()
    assert set(module.state_dict()) - set(names_of(ModuleSource(module))) == {"head.weight"}  # tied to embed.weight


def test_the_manifest_and_the_tensors_agree() -> None:
    source = ModuleSource(Tied())
    for meta, (name, tensor) in zip(source.manifest().params, source, strict=True):
        assert (meta.name, meta.shape) == (name, tensor.shape)
        assert meta.nbytes == tensor.numel() * tensor.element_size()
        assert not tensor.requires_grad


def test_the_tensors_are_the_modules_own_and_follow_its_training() -> None:
    module = Tied()
    source = ModuleSource(module)
    manifest = source.manifest()
    before = dict(source)["embed.weight"].clone()
    with torch.no_grad():
        module.head.weight.add_(1)
    assert source.manifest() is manifest
    after = dict(source)["embed.weight"]
    assert torch.equal(after, before + 1)
    assert after.data_ptr() == module.embed.weight.data_ptr()
    assert source.resident()["embed.weight"] is module.embed.weight


def test_the_manifest_is_the_same_object_while_nothing_changed() -> None:
    source = ModuleSource(Tied())
    first = source.manifest()
    dict(source)
    assert source.manifest() is first


def test_a_replaced_parameter_is_noticed() -> None:
    module = Tied()
    source = ModuleSource(module)
    first = source.manifest()
    module.scale = torch.full((3,), 2, dtype=torch.bfloat16)  # same shape and dtype, another tensor
    assert source.manifest() is first
    assert dict(source)["scale"] is not None
    assert dict(source)["scale"].data_ptr() == module.scale.data_ptr()
    module.norm.weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    second = source.manifest()
    assert second.digest != first.digest
    assert second.by_name["norm.weight"].dtype == "bfloat16"
    assert dict(source)["norm.weight"].dtype is torch.bfloat16


def test_an_untied_weight_is_sent_from_then_on() -> None:
    module = Tied()
    source = ModuleSource(module)
    source.manifest()
    module.head.weight = nn.Parameter(module.head.weight.detach().clone())
    assert set(names_of(source)) == {*SENT, "head.weight"}


def test_names_can_be_changed_on_the_way() -> None:
    wrapped = nn.Sequential(nn.Linear(2, 2))
    source = ModuleSource(wrapped, rename=lambda name: name.replace("0.", "model.", 1))
    assert names_of(source) == ["model.weight", "model.bias"]
    assert list(source.resident()) == ["model.weight", "model.bias"]
    assert dict(source)["model.bias"].data_ptr() == wrapped[0].bias.data_ptr()


def test_two_parameters_cannot_be_given_one_name() -> None:
    source = ModuleSource(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), rename=lambda name: name.partition(".")[2])
    with pytest.raises(ConfigError, match="rename gives several parameters the name 'weight'"):
        source.manifest()


def test_sharded_parameters_are_gathered_one_at_a_time_and_are_not_resident() -> None:
    gathered: list[str] = []

    class Sharded(nn.Parameter):
        """What FSDP2 makes of a parameter, as far as a source can tell: something with ``full_tensor``."""

        def full_tensor(self) -> torch.Tensor:
            gathered.append("weight")
            return self.detach().clone()

    module = nn.Linear(3, 2)
    module.weight = Sharded(module.weight.detach().clone())
    source = ModuleSource(module)
    source.manifest()
    assert source.collective
    assert list(source.resident()) == ["bias"]
    assert gathered == []
    stream = iter(source)
    name, tensor = next(stream)
    assert (name, gathered) == ("weight", ["weight"])
    assert type(tensor) is torch.Tensor
    assert torch.equal(tensor, module.weight.detach())
    assert [name for name, _ in stream] == ["bias"]


def test_a_plain_module_runs_no_collectives() -> None:
    source = ModuleSource(nn.Linear(2, 2))
    source.manifest()
    assert not source.collective


def test_what_can_be_sent_is_a_module_or_a_source() -> None:
    module = nn.Linear(2, 2)
    source = as_source(module)
    assert isinstance(source, ModuleSource)
    assert source.module is module
    assert as_source(source) is source
    with pytest.raises(ConfigError, match=r"must be an nn\.Module or a WeightSource, got dict"):
        as_source(dict(module.state_dict()))  # type: ignore[arg-type]


# A checkpoint.

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


def memory(kind: str) -> int:
    """Return bytes of this process's memory: ``RssAnon`` is its own, ``RssFile`` mapped from files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    pytest.skip(f"this kernel does not report {kind}")


def touch(tensor: torch.Tensor) -> None:
    """Read every page, and see that the tensor is the constant that it should be."""
    pages = tensor[::1024]
    assert torch.equal(pages, pages[:1].expand_as(pages))


def test_a_checkpoint_is_never_wholly_in_memory(tmp_path: Path) -> None:
    count, size = 24, 4 * MIB
    save_file(
        {f"p{i}": torch.full((size,), i, dtype=torch.uint8) for i in range(count)}, tmp_path / "model.safetensors"
    )
    gc.collect()
    before = {kind: memory(kind) for kind in ("RssAnon", "RssFile")}
    source = CheckpointSource(tmp_path)
    assert source.manifest().nbytes == count * size
    stream = iter(source)
    _, first = next(stream)
    assert (
        first.sum(dtype=torch.int64) == int(first[0]) * size
    )  # touches every byte of the first tensor, and of no other
    grown = sum(memory(kind) - before[kind] for kind in before)
    assert size // 2 < grown < 4 * size, "opening and taking one tensor loads about one tensor"
    peak = 0
    for _, tensor in stream:
        touch(tensor)
        peak = max(peak, memory("RssAnon") - before["RssAnon"])
    assert peak < 4 * size, "private memory holds about one tensor at a time; mapped pages are the kernel's to drop"
