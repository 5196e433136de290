"""The processes of ``benchmarks/shards.py``: trainer ranks with FSDP2's shards, and workers that keep their part."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import attrs
import limits
import torch
import torch.distributed as dist
from parts import Parts
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import weight_transfer as wt
from weight_transfer.config.structuring import unstructure

if TYPE_CHECKING:
    from weight_transfer.model.shards import Shard

NO_SHARDS: Mapping[str, Sequence[Shard]] = {}


@attrs.frozen(kw_only=True)
class Scene:
    """Who takes part.

    Attributes:
        parts: what lies where.
        backend: the backend's name.
        config: for both sides.
        trainers: devices of the trainer's ranks.
        workers: devices of the workers.
        store: file in which the trainer's ranks meet.
    """

    parts: Parts
    backend: str
    config: dict[str, Any]
    trainers: Sequence[str]
    workers: Sequence[str]
    store: str


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


class Member:
    """A process of the benchmark.

    Args:
        scene: who takes part.
        device: of this one's weights.
        sizes: see `limits.Limit`.
    """

    def __init__(self, scene: Scene, device: str, sizes: Sequence[int]) -> None:
        self.scene, self.parts = scene, scene.parts
        self.device = torch.device(device)
        self.sizes = sizes
        self.stack = ExitStack()
        self.limit: limits.Limit | None = None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(1)

    def tidy(self) -> None:
        """Be there, and give the GPU back what torch keeps for later."""
        limits.settle(self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def before(self) -> None:
        """Take note of the memory that is held now, when all processes are tidy."""
        self._held = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._held = torch.cuda.memory_allocated(self.device)
            self._free = torch.cuda.mem_get_info(self.device)[0]

    def memory(self) -> dict[str, int]:
        """Return bytes beyond those that were held `before`: the engine's own count, torch's peak, and the whole GPU's.

        The last one counts all processes on this GPU, with kernels that were loaded and what torch keeps for later.
        """
        found = {"engine": self.engine_memory()}
        if self.device.type == "cuda":
            found["torch_peak"] = torch.cuda.max_memory_allocated(self.device) - self._held
            found["gpu"] = self._free - torch.cuda.mem_get_info(self.device)[0]
        return found

    def engine_memory(self) -> int:
        raise NotImplementedError

    def make_limit(self, member: int, meeting: Any) -> Any:
        """Make this side of the limit; return what the others need of it."""
        common = self.device, self.sizes, list(map(torch.device, self.scene.trainers))
        if self.scene.backend == "nccl":
            self.limit = limits.GroupLimit(*common, member=member, meeting=meeting)
        elif self.scene.backend == "rdma":
            self.limit = limits.ReadLimit(*common, name=str(member), config=self.scene.config)
        elif member < len(self.scene.trainers):  # only the workers copy
            self.limit = limits.Limit(*common)
        else:
            self.limit = (limits.SideBySideLimit if self.device.type == "cuda" else limits.CopyLimit)(*common)
        return self.limit.offer() if member < len(self.scene.trainers) else None

    def join_limit(self, offers: Sequence[Any]) -> None:
        assert self.limit is not None
        self.limit.join(offers)

    def run_limit(self) -> limits.Seconds:
        assert self.limit is not None
        return self.limit.run()

    def end_limit(self) -> None:
        if self.limit is not None:
            self.limit.close()
            self.limit = None

    def close(self) -> None:
        self.end_limit()
        self.stack.close()


class Trainer(Member):
    """A trainer rank, with a real FSDP2 model: a group of parameters per layer."""

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
        mesh = init_device_mesh(self.device.type, (size,))
        for layer in self.model.get_submodule("model.layers").children():
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.model.to_empty(device=self.device)
        self._shards()
        self._sender: wt.WeightSender | None = None

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
                    raise SystemExit(f"FSDP2 shards {name} otherwise than this benchmark thinks")
        return found


class Worker(Member):
    """A worker behind HTTP, whose model holds its part of each weight, declared with ``needs``."""

    def __init__(self, scene: Scene, number: int) -> None:
        super().__init__(scene, scene.workers[number], scene.parts.by_rank(number))
        self.number = number
        self.model = nn.Module()
        self._regions = {name: self.parts.kept(name, number) for name in self.parts.shapes}
        for name, region in self._regions.items():
            if region is not None:
                part = torch.zeros(region.shape, dtype=torch.bfloat16, device=self.device)
                self.model.register_parameter(_own(name), nn.Parameter(part, requires_grad=False))
        self._serving = ExitStack()
        self.stack.callback(self._serving.close)
        self._times: dict[str, limits.Seconds] = {}
        self._engine: Any = None
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._copied: dict[tuple[int, str], torch.Tensor] = {}
        self._watch_engine()

    def serve(self) -> str:
        """Serve a new receiver in place of the last one; return its address."""
        self._serving.close()
        receiver = self._serving.enter_context(wt.WeightReceiver(self.scene.config, self.model, needs=self._needs))
        return self._serving.enter_context(wt.serve(receiver)).url

    def engine_seconds(self) -> dict[str, limits.Seconds]:
        """Return wall time and the thread's CPU time of the engine's methods in the last update."""
        return self._times

    def forget(self) -> None:
        """Set all weights to zero."""
        for target in self._targets().values():
            target.zero_()
        limits.settle(self.device)

    def wrong(self, seed: int) -> int:
        """Count the elements that are not those of a version."""
        count = torch.zeros((), dtype=torch.int64, device=self.device)
        for name, target in self._targets().items():
            region = self._regions[name]
            assert region is not None
            count += self.parts.wrong(target, name, region, seed)
        return int(count)

    def hold(self) -> None:
        """Hold tensors of all trainer ranks' shards here, for plain copies on the CPU; see `hold_seed`."""
        self._copied = {
            (rank, name): torch.zeros(self.parts.held(name, rank).shape, dtype=torch.bfloat16)
            for name in self.parts.shapes
            for rank in range(len(self.scene.trainers))
        }
        self._pair(lambda rank, name: self._copied[rank, name])

    def hold_seed(self, seed: int) -> None:
        """Give them the weights of a version."""
        for (rank, name), tensor in self._copied.items():
            self.parts.fill(tensor, name, self.parts.held(name, rank), seed)

    def map(self, shared: Sequence[tuple[list[tuple[str, int]], dict[str, tuple[int, int]]]]) -> None:
        """Map the trainer ranks' shards, for plain copies on a GPU; see `Trainer.where`."""
        from weight_transfer_ipc import cuda
        from weight_transfer_ipc.device_memory import bytes_at

        memory: list[list[torch.Tensor]] = []
        for allocations, _ in shared:
            memory.append([])
            for handle, nbytes in allocations:
                address = cuda.open_handle(handle, self.device.index)
                self.stack.callback(cuda.close_handle, address, self.device.index)
                memory[-1].append(bytes_at(address, nbytes, self.device))

        def shard(rank: int, name: str) -> torch.Tensor:
            number, offset = shared[rank][1][name]
            held = self.parts.held(name, rank)
            data = memory[rank][number][offset : offset + 2 * held.volume]
            return data.view(torch.bfloat16).view(held.shape)

        self._pair(shard)

    def copy_plainly(self) -> limits.Seconds:
        """Copy each piece by itself."""

        def copy() -> None:
            for target, source in self._pairs:
                target.copy_(source)

        return limits.timed(copy, self.device)

    def unpair(self) -> None:
        """Let go of what plain copies read."""
        self._pairs, self._copied = [], {}

    def engine_memory(self) -> int:
        return int(self._engine.extra_memory) if self._engine is not None else 0

    def _targets(self) -> dict[str, torch.Tensor]:
        return {name: self._target(name) for name, region in self._regions.items() if region is not None}

    def _target(self, name: str) -> torch.Tensor:
        return self.model.get_parameter(_own(name)).detach()

    def _needs(self, manifest: wt.Manifest) -> dict[str, wt.Target | list[wt.Target]]:
        return {
            name: wt.Target(region, self._target(name)) if region is not None else []
            for name, region in self._regions.items()
        }

    def _pair(self, shard: Callable[[int, str], torch.Tensor]) -> None:
        """Pair each piece with its place, as integers, since copies of floats may change the bits of NaNs on a GPU."""
        targets = self._targets()
        self._pairs = [
            (
                targets[piece.name].view(torch.int16)[piece.target],
                shard(piece.rank, piece.name).view(torch.int16)[piece.source],
            )
            for piece in self.parts.pieces(self.number)
        ]

    def _watch_engine(self) -> None:
        """Time two methods of the worker's engine, in this process, until the GPU has done what they have begun."""
        config = wt.load_config(self.scene.config)
        parallel = wt.ParallelConfig(device=str(self.device))
        kind = type(wt.load_backend(self.scene.backend).create_worker_engine(config, parallel))
        for name in ("receive_regions", "receive_weights"):
            setattr(kind, name, self._timed(name, getattr(kind, name)))

    def _timed(self, name: str, method: Callable[..., None]) -> Callable[..., None]:
        def timed(engine: Any, *arguments: Any) -> None:
            since, cpu = time.perf_counter(), time.thread_time()
            method(engine, *arguments)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            self._times[name] = time.perf_counter() - since, time.thread_time() - cpu
            self._engine = engine

        return timed


def _own(name: str) -> str:
    """Return the name of a worker's part of a weight in its own model."""
    return name.replace(".", "/")
