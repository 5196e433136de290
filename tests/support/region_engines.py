"""Engines that move regions, driven by hand in processes of their own: trainer ranks and workers, told by a pipe."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from support import regions as cases
from weight_transfer import load_backend, load_config
from weight_transfer.config.settings import ParallelConfig
from weight_transfer.engine import WorkerSlot
from weight_transfer.errors import WeightTransferError, error_from_dict, error_to_dict
from weight_transfer.memory.export import Export
from weight_transfer.plan.exchange import OutgoingRegions, Taker
from weight_transfer.plan.layout import Layout
from weight_transfer.plan.pieces import plan_pieces
from weight_transfer.testing.actors import PROCESSES
from weight_transfer.values.deadline import Deadline


class RankActor:
    """A trainer rank.

    Args:
        rank: its number.
        ranks: of the trainer.
        dim: along which weights are cut.
        workers: how many there are.
        config: of `load_config`.
    """

    def __init__(self, rank: int, ranks: int, dim: int, workers: int, config: dict[str, Any]) -> None:
        self.rank = rank
        self.layout = Layout.of(cases.split(ranks, dim))
        self.tensors = cases.shards(self.layout, rank)
        own = load_config(**config)
        self.engine = load_backend(own.backend).create_trainer_engine(own, ParallelConfig(device="cpu"))
        self.slots = [
            WorkerSlot(peer=f"worker {n}", rank_offset=1 + n, count=1, world_size=1 + workers) for n in range(workers)
        ]
        pieces = [plan_pieces(self.layout, kept, n).of_rank(rank) for n, kept in enumerate(cases.kept(workers))]
        takers = [Taker(peer=f"worker {n}", worker=n, pieces=some) for n, some in enumerate(pieces)]
        self.outgoing = OutgoingRegions(rank=rank, layout=self.layout, tensors=self.tensors, takers=takers)

    def open(self) -> dict[str, Any]:
        if self.rank:
            return self.engine.open_rank({}, self.slots, Deadline(20))
        return self.engine.open_endpoint(self.slots, Deadline(20))[0]

    def join(self) -> None:
        self.engine.join_workers(Deadline(20))

    def share(self, seed: int) -> dict[str, Any]:
        cases.fill(self.tensors, self.layout, self.rank, cases.full(seed))
        return self.engine.share_regions(self.outgoing, Deadline(20))

    def send(self, timeout: float = 20) -> int:
        sent: list[int] = []
        self.engine.send_regions(self.outgoing, Deadline(timeout), sent.append)
        return sum(sent)

    def release(self) -> int:
        self.engine.release_source()
        return self.engine.extra_memory

    def shutdown(self) -> None:
        self.engine.shutdown()


class WorkerActor:
    """A worker; see `RankActor`."""

    def __init__(self, worker: int, ranks: int, dim: int, workers: int, config: dict[str, Any]) -> None:
        self.worker = worker
        self.layout = Layout.of(cases.split(ranks, dim))
        self.own = cases.kept(workers)[worker]
        self.incoming = cases.Incoming(self.layout, self.own, worker, cases.targets(self.own))
        self.shares: Any = None
        own = load_config(**config)
        self.engine = load_backend(own.backend).create_worker_engine(own, ParallelConfig(device="cpu"))

    def join(self, infos: list[dict[str, Any]]) -> None:
        common = {"rank_offset": 1 + self.worker, "world_size": 9, "timeout": 20, "trainer_ranks": len(infos)}
        given = [{name: value for name, value in info.items() if value is not None} for info in infos]
        self.engine.init_transfer_engine(self.engine.parse_init_info(common | given[0] | {"ranks": given[1:]}))

    def receive(self, shares: list[dict[str, Any]], timeout: float = 20) -> dict[int, int]:
        if shares != self.shares:  # as with the core, the same object while it is unchanged
            self.shares = shares
        self.incoming.bytes_by_rank = {}
        info = self.engine.update_info_cls(
            manifest=cases.MANIFEST, timeout=timeout, export=Export((), (), (), {}), shares=self.shares
        )
        self.engine.receive_regions(info, self.incoming)
        return self.incoming.bytes_by_rank

    def holds(self, seed: int) -> bool:
        expected = cases.expected(self.own, cases.full(seed))
        return all(map(cases.same_bits, self.incoming.targets, expected))

    def move_targets(self) -> None:
        self.incoming.targets = [torch.empty_like(target) for target in self.incoming.targets]

    def planned(self) -> dict[int, int]:
        sizes = self.incoming.pieces.by_rank(len(self.layout.places)).tolist()
        return {rank: size for rank, size in enumerate(sizes) if size}

    def lost(self) -> bool:
        return self.engine.lost

    def abort(self) -> None:
        self.engine.abort_update()

    def shutdown(self) -> None:
        self.engine.shutdown()


def answer_calls(kind: type[Any], arguments: tuple[Any, ...], pipe: Connection) -> None:
    """Make an actor and answer calls of its methods until the pipe is closed."""
    torch.set_num_threads(1)
    actor = kind(*arguments)
    while True:
        try:
            name, given = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send({"result": getattr(actor, name)(*given)})
        except WeightTransferError as error:
            pipe.send({"error": error_to_dict(error)})


class Remote:
    """An actor in a process of its own; a call is begun by `begin`, and `end` returns its result."""

    def __init__(self, kind: type[Any], *arguments: Any) -> None:
        self._pipe, theirs = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=answer_calls, args=(kind, arguments, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, name: str, *arguments: Any) -> Callable[[], Any]:
        self._pipe.send((name, arguments))
        return self.end

    def end(self) -> Any:
        assert self._pipe.poll(60), "no answer"
        answer = self._pipe.recv()
        if "error" in answer:
            raise error_from_dict(answer["error"])
        return answer["result"]

    def ask(self, name: str, *arguments: Any) -> Any:
        return self.begin(name, *arguments)()

    def stop(self) -> None:
        self._pipe.close()
        self.process.kill()
        self.process.join(10)


class RegionFleet:
    """Trainer ranks and workers that have joined, in processes; use it in a ``with`` block."""

    def __init__(self, ranks: int, workers: int, config: dict[str, Any], dim: int = 0) -> None:
        common = dim, workers, config
        self.trainers = [Remote(RankActor, rank, ranks, *common) for rank in range(ranks)]
        self.workers = [Remote(WorkerActor, number, ranks, *common) for number in range(workers)]

    def __enter__(self) -> RegionFleet:
        infos = [trainer.ask("open") for trainer in self.trainers]
        ends = [worker.begin("join", infos) for worker in self.workers]
        ends += [trainer.begin("join") for trainer in self.trainers]
        for end in ends:
            end()
        return self

    def __exit__(self, *_: object) -> None:
        for each in [*self.trainers, *self.workers]:
            each.stop()

    def update(self, seed: int) -> list[dict[int, int]]:
        """Send weights; return how many bytes of each rank each worker has counted."""
        shares = [trainer.ask("share", seed) for trainer in self.trainers]
        receiving = [worker.begin("receive", shares) for worker in self.workers]
        sending = [trainer.begin("send") for trainer in self.trainers]
        received = [end() for end in receiving]
        for end in sending:
            end()
        for trainer in self.trainers:
            trainer.ask("release")
        return received
