"""A blocking call on a thread of its own, awaited by asyncio."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TypeVar

T = TypeVar("T")


def start(call: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Call on a new thread, with the caller's context variables and CUDA stream; return a future of the running loop.

    The call goes on if the future is cancelled.
    """
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()
    context, stream = contextvars.copy_context(), _current_stream()

    def run() -> None:
        try:
            with stream:
                outcome.set_result(context.run(call))
        except BaseException as error:  # noqa: BLE001  (raised where it is awaited)
            outcome.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return asyncio.wrap_future(outcome)


async def finished(call: Callable[[], T], name: str, give_up: Callable[[], object] | None = None) -> T:
    """Call on a new thread, and return what it returns; the event loop goes on meanwhile.

    A task that is cancelled in it has ``give_up`` called on another thread, and ends once the call has ended.
    """
    running = start(call, name)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        if give_up is not None:
            start(give_up, f"{name}, given up")
        with suppress(Exception):  # the failure of what nobody wants any more
            await asyncio.shield(running)
        raise


def _current_stream() -> AbstractContextManager[object]:
    """Return a context with the caller's CUDA device and stream, which torch keeps per thread."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return nullcontext()
    stream: AbstractContextManager[object] = torch.cuda.stream(torch.cuda.current_stream())
    return stream
