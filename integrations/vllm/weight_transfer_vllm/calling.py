"""Calls of an object that knows no deadlines: one after another, on one thread, with a deadline each."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline

T = TypeVar("T")


class Caller:
    """Runs calls on a daemon thread: one that never returns costs that thread, not the process.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def __call__(self, call: Callable[[], T], deadline: Deadline) -> T:
        """Run a call, after those before it, and return its result, or raise what it raises.

        Raises:
            TimeoutError: it has not ended by the deadline; if it has not begun either, it never will.
        """
        outcome: Future[T] = Future()
        self._calls.put((call, outcome))
        try:
            return outcome.result(max(deadline.remaining(), 1e-3))
        except TimeoutError:
            if outcome.done() and not outcome.cancelled():  # it was the call that has raised it
                raise
            outcome.cancel()
            raise deadline.timeout("waiting for vLLM") from None

    def close(self) -> None:
        """End the thread when the calls that wait have ended."""
        self._calls.put(None)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            call, outcome = item
            if not outcome.set_running_or_notify_cancel():
                continue
            try:
                outcome.set_result(call())
            except BaseException as error:  # noqa: BLE001  (it is raised where the call was made)
                outcome.set_exception(error)
            del item, call, outcome  # while it waits it keeps nothing alive
