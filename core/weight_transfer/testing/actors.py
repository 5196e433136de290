"""Real processes that a test commands: one JSON text a command, one a reply.

They are forked from a server process that has imported torch once, so that starting one takes a tenth of a second.
For a backend that cannot leave its process an actor is a thread with the same commands.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Self

from weight_transfer.errors import WeightTransferError, error_from_dict, error_to_dict

PATIENCE = 60.0
"""Seconds after which an actor that does not reply has failed; what a test expects to be quick is bounded by itself."""

_ENDING = 5.0  # seconds from the end of its pipe to that of a process

PROCESSES = multiprocessing.get_context("forkserver")
"""How processes are started: `Actor`, and whoever needs another kind."""
PROCESSES.set_forkserver_preload(
    [
        "torch._dynamo",  # FSDP2 imports it when it is first used
        "torch.distributed.fsdp",
        "weight_transfer.control.http_client",
        "weight_transfer.control.http_server",
        "weight_transfer.session.receiver",
        "weight_transfer.session.sender",
        "weight_transfer.testing.inviter",
        "weight_transfer.testing.keeper",
        "weight_transfer.testing.rank",
        "weight_transfer.testing.trainer",
        "weight_transfer.testing.worker",
        "weight_transfer.testing.warmed",  # last
    ]
)


class Actor:
    """A process that runs ``main(stage, **spec)`` of a module.

    Args:
        role: the module, such as ``"weight_transfer.testing.worker"``.
        in_process: run it as a thread instead; such an actor cannot be killed or stopped.
        shielded: let no Ctrl-C of the terminal reach it; whoever commands it hears that, and hangs up.
        called: how messages name it; default is the role.
        spec: what ``main`` is given, JSON-safe.

    Attributes:
        hello: what it said when it was ready.
        called: how messages name it.
    """

    hello: Any = None

    def __init__(
        self, role: str, *, in_process: bool = False, shielded: bool = False, called: str | None = None, **spec: Any
    ) -> None:
        self.called = called or role
        self._pipe, theirs = PROCESSES.Pipe()
        self._body: Any
        if in_process:
            self._body = threading.Thread(target=_perform, args=(role, spec, theirs), name=self.called, daemon=True)
            self._body.start()
        else:
            _start_server()
            arguments = role, spec, theirs, shielded
            self._body = PROCESSES.Process(target=_perform, args=arguments, name=self.called, daemon=True)
            self._body.start()
            theirs.close()

    @property
    def pid(self) -> int:
        """Of the process; a thread has none."""
        pid = getattr(self._body, "pid", None)
        assert pid is not None, "an actor that is a thread cannot be killed or stopped"
        result: int = pid
        return result

    @property
    def is_alive(self) -> bool:
        """Whether it runs, or stands still."""
        alive: bool = self._body.is_alive()
        return alive

    def ready(self) -> Self:
        """Wait until it has started."""
        self.hello = self.reply()
        return self

    def tell(self, command: str, **arguments: Any) -> None:
        """Send a command without waiting for its reply."""
        self._pipe.send_bytes(json.dumps({"command": command, **arguments}).encode())

    def reply(self, within: float = PATIENCE) -> Any:
        """Wait for the next reply; an error that it carries is raised.

        Args:
            within: seconds to wait.

        Raises:
            AssertionError: there was none, or the process has died.
        """
        if not self._pipe.poll(within):
            raise AssertionError(f"{self._body.name} did not reply within {within:g} s: it hangs")
        try:
            reply = json.loads(self._pipe.recv_bytes())
        except (EOFError, ConnectionError) as error:
            raise AssertionError(f"{self._body.name} died{self._how()}; its stderr says why") from error
        if "error" in reply:
            raise error_from_dict(reply["error"])
        return reply["result"]

    def ask(self, command: str, **arguments: Any) -> Any:
        """Send a command and return its reply."""
        self.tell(command, **arguments)
        return self.reply()

    def _how(self) -> str:
        """Return how the process has ended, as a clause."""
        self._body.join(_ENDING)
        code = getattr(self._body, "exitcode", None)
        if code is None:
            return ""
        return f" of {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"

    def error(self, within: float = PATIENCE) -> WeightTransferError:
        """Wait for the next reply, which must be an error."""
        try:
            result = self.reply(within)
        except WeightTransferError as error:
            return error
        raise AssertionError(f"an error was expected, got {result!r}")

    def kill(self) -> None:
        """SIGKILL, unless it has ended: no exit path of the process runs."""
        if self.is_alive:
            with suppress(ProcessLookupError):  # that was not known yet
                os.kill(self.pid, signal.SIGKILL)
        self._body.join(10)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Freeze the process with SIGSTOP inside a ``with`` block."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def hang_up(self) -> None:
        """Close its pipe, which tells it to end."""
        self._pipe.close()

    def stop(self) -> None:
        """End it, and wait for that."""
        self.hang_up()
        self._body.join(20)
        if self._body.is_alive() and not isinstance(self._body, threading.Thread):
            self.kill()


class Stage:
    """The actor's own end: what a role's ``main`` is given."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def say(self, result: Any) -> None:
        """Send a reply."""
        self._pipe.send_bytes(json.dumps({"result": result}).encode())

    def await_command(self, name: str) -> None:
        """Wait, in the middle of a command, for the command ``name``, which gets no reply of its own."""
        request = json.loads(self._pipe.recv_bytes())
        if request["command"] != name:
            raise RuntimeError(f"expected the command {name!r}, got {request['command']!r}")

    def serve(self, commands: Mapping[str, Callable[..., Any]]) -> None:
        """Run each command and reply with its result or its error, until the test closes the pipe."""
        while True:
            try:
                request = json.loads(self._pipe.recv_bytes())
            except (EOFError, ConnectionError):
                return
            try:
                reply = {"result": commands[request.pop("command")](**request)}
            except Exception as error:  # noqa: BLE001  (replied)
                reply = {"error": error_to_dict(error)}
            try:
                self._pipe.send_bytes(json.dumps(reply).encode())
            except OSError:  # the test is over: it has closed the pipe
                return


def ask_all(actors: Sequence[Actor], within: float, command: str, **arguments: Any) -> list[Any]:
    """Have actors do the same at the same time, and return their replies.

    Args:
        actors: who do it.
        within: seconds that it may take.
        command: what.
        arguments: how.

    Raises:
        AssertionError: one did not reply in time, or has died: the first one of which that is known.
        WeightTransferError: the first one that a reply carries.
    """
    for actor in actors:
        actor.tell(command, **arguments)
    replies: dict[Actor, Any] = {}
    waiting: dict[Any, Actor] = {actor._pipe: actor for actor in actors}  # noqa: SLF001  (of this module)
    end = time.monotonic() + within
    while waiting:
        ready = wait(list(waiting), max(end - time.monotonic(), 0))
        if not ready:
            late = ", ".join(actor.called for actor in waiting.values())
            raise AssertionError(f"{late} did not reply to {command!r} within {within:g} s")
        for pipe in ready:
            actor = waiting.pop(pipe)
            replies[actor] = actor.reply(0)
    return [replies[actor] for actor in actors]


def eventually(holds: Callable[[], bool], within: float) -> bool:
    """Ask again and again, and return whether it held within that many seconds."""
    end = time.monotonic() + within
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _start_server() -> None:
    """Start the server of processes, if it does not run, where no Ctrl-C reaches it while it imports."""
    resource_tracker.ensure_running()  # which would let signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _perform(role: str, spec: dict[str, Any], pipe: Connection, shielded: bool = False) -> None:
    faulthandler.enable()
    if threading.current_thread() is threading.main_thread():  # a shell's background jobs begin with Ctrl-C ignored
        signal.signal(signal.SIGINT, signal.SIG_IGN if shielded else signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # as it is in the server
    with pipe:
        import_module(role).main(Stage(pipe), **spec)
