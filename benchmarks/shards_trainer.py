"""The trainer ranks of ``benchmarks/shards.py``, with the shards of FSDP2 or HSDP."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import limits
import torch
import torch.distributed as dist
from shards_member import Member, Scene
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import weight_transfer as wt
from weight_transfer.config.structuring import unstructure

if TYPE_CHECKING:
    from weight_transfer.model.shards import Shard

NO_SHARDS: Mapping[str, Sequence[Shard]] = {}


class Gathered(wt.ModuleSource):
    """Weights of which nobody says where their shards lie, so that they are gathered: what every backend did once."""

    def shards(self) -> Mapping[str, Sequence[Shard]]:
        return NO_SHARDS


class Tree(nn.Module):
    """A module that has its children and parameters by dotted names."""

    def plant(self, name: str, parameter: nn.Parameter) -> None:
        first, _, rest = name.partition(".")
        if not rest:
            self.register_parameter(first, parameter)
            return
        if first not in self._modules:
            self.add_module(first, Tree())
        child = self._modules[first]
        assert isinstance(child, Tree)
        child.plant(rest, parameter)


class Trainer(Member):
    """A trainer rank, with a real FSDP2 or HSDP model: a group of parameters per layer."""

    def __init__(self, scene: Scene, rank: int) -> None:
        sizes = [scene.parts.by_rank(worker)[rank] for worker in range(len(scene.workers))]
        super().__init__(scene, scene.trainers[rank], sizes)
        self.rank = rank
        on_gpu = self.device.type == "cuda"
        size = len(scene.trainers)
        if on_gpu:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # for the barrier: all ranks are on this host
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"file://{scene.store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=limits.LONG),
        )
        self.stack.callback(dist.destroy_process_group)
        self._gate = dist.new_group(backend="gloo", timeout=timedelta(seconds=limits.LONG))
        self.model = Tree()
        for name, shape in self.parts.shapes.items():
            self.model.plant(name, nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta")))
        mesh = self._mesh()
        for layer in self.model.get_submodule("model.layers").children():
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.model.to_empty(device=self.device)
        self._shards()
        self._sender: wt.WeightSender | None = None

    def _mesh(self) -> DeviceMesh:
        """Return FSDP's mesh; with replicas HSDP's, in which rank r holds shard r % shards."""
        shards = self.parts.shards
        replicas = self.parts.trainers // shards
        if replicas == 1:
            return init_device_mesh(self.device.type, (shards,))
        return init_device_mesh(self.device.type, (replicas, shards), mesh_dim_names=("replicas", "shards"))

    def fill(self, seed: int) -> None:
        """Give the weights of a version to this rank's shards."""
        for name, tensor in self._shards().items():
            self.parts.fill(tensor, name, self.parts.held(name, self.rank), seed)
        limits.settle(self.device)

    def connect(self, urls: Sequence[str]) -> None:
        """Make a sender to these workers."""
        self._sender = self.stack.enter_context(wt.WeightSender(self.scene.config, urls))

    def send(self, gather: bool = False) -> dict[str, Any]:
        """Send; return the report's fields and the wall time here. All ranks begin together."""
        assert self._sender is not None
        weights = self._gathered if gather else self.model
        dist.barrier(self._gate)
        since = time.perf_counter()
        report = self._sender.send(weights)
        seconds = time.perf_counter() - since
        self._extra = report.extra_memory
        return {**unstructure(report), "send": seconds}

    def disconnect(self) -> None:
        """Close the sender."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        self._gathered = Gathered(self.model)

    def engine_memory(self) -> int:
        return self._extra

    def where(self) -> tuple[list[tuple[str, int]], dict[str, tuple[int, int]]]:
        """Return handles and bytes of this rank's GPU allocations; and by name in which one a shard lies, and where."""
        from weight_transfer_ipc import cuda

        numbers: dict[int, int] = {}
        allocations: list[tuple[str, int]] = []
        places: dict[str, tuple[int, int]] = {}
        for name, tensor in self._shards().items():
            index, address = self.device.index, tensor.data_ptr()
            if not tensor.numel():
                continue
            begin, nbytes = cuda.allocation_at(address, index)
            if begin not in numbers:
                numbers[begin] = len(allocations)
                allocations.append((cuda.export(begin, index), nbytes))
            places[name] = numbers[begin], address - begin
        return allocations, places

    def _shards(self) -> dict[str, torch.Tensor]:
        """Return this rank's local tensors; after an update on the CPU they lie in shared memory."""
        found = {}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                assert isinstance(parameter, DTensor)
                found[name] = parameter.to_local().detach()
                if tuple(found[name].shape) != self.parts.held(name, self.rank).shape:
                    raise SystemExit(f"the mesh shards {name} otherwise than this benchmark thinks")
        return found
