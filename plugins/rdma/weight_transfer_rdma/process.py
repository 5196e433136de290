"""A NIXL agent in a process of its own, seen from its engine.

NIXL cannot cancel a transfer, waits without a limit for peers that stand still, and may abort its process when one
dies. Killing a process does end everything that it does: after `AgentProcess.kill` nothing writes into the shared
memory any more, and a crash costs the agent, not the trainer or the worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from weight_transfer.authoring import tracing
from weight_transfer.errors import BackendUnavailableError, PeerLostError, TransferError, TransferTimeoutError
from weight_transfer_rdma.nixl import WHOLE, Place, Transport, environment, installed, transport_in
from weight_transfer_rdma.wire import Message, receive, send

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline, SharedMemory
    from weight_transfer_rdma.config import RdmaOptions
    from weight_transfer_rdma.nixl import Rows

logger = logging.getLogger(__name__)

_KILL_TIMEOUT = 30.0  # seconds that the kernel gets to end a killed process
_CLEAR_UP = 1.0  # seconds for what is left of it then; it may take longer, and nobody needs to wait for that
_LOG_TAIL = 400  # characters of an agent's last words in an error


class AgentProcess:
    """A running agent process. Its calls come from one thread; `kill` may come from any.

    Args:
        name: of the NIXL agent.
        options: of the backend.
        peer: how errors call the other side of its transfers, unless `connect` says better.
        deadline: for the start, which takes about a quarter of a second.

    Raises:
        TransferError: NIXL cannot start here.
        TransferTimeoutError: it did not start in time.
    """

    def __init__(self, name: str, options: RdmaOptions, peer: str, deadline: Deadline) -> None:
        module = installed()
        if module is None:
            raise BackendUnavailableError("NIXL is not installed: pip install nixl-cu12", name="rdma")
        self.name = name
        self.peer = peer
        self._log = os.memfd_create("weight-transfer-agent-log", os.MFD_CLOEXEC)
        self._traced = 0
        self._killed = False
        self._shared: dict[int, tuple[SharedMemory, int]] = {}
        self._labels: dict[str, str] = {}
        self._peers: dict[int, str] = {}
        self._under_way: deque[str] = deque()
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-u", "-P", "-m", "weight_transfer_rdma.agent", str(theirs.fileno()), name, module]
        self._keeper = _Keeper(command, _variables(options), theirs.fileno(), self._log)
        try:
            with theirs:
                self._keeper.await_start()
            self._call({}, deadline)
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return not self._killed and not self._keeper.ended.is_set()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._keeper.pid

    def share(self, memory: SharedMemory, deadline: Deadline) -> int:
        """Let the agent at a segment; return the segment's address there."""
        if id(memory) not in self._shared:
            reply = self._call({"call": "share", "nbytes": memory.nbytes}, deadline, fds=(memory.fd,))
            self._shared[id(memory)] = memory, int(reply.body["address"])
        return self._shared[id(memory)][1]

    def unshare_all_but(self, memories: list[SharedMemory], deadline: Deadline) -> None:
        """Take back the segments that are not among these; nobody may be reading them."""
        kept = {id(memory) for memory in memories}
        for key in [key for key in self._shared if key not in kept]:
            self._call({"call": "unshare", "address": self._shared[key][1]}, deadline)
            del self._shared[key]

    def metadata(self, deadline: Deadline) -> bytes:
        """See `Agent.metadata`."""
        return self._call({"call": "metadata"}, deadline).data

    def connect(
        self, metadata: bytes, deadline: Deadline, replaced: str | None = None, label: str | None = None
    ) -> str:
        """See `Agent.connect`; ``label`` is how errors call this peer."""
        message = {"call": "connect", "replaced": replaced}
        name = str(self._call(message, deadline, metadata, label=label).body["peer"])
        self._labels[name] = label or self.peer
        return name

    def prepare(
        self,
        operation: str,
        peer: str,
        rows: Rows,
        local: Place,
        remote: Place,
        deadline: Deadline,
        plan: str = WHOLE,
    ) -> int:
        """See `Agent.prepare`; ``local`` is host memory."""
        message = {"call": "prepare", "operation": operation, "peer": peer, "plan": plan}
        place = {"remote": [remote.memory, remote.device]}
        label = self._labels.get(peer)
        handle = int(self._call(message | place, deadline, rows.tobytes(), label=label).body["handle"])
        self._peers[handle] = label or self.peer
        return handle

    def release(self, deadline: Deadline, plan: str = WHOLE) -> None:
        """See `Agent.release`."""
        self._call({"call": "release", "plan": plan}, deadline)

    def attach_flags(self, peer: str, filled: int, loaded: int, deadline: Deadline, plan: str = WHOLE) -> None:
        """See `Agent.attach_flags`."""
        message = {"call": "attach_flags", "peer": peer, "filled": filled, "loaded": loaded, "plan": plan}
        self._call(message, deadline, label=self._labels.get(peer))

    def start(self, handle: int, bucket: int, deadline: Deadline) -> None:
        """Begin a transfer, when its peer has filled ``bucket`` buckets; see `Runs.start`."""
        self._under_way.append(self._peers[handle])
        self._send(Message({"call": "run", "handle": handle, "bucket": bucket}), deadline)

    def finish(self, deadline: Deadline) -> None:
        """Wait for the end of the first transfer that `start` began and that was not waited for."""
        self._receive("moving weights", deadline, self._under_way[0])
        self._under_way.popleft()

    def transport(self, place: Place) -> Transport:
        """Return how the agent reads from its peer into ``place``; known after a first transfer."""
        return transport_in(self._read_log(0), place)

    def kill(self) -> None:
        """End the process, if it still runs. When this returns, nothing of it writes any more.

        Raises:
            TransferTimeoutError: the kernel did not end it; this has never been seen.
        """
        first, self._killed = not self._killed, True
        self._keeper.kill()
        if not self._keeper.ended.wait(_KILL_TIMEOUT):
            raise TransferTimeoutError("The kernel did not end a killed agent process.", backend="rdma")
        if first:
            self._trace()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for a reply

    def close(self) -> None:
        """Kill the process and close what belongs to it; after this no method may be called."""
        self.kill()
        if self._keeper.is_alive():
            self._keeper.join(_CLEAR_UP)
        self._socket.close()
        if self._log >= 0:
            os.close(self._log)
            self._log = -1
        self._shared.clear()

    def _call(
        self,
        body: dict[str, Any],
        deadline: Deadline,
        data: bytes = b"",
        fds: tuple[int, ...] = (),
        label: str | None = None,
    ) -> Message:
        self._send(Message(body, data, fds), deadline)
        return self._receive(str(body.get("call", "start")), deadline, label or self.peer)

    def _send(self, message: Message, deadline: Deadline) -> None:
        self._socket.settimeout(max(deadline.remaining(), 1e-3))
        try:
            send(self._socket, message)
        except OSError as error:
            raise self._lost(error, deadline, "calling the RDMA agent", self.peer) from error

    def _receive(self, what: str, deadline: Deadline, label: str) -> Message:
        self._socket.settimeout(max(deadline.remaining(), 1e-3))
        try:
            reply = receive(self._socket)
        except (EOFError, OSError) as error:
            raise self._lost(error, deadline, f"{what} ({label})", label) from error
        self._trace()
        if "error" in reply.body:
            label = self._labels.get(reply.body.get("peer", ""), label)
            raise foreign(reply.body["error"], reply.body["text"], what, label, self._last_words())
        return reply

    def _lost(self, error: Exception, deadline: Deadline, what: str, label: str) -> TransferError:
        if isinstance(error, TimeoutError):
            return deadline.timeout(what, backend="rdma", peer=label)
        if self._killed:
            return TransferError("The transfer was stopped.", backend="rdma")
        self._keeper.ended.wait(1)
        return TransferError(
            f"This side's RDMA agent process ended ({self._keeper.status}) while {what}.",
            backend="rdma",
            cause=self._last_words(),
        )

    def _read_log(self, start: int) -> str:
        if self._log < 0:
            return ""
        return os.pread(self._log, max(os.fstat(self._log).st_size - start, 0), start).decode(errors="replace")

    def _last_words(self) -> str | None:
        lines = [line for line in self._read_log(0).splitlines() if line and "  | " not in line and "  +-" not in line]
        return " ".join(lines)[-_LOG_TAIL:] or None

    def _trace(self) -> None:
        """Hand on what the agent printed, if the user wants to see everything."""
        if tracing():
            text = self._read_log(self._traced)
            self._traced = os.fstat(self._log).st_size
            for line in text.splitlines():
                logger.info("agent %s: %s", self.name, line)


class _Keeper(threading.Thread):
    """Starts the process and waits for its end, on one thread that lives as long as the process.

    The kernel's parent-death signal is sent when the *thread* that started a process ends, so that must not be one of
    the caller's. ``ended`` says that the process runs no more and has no memory; under load it can take the kernel
    seconds to clear up what is left of it then, for which only this thread waits.
    """

    def __init__(self, command: list[str], env: dict[str, str], fd: int, log: int) -> None:
        super().__init__(name="weight-transfer-rdma agent", daemon=True)
        self._arguments = command, env, fd, log
        self._spawned = threading.Event()
        self._error: OSError | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._code: int | None = None
        self._ending = threading.Lock()
        self.ended = threading.Event()

    def await_start(self) -> None:
        """Start; raises OSError if there is no process."""
        self.start()
        self._spawned.wait()
        if self._error is not None:
            raise self._error

    @property
    def status(self) -> str:
        code = self._code
        return "its end is unknown" if code is None else f"signal {-code}" if code < 0 else f"exit status {code}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        with self._ending:  # until ``ended`` is set the id is nobody else's
            if self._process is None:
                self.ended.set()
            elif not self.ended.is_set():
                os.kill(self._process.pid, signal.SIGKILL)

    def run(self) -> None:
        command, env, fd, log = self._arguments
        try:
            self._process = subprocess.Popen(
                command, env=env, pass_fds=[fd], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        except OSError as error:
            self._error = error
        self._spawned.set()
        if self._process is not None:
            self._await_end(self._process.pid)
        with self._ending:
            self.ended.set()
        if self._process is not None:
            self._process.wait()

    def _await_end(self, pid: int) -> None:
        with contextlib.suppress(ChildProcessError):  # this process lets the kernel clear up after all its children
            end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            if end is not None:
                self._code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status


def foreign(kind: str, text: str, what: str, peer: str, words: str | None = None) -> TransferError:
    """Turn an exception of NIXL, known by its class's name, into an error of ours."""
    cause = f"{kind}: {text}" + (f"; {words}" if words else "")
    fields: dict[str, Any] = {"backend": "rdma", "peer": peer, "cause": cause}
    if kind == "nixlRemoteDisconnectError":
        return PeerLostError("The agent on the other side died or closed its connection.", **fields)
    if what == "connect":
        return PeerLostError(
            "The other side's RDMA agent cannot be reached; both sides need the same transport, and an interface that "
            "leads to the other host.",
            **fields,
        )
    return TransferError(f"NIXL failed at {what!r}.", **fields)


def _variables(options: RdmaOptions) -> dict[str, str]:
    own = environment(options.transport, options.interface, options.ucx)
    path = os.pathsep.join(entry for entry in sys.path if entry)  # the agent finds packages where this process does
    # UCX patches every loaded library to watch memory that is freed under its cache of registrations, which takes
    # 0.4 seconds. An agent registers what it shares by itself, and deregisters it before it is unmapped.
    return {"UCX_MEM_EVENTS": "n", **os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path, **own}
