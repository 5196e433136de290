"""The trainer's view of its workers: processes behind HTTP or, if the backend cannot leave the process, threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from weight_transfer.demo.process import ProcessWorker

if TYPE_CHECKING:
    from weight_transfer.config.settings import WeightTransferConfig
    from weight_transfer.control import ControlChannel
    from weight_transfer.demo.worker import InferenceWorker
    from weight_transfer.errors import WeightTransferError


class Worker(Protocol):
    """What the demo asks of a worker, wherever it runs.

    Attributes:
        peer: what the sender calls it.
        name: what the user reads.
        where: its process or thread.
    """

    peer: str
    name: str
    where: str

    @property
    def channel(self) -> str | ControlChannel: ...
    def wait_up(self) -> None: ...
    def check(self, grace: float = 0.0) -> None: ...
    def generate(self, prompt: str, count: int) -> dict[str, Any]: ...
    def fingerprint(self) -> dict[str, Any]: ...
    def status(self) -> dict[str, Any]: ...
    def hang_up(self) -> None: ...
    def close(self) -> None: ...


@contextmanager
def start_workers(config: WeightTransferConfig, count: int, cross_process: bool) -> Iterator[Sequence[Worker]]:
    """Start workers without waiting for them, and end them on the way out, whatever happened."""
    kind = ProcessWorker if cross_process else ThreadWorker
    workers: list[Worker] = []
    try:
        for index in range(count):
            workers.append(kind(config, index))  # noqa: PERF401  (if one fails, those before it are ended)
        yield workers
    finally:
        for worker in workers:
            worker.hang_up()
        for worker in workers:
            worker.close()


def check_workers(workers: Sequence[Worker], error: WeightTransferError | None = None) -> None:
    """Raise if a worker has died; the one that ``error`` is about may need a moment to be seen dead."""
    for worker in workers:
        worker.check(grace=1.0 if worker.peer == getattr(error, "peer", None) else 0.0)


class ThreadWorker:
    """A worker in this process; the sender runs its receiver on a thread."""

    def __init__(self, config: WeightTransferConfig, index: int) -> None:
        self.peer = self.name = f"worker {index}"
        self.where = "a thread of this process"
        self._config, self._seed = config, index + 1
        self._worker: InferenceWorker | None = None

    @property
    def channel(self) -> ControlChannel:
        return self._up.receiver

    def wait_up(self) -> None:
        from weight_transfer.demo.worker import InferenceWorker

        self._worker = InferenceWorker(self._config, self._seed)

    def check(self, grace: float = 0.0) -> None:
        """A thread does not die."""

    def generate(self, prompt: str, count: int) -> dict[str, Any]:
        return self._up.generate(prompt, count)

    def fingerprint(self) -> dict[str, Any]:
        return self._up.fingerprint()

    def status(self) -> dict[str, Any]:
        return self._up.receiver.status()

    def hang_up(self) -> None:
        """Nothing to tell it."""

    def close(self) -> None:
        if self._worker is not None:
            self._worker.receiver.close()

    @property
    def _up(self) -> InferenceWorker:
        assert self._worker is not None, "wait_up comes first"
        return self._worker
