"""A trainer rank other than 0: says what it holds, does what rank 0 orders, and learns how the update ended."""

from __future__ import annotations

import queue
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.config.structuring import structure, unstructure
from weight_transfer.engine import WorkerSlot
from weight_transfer.errors import (
    PeerLostError,
    TransferTimeoutError,
    WeightTransferError,
    error_from_dict,
    error_to_dict,
)
from weight_transfer.model.manifest import Manifest
from weight_transfer.plan.layout import Layout
from weight_transfer.session.guarded import GuardedSource, named
from weight_transfer.session.meeting import find_leader, meet_leader, name_of
from weight_transfer.session.part import StartOver
from weight_transfer.session.sharing import Keeper, Sharing
from weight_transfer.values.deadline import Deadline
from weight_transfer.values.report import TransferReport

if TYPE_CHECKING:
    from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
    from weight_transfer.engine import TrainerWeightTransferEngine
    from weight_transfer.plugins.manager import LoadedBackend
    from weight_transfer.session.lines import Line, Message
    from weight_transfer.session.meeting import Address
    from weight_transfer.session.part import Part

_LATER = 5.0  # seconds that rank 0 gets to say how its deadline ended the update


class Follower:
    """This rank's place behind rank 0.

    Args:
        backend: the loaded backend.
        config: the trainer's.
        ranks: this rank, and how many there are.
        key: under which rank 0's meeting is made known; see `next_key`.
    """

    def __init__(self, backend: LoadedBackend, config: WeightTransferConfig, ranks: ParallelConfig, key: str) -> None:
        self._backend = backend
        self._config = config
        self._ranks = ranks
        self._key = key
        self._address: Address | None = None
        self._line: Line | None = None
        self._orders: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._engine: TrainerWeightTransferEngine[Any, Any] | None = None
        self._generation: str | None = None
        self._sharings: dict[str, Sharing] = {}
        self._plans: dict[str, str] = {}
        self._told: dict[str, object] = {}
        self._stopped = False

    def send(self, prepare: Callable[[], Part]) -> TransferReport:
        """Take part in an update.

        Args:
            prepare: reads this rank's weights.

        Raises:
            WeightTransferError: the update failed; all ranks raise the same.
            StartOver: all ranks have to send anew.
        """
        self._stopped = False
        deadline = Deadline(self._config.timeout + _LATER)
        try:
            line = self._connected(deadline)
            part = self._prepared(prepare, line, deadline)
            while (order := self._next(line)) and order["do"] != "end":
                self._answer(order, part, line)
            return self._outcome(order)
        except BaseException:
            self._give_up()
            raise

    def cancel(self) -> None:
        """Make what is under way raise soon; callable from any thread."""
        self._stop()
        if self._line is not None:
            self._line.close()

    def forget(self) -> None:
        """Let go of the weights."""
        self._sharings.clear()
        self._plans.clear()
        self._told.clear()

    def close(self) -> None:
        """Leave the other ranks, and shut the engine down."""
        self._drop()
        self.forget()
        if self._line is not None:
            self._line.close()
            self._line = None

    # What happens with rank 0.

    def _connected(self, deadline: Deadline) -> Line:
        if self._line is None or self._line.ended.is_set():
            self._told.clear()
            config = self._config
            self._address = self._address or find_leader(self._key, config.rendezvous, deadline)
            self._orders = queue.SimpleQueue()
            size = self._ranks.world_size
            hear = self._hearing(self._orders)
            self._line = meet_leader(self._ranks.rank, size, self._address, config.token, hear, deadline)
        return self._line

    def _hearing(self, orders: queue.SimpleQueue[Message | None]) -> Callable[[Message | None], None]:
        def hear(message: Message | None) -> None:
            if orders is not self._orders:  # the line was given up, and its end is no news
                return
            if message is None or message.get("aside") == "abort" or message.get("error"):
                self._stop()
            elif message.get("aside") == "lose_worker" and self._engine is not None:
                self._engine.lose_worker(str(message["peer"]))
            if message is None or "aside" not in message:
                orders.put(message)

        return hear

    def _prepared(self, prepare: Callable[[], Part], line: Line, deadline: Deadline) -> Part:
        """Read this rank's weights and say what it holds; if that fails, rank 0 tells all others."""
        try:
            part = prepare()
        except Exception as error:
            foreign = not isinstance(error, WeightTransferError)
            known = named(error, self._config.backend, None) if foreign else error
            with suppress(WeightTransferError):  # this rank's own error is raised
                line.send({"error": error_to_dict(known)}, deadline)
                self._next(line)
            if known is error:
                raise
            raise known from error
        own = {"engine": self._generation, "plan": self._plans.get(part.target)}
        self._say(line, part.ready(self._told) | own, deadline)
        return part

    def _say(self, line: Line, message: Message, deadline: Deadline) -> None:
        """Tell rank 0 something; if it has hung up, the next order is what it said last, or that it is gone."""
        with suppress(PeerLostError):
            line.send(message, deadline)

    def _next(self, line: Line) -> Message:
        """Return the next order."""
        deadline = Deadline(max(self._config.timeout, self._config.init_timeout) + _LATER)
        try:
            order = self._orders.get(timeout=deadline.remaining())
        except queue.Empty:
            raise TransferTimeoutError(
                f"It did not go on with the update within {deadline.seconds:g} s.", peer=name_of(0), phase="update"
            ) from None
        if order is None:
            raise line.lost()
        return order

    def _answer(self, order: Message, part: Part, line: Line) -> None:
        """Do what rank 0 orders, and say how that went; it tells all ranks of a failure."""
        deadline = Deadline(float(order["timeout"]))
        try:
            if order["do"] != "send":  # its collectives come first: rank 0 runs them, whatever has happened since
                self._require_going_on()
            answer = getattr(self, f"_do_{order['do']}")(order, part, deadline)
        except Exception as error:  # noqa: BLE001  (told)
            answer = {"error": error_to_dict(part.named(error))}
        self._say(line, answer or {"done": order["do"]}, Deadline(_LATER))

    def _outcome(self, order: Message) -> TransferReport:
        if order.get("error"):
            raise error_from_dict(order["error"])
        if order.get("anew"):
            raise StartOver(order["anew"])
        if self._engine is not None:
            self._engine.release_source()
        report: TransferReport = structure(order["report"], TransferReport, "report of trainer rank 0")
        return attrs.evolve(report, extra_memory=self._engine.extra_memory if self._engine else 0)

    def _give_up(self) -> None:
        """After a failure: this rank has to meet the others anew."""
        self._drop()
        self._told.clear()
        self._sharings.clear()
        self._plans.clear()
        self._orders = queue.SimpleQueue()
        if self._line is not None:
            self._line.close()
            self._line = None

    def _stop(self) -> None:
        self._stopped = True
        if self._engine is not None:
            self._engine.abort_update()

    def _require_going_on(self) -> None:
        if self._stopped:  # for rank 0 that is an echo of what has failed, as when an engine is aborted
            raise PeerLostError("The update was aborted.", phase="update")

    def _drop(self) -> None:
        engine, self._engine, self._generation = self._engine, None, None
        if engine is not None:
            engine.shutdown()

    # What rank 0 may order.

    def _do_open(self, order: Message, part: Part, deadline: Deadline) -> Message:
        if self._engine is None:
            ranks = attrs.evolve(self._ranks, device=self._ranks.device or part.device)
            self._engine = self._backend.create_trainer_engine(self._config, ranks)
        self._generation = str(order["generation"])
        slots = [structure(slot, WorkerSlot, "a worker's slot") for slot in order["slots"]]
        return {"fields": unstructure(self._engine.open_rank(order["first"], slots, deadline))}

    def _do_join(self, _order: Message, _part: Part, deadline: Deadline) -> None:
        if self._engine is not None:
            self._engine.join_workers(deadline)

    def _do_plan(self, order: Message, part: Part, _deadline: Deadline) -> None:
        manifest = Manifest.from_wire(order["manifest"]) if order["manifest"] is not None else part.manifest
        keepers = [Keeper.from_wire(data, manifest) for data in order["keepers"]]
        layout = Layout.from_wire(order["layout"], manifest) if order["layout"] is not None else None
        self._sharing(part).plan(layout, keepers)
        self._plans[part.target] = str(order["id"])
        self._told.pop(f"share {part.target}", None)  # rank 0 has put its shares together for the plan before

    def _do_share(self, _order: Message, part: Part, deadline: Deadline) -> Message:
        outgoing = self._sharing(part).outgoing(part.shards)
        assert self._engine is not None and outgoing is not None
        share = self._engine.share_regions(outgoing, deadline)
        known = self._told.get(f"share {part.target}") is share
        self._told[f"share {part.target}"] = share
        return {"share": None if known else unstructure(share)}

    def _do_send(self, order: Message, part: Part, deadline: Deadline) -> Message:
        """Run the collectives of what goes whole in lockstep with rank 0, then give what goes by region."""
        sharing = self._sharing(part)
        GuardedSource(part.whole(sharing.layout), part.whole(sharing.layout).manifest()).drain()
        self._require_going_on()
        outgoing = sharing.outgoing(part.shards)
        is_right = part.confirm()
        if outgoing is not None:
            assert self._engine is not None
            self._engine.send_regions(outgoing, deadline, lambda _nbytes: None)
        answer = {"done": "send", "right": is_right}
        if outgoing is None or self._config.verify == "none":
            return answer
        return {**answer, "digests": sharing.digests(outgoing)}

    def _do_drop(self, _order: Message, _part: Part, _deadline: Deadline) -> None:
        self._drop()

    def _sharing(self, part: Part) -> Sharing:
        return self._sharings.setdefault(part.target, Sharing(self._ranks.rank))
