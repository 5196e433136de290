"""What a model's own weights are as targets: whole, or the shards of this rank; and where bytes cannot be right."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from support.lone_rank import lone_rank
from weight_transfer import KernelFormatLoader, Manifest, ManifestMismatchError, ModuleSource, Region
from weight_transfer.memory.place import host, place_of
from weight_transfer.model.checkpoint_loading import loader_for
from weight_transfer.model.overlap import Memory
from weight_transfer.model.shards import Target
from weight_transfer.model.targets import RegionLoader

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    with lone_rank() as mesh:
        yield mesh


def sharded(mesh: DeviceMesh, local: torch.Tensor, placement: Placement, shape: tuple[int, ...]) -> nn.Parameter:
    strides = tuple(torch.empty(shape).stride())
    made = DTensor.from_local(local, mesh, [placement], run_check=False, shape=torch.Size(shape), stride=strides)
    return nn.Parameter(made)


def manifest_of(model: nn.Module) -> Manifest:
    return ModuleSource(model).manifest()


def test_a_plain_weight_is_kept_whole() -> None:
    model = nn.Linear(3, 2)
    loader = KernelFormatLoader(model)
    assert isinstance(loader, RegionLoader)
    targets = loader.targets(manifest_of(model))
    assert {name: [target.region for target in some] for name, some in targets.items()} == {
        "weight": [Region.whole((2, 3))],
        "bias": [Region.whole((2,))],
    }
    assert targets["weight"][0].tensor is model.weight


def local_replaced(model: Any) -> None:
    model["w"]._local_tensor = torch.ones(4, 4)


def local_moved(model: Any) -> None:
    model["w"]._local_tensor.data = torch.ones(4, 4)


def cut_otherwise(model: Any) -> None:
    model["w"]._spec = copy.copy(model["w"]._spec)


def unchanged(model: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "is_right", "is_recalled"),
    [
        (unchanged, True, True),
        (local_replaced, False, True),
        (cut_otherwise, False, True),
        (local_moved, True, False),  # seen at once: it lies elsewhere
    ],
)
def test_shards_that_are_recalled_are_confirmed_later(
    mesh: DeviceMesh, change: Any, is_right: bool, is_recalled: bool
) -> None:
    model = nn.ParameterDict({"w": sharded(mesh, torch.zeros(4, 4), Shard(0), (4, 4)), "b": torch.zeros(4)})
    source = ModuleSource(model)
    for _ in range(3):
        source.manifest()
        known = source.shards()
    source.recall(True)
    change(model)
    source.manifest()
    assert (source.shards() is known) is is_recalled
    assert source.confirm() is is_right
    source.recall(True)
    source.manifest()
    assert source.shards()["w"][0].tensor.data_ptr() == model["w"]._local_tensor.data_ptr()
    assert source.confirm()


def test_targets_are_the_same_object_until_a_weight_is_replaced(mesh: DeviceMesh) -> None:
    model = nn.ParameterDict({"w": sharded(mesh, torch.zeros(4, 4), Shard(0), (4, 4)), "b": torch.zeros(4)})
    manifest = manifest_of(model)
    loader = KernelFormatLoader(model)
    targets = loader.targets(manifest)
    for _ in range(2):
        loader.begin(manifest)
        assert loader.targets(manifest) is targets
        loader.finish()
    weight: Any = model["w"]
    weight._local_tensor = torch.ones(4, 4)
    moved = loader.targets(manifest)
    assert moved is not targets
    assert moved["w"][0].tensor is weight._local_tensor
    weight._local_tensor.data = torch.ones(4, 4)
    loader.begin(manifest)
    assert loader.targets(manifest) is not moved


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_whole_weights_are_scattered_bit_for_bit(mesh: DeviceMesh, placement: Placement) -> None:
    model = nn.ParameterDict({"w": sharded(mesh, torch.zeros(4, 6), placement, (4, 6)), "b": torch.zeros(4)})
    loader = KernelFormatLoader(model)
    loader.begin(manifest_of(model))
    weight = torch.randn(4, 6)
    weight[1, 2] = torch.tensor(0x7FA00001, dtype=torch.int32).view(torch.float32)  # a NaN that signals
    loader([("w", weight), ("b", torch.ones(4))])
    loader.finish()
    local: Any = model["w"]
    assert torch.equal(local._local_tensor.view(torch.int32), weight.view(torch.int32))
    assert torch.equal(model["b"], torch.ones(4))
    assert loader.destinations().keys() == {"b"}


def test_what_is_tied_on_the_trainer_alone_fills_the_shards_of_both(mesh: DeviceMesh) -> None:
    names = {name: sharded(mesh, torch.zeros(4, 2), Shard(0), (4, 2)) for name in ("embed", "head")}
    model = nn.ParameterDict(names)
    trained = nn.ParameterDict({"embed": torch.randn(4, 2)})
    trained["head"] = trained["embed"]
    loader = KernelFormatLoader(model)
    manifest = manifest_of(trained)
    loader.begin(manifest)
    assert len(loader.targets(manifest)["embed"]) == 2
    loader([("embed", trained["embed"].detach())])
    loader.finish()
    for weight in names.values():
        local: Any = weight
        assert torch.equal(local.to_local(), trained["embed"])


def test_a_sum_that_is_still_to_be_made_is_refused_by_name(mesh: DeviceMesh) -> None:
    model = nn.ParameterDict({"w": sharded(mesh, torch.zeros(4, 4), Partial(), (4, 4))})
    with pytest.raises(ManifestMismatchError, match=r"'w' is sharded \(.*Partial.*what this rank keeps"):
        KernelFormatLoader(model).begin(manifest_of(model))


def test_shards_that_share_memory_are_refused_by_name(mesh: DeviceMesh) -> None:
    memory = torch.zeros(6, 4)
    model = nn.ParameterDict(
        {name: sharded(mesh, memory[i : i + 4], Shard(0), (4, 4)) for i, name in enumerate(("a", "b"))}
    )
    with pytest.raises(ManifestMismatchError, match="'a' shares memory with 'b'"):
        KernelFormatLoader(model).begin(manifest_of(model))


def test_shards_of_a_kind_that_nobody_knows_are_refused_by_name() -> None:
    class Sharded(nn.Parameter):
        def full_tensor(self) -> torch.Tensor:
            return self.detach()

    model = nn.Linear(3, 2)
    model.weight = Sharded(model.weight.detach().clone())
    with pytest.raises(ManifestMismatchError, match="'weight' is sharded"):
        KernelFormatLoader(model).begin(manifest_of(nn.Linear(3, 2)))


def test_layers_of_shards_are_processed_after_they_were_loaded(mesh: DeviceMesh) -> None:
    model = nn.Sequential(nn.Module())
    model[0].w = sharded(mesh, torch.zeros(4, 4), Shard(0), (4, 4))
    seen: list[torch.Tensor] = []

    def process(layer: Any) -> None:
        seen.append(layer.w.to_local().clone())

    loader = loader_for(model, None, process)[True]
    loader.begin(manifest_of(model))
    weight = torch.randn(4, 4)
    loader([("0.w", weight)])
    loader.finish()
    assert torch.equal(seen[0], weight)


def test_shards_that_fsdp_has_put_aside_are_what_is_written(mesh: DeviceMesh) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    trained = copy.deepcopy(model)
    manifest = manifest_of(trained)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    loader = KernelFormatLoader(model)
    for seed in (1, 2, 1):
        model(torch.ones(4))
        assert type(model[0].weight) is nn.Parameter  # a whole copy, for the moment
        torch.manual_seed(seed)
        for parameter in trained.parameters():
            nn.init.normal_(parameter)
        loader.begin(manifest)
        loader(list(trained.state_dict().items()))
        loader.finish()
        assert torch.equal(model(torch.ones(4)), trained(torch.ones(4)))


def test_a_target_has_its_regions_shape() -> None:
    with pytest.raises(ValueError, match=r"its region's shape \[2, 3\], got \[3, 2\]"):
        Target(Region((0, 0), (2, 3)), torch.zeros(3, 2))


# In whose memory a tensor lies.


def test_the_owner_of_memory_has_all_of_it() -> None:
    base = torch.zeros(8, 8)
    memory = Memory({"upper": base[:4], "lower": base[4:], "flat": base, "none": torch.zeros(0)})
    assert memory.owner(base[1:3, 2:5]) in ("upper", "flat")
    assert memory.owner(base[5:, ::2]) in ("lower", "flat")
    assert memory.owner(base[3:5]) == "flat"
    assert memory.owner(torch.zeros(8, 8)) is None
    assert memory.owner(base[:0]) is None


def test_what_lies_in_the_gaps_of_a_weight_is_not_its_own() -> None:
    base = torch.zeros(4, 8)
    memory = Memory({"columns": base[:, :4]})
    assert memory.owner(base[:3, 4:]) is None
    assert memory.owner(base[:, :4]) == "columns"


# Where it lies.


def test_a_place_names_the_host_without_telling_of_it() -> None:
    assert place_of("cpu") == place_of(None) == place_of(torch.device("cpu")) == (host(),)
    assert len(host()) == 16
    assert set(host()) <= set("0123456789abcdef")


def test_a_gpus_place_has_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert place_of("cuda:1") == (host(), "GPU-1")
    assert place_of("cuda") == (host(), "GPU-3")
