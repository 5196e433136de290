"""The engines of a case's trainer ranks and workers, each in a process of its own, driven as sessions drive them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import attrs
import torch

from support.actors import Actor
from support.region_case import Case, Incoming, placed, raw
from weight_transfer import ModuleSource, load_backend, load_config
from weight_transfer.authoring import Deadline, OutgoingRegions, Taker, unstructure
from weight_transfer.config.settings import ParallelConfig
from weight_transfer.engine import WorkerSlot
from weight_transfer.memory.integrity import tensor_digest

if TYPE_CHECKING:
    from support.actors import Stage

_LONG = 30.0  # seconds


def main(stage: Stage, side: str, **spec: Any) -> None:
    """Be a trainer rank or a worker until the test is over; SIGUSR1 has another thread abort the update."""
    torch.set_num_threads(1)
    with torch.no_grad():
        player = (_Rank if side == "rank" else _Worker)(stage, **spec)
        abort = player.engine.abort_update
        signal.signal(signal.SIGUSR1, lambda *_: threading.Thread(target=abort, daemon=True).start())
        stage.say("ready")
        stage.serve(player.commands())
        player.engine.shutdown()


class _Player:
    """What both sides can do."""

    own: Sequence[str] = ()

    def __init__(self, number: int, case: dict[str, Any], engine: Any) -> None:
        self.number = number
        self.case = Case(**case)
        self.engine = engine

    def commands(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("call", "get", "fork", *self.own)}

    def call(self, method: str, arguments: Sequence[Any] = ()) -> None:
        """Call a method of the engine."""
        getattr(self.engine, method)(*arguments)

    def get(self, name: str) -> Any:
        """Return an attribute of the engine."""
        return getattr(self.engine, name)

    def fork(self) -> None:
        """Start a child, and wait for its end."""
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)


class _Rank(_Player):
    own = ("open", "join", "fill", "describe", "share", "send", "move")

    def __init__(self, _stage: Stage, number: int, case: dict[str, Any], config: dict[str, Any]) -> None:
        parallel = ParallelConfig(rank=number, world_size=len(case["held"]), device="cpu")
        engine = load_backend(config["backend"]).create_trainer_engine(load_config(config), parallel)
        super().__init__(number, case, engine)
        self._whole = ModuleSource(torch.nn.Module())
        self._shards = self.case.shards(number)
        named = zip(self.case.sharded(number), self._shards, strict=True)
        self._lent = [shard.view(-1) for (param, _), shard in named if param.name in self.case.lent]
        takers = [
            Taker(peer=name, worker=worker, pieces=self.case.pieces(worker).of_rank(number))
            for worker, name in enumerate(_names(self.case))
        ]
        layout = self.case.layout
        self._outgoing = OutgoingRegions(rank=number, layout=layout, tensors=self._shards, takers=takers)

    def open(self, workers: Sequence[int], first: dict[str, Any] | None = None) -> Any:
        names = _names(self.case)
        slots = [
            WorkerSlot(peer=names[number], rank_offset=1 + number, count=1, world_size=1 + len(names))
            for number in workers
        ]
        if first is None:
            return unstructure(self.engine.open_endpoint(slots, Deadline(_LONG)))
        return unstructure(self.engine.open_rank(first, slots, Deadline(_LONG)))

    def join(self, timeout: float) -> None:
        self.engine.join_workers(Deadline(timeout))

    def fill(self, seed: int) -> None:
        self.case.fill(self._shards, self.number, seed)

    def describe(self) -> Any:
        return unstructure(self.engine.describe_update(self._whole, self._whole.manifest(), Deadline(_LONG)))

    def share(self) -> Any:
        shared = self.engine.share_regions(self._outgoing, Deadline(_LONG))
        assert self.engine.share_regions(self._outgoing, Deadline(_LONG)) is shared, "nothing has changed"
        return unstructure(shared)

    def send(self, timeout: float) -> int:
        sent: list[int] = []
        self.engine.send_regions(self._outgoing, Deadline(timeout), sent.append)
        return sum(sent)

    def move(self, names: Sequence[str] | None = None) -> None:
        """Give the shards of some weights, by default of all, other memory, as an optimiser that swaps tensors does."""
        for shard, (param, _) in zip(self._shards, self.case.sharded(self.number), strict=True):
            if names is None or param.name in names:
                shard.data = torch.empty_strided(shard.shape, shard.stride(), dtype=shard.dtype)
        self._shards = list(self._shards)
        self._outgoing = attrs.evolve(self._outgoing, tensors=self._shards)


class _Worker(_Player):
    own = ("join", "receive", "unlike", "digests", "replace", "move")

    def __init__(self, stage: Stage, number: int, case: dict[str, Any], config: dict[str, Any]) -> None:
        engine = load_backend(config["backend"]).create_worker_engine(load_config(config), ParallelConfig(device="cpu"))
        super().__init__(number, case, engine)
        self._stage = stage
        self._holds = False
        self._incoming = Incoming(self.case, number, self._wait_if_held)
        self._told: Any = None
        self._info: Any = None

    def join(self, timeout: float, first: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
        members = {"rank_offset": 1 + self.number, "world_size": 1 + len(self.case.kept)}
        info = {**first, **members, "timeout": timeout, "trainer_ranks": len(self.case.held), "ranks": ranks}
        self.engine.init_transfer_engine(self.engine.parse_init_info(info))

    def receive(self, timeout: float, info: dict[str, Any], holds: bool = False) -> list[int]:
        """Return how many bytes came from each rank; if it ``holds``, say so and wait before the next write."""
        if info != self._told:  # as with the core, the same objects while they are unchanged
            told = {"manifest": unstructure(self.case.manifest), "layout": self.case.layout.to_wire(), **info}
            self._told, self._info = info, self.engine.parse_update_info({"timeout": timeout, **told})
        self._incoming.by_rank, self._holds = [0] * len(self.case.held), holds
        self.engine.receive_regions(attrs.evolve(self._info, timeout=timeout), self._incoming)
        return self._incoming.by_rank

    def _wait_if_held(self) -> None:
        if self._holds:
            self._holds = False
            self._stage.say("held")
            self._stage.await_command("release")

    def unlike(self, seed: int) -> list[str]:
        return self.case.unlike(self._incoming.targets, self.number, seed)

    def digests(self) -> list[str]:
        return [tensor_digest(raw(target)) for target in self._incoming.targets]

    def replace(self) -> None:
        """Keep everything in new tensors."""
        self._incoming.targets = self.case.targets(self.number)

    def move(self, target: int, lies: str = "") -> None:
        """Give one tensor other memory; see `placed`."""
        tensor = self._incoming.targets[target]
        tensor.data = placed(tensor.shape, tensor.dtype, lies)
        self._incoming.targets = list(self._incoming.targets)


def _names(case: Case) -> list[str]:
    return [f"worker {number}" for number in range(len(case.kept))]


class RegionEngines:
    """All engines of a case; use it in a ``with`` block.

    Args:
        case: what is sent.
        config: that of `load_config`.

    Attributes:
        ranks: the trainer's.
        workers: in the case's order.
    """

    def __init__(self, case: Case, config: dict[str, Any]) -> None:
        self._case, self._config = case, config
        self.ranks = [self._start("rank", number) for number in range(len(case.held))]
        self.workers = [self._start("worker", number) for number in range(len(case.kept))]
        for actor in self.all:
            actor.ready()

    def _start(self, side: str, number: int) -> Actor:
        case = attrs.asdict(self._case)
        return Actor("region_engines", side=side, number=number, case=case, config=self._config)

    @property
    def all(self) -> list[Actor]:
        return [*self.ranks, *self.workers]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.all:
            actor.hang_up()
        for actor in self.all:
            actor.stop()

    def begin_joining(
        self, timeout: float = _LONG, workers: Sequence[int] | None = None, without: Sequence[Actor] = ()
    ) -> list[Actor]:
        """Have workers, by default all, and ranks join each other, but for some; return who has to reply."""
        numbers = range(len(self.workers)) if workers is None else workers
        infos = self.ranks[0].ask("open", workers=list(numbers))
        ranks = [actor.ask("open", workers=list(numbers), first=infos[0]) for actor in self.ranks[1:]]
        joining = {self.workers[number]: first for number, first in zip(numbers, infos, strict=True)}
        for actor in self.ranks:
            if actor not in without:
                actor.tell("join", timeout=timeout)
        for actor, first in joining.items():
            if actor not in without:
                actor.tell("join", timeout=timeout, first=first, ranks=ranks)
        return [actor for actor in (*self.ranks, *joining) if actor not in without]

    def join(self, workers: Sequence[int] | None = None) -> Self:
        for actor in self.begin_joining(workers=workers):
            actor.reply()
        return self

    def restart(self, number: int) -> None:
        """Start a worker anew."""
        self.workers[number].stop()
        self.workers[number] = self._start("worker", number).ready()

    def describe(self) -> dict[str, Any]:
        """Return what workers are told of an update."""
        fields: dict[str, Any] = self.ranks[0].ask("describe")
        for actor in self.ranks:
            actor.tell("share")
        return {**fields, "shares": [actor.reply() for actor in self.ranks]}

    def begin(self, actor: Actor, info: dict[str, Any], timeout: float = _LONG, **spec: Any) -> None:
        """Let one of them begin its part of an update."""
        if actor in self.workers:
            actor.tell("receive", timeout=timeout, info=info, **spec)
        else:
            actor.tell("send", timeout=timeout)

    def fill(self, seed: int) -> None:
        for actor in self.ranks:
            actor.ask("fill", seed=seed)

    def update(self, seed: int) -> list[int]:
        """Send the bits of a seed, see that they and no others arrive, and return how many bytes each rank has sent."""
        self.fill(seed)
        info = self.describe()
        for actor in (*self.workers, *self.ranks):
            self.begin(actor, info)
        moved = [actor.reply() for actor in self.workers]
        sent: list[int] = [actor.reply() for actor in self.ranks]
        for actor in self.ranks:
            actor.ask("call", method="release_source")
        assert moved == [self._case.planned(worker) for worker in range(len(self.workers))]
        assert sum(sent) <= sum(map(sum, moved))
        assert self.unlike(seed) == []
        return sent

    def to_and_fro(self) -> None:
        for seed in (1, 2, 1):
            self.update(seed)

    def unlike(self, seed: int) -> list[str]:
        """Return what workers keep that has other bits than those of a seed."""
        return [text for actor in self.workers for text in actor.ask("unlike", seed=seed)]

    def abort_from_another_thread(self, actor: Actor) -> None:
        os.kill(actor.pid, signal.SIGUSR1)

    def memory(self) -> list[int]:
        """Return what each engine holds beside the weights, in bytes, ranks first."""
        return [actor.ask("get", name="extra_memory") for actor in self.all]
