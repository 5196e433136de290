"""The trainer: one process with whole weights, or ranks with the shards of FSDP2 or HSDP."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from weight_transfer.bench.member import Member, Scene, Tree
from weight_transfer.config.structuring import unstructure
from weight_transfer.limit import settle
from weight_transfer.plugins.hookspecs import hookimpl
from weight_transfer.session.sender import WeightSender

if TYPE_CHECKING:
    from weight_transfer.model.source import WeightSource
    from weight_transfer.testing.actors import Stage
    from weight_transfer.values.events import TransferFinished

_PATIENCE = timedelta(seconds=120)


def main(stage: Stage, scene: dict[str, Any], number: int) -> None:
    """Be the trainer's rank ``number``."""
    Trainer(Scene.of(scene), number).perform(stage)


class Trainer(Member):
    """A trainer rank; with several of them a real FSDP2 or HSDP model, with a group of parameters per layer."""

    def __init__(self, scene: Scene, rank: int) -> None:
        sizes = [scene.parts.by_rank(worker)[rank] for worker in range(len(scene.workers))]
        super().__init__(scene, rank, scene.trainers[rank], sizes)
        self.rank = rank
        self.model = Tree()
        self._senders: dict[str, WeightSender] = {}
        self._phases: dict[str, float] = {}
        self._extra = 0
        self._gate: dist.ProcessGroup | None = None

    def enter(self) -> None:
        super().enter()
        if self.parts.all_alike:
            for name, shape in self.parts.shapes.items():
                self.model.plant(name, _parameter(shape, self.dtype(name), self.device))
        else:
            self._shard()

    def _shard(self) -> None:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # for the barrier: all ranks are on this host
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"file://{self.scene.store}",
            rank=self.rank,
            world_size=len(self.scene.trainers),
            timeout=_PATIENCE,
        )
        self.stack.callback(dist.destroy_process_group)
        self._gate = dist.new_group(backend="gloo", timeout=_PATIENCE)
        for name, shape in self.parts.shapes.items():
            self.model.plant(name, _parameter(shape, self.dtype(name), torch.device("meta")))
        mesh = self._mesh()
        for layer in self.model.get_submodule("model.layers").children():
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.model.to_empty(device=self.device)
        self.weights()

    def _mesh(self) -> DeviceMesh:
        """Return FSDP's mesh; with replicas HSDP's, in which rank r holds shard r % shards."""
        shards = self.parts.shards
        replicas = self.parts.trainers // shards
        if replicas == 1:
            return init_device_mesh(self.device.type, (shards,))
        return init_device_mesh(self.device.type, (replicas, shards), mesh_dim_names=("replicas", "shards"))

    def fill(self, seed: int) -> None:
        """Give the weights of a version to this rank's shards."""
        for name, tensor in self.weights().items():
            self.parts.fill(tensor, name, self.parts.held(name, self.rank), seed)
        settle(self.device)

    def connect(self, urls: Mapping[str, Sequence[str]]) -> None:
        """Make a sender for each way to the workers that serve it."""
        for way, changes in self.scene.ways.items():
            sender = WeightSender({**self.scene.config, **changes}, urls[way], observers=(self,))
            self._senders[way] = self.stack.enter_context(sender)

    @hookimpl
    def weight_transfer_finished(self, event: TransferFinished) -> None:
        """Take note of where the time of an update went; rank 0 hears of it."""
        self._phases = dict(event.phases)

    def send(self, way: str) -> dict[str, Any]:
        """Send in one of the ways; all ranks begin together.

        Returns:
            The report's fields, ``gbps``, when it began, ``phases`` as observers hear of them, and the wall time here.
        """
        return self._send(way, self.model)

    def _send(self, way: str, weights: nn.Module | WeightSource) -> dict[str, Any]:
        if self._gate is not None:
            dist.barrier(self._gate)
        began = time.perf_counter()
        report = self._senders[way].send(weights)
        seconds = time.perf_counter() - began
        self._extra = report.extra_memory
        told = {"gbps": report.gbps, "began": began, "phases": self._phases, "send": seconds}
        return {**unstructure(report), **told}

    def disconnect(self) -> None:
        """Close the senders."""
        while self._senders:
            self._senders.popitem()[1].close()

    def engine_memory(self) -> int:
        return self._extra

    def weights(self) -> dict[str, torch.Tensor]:
        """Return this rank's local tensors; after an update on the CPU they may lie in shared memory."""
        found = {}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                found[name] = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
                expected = self.parts.held(name, self.rank).shape
                if tuple(found[name].shape) != expected:
                    raise RuntimeError(f"{name} is sharded as {tuple(found[name].shape)}, and not as {expected}")
        return found


def _parameter(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device=device), requires_grad=False)
