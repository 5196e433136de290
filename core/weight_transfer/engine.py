"""The contract of a backend: one engine in each worker, one in the trainer.

Who calls what, for one trainer and its workers:

    trainer                                             each worker
    -------                                             -----------
    1. open_endpoint(slots)   -> init infos     ──────▶ 2. init_transfer_engine(init_info)
    3. join_workers()                           ◀─────▶    (while 2. is under way)
    for every update:
    4. describe_update(source) -> extra fields  ──────▶ 5. receive_weights(update_info, load_weights)
    6. send_weights(source)                     ◀─────▶    (while 5. is under way)
    7. release_source()                                    (after every worker has finished)
    at the end, or after an error:
    8. shutdown()                                       9. shutdown()

States, versions, deadlines over the whole call, verification and events belong to the core
(`WeightSender`, `WeightReceiver`). An engine moves bytes, no more.

A backend that declares `Capability.REGIONS` also moves parts of weights, from every trainer rank straight to where
each worker keeps them. The trainer then has an engine on each of its ranks:

    trainer rank 0              trainer ranks 1..           each worker
    --------------              -----------------           -----------
    1. open_endpoint(slots)     open_rank(first, slots) ──▶ 2. init_transfer_engine(init_info)
    3. join_workers()           join_workers()        ◀───▶    (while 2. is under way)
    for every update, first what goes whole (steps 4. to 6. above), then what goes by region:
    4. share_regions(outgoing)  share_regions(outgoing) ──▶ 5. receive_regions(update_info, incoming)
    6. send_regions(outgoing)   send_regions(outgoing) ◀──▶    (while 5. is under way)
    7. release_source()         release_source()

Without that capability the core gathers sharded weights, and sends them whole from rank 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import attrs

from weight_transfer.config.structuring import structure
from weight_transfer.model.info import WeightTransferInitInfo, WeightTransferUpdateInfo

if TYPE_CHECKING:
    from torch import Tensor

    from weight_transfer.config.settings import ParallelConfig, WeightTransferConfig
    from weight_transfer.model.manifest import Manifest
    from weight_transfer.model.source import WeightSource
    from weight_transfer.plan.exchange import IncomingRegions, OutgoingRegions
    from weight_transfer.values.deadline import Deadline

TInitInfo = TypeVar("TInitInfo", bound=WeightTransferInitInfo)
TUpdateInfo = TypeVar("TUpdateInfo", bound=WeightTransferUpdateInfo)

LoadWeights = Callable[[list[tuple[str, "Tensor"]]], None]
"""Takes a part of the weights as ``(name, tensor)`` pairs. The tensors are only valid during the call."""


class WeightTransferEngine(ABC, Generic[TInitInfo, TUpdateInfo]):
    """The worker's side of a backend.

    Subclasses set `init_info_cls` and `update_info_cls` and write the three abstract methods. The core
    calls them from one thread at a time, in the order of this module's docstring; only `abort_update` may come
    from another thread at any time.

    Attributes:
        transport: how the bytes travel from the trainer, for reports, such as ``"gloo over TCP"``. An engine whose
            library chooses says here what it chose.
        warnings: what is amiss with the last update though it is good, for reports, a sentence each: a slow path, say.
    """

    init_info_cls: ClassVar[type[Any]] = WeightTransferInitInfo
    update_info_cls: ClassVar[type[Any]] = WeightTransferUpdateInfo
    transport: str = ""
    warnings: tuple[str, ...] = ()

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        """Keep both configs; ``config.options`` is an instance of the backend's options class. Acquire nothing yet."""
        self.config = config
        self.parallel_config = parallel_config

    def parse_init_info(self, init_dict: dict[str, Any]) -> TInitInfo:
        """Return the typed init info.

        Raises:
            ValueError: a key is unknown, missing, or of a wrong type; the sentence names the engine and the key.
        """
        info: TInitInfo = structure(init_dict, self.init_info_cls, f"init_info of {type(self).__name__}")
        return info

    def parse_update_info(self, update_dict: dict[str, Any]) -> TUpdateInfo:
        """Return the typed update info; see `parse_init_info`."""
        info: TUpdateInfo = structure(update_dict, self.update_info_cls, f"update_info of {type(self).__name__}")
        return info

    @abstractmethod
    def init_transfer_engine(self, init_info: TInitInfo) -> None:
        """Join the trainer within ``init_info.timeout`` seconds. Called once per engine.

        Raises:
            HandshakeError, PeerLostError, TransferTimeoutError: joining failed; nothing stays open.
        """

    @abstractmethod
    def receive_weights(self, update_info: TUpdateInfo, load_weights: LoadWeights) -> None:
        """Receive every parameter of ``update_info.manifest`` once and hand it to ``load_weights``.

        Call ``load_weights`` incrementally, with a bounded number of bytes at a time. It raises when the deadline has
        passed or the update was aborted; let that through. With
        `destinations_of` bytes may be written straight into the worker's own tensors,
        which are then handed to ``load_weights`` themselves.

        Raises:
            TransferTimeoutError: ``update_info.timeout`` seconds passed; nothing is written afterwards.
            PeerLostError: the trainer died.
            ManifestMismatchError: both sides disagree about the plan.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """Give back everything: memory, connections, threads. May be called in any state, and twice."""

    def receive_regions(self, update_info: TUpdateInfo, incoming: IncomingRegions) -> None:
        """Receive every piece of ``incoming.pieces`` into ``incoming.targets``; see `Capability.REGIONS`.

        ``update_info.shares`` holds, by rank, what the trainer's engines said in `share_regions`. Before each batch of
        writes call ``incoming.write_in_place()``, and ``incoming.moved(rank, nbytes)`` once bytes of a rank have been
        written.

        Raises:
            TransferTimeoutError: ``update_info.timeout`` seconds passed; nothing is written afterwards.
            PeerLostError: a trainer rank died.
            ManifestMismatchError: both sides disagree about the plan.
        """
        raise NotImplementedError(f"{type(self).__name__} declares REGIONS, and has no receive_regions")

    def abort_update(self) -> None:
        """Make running `receive_weights`, `receive_regions` or `init_transfer_engine` end soon; from another thread."""

    @property
    def lost(self) -> bool:
        """Whether it is known that the trainer has closed its connection or died; asked often, so answer at once."""
        return False

    @property
    def extra_memory(self) -> int:
        """Bytes of staging memory that this engine holds now, apart from the weights themselves."""
        return 0


@attrs.frozen(kw_only=True)
class WorkerSlot:
    """The place of one control channel in the transfer group.

    Attributes:
        peer: the channel's address, for messages.
        rank_offset: rank of the first worker behind it; the trainer is rank 0.
        count: number of workers behind it.
        world_size: members of the group: the trainer and all workers.
    """

    peer: str
    rank_offset: int
    count: int
    world_size: int


class TrainerWeightTransferEngine(ABC, Generic[TInitInfo, TUpdateInfo]):
    """The trainer's side of a backend, on the trainer rank that sends; on each of them with `Capability.REGIONS`.

    The core calls the methods in the order of this module's docstring, from the thread that called ``send``; only
    `abort_update` may come from another thread at any time.
    """

    init_info_cls: ClassVar[type[Any]] = WeightTransferInitInfo
    update_info_cls: ClassVar[type[Any]] = WeightTransferUpdateInfo

    def __init__(self, config: WeightTransferConfig, parallel_config: ParallelConfig) -> None:
        """Keep both configs. Acquire nothing yet."""
        self.config = config
        self.parallel_config = parallel_config

    @abstractmethod
    def open_endpoint(self, slots: Sequence[WorkerSlot], deadline: Deadline) -> list[dict[str, Any]]:
        """Get ready for the workers in ``slots`` and say what each needs to join.

        Called once with all slots; called again, with the returning ones only, if the backend declares
        `REJOIN`.

        Returns:
            One dict per slot: the fields that ``init_info_cls`` adds to
            `WeightTransferInitInfo`, JSON-safe.
        """

    def open_rank(self, first: Mapping[str, Any], slots: Sequence[WorkerSlot], deadline: Deadline) -> dict[str, Any]:
        """Get ready on a trainer rank other than 0, and say what workers need to join it; see `Capability.REGIONS`.

        Called whenever `open_endpoint` was called on rank 0, with the same slots.

        Args:
            first: what rank 0's `open_endpoint` returned for the first slot.
            slots: the workers that join.
            deadline: of the join.

        Returns:
            The fields that ``init_info_cls`` adds to `WeightTransferInitInfo`, JSON-safe; workers find them in
            ``init_info.ranks``, see `WeightTransferInitInfo.of_ranks`.
        """
        raise NotImplementedError(f"{type(self).__name__} declares REGIONS, and has no open_rank")

    @abstractmethod
    def join_workers(self, deadline: Deadline) -> None:
        """Wait until every worker that was promised by the last `open_endpoint` has joined.

        Return at once if there is nothing to wait for but the workers' answers: the core waits for those.
        """

    def describe_update(self, source: WeightSource, manifest: Manifest, deadline: Deadline) -> dict[str, Any]:
        """Return the fields that ``update_info_cls`` adds to `WeightTransferUpdateInfo`.

        For a field declared with `sent_once`, return the same object while it is unchanged.
        """
        return {}

    @property
    def tolerates_moves(self) -> bool:
        """Whether what was described last may lie elsewhere by now, without harm: then the core looks at that later.

        So it is if no address in this process is read that `describe_update` has not just seen to be right, but by
        workers, whose reads of memory that is gone fail, or find what lay there. The core gives up an update of weights
        that have moved; until it knows, bytes may go that are no weights of this version any more. By default it looks
        where tens of thousands of tensors lie before the workers hear of the update.
        """
        return False

    @abstractmethod
    def send_weights(
        self, source: WeightSource, manifest: Manifest, deadline: Deadline, progress: Callable[[int], None]
    ) -> None:
        """Move the bytes, while the workers are in ``receive_weights``; a backend whose workers pull returns at once.

        Args:
            source: iterate it to materialise tensors, or export ``source.resident()``.
            manifest: ``source.manifest()``.
            deadline: raise `TransferTimeoutError` when it passes.
            progress: call it with the number of bytes that have moved since the last call.
        """

    def share_regions(self, outgoing: OutgoingRegions, deadline: Deadline) -> dict[str, Any]:
        """Say how workers get at this rank's shards; see `Capability.REGIONS`.

        Called in each update before `send_regions`, on the thread whose current CUDA stream has written the weights.

        Returns:
            JSON-safe; the same object while it is unchanged, for it is sent once. Workers find it in
            ``update_info.shares`` at this rank.
        """
        raise NotImplementedError(f"{type(self).__name__} declares REGIONS, and has no share_regions")

    def send_regions(self, outgoing: OutgoingRegions, deadline: Deadline, progress: Callable[[int], None]) -> None:
        """Move this rank's pieces, while the workers are in ``receive_regions``; if they pull, return at once.

        Args:
            outgoing: that of the last `share_regions`.
            deadline: raise `TransferTimeoutError` when it passes.
            progress: call it with the number of bytes that have moved since the last call.
        """
        raise NotImplementedError(f"{type(self).__name__} declares REGIONS, and has no send_regions")

    def release_source(self) -> None:
        """Every worker has finished: let go of what was exported for this update only."""

    def abort_update(self) -> None:
        """The update failed: make running `send_weights` and `send_regions` raise soon. Called from any thread."""

    def lose_worker(self, peer: str) -> None:
        """Worker ``peer`` of an `open_endpoint` failed, the others go on: do not wait for it. Called from any thread.

        It may come back: then `open_endpoint` is called for it again.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """Give back everything. May be called in any state, and twice."""

    @property
    def extra_memory(self) -> int:
        """Bytes of staging memory that this engine holds now, apart from the weights themselves."""
        return 0
