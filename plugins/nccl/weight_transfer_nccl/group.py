"""A communicator of our own: one process group per trainer and its workers, built on a store that the trainer opens.

The user's default process group is neither created, needed nor touched.
"""

from __future__ import annotations

import ipaddress
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from weight_transfer.errors import PeerLostError, TransferError
from weight_transfer_nccl.rendezvous import Rendezvous, dist, first_line, reach_store
from weight_transfer_nccl.sockets import End, break_connections, published_end

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline

_POLL = 0.02  # seconds between two looks at the store
_GRACE = 0.5  # seconds in which a thread may say why it failed at its deadline
_MARGIN = 0.01  # seconds by which gloo's timeout, in whole milliseconds, comes after the deadline
_ABORT_WAIT = 3.0  # seconds
_STORE_TIMEOUT = timedelta(seconds=2)
_LAST_WORKS = 64  # more than are under way: those before have been waited for
_FIRST_CONTEXT = 0  # the number under which gloo publishes the addresses of a group's first connections
_NEVER = timedelta(days=365)  # NCCL's own watchdog would end the process: deadlines are ours


class Work:
    """Broadcasts under way.

    It can let go of torch's own objects, which keep gloo's connections open as long as anything refers to them, be it
    the frames of a traceback.

    Args:
        deadline: when they must have ended.
        doing: for messages.
    """

    def __init__(self, deadline: Deadline, doing: str) -> None:
        self._works: list[Any] | None = []
        self._deadline = deadline
        self._doing = doing

    def add(self, work: Any) -> None:
        """Add one more."""
        if self._works is not None:
            self._works.append(work)

    def wait(self) -> None:
        """Wait for their end: on the host for gloo, on the current stream for NCCL.

        Raises:
            TransferTimeoutError: the deadline passed.
            PeerLostError: a member of the group died, or the group was aborted.
        """
        if self._works is None:
            raise _aborted(self._deadline, self._doing)
        with _errors_of_torch(self._deadline, self._doing):
            for index in range(len(self._works)):  # no name for a work: a traceback would keep it
                self._works[index].wait()

    def drain(self) -> None:
        """Wait until each has ended, well or not, and forget them."""
        works, self._works = self._works or [], None
        for work in works:
            with suppress(RuntimeError):  # gloo: each operation ends by its own timeout at the latest
                work.wait()


class Group:
    """A process group of the trainer (rank 0) and its workers.

    Args:
        store: the trainer's; None: it is reached by `join`.
        meeting: where the members meet.
        rank: of this one.
        world_size: their number.
        device: of the tensors that it moves.
    """

    def __init__(
        self, store: Any | None, meeting: Rendezvous, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.device = device
        self._store: Any = store and dist.PrefixStore(meeting.secret, store)
        self._meeting = meeting
        self._rank = rank
        self._world_size = world_size
        self._doing = "receiving the weights" if rank else "broadcasting the weights"
        self._backend: Any = None
        self._options = dist.BroadcastOptions()
        self._options.rootRank = 0
        self._options.rootTensor = 0
        self._aborted = threading.Event()
        self._building = threading.Lock()
        self._ends: Set[End] = frozenset()
        self._works: deque[Work] = deque(maxlen=_LAST_WORKS)

    def join(self, deadline: Deadline, name_of: Callable[[int], str]) -> None:
        """Meet the other members.

        Args:
            deadline: for all of it.
            name_of: how messages call the member of a rank.

        Raises:
            TransferTimeoutError: members are missing, and named; or the trainer stands still.
            PeerLostError: one died meanwhile.
            TransferError: joining was aborted.
        """
        outcome: list[Exception | None] = []
        done = threading.Event()

        def meet() -> None:
            try:
                self._meet(deadline, name_of)
                outcome.append(None)
            except Exception as error:  # noqa: BLE001  (raised below, in the caller's thread)
                outcome.append(error)
            done.set()

        # torch asks a store whose host stands still for ever: that costs a thread, not this one.
        threading.Thread(target=meet, name="weight-transfer nccl join", daemon=True).start()
        while not done.wait(_POLL):
            self._require_joining()
            if deadline.expired and not done.wait(_GRACE):
                self.abort()
                raise deadline.timeout("building the communicator", backend="nccl", phase="init")
        error = outcome[0]
        if isinstance(error, TransferError) and error.phase == "init":
            raise error
        if error is not None:
            if deadline.expired:
                raise deadline.timeout("building the communicator", backend="nccl", phase="init") from error
            message, cause = "The communicator could not be built.", first_line(error)
            raise PeerLostError(message, backend="nccl", phase="init", cause=cause) from error

    def begin(self, deadline: Deadline) -> Work:
        """Begin an update: the trainer says so to all workers. One whose work has ended knows that bytes follow."""
        return self.broadcast([self._token], deadline)

    def broadcast(self, data: Sequence[torch.Tensor], deadline: Deadline) -> Work:
        """Start to broadcast tensors from rank 0 to all; returns a work to wait for.

        Args:
            data: uint8, of the same sizes on all ranks. NCCL broadcasts them in one launch.
            deadline: when they must have arrived.

        Raises:
            PeerLostError: a member of the group died, or the group was aborted.
            TransferTimeoutError: it was aborted because the deadline has passed.
        """
        backend = self._backend
        if self._aborted.is_set() or backend is None:
            raise _aborted(deadline, self._doing)
        if self._meeting.transport == "gloo":  # the operation itself must end: only then is its memory quiet
            self._options.timeout = timedelta(seconds=deadline.remaining() + _MARGIN)
        work = Work(deadline, self._doing)
        self._works.append(work)
        together = len(data) > 1 and backend.supports_coalescing
        with _errors_of_torch(deadline, self._doing):
            try:
                if together:
                    backend._start_coalescing()  # noqa: SLF001  (its only name)
                for tensor in data:
                    launched = backend.broadcast([tensor], self._options)
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
        timer = threading.Timer(deadline.remaining(), self.abort)
        timer.daemon = True
        timer.start()
        try:
            yield
            if self.aborted:  # NCCL's kernels end without an error
                raise _aborted(deadline, self._doing)
        except BaseException:
            self._quiet()
            raise
        finally:
            timer.cancel()

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
        self._aborted.set()
        with self._building:
            backend, self._backend = self._backend, None
        if backend is None:
            return
        # NCCL's abort ends the running kernels and then waits for its peers, for ever if one of them is stopped.
        # gloo has none: its operations end with their connections, or else by their own timeouts. A group that is being
        # torn down when the interpreter ends would abort the process.
        break_connections(self._ends)
        closing = threading.Thread(target=_close, args=([backend], self._meeting.transport), daemon=True)
        del backend
        closing.start()
        closing.join(_ABORT_WAIT)

    def _meet(self, deadline: Deadline, name_of: Callable[[int], str]) -> None:
        """Meet the other members, for as long as it takes."""
        store = self._store or dist.PrefixStore(self._meeting.secret, reach_store(self._meeting, deadline))
        store.set(f"here/{self._rank}", "")
        self._await_members(store, deadline, name_of)
        built = [self._build(store, deadline)]
        ends = self._published(store)
        with self._building:
            if not self._aborted.is_set():
                self._store, self._backend, self._ends = store, built.pop(), ends
        if built:  # nobody waits for it any more
            _close(built, self._meeting.transport)
            self._require_joining()
        self._token = torch.zeros(1, dtype=torch.uint8, device=self.device)
        self._warm_up(deadline)
        store.set_timeout(_STORE_TIMEOUT)  # its host may stand still when torch asks it

    def _await_members(self, store: Any, deadline: Deadline, name_of: Callable[[int], str]) -> None:
        missing = [rank for rank in range(self._world_size) if rank != self._rank]
        while True:
            missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
            if not missing:
                return
            self._require_joining()
            if deadline.expired:
                names = ", ".join(name_of(rank) for rank in missing)
                raise deadline.timeout(f"waiting for {names} to join", backend="nccl", phase="init", peer=names)
            time.sleep(_POLL)

    def _published(self, store: Any) -> Set[End]:
        """Return where the members of a gloo group listen; those that cannot be found out are left out."""
        members = range(self._world_size if self._meeting.transport == "gloo" else 0)
        keys = [f"{_FIRST_CONTEXT}/{rank}" for rank in members]
        found = {published_end(store.get(key)) for key in keys if store.check([key])}
        return {end for end in found if end is not None}

    def _require_joining(self) -> None:
        if self._aborted.is_set():
            raise TransferError("Joining was aborted.", backend="nccl", phase="init")

    def _build(self, store: Any, deadline: Deadline) -> Any:
        if self._meeting.transport == "nccl":
            torch.cuda.set_device(self.device)
            # before the copies and casts of the next batch, which would else take the multiprocessors first
            options: Any = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            options._timeout = _NEVER  # noqa: SLF001  (its only name)
            with _without_watchdog():
                return dist.ProcessGroupNCCL(store, self._rank, self._world_size, options)
        options = dist.ProcessGroupGloo._Options()  # noqa: SLF001  (its only name)
        options._timeout = timedelta(seconds=max(deadline.remaining(), 1e-3))  # noqa: SLF001
        options._devices = [_gloo_device(self._meeting)]  # noqa: SLF001
        return dist.ProcessGroupGloo(store, self._rank, self._world_size, options)

    def _warm_up(self, deadline: Deadline) -> None:
        """Connect now, so that the first update does not pay for it."""
        self.broadcast([self._token], deadline).wait()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def _errors_of_torch(deadline: Deadline, doing: str) -> Iterator[None]:
    """Map the errors of torch.distributed, whose operations are all that may stand inside."""
    try:
        yield
    except RuntimeError as error:
        if deadline.expired:
            raise deadline.timeout(doing, backend="nccl", phase="update") from error
        message = f"A member of the group died or closed its connection while {doing}."
        raise PeerLostError(message, backend="nccl", phase="update", cause=first_line(error)) from error


def _aborted(deadline: Deadline, doing: str) -> TransferError:
    """Return the error of a group that was aborted, be it by its deadline."""
    if deadline.expired:
        return deadline.timeout(doing, backend="nccl", phase="update")
    return PeerLostError("The communicator was aborted.", backend="nccl", phase="update")


def _gloo_device(meeting: Rendezvous) -> Any:
    create = dist.ProcessGroupGloo.create_device
    if meeting.interface is not None:
        return create(interface=meeting.interface)
    return (
        create(hostname=meeting.address)
        if _is_loopback(meeting.address)
        else dist.ProcessGroupGloo.create_default_device()
    )


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


_UNSUPERVISED = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # else a peer's death ends the process
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # else an abort that waits for a stopped peer ends it
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",  # else the store is polled, with warnings once the trainer has closed it
}


@contextmanager
def _without_watchdog() -> Iterator[None]:
    """Keep torch's supervision of NCCL from ending the process; a group reads these settings when it is built."""
    before = {name: os.environ.get(name) for name in _UNSUPERVISED}
    os.environ.update(_UNSUPERVISED)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _close(last_reference: list[Any], transport: str) -> None:
    if transport == "nccl":
        last_reference[0].abort()
    last_reference.clear()
