"""A communicator of our own: one process group per trainer and its workers, who meet where the trainer listens.

The user's default process group is neither created, needed nor touched.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from weight_transfer.errors import PeerLostError, TransferError
from weight_transfer_nccl.communicators import begin_close, build, close
from weight_transfer_nccl.member_store import MemberStore
from weight_transfer_nccl.members import POLL, await_members, gloo_ends, here, prove_each_other
from weight_transfer_nccl.rendezvous import Rendezvous, dist, first_line
from weight_transfer_nccl.sockets import End, break_connections, stop_hearing
from weight_transfer_nccl.watchdog import Watchdog
from weight_transfer_nccl.works import MARGIN, Work, aborted, errors_of_torch

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline

_GRACE = 0.5  # seconds in which a thread may say why it failed at its deadline
_ABORT_WAIT = 3.0  # seconds
_LAST_WORKS = 64  # more than are under way: those before have been waited for
_FEW = 64  # members; of more, only those pairs are connected between which something travels
_TAGS = 2**31 - 1  # the last one is that of proofs

Parcel = tuple[int, torch.Tensor]
"""The rank of the other member, and what goes to it or comes from it: contiguous, uint8, not empty."""


class Group:
    """A process group of the trainer's ranks (from 0) and its workers.

    Args:
        meeting: where the members meet.
        rank: of this one.
        world_size: their number.
        device: of the tensors that it moves.
        trainers: how many of the members are the trainer's ranks.
    """

    def __init__(
        self,
        meeting: Rendezvous,
        rank: int,
        world_size: int,
        device: torch.device,
        trainers: int = 1,
    ) -> None:
        self.device = device
        self._meeting = meeting
        self._store: MemberStore | None = None
        self._rank = rank
        self._world_size = world_size
        self._trainers = trainers
        sends = "broadcasting the weights" if trainers == 1 else "sending the weights"
        self._doing = sends if rank < trainers else "receiving the weights"
        self._backend: Any = None
        self._options = dist.BroadcastOptions()
        self._options.rootRank = 0
        self._options.rootTensor = 0
        self._least = dist.AllreduceOptions()
        self._least.reduceOp = dist.ReduceOp.MIN
        self._aborted = threading.Event()
        self._building = threading.Lock()
        self._ends: Set[End] = frozenset()
        self._works: deque[Work] = deque(maxlen=_LAST_WORKS)
        self._tags = [0] * world_size
        self._watchdog = Watchdog(self.abort)
        weakref.finalize(self, self._watchdog.close)

    def join(self, deadline: Deadline, name_of: Callable[[int], str]) -> None:
        """Meet the other members; see `join_groups`."""
        join_groups([(self, name_of)], deadline)

    def begin(self, deadline: Deadline, agrees: bool = False) -> Work:
        """Begin an update, with all members. One whose work has ended knows that bytes follow.

        Args:
            deadline: until when.
            agrees: what this one says to what `agreed` asks.
        """
        if self._meeting.transport == "gloo":
            self._least.timeout = timedelta(seconds=deadline.remaining() + MARGIN)
        self._token.fill_(agrees)
        return self._start("allreduce", [([self._token], self._least)], deadline, together=False)

    def agreed(self) -> bool:
        """Return whether all members have agreed in `begin`, whose work has ended; on a GPU, on its stream."""
        return bool(self._token.item())

    def begin_with(self, peers: Sequence[int], deadline: Deadline) -> Work:
        """Begin an update with some members only, as `begin`: trainer ranks say so, workers hear it."""
        tokens = torch.zeros(max(len(peers), 1), dtype=torch.uint8, device=self.device)
        return self.exchange([(peer, tokens[index : index + 1]) for index, peer in enumerate(peers)], deadline)

    def broadcast(self, data: Sequence[torch.Tensor], deadline: Deadline) -> Work:
        """Start to broadcast tensors from rank 0 to all; returns a work to wait for.

        Args:
            data: uint8, of the same sizes on all ranks. NCCL broadcasts them in one launch.
            deadline: when they must have arrived.

        Raises:
            PeerLostError: a member of the group died, or the group was aborted.
            TransferTimeoutError: it was aborted because the deadline has passed.
        """
        if self._meeting.transport == "gloo":  # the operation itself must end: only then is its memory quiet
            self._options.timeout = timedelta(seconds=deadline.remaining() + MARGIN)
        calls = [([tensor], self._options) for tensor in data]
        return self._start("broadcast", calls, deadline, together=len(data) > 1)

    def exchange(self, parcels: Sequence[Parcel], deadline: Deadline) -> Work:
        """Start to send, on a trainer's rank, or to receive, on a worker; in one launch of NCCL.

        What one member sends another is received in the same order, and in parcels of the same sizes.

        Raises:
            PeerLostError, TransferTimeoutError: as `broadcast` does.
        """
        calls = []
        for peer, tensor in parcels:
            calls.append(([tensor], peer, self._tags[peer]))
            self._tags[peer] = (self._tags[peer] + 1) % _TAGS
        return self._start("send" if self._rank < self._trainers else "recv", calls, deadline, together=True)

    def _start(self, name: str, calls: Sequence[tuple[Any, ...]], deadline: Deadline, together: bool) -> Work:
        backend = self._backend
        if self._aborted.is_set() or backend is None:
            raise aborted(deadline, self._doing)
        is_gloo, is_timed = self._meeting.transport == "gloo", name in ("send", "recv")
        only_reads = is_gloo and not is_timed and self._rank == 0  # but for this group's own byte
        work = Work(deadline, self._doing, is_gloo and is_timed, self._aborted if only_reads else None)
        self._works.append(work)
        together = together and bool(calls) and backend.supports_coalescing
        with errors_of_torch(deadline, self._doing):
            try:
                if together:
                    backend._start_coalescing()  # noqa: SLF001  (its only name)
                for arguments in calls:
                    launched = getattr(backend, name)(*arguments)
                    if not together:
                        work.add(launched)
            finally:
                if together:  # also after an error: NCCL counts the launches that a thread has opened
                    launched = backend._end_coalescing()  # noqa: SLF001
                    if launched is not None:
                        work.add(launched)
                launched = backend = None  # a traceback would keep them
        return work

    @contextmanager
    def guard(self, deadline: Deadline) -> Iterator[None]:
        """End whatever blocks inside when the deadline passes; once an error leaves it, nothing moves any more.

        What is raised inside is raised: the source's and the loader's errors are their own.
        """
        try:
            with self._watchdog.watching(deadline):
                yield
            if self.aborted:  # NCCL's kernels end without an error
                raise aborted(deadline, self._doing)
        except BaseException:
            self._quiet()
            raise

    def _quiet(self) -> None:
        """Abort, and return when nothing writes any more."""
        self.abort()
        if self.device.type == "cuda":  # aborted kernels have ended, or end at once
            torch.cuda.synchronize(self.device)
        for work in self._works:
            work.drain()
        self._works.clear()

    @property
    def aborted(self) -> bool:
        return self._aborted.is_set()

    def abort(self) -> None:
        """End all operations and connections; callable from any thread, and twice."""
        abort_groups([self])

    def begin_abort(self) -> threading.Thread | None:
        """Begin to `abort`; return what has to be waited for, or None."""
        self._aborted.set()
        self._watchdog.close()
        with self._building:
            backend, self._backend = self._backend, None
            if self._store is not None:
                self._store.close()
        if backend is None:
            return None
        # NCCL's abort ends the running kernels and then waits for its peers, for ever if one of them is stopped.
        # gloo has none: its operations end with their connections, or else by their own timeouts.
        break_connections(self._ends)
        last_reference = [backend]
        del backend
        return begin_close(last_reference, self._meeting.transport)

    def arrive(self, deadline: Deadline) -> None:
        """Come to the meeting place, and say there that this member is here."""
        store = MemberStore(self._meeting, deadline)
        with self._building:
            self._store = store
        if self._aborted.is_set():
            store.close()
            self.require_joining()
        self._named(store).set(here(self._rank), "")

    def meet(self, deadline: Deadline, name_of: Callable[[int], str]) -> None:
        """Build the communicator with the other members once they have arrived, for as long as it takes."""
        assert self._store is not None
        store = self._named(self._store)
        await_members(store, self._rank, self._world_size, name_of, self.require_joining, deadline)
        built = [build(self._meeting, store, self._rank, self._world_size, self.device, deadline)]
        ends = gloo_ends(store, self._world_size) if self._meeting.transport == "gloo" else {}
        with self._building:
            if not self._aborted.is_set():
                self._backend, self._ends = built.pop(), frozenset(ends.values())
        if built:  # nobody waits for it any more
            close(built, self._meeting.transport)
            self.require_joining()
        if self._meeting.transport == "gloo":
            self._trust_gloo(ends, deadline, name_of)
        self._token = torch.zeros(1, dtype=torch.uint8, device=self.device)
        self._warm_up(deadline)
        self._store.joined()

    def _named(self, store: MemberStore) -> Any:
        return dist.PrefixStore(str(self._trainers), store)

    def _trust_gloo(self, ends: Mapping[int, End], deadline: Deadline, name_of: Callable[[int], str]) -> None:
        """Make sure that all its connections are to members, and that there will be no others."""
        backend = self._backend
        if backend is None:
            raise aborted(deadline, self._doing)
        others = set(range(self._world_size)) - {self._rank}
        try:
            prove_each_other(backend, self._meeting.secret + str(self._trainers), self._rank, others, name_of, deadline)
        finally:
            backend = None  # a traceback would keep it
        if self._rank in ends:
            stop_hearing(ends[self._rank])

    def require_joining(self) -> None:
        """Raise if joining was aborted."""
        if self._aborted.is_set():
            raise TransferError("Joining was aborted.", backend="nccl", phase="init")

    def _warm_up(self, deadline: Deadline) -> None:
        """Connect now, so that the first update does not pay for it."""
        self.broadcast([self._token], deadline).wait()
        if self._trainers == 1:
            self.begin(deadline).wait()
        elif self._world_size <= _FEW:
            ranks = range(self._world_size)
            others = ranks[self._trainers :] if self._rank < self._trainers else ranks[: self._trainers]
            self.begin_with(others, deadline).wait()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def abort_groups(groups: Iterable[Group]) -> None:
    """Abort groups, all at once."""
    for closing in [group.begin_abort() for group in groups]:
        if closing is not None:
            closing.join(_ABORT_WAIT)


def join_groups(groups: Sequence[tuple[Group, Callable[[int], str]]], deadline: Deadline) -> None:
    """Meet the other members of some groups, one group after another; the order is that of all members.

    Args:
        groups: each with how messages call its member of a rank.
        deadline: for all of it.

    Raises:
        TransferTimeoutError: members are missing, and named; or the trainer stands still.
        PeerLostError: one died meanwhile.
        TransferError: joining was aborted.
    """
    outcome: list[Exception | None] = []
    done = threading.Event()

    def meet() -> None:
        try:
            for group, _ in groups:  # those who wait in a later group see who is still in an earlier one
                group.arrive(deadline)
            for group, name_of in groups:
                group.meet(deadline, name_of)
            outcome.append(None)
        except Exception as error:  # noqa: BLE001  (raised below, in the caller's thread)
            outcome.append(error)
        done.set()

    # Building waits for members that stand still, for ever over NCCL: that costs a thread, not this one.
    threading.Thread(target=meet, name="weight-transfer nccl join", daemon=True).start()
    try:
        while not done.wait(POLL):
            for group, _ in groups:
                group.require_joining()
            if deadline.expired and not done.wait(_GRACE):
                raise deadline.timeout("building the communicator", backend="nccl", phase="init")
        error = outcome[0]
        if error is not None:  # it may be an echo of the abort
            for group, _ in groups:
                group.require_joining()
        if isinstance(error, TransferError) and error.phase == "init":
            raise error
        if error is not None:
            raise _joining_error(error, deadline) from error
    except BaseException:
        abort_groups(group for group, _ in groups)
        raise


def _joining_error(error: Exception, deadline: Deadline) -> TransferError:
    if deadline.expired:
        return deadline.timeout("building the communicator", backend="nccl", phase="init")
    message, cause = "The communicator could not be built.", first_line(error)
    return PeerLostError(message, backend="nccl", phase="init", cause=cause)
