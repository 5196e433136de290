"""The agent process: ``python -m weight_transfer_rdma.agent FD NAME MODULE``; `AgentProcess` starts it.

It maps the memory that its engine passes, runs the engine's calls one after another, and ends with its engine: by the
end of the socket, or by a signal when the engine's process dies while a call is under way.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import socket
import sys
from typing import Any

import numpy as np

from weight_transfer_rdma.nixl import Agent, Place, let_progress_threads_rest
from weight_transfer_rdma.wire import Message, receive, send

_PR_SET_PDEATHSIG = 1  # of prctl(2)
_HUGE_PAGE = 2 * 2**20


class Calls:
    """What the engine may call; each method is named in a message's ``call``, its other keys are the arguments."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._mappings: dict[int, mmap.mmap] = {}

    def share(self, message: Message, nbytes: int) -> Message:
        """Map and register a segment; reply with its address here."""
        mapping = mmap.mmap(message.fds[0], nbytes)
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

    def connect(self, message: Message) -> Message:
        return Message({"peer": self._agent.connect(message.data)})

    def prepare(self, message: Message, operation: str, peer: str, remote: list[Any]) -> Message:
        rows = np.frombuffer(message.data, dtype=np.uint64).reshape(-1, 3)
        return Message({"handle": self._agent.prepare(operation, peer, rows, Place(), Place(*remote))})

    def release(self, _message: Message) -> Message:
        self._agent.release()
        return Message({})

    def attach_flags(self, _message: Message, peer: str, filled: int, loaded: int) -> Message:
        self._agent.attach_flags(peer, filled, loaded)
        return Message({})

    def run(self, _message: Message, handle: int, bucket: int) -> Message:
        self._agent.run(handle, bucket)
        return Message({})


def main() -> None:
    """Serve until the engine is gone. Never runs NIXL's destructors, which may wait for peers."""
    fd, name, module = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    sock = socket.socket(fileno=fd)
    try:
        calls = None
        while True:
            message = receive(sock)
            try:
                if calls is None:  # the first message only asks whether the agent has started
                    let_progress_threads_rest(module)
                    calls, reply = Calls(Agent(name, module)), Message({})
                else:
                    arguments = dict(message.body)
                    reply = getattr(calls, arguments.pop("call"))(message, **arguments)
            except Exception as error:  # noqa: BLE001  (replied)
                reply = Message({"error": type(error).__name__, "text": str(error)})
            send(sock, reply)
    except (EOFError, ConnectionError):
        os._exit(0)


if __name__ == "__main__":
    main()
