"""A communicator of our own: one process group per trainer and its workers, built on a store that the trainer opens.

The user's default process group is neither created, needed nor touched.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed

from weight_transfer.errors import HandshakeError, PeerLostError, TransferError, WeightTransferError

if TYPE_CHECKING:
    from weight_transfer.deadline import Deadline

dist: Any = torch.distributed  # what it holds depends on the build, so type checkers see half of it

_POLL = 0.02  # seconds between two looks at the store
_ABORT_WAIT = 3.0  # seconds
_STORE_TIMEOUT = timedelta(seconds=2)
_LAST_WORKS = 64  # more than are under way: those before have been waited for
_NEVER = timedelta(days=365)  # NCCL's own watchdog would end the process: deadlines are ours


@attrs.frozen(kw_only=True)
class Rendezvous:
    """Where and how the members meet.

    Attributes:
        address: the trainer's address.
        port: of its store.
        secret: prefix of all keys in the store; without it nobody can join.
        transport: ``"nccl"`` or ``"gloo"``.
        interface: for gloo.
    """

    address: str
    port: int
    secret: str = attrs.field(repr=False)
    transport: str
    interface: str | None = None


def open_store(address: str, port: int) -> tuple[Any, int]:
    """Open the trainer's store on ``address`` alone, not on all interfaces as torch does; return it and its port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind((address, port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise HandshakeError(
            f"The trainer cannot open its rendezvous on {address} port {port}; see [weight_transfer.nccl].",
            backend="nccl",
            phase="init",
            cause=str(error),
        ) from error
    bound = listener.getsockname()[1]
    store = dist.TCPStore(address, bound, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, bound


def reach_store(meeting: Rendezvous, deadline: Deadline) -> Any:
    """Connect to the trainer's store."""
    timeout = timedelta(seconds=max(deadline.remaining(), 1e-3))
    try:
        return dist.TCPStore(meeting.address, meeting.port, is_master=False, timeout=timeout)
    except RuntimeError as error:
        message = f"The trainer's rendezvous at {meeting.address} port {meeting.port} cannot be reached."
        raise PeerLostError(message, backend="nccl", phase="init", peer="trainer", cause=_first_line(error)) from error


def new_secret() -> str:
    """Return 128 random bits as text."""
    return secrets.token_hex(16)


class Work:
    """Broadcasts under way.

    It can let go of torch's own objects, which keep gloo's connections open as long as anything refers to them, be it
    the frames of a traceback.
    """

    def __init__(self) -> None:
        self._works: list[Any] | None = []

    def add(self, work: Any) -> None:
        """Add one more."""
        if self._works is not None:
            self._works.append(work)

    def wait(self) -> None:
        """Wait for their end: on the host for gloo, on the current stream for NCCL."""
        if self._works is None:
            raise PeerLostError("The communicator was aborted.", backend="nccl", phase="update")
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

    Attributes:
        device: of the tensors that it moves.
    """

    def __init__(self, store: Any, meeting: Rendezvous, rank: int, world_size: int, device: torch.device) -> None:
        self.device = device
        self._store = dist.PrefixStore(meeting.secret, store)
        self._meeting = meeting
        self._rank = rank
        self._world_size = world_size
        self._backend: Any = None
        self._options = dist.BroadcastOptions()
        self._options.rootRank = 0
        self._options.rootTensor = 0
        self._aborted = threading.Event()
        self._works: deque[Work] = deque(maxlen=_LAST_WORKS)

    def join(self, deadline: Deadline, name_of: Callable[[int], str]) -> None:
        """Meet the other members.

        Args:
            deadline: for all of it.
            name_of: how messages call the member of a rank.

        Raises:
            TransferTimeoutError: members are missing; they are named.
            PeerLostError: one died meanwhile.
        """
        self._store.set(f"here/{self._rank}", "1")
        self._await_members(deadline, name_of)
        answer: list[BaseException | None] = []
        done = threading.Event()

        def build() -> None:
            try:
                self._backend = self._build(deadline)
                self._warm_up(deadline)
                answer.append(None)
            except Exception as error:  # noqa: BLE001  (raised below, in the caller's thread)
                answer.append(error)
            done.set()

        threading.Thread(target=build, name="weight-transfer nccl join", daemon=True).start()
        while not done.wait(_POLL):
            if self._aborted.is_set():
                raise TransferError("Joining was aborted.", backend="nccl", phase="init")
            deadline.check("building the communicator", backend="nccl", phase="init")
        self._store.set_timeout(_STORE_TIMEOUT)  # its host may stand still when torch asks it
        if answer[0] is not None:
            raise PeerLostError(
                "The communicator could not be built.", backend="nccl", phase="init", cause=_first_line(answer[0])
            ) from answer[0]

    def broadcast(self, data: Sequence[torch.Tensor], deadline: Deadline) -> Work:
        """Start to broadcast tensors from rank 0 to all; returns a work to wait for.

        Args:
            data: uint8, of the same sizes on all ranks. NCCL broadcasts them in one launch.
            deadline: when they must have arrived.
        """
        backend = self._backend
        if self._aborted.is_set() or backend is None:
            raise PeerLostError("The communicator was aborted.", backend="nccl", phase="update")
        if self._meeting.transport == "gloo":  # the operation itself must end: only then is its memory quiet
            self._options.timeout = timedelta(seconds=max(deadline.remaining(), 1e-3))
        work = Work()
        self._works.append(work)
        together = len(data) > 1 and backend.supports_coalescing
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
    def guard(self, deadline: Deadline, what: str) -> Iterator[None]:
        """End whatever blocks inside when the deadline passes, and name what went wrong."""
        timer = threading.Timer(deadline.remaining(), self.abort)
        timer.daemon = True
        timer.start()
        try:
            yield
        except WeightTransferError:
            self._quiet()
            raise
        except RuntimeError as error:  # what torch.distributed raises
            self._quiet()
            if deadline.expired:
                raise deadline.timeout(what, backend="nccl", phase="update") from error
            message = f"A member of the group died or closed its connection while {what}."
            raise PeerLostError(message, backend="nccl", phase="update", cause=_first_line(error)) from error
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
        if self._aborted.is_set():
            return
        self._aborted.set()
        backend, self._backend = self._backend, None
        if backend is None:
            return
        # NCCL's abort ends the running kernels and then waits for its peers, for ever if one of them is stopped.
        # gloo has no abort: its connections close with the last reference, after the running operations, which end by
        # their own timeouts. A group that is being torn down when the interpreter ends would abort the process.
        closing = threading.Thread(target=_close, args=([backend], self._meeting.transport), daemon=True)
        del backend
        closing.start()
        closing.join(_ABORT_WAIT)

    def _await_members(self, deadline: Deadline, name_of: Callable[[int], str]) -> None:
        missing = [rank for rank in range(self._world_size) if rank != self._rank]
        while True:
            missing = [rank for rank in missing if not self._store.check([f"here/{rank}"])]
            if not missing:
                return
            if self._aborted.is_set():
                raise TransferError("Joining was aborted.", backend="nccl", phase="init")
            if deadline.expired:
                names = ", ".join(name_of(rank) for rank in missing)
                raise deadline.timeout(f"waiting for {names} to join", backend="nccl", phase="init", peer=names)
            time.sleep(_POLL)

    def _build(self, deadline: Deadline) -> Any:
        if self._meeting.transport == "nccl":
            torch.cuda.set_device(self.device)
            options: Any = dist.ProcessGroupNCCL.Options()
            options._timeout = _NEVER  # noqa: SLF001  (its only name)
            with _without_watchdog():
                return dist.ProcessGroupNCCL(self._store, self._rank, self._world_size, options)
        options = dist.ProcessGroupGloo._Options()  # noqa: SLF001  (its only name)
        options._timeout = timedelta(seconds=max(deadline.remaining(), 1e-3))  # noqa: SLF001
        options._devices = [_gloo_device(self._meeting)]  # noqa: SLF001
        return dist.ProcessGroupGloo(self._store, self._rank, self._world_size, options)

    def _warm_up(self, deadline: Deadline) -> None:
        """Connect now, so that the first update does not pay for it."""
        token = torch.zeros(1, dtype=torch.uint8, device=self.device)
        self.broadcast([token], deadline).wait()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


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


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
