"""Trainer ranks and workers of an update by region, each in a process of its own, driven as the core drives engines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import attrs
import torch

import weight_transfer as wt
from weight_transfer.config.settings import ParallelConfig
from weight_transfer.config.structuring import unstructure
from weight_transfer.engine import WorkerSlot
from weight_transfer.memory.integrity import tensor_digest
from weight_transfer.model.manifest import Manifest, ParamMeta, digest_json, torch_dtype
from weight_transfer.model.regions import Region
from weight_transfer.plan.exchange import IncomingRegions, OutgoingRegions, Taker
from weight_transfer.plan.layout import Layout, Regions
from weight_transfer.plan.pieces import plan_pieces
from weight_transfer.testing.actors import PROCESSES
from weight_transfer.values.deadline import Deadline
from weight_transfer_rdma.receiving import RdmaWorkerEngine
from weight_transfer_rdma.sending import RdmaTrainerEngine

Boxes = dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]
"""Offset and shape of regions, by name."""


@attrs.frozen(kw_only=True)
class Case:
    """A model, how the trainer's ranks hold it, what the workers keep, and how.

    Attributes:
        params: dtype and shape by name.
        held: of each rank.
        kept: of each worker.
        masters: dtype in which ranks hold weights of another one, by name.
        strided: names whose targets (``"target"``) or shards (``"shard"``) are not contiguous.
        lent: names whose shards' storage something else refers to.
        options: of the backend.
    """

    params: dict[str, tuple[str, tuple[int, ...]]]
    held: list[Boxes]
    kept: list[Boxes]
    masters: dict[str, str] = attrs.field(factory=dict)
    strided: dict[str, str] = attrs.field(factory=dict)
    lent: frozenset[str] = frozenset()
    options: dict[str, Any] = attrs.field(factory=dict)
    config: dict[str, Any] = attrs.field(factory=dict)

    @property
    def manifest(self) -> Manifest:
        return Manifest(ParamMeta(name, dtype, shape) for name, (dtype, shape) in self.params.items())

    def full(self, seed: int) -> dict[str, torch.Tensor]:
        """Return all weights as the trainer holds them; equal numbers give equal bits everywhere."""
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for name, (dtype, shape) in self.params.items():
            bits = torch.randn(shape, generator=generator, dtype=torch.float32)
            weights[name] = bits.to(torch_dtype(self.masters.get(name, dtype)))
        return weights

    def regions(self, boxes: Boxes) -> Regions:
        named = {name: [Region(*box) for box in own] for name, own in boxes.items()}
        return Regions.of(self.manifest, named)

    @property
    def layout(self) -> Layout:
        return Layout.of(list(map(self.regions, self.held)))


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same elements with other elements between its own."""
    wide = torch.zeros((*tensor.shape, 3), dtype=tensor.dtype)
    wide[..., 1].copy_(tensor)
    return wide[..., 1]


class Process:
    """What both kinds of actors can do."""

    _engine: Any

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the engine."""
        return getattr(self._engine, method)(*arguments)

    def memory(self) -> int:
        held: int = self._engine.extra_memory
        return held

    def fork(self) -> None:
        """Start a child, and wait for its end."""
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)

    def close(self) -> None:
        self._engine.shutdown()


class Rank(Process):
    """One trainer rank."""

    def __init__(self, case: Case, rank: int, device: str) -> None:
        self._case, self._rank = case, rank
        self._engine = RdmaTrainerEngine(_config(case), ParallelConfig(device=device))
        self._layout = case.layout
        self._tensors: list[torch.Tensor] = []
        self._lent: list[object] = []
        names = list(case.params)
        for index, region in self._layout.shards(rank):
            full = case.full(0)[names[index]]
            tensor = full[region.slices].clone()
            if case.strided.get(names[index]) == "shard":
                tensor = _strided(tensor)
            if names[index] in case.lent:
                self._lent.append(tensor.view(-1))
            self._tensors.append(tensor)
        self._outgoing: OutgoingRegions | None = None
        self._moved = 0

    def open(self, slots: Sequence[WorkerSlot], first: Mapping[str, Any] | None) -> Any:
        if first is None:
            return _plain(self._engine.open_endpoint(slots, Deadline(30)))
        return self._engine.open_rank(first, slots, Deadline(30))

    def give(self, peers: Sequence[str]) -> None:
        kept = list(map(self._case.regions, self._case.kept))
        takers = [
            Taker(peer=peer, worker=worker, pieces=plan_pieces(self._layout, own, worker).of_rank(self._rank))
            for worker, (peer, own) in enumerate(zip(peers, kept, strict=True))
        ]
        self._outgoing = OutgoingRegions(rank=self._rank, layout=self._layout, tensors=self._tensors, takers=takers)

    def fill(self, seed: int) -> None:
        full = list(self._case.full(seed).values())
        for tensor, (index, region) in zip(self._tensors, self._layout.shards(self._rank), strict=True):
            tensor.copy_(full[index][region.slices])

    def share(self, seconds: float) -> Any:
        deadline = Deadline(seconds)
        assert self._outgoing is not None
        own = {}
        if self._rank == 0:
            own = _plain(self._engine.describe_update(_Nothing(), _EMPTY, deadline))  # type: ignore[arg-type]
        shared = self._engine.share_regions(self._outgoing, deadline)
        again = self._engine.share_regions(self._outgoing, deadline)
        assert shared is again
        return own, shared

    def send(self, seconds: float) -> int:
        assert self._outgoing is not None
        moved: list[int] = []
        self._engine.send_regions(self._outgoing, Deadline(seconds), moved.append)
        return sum(moved)

    def reallocate(self, name: str) -> None:
        """Give a weight's shards other memory, as an optimiser that swaps tensors does."""
        names = list(self._case.params)
        for tensor, (index, _) in zip(self._tensors, self._layout.shards(self._rank), strict=True):
            if names[index] == name:
                tensor.data = tensor.data.clone()
        assert self._outgoing is not None
        self._tensors = list(self._tensors)
        self._outgoing = attrs.evolve(self._outgoing, tensors=self._tensors)


class Incoming(IncomingRegions):
    """What a worker receives, with a note of everything that the engine says."""

    def __init__(self, case: Case, worker: int) -> None:
        self.layout = case.layout
        kept = case.regions(case.kept[worker])
        self.pieces = plan_pieces(self.layout, kept, worker)
        self.targets = []
        self.names: list[tuple[str, Region]] = []
        for index, param in enumerate(case.manifest.params):
            for region in kept.of_param(index) or []:
                target = torch.zeros(region.shape, dtype=torch_dtype(param.dtype))
                self.targets.append(_strided(target) if case.strided.get(param.name) == "target" else target)
                self.names.append((param.name, region))
        self.by_rank: dict[int, int] = {}
        self.allowed = 0

    def write_in_place(self) -> None:
        self.allowed += 1

    def moved(self, rank: int, nbytes: int) -> None:
        assert self.allowed
        self.by_rank[rank] = self.by_rank.get(rank, 0) + nbytes


class Worker(Process):
    """One worker."""

    def __init__(self, case: Case, worker: int, device: str) -> None:
        self._case = case
        self._engine = RdmaWorkerEngine(_config(case), ParallelConfig(device=device))
        self._incoming = Incoming(case, worker)

    def join(self, info: dict[str, Any]) -> str:
        self._engine.init_transfer_engine(self._engine.parse_init_info(info))
        return self._engine.transport

    def receive(self, info: dict[str, Any]) -> dict[int, int]:
        self._incoming.by_rank = {}
        self._engine.receive_regions(self._engine.parse_update_info(info), self._incoming)
        planned = self._incoming.pieces.by_rank(len(self._incoming.layout.places)).tolist()
        assert {rank: nbytes for rank, nbytes in enumerate(planned) if nbytes} == self._incoming.by_rank
        return self._incoming.by_rank

    def wrong(self, seed: int) -> list[str]:
        """Return which targets hold other bits than the trainer's weights have."""
        full = self._case.full(seed)
        found = []
        for target, (name, region) in zip(self._incoming.targets, self._incoming.names, strict=True):
            expected = full[name].to(target.dtype)[region.slices]
            if tensor_digest(target.contiguous()) != tensor_digest(expected.contiguous()):
                found.append(f"{name} {region}")
        return found

    def replace(self, number: int) -> None:
        """Let a target lie elsewhere."""
        target = self._incoming.targets[number]
        target.data = torch.zeros_like(target)
        self._incoming.targets = list(self._incoming.targets)

    def stride(self, number: int) -> None:
        """Let a target lie elsewhere, with other elements between its own."""
        target = self._incoming.targets[number]
        target.data = _strided(target)
        self._incoming.targets = list(self._incoming.targets)

    def bits(self) -> str:
        """Return a digest of all targets."""
        return digest_json([tensor_digest(target.contiguous()) for target in self._incoming.targets])


_EMPTY = Manifest([])


class _Nothing:
    def resident(self) -> dict[str, torch.Tensor]:
        return {}


def _config(case: Case) -> Any:
    return wt.load_config(backend="rdma", options=case.options, **case.config)


def _plain(value: Any) -> Any:
    """Return what an engine said as it travels."""
    if attrs.has(type(value)):
        return _plain(unstructure(value))
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def _serve(connection: Connection, make: Callable[..., Any], arguments: Sequence[Any]) -> None:
    actor = make(*arguments)
    signal.signal(signal.SIGUSR1, lambda *_: threading.Thread(target=actor.call, args=("abort_update",)).start())
    while True:
        try:
            method, *given = connection.recv()
        except (EOFError, ConnectionError):
            break
        try:
            answer: Any = "done", getattr(actor, method)(*given)
        except wt.WeightTransferError as error:
            answer = "error", (type(error).__name__, str(error), error.peer)
        except Exception:  # noqa: BLE001  (shown)
            answer = "broken", traceback.format_exc()
        with contextlib.suppress(ConnectionError):  # the test has ended
            connection.send(answer)
    actor.close()


class EngineError(Exception):
    """An engine raised: the error's class, its text, and its peer."""


class Actor:
    """An actor in another process: ``begin`` a call, then ``end`` it."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._connection, theirs = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, method: str, *arguments: Any) -> Actor:
        self._connection.send((method, *arguments))
        return self

    def end(self) -> Any:
        kind, answer = self._connection.recv()
        if kind == "error":
            raise EngineError(*answer)
        assert kind == "done", answer
        return answer

    def __call__(self, method: str, *arguments: Any) -> Any:
        return self.begin(method, *arguments).end()

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def interrupt(self) -> None:
        """Let another thread of the actor abort the update."""
        self.kill(signal.SIGUSR1)

    def close(self) -> None:
        self._connection.close()
        self.process.join(5)
        self.process.kill()
        self.process.join()


class Group:
    """All actors of a case, joined."""

    def __init__(self, case: Case, devices: Sequence[str] = (), worker_devices: Sequence[str] = ()) -> None:
        self.case = case
        self.ranks = [Actor(Rank, case, rank, devices[rank] if devices else "cpu") for rank in range(len(case.held))]
        self.workers = [
            Actor(Worker, case, worker, worker_devices[worker] if worker_devices else "cpu")
            for worker in range(len(case.kept))
        ]
        self.peers = [f"worker-{number}" for number in range(len(self.workers))]
        self.join(range(len(self.workers)))
        for rank in self.ranks:
            rank("give", self.peers)

    def replace(self, number: int, join: bool = True) -> None:
        """Start a worker anew."""
        self.workers[number].close()
        self.workers[number] = Actor(Worker, self.case, number, "cpu")
        if join:
            self.join([number])

    def join(self, numbers: Sequence[int] | range) -> list[str]:
        world = len(self.workers) + 1
        slots = [
            WorkerSlot(peer=self.peers[number], rank_offset=number + 1, count=1, world_size=world) for number in numbers
        ]
        infos = [_plain(info) for info in self.ranks[0]("open", slots, None)]
        others = [rank("open", slots, infos[0]) for rank in self.ranks[1:]]
        for slot, number, info in zip(slots, numbers, infos, strict=True):
            common = {"rank_offset": slot.rank_offset, "world_size": world, "timeout": 30.0}
            ranks = {"trainer_ranks": len(self.ranks), "ranks": others}
            self.workers[number].begin("join", json.loads(json.dumps({**info, **common, **ranks})))
        return [self.workers[number].end() for number in numbers]

    def describe(self, seconds: float = 30.0) -> dict[str, Any]:
        shared = [rank.begin("share", seconds) for rank in self.ranks]
        answers = [rank.end() for rank in shared]
        info = {
            "manifest": _plain(self.case.manifest),
            "timeout": seconds,
            "layout": self.case.layout.to_wire(),
            "shares": [share for _, share in answers],
            **answers[0][0],
        }
        wired: dict[str, Any] = json.loads(json.dumps(_plain(info)))
        return wired

    def update(self, seed: int) -> tuple[list[int], list[dict[int, int]]]:
        """Send once; return the bytes that each rank packed, and those that came to each worker, by rank."""
        for rank in self.ranks:
            rank("fill", seed)
        info = self.describe()
        for worker in self.workers:
            worker.begin("receive", info)
        for rank in self.ranks:
            rank.begin("send", 30.0)
        got = [worker.end() for worker in self.workers]
        packed = [rank.end() for rank in self.ranks]
        for rank in self.ranks:
            rank("call", "release_source")
        return packed, got

    def wrong(self, seed: int) -> list[str]:
        return [text for worker in self.workers for text in worker("wrong", seed)]

    def close(self) -> None:
        for actor in (*self.workers, *self.ranks):
            actor.close()
