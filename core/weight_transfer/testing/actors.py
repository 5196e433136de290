"""Real processes that a test commands: one JSON text a command, one a reply.

They are forked from a server process that has imported torch once, so that starting one takes a tenth of a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from weight_transfer.errors import WeightTransferError, error_from_dict, error_to_dict

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "weight_transfer.control.http_client",
        "weight_transfer.control.http_server",
        "weight_transfer.receiver",
        "weight_transfer.sender",
    ]
)


class Actor:
    """A process that runs ``main`` of ``support.trainer`` or ``support.worker``.

    Attributes:
        hello: what it said when it was ready.
    """

    hello: Any = None

    def __init__(self, role: str, **spec: Any) -> None:
        self._pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_run, args=(role, spec, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ready(self) -> Actor:
        """Wait until it has started."""
        self.hello = self.reply()
        return self

    def tell(self, command: str, **arguments: Any) -> None:
        """Send a command without waiting for its reply."""
        self._pipe.send_bytes(json.dumps({"command": command, **arguments}).encode())

    def reply(self) -> Any:
        """Wait for the next reply; an error that it carries is raised."""
        reply = json.loads(self._pipe.recv_bytes())
        if "error" in reply:
            raise error_from_dict(reply["error"])
        return reply["result"]

    def ask(self, command: str, **arguments: Any) -> Any:
        """Send a command and return its reply."""
        self.tell(command, **arguments)
        return self.reply()

    def error(self) -> WeightTransferError:
        """Wait for the next reply, which must be an error."""
        try:
            result = self.reply()
        except WeightTransferError as error:
            return error
        raise AssertionError(f"an error was expected, got {result!r}")

    def kill(self) -> None:
        """SIGKILL: no exit path of the process runs."""
        self.process.kill()
        self.process.join(10)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Freeze the process with SIGSTOP inside a ``with`` block."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End the process by closing its pipe."""
        self._pipe.close()
        self.process.join(20)
        if self.process.is_alive():
            self.kill()


class Stage:
    """The process's own end: what a role's ``main`` is given."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def say(self, result: Any) -> None:
        """Send a reply."""
        self._pipe.send_bytes(json.dumps({"result": result}).encode())

    def serve(self, commands: dict[str, Any]) -> None:
        """Run each command and reply with its result or its error, until the test closes the pipe."""
        while True:
            try:
                request = json.loads(self._pipe.recv_bytes())
            except EOFError:
                return
            try:
                self.say(commands[request.pop("command")](**request))
            except Exception as error:  # noqa: BLE001  (replied)
                self._pipe.send_bytes(json.dumps({"error": error_to_dict(error)}).encode())


def _run(role: str, spec: dict[str, Any], pipe: Connection) -> None:
    import_module(f"support.{role}").main(Stage(pipe), **spec)
