"""The agent process: ``python -m weight_transfer_rdma.agent FD NAME MODULE``; `AgentProcess` starts it.

It maps the memory that its engine passes, runs the engine's calls one after another while transfers go on beside them,
and ends with its engine: by the end of the socket, or by a signal when the engine's process dies while a call is under
way.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import signal
import socket
import sys
from typing import Any

import numpy as np

from weight_transfer_rdma.nixl import Agent, Place, let_progress_threads_rest
from weight_transfer_rdma.runs import FIRST_PAUSE, Runs
from weight_transfer_rdma.wire import Message, receive, send

_PR_SET_PDEATHSIG = 1  # of prctl(2)
_HUGE_PAGE = 2 * 2**20
_LONGEST_PAUSE = 1e-3  # seconds between two looks at transfers


class Calls:
    """What the engine may call; each method is named in a message's ``call``, its other keys are the arguments."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._mappings: dict[int, mmap.mmap] = {}
        self.runs = Runs(agent)

    def share(self, message: Message, nbytes: int) -> Message:
        """Map and register a segment; reply with its address here."""
        try:
            mapping = mmap.mmap(message.fds[0], nbytes)
        finally:
            os.close(message.fds[0])
        if nbytes >= _HUGE_PAGE:
            with contextlib.suppress(OSError):  # a kernel without huge pages for shared memory; only speed differs
                mapping.madvise(mmap.MADV_HUGEPAGE)
        address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
        self._agent.register(address, nbytes, Place())
        self._mappings[address] = mapping
        return Message({"address": address})

    def unshare(self, _message: Message, address: int) -> Message:
        """Deregister and unmap a segment."""
        self._agent.deregister(address)
        self._mappings.pop(address).close()
        return Message({})

    def metadata(self, _message: Message) -> Message:
        return Message({}, self._agent.metadata())

    def connect(self, message: Message, replaced: str | None) -> Message:
        return Message({"peer": self._agent.connect(message.data, replaced)})

    def prepare(self, message: Message, operation: str, peer: str, remote: list[Any], plan: str) -> Message:
        rows = np.frombuffer(message.data, dtype=np.uint64).reshape(-1, 3)
        return Message({"handle": self._agent.prepare(operation, peer, rows, Place(), Place(*remote), plan)})

    def release(self, _message: Message, plan: str) -> Message:
        self._agent.release(plan)
        return Message({})

    def attach_flags(self, _message: Message, peer: str, filled: int, loaded: int, plan: str) -> Message:
        self._agent.attach_flags(peer, filled, loaded, plan)
        return Message({})

    def run(self, _message: Message, handle: int, bucket: int) -> None:
        """Start a transfer; `transfer` replies when it has ended."""
        self.runs.start(handle, bucket)

    def transfer(self, sock: socket.socket) -> None:
        """Go on with transfers, and reply at the end of each, until there are none or the engine calls."""
        pause = FIRST_PAUSE
        try:
            while self.runs:
                went_on = self.runs.advance()
                while self.runs.take():
                    send(sock, Message({}))
                pause = FIRST_PAUSE if went_on else min(2 * pause, _LONGEST_PAUSE)
                if select.select([sock], [], [], 0 if went_on else pause)[0]:
                    return
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001  (replied; the engine then ends this process)
            send(sock, _described(error, peer=self.runs.peer))
            self.runs = Runs(self._agent)


def _described(error: Exception, **facts: str) -> Message:
    return Message({"error": type(error).__name__, "text": str(error), **facts})


def main() -> None:
    """Serve until the engine is gone. Never runs NIXL's destructors, which may wait for peers."""
    fd, name, module = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    sock = socket.socket(fileno=fd)
    try:
        calls: Calls | None = None
        while True:
            if calls is not None:
                calls.transfer(sock)
            message = receive(sock)
            reply: Message | None
            try:
                if calls is None:  # the first message only asks whether the agent has started
                    let_progress_threads_rest(module)
                    calls, reply = Calls(Agent(name, module)), Message({})
                else:
                    arguments = dict(message.body)
                    reply = getattr(calls, arguments.pop("call"))(message, **arguments)
            except Exception as error:  # noqa: BLE001  (replied)
                reply = _described(error)
            if reply is not None:
                send(sock, reply)
    except (EOFError, ConnectionError):
        os._exit(0)


if __name__ == "__main__":
    main()
