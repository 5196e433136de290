"""A bar for each worker while weights go to them: bytes, rate and time left, as the workers themselves tell."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import WeightTransferError
from weight_transfer.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from rich.console import Console

    from weight_transfer.config.settings import WeightTransferConfig
    from weight_transfer.values.events import TransferFinished, TransferStarted

SHOWN = 32
"""Workers that get a bar; the others of a large fleet go on unseen."""
_INTERVAL = 0.25  # seconds between two questions
_PATIENCE = 5.0  # seconds that an answer may take

Ask = Callable[[], Mapping[str, Any] | None]
"""Returns a worker's status."""


class WorkerBars:
    """An observer of a trainer that asks each worker how far it is, and shows that until the update ends.

    A worker that does not answer, or does not tell, has a bar that stands still: the update itself says what is wrong.

    Args:
        asks: by the workers' addresses.
        console: a terminal.
    """

    def __init__(self, asks: Mapping[str, Ask], console: Console) -> None:
        self._asks = asks
        self._console = console
        self._over = threading.Event()
        self._thread = threading.Thread()

    @hookimpl
    def weight_transfer_started(self, event: TransferStarted) -> None:
        self._over = threading.Event()
        arguments = event.nbytes, self._over
        self._thread = threading.Thread(target=self._show, args=arguments, name="weight-transfer bars", daemon=True)
        self._thread.start()

    @hookimpl
    def weight_transfer_finished(self, event: TransferFinished) -> None:
        self._over.set()
        self._thread.join(_PATIENCE)

    def _show(self, nbytes: int, over: threading.Event) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        bars = Progress(TextColumn("{task.description}"), *columns, console=self._console, transient=True)
        with ThreadPoolExecutor(len(self._asks)) as pool, bars:
            tasks = [bars.add_task(address, total=nbytes) for address in self._asks]
            while not over.wait(_INTERVAL):
                for task, told in zip(tasks, pool.map(_progress_in, self._asks.values()), strict=True):
                    if told is not None:
                        bars.update(task, completed=told[0], total=told[1])


def _progress_in(ask: Ask) -> tuple[int, int] | None:
    """Return how many bytes have come of how many, if that is told now."""
    try:
        told = (ask() or {}).get("progress")
    except WeightTransferError:
        return None
    done, total = (told.get("done"), told.get("total")) if isinstance(told, Mapping) else (None, None)
    return (done, total) if isinstance(done, int) and isinstance(total, int) else None


@contextmanager
def asking(addresses: Sequence[str], config: WeightTransferConfig) -> Iterator[dict[str, Ask]]:
    """Provide what asks workers for their status, the first `SHOWN` of them, over channels apart from the update's."""
    from weight_transfer.control import HttpChannel
    from weight_transfer.control.tls import Tls
    from weight_transfer.plugins.channels import worker_at

    with ExitStack() as stack:
        asks: dict[str, Ask] = {}
        for address in addresses[:SHOWN]:
            channel = stack.enter_context(worker_at(address))
            if isinstance(channel, str):
                channel = HttpChannel(
                    channel, token=config.token, timeout=_PATIENCE, connect_timeout=_PATIENCE, tls=Tls.of(config)
                )
                stack.enter_context(channel)
            asks[address] = getattr(channel, "status", dict)
        yield asks
