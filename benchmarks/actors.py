"""Children that do what they are told, one call at a time; whoever fails, dies or is late is named, and ends it all."""

from __future__ import annotations

import faulthandler
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

_GRACE = 2.0  # seconds in which others may say why they failed, too
_context = multiprocessing.get_context("spawn")


class Actor:
    """An object in a process of its own.

    Args:
        name: for messages.
        life: seconds after which the process shows where it stands, and ends.
        make: makes the object, in that process; its method ``close`` is called in the end.
        arguments: for ``make``.
    """

    def __init__(self, name: str, life: float, make: Callable[..., Any], *arguments: Any) -> None:
        self.name = name
        self.pipe, theirs = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(theirs, life, make, arguments), name=name, daemon=True)
        self.process.start()
        theirs.close()


def ask(actors: Sequence[Actor], seconds: float, method: str, *arguments: Any) -> list[Any]:
    """Have actors do the same at the same time; return their answers.

    Raises:
        SystemExit: one failed, died or is late; what is known of it is on standard error.
    """
    return ask_each([(actor, method, arguments) for actor in actors], seconds)


def ask_each(calls: Sequence[tuple[Actor, str, tuple[Any, ...]]], seconds: float) -> list[Any]:
    """Have each actor do something; as `ask`."""
    for actor, method, arguments in calls:
        actor.pipe.send((method, arguments))
    waiting: dict[Any, Actor] = {actor.pipe: actor for actor, _, _ in calls}
    answers: dict[str, Any] = {}
    failed, until = False, time.monotonic() + seconds
    while waiting:
        ready = wait(list(waiting), max(until - time.monotonic(), 0))
        if not ready:
            break
        for pipe in ready:
            actor = waiting.pop(pipe)
            try:
                error, answers[actor.name] = actor.pipe.recv()
            except (EOFError, ConnectionError):
                actor.process.join(_GRACE)
                error = f"it died; exit code {actor.process.exitcode}"
            if error is not None:
                print(f"{actor.name}: {error}", file=sys.stderr, flush=True)
                failed, until = True, min(until, time.monotonic() + _GRACE)
    if failed:
        raise SystemExit("the benchmark has failed; see above")
    if waiting:
        names = ", ".join(actor.name for actor in waiting.values())
        raise SystemExit(f"{names} did not answer {calls[0][1]!r} within {seconds:.0f} s")
    return [answers[actor.name] for actor, _, _ in calls]


def end(actors: Sequence[Actor], seconds: float = 15.0) -> None:
    """Let all actors go, and kill those that do not."""
    for actor in actors:
        actor.pipe.close()
    until = time.monotonic() + seconds
    for actor in actors:
        actor.process.join(max(until - time.monotonic(), 0))
        if actor.process.is_alive():
            actor.process.kill()
            actor.process.join()


def _serve(pipe: Connection, life: float, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    faulthandler.dump_traceback_later(life, exit=True)
    try:
        actor = None
        while True:
            method, given = pipe.recv()
            answer: tuple[str | None, Any]
            try:
                actor = actor or make(*arguments)
                answer = None, getattr(actor, method)(*given)
            except Exception:  # noqa: BLE001  (shown by the parent)
                answer = traceback.format_exc(), None
            pipe.send(answer)
    except (EOFError, ConnectionError):  # the parent has ended, or has had enough
        if actor is not None:
            actor.close()
