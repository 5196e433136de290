"""The actor that plays workers: each receiver serves over HTTP, with a loader that can be told to stop or to fail."""

from __future__ import annotations

import builtins
import ctypes
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import torch

from weight_transfer.control.http_server import serve
from weight_transfer.errors import TransferTimeoutError, WeightTransferError, error_to_dict
from weight_transfer.plugins.hookspecs import hookimpl
from weight_transfer.session.receiver import WeightReceiver
from weight_transfer.testing.actors import PATIENCE
from weight_transfer.testing.forked import Family
from weight_transfer.testing.models import Model, Weight, digest, hashes, raw_bytes
from weight_transfer.testing.outages import Outages
from weight_transfer.testing.resources import MemoryMark, Watch, held
from weight_transfer.testing.unpickling import watched_unpickling

if TYPE_CHECKING:
    from weight_transfer.testing.actors import Stage


class Loader:
    """Copies by name; at call ``block_at`` it says so and waits until it is released, at call ``fail_at`` it fails.

    Args:
        habit: ``"scribble"`` over what it is given once it has copied it, or ``"keep"`` it; None for neither.
    """

    def __init__(self, model: torch.nn.Module, stage: Stage, habit: str | None = None) -> None:
        self._habit = habit
        self._kept: list[torch.Tensor] = []
        self._targets = dict(model.state_dict(keep_vars=True))
        self._stage = stage
        self._block_at: int | None = None
        self._fail_at: int | None = None
        self._error = "RuntimeError"
        self._released = threading.Event()
        self.calls = 0

    def __call__(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.calls += 1
        for index, (name, tensor) in enumerate(weights):
            with torch.no_grad():
                self._targets[name].copy_(tensor)
                if self._habit == "scribble":
                    _scribble(tensor)
            if self._habit == "keep":
                self._kept.append(tensor)
            if self.calls == self._block_at and index == 0:
                self._stage.say("blocked")
                self._released.wait()
            if self.calls == self._fail_at and index == 0:
                raise vars(builtins)[self._error]("the loader was told to fail")

    def arm(self, block_at: int | None = None, fail_at: int | None = None, error: str = "RuntimeError") -> None:
        """Choose the call that goes wrong; None for no call. ``error`` is the name of a built-in exception."""
        self._block_at, self._fail_at, self._error, self.calls = block_at, fail_at, error, 0
        self._released.clear()

    def release(self) -> None:
        """Let a blocked call go on."""
        self._released.set()


def _scribble(tensor: torch.Tensor) -> None:
    """Write into a tensor; in host memory behind torch's back, as a foreign kernel does."""
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        ctypes.memset(tensor.data_ptr(), 0x55, tensor.nbytes)
    else:
        tensor.zero_()


class _Teller:
    """Hears that an update begins: from then on an abort has to reach the engine."""

    def __init__(self, told: threading.Event) -> None:
        self._told = told

    @hookimpl
    def weight_transfer_started(self) -> None:
        self._told.set()


class Receiver(WeightReceiver):
    """Says when it is told of an update, and keeps the error of one that failed: the trainer may not be there any more.

    Attributes:
        told: whether the engine has been asked to receive.
        failure: of the last one.
        session: of the trainer that has joined last.
    """

    failure: WeightTransferError | None = None
    session: str | None = None

    def __init__(self, *args: Any, observers: tuple[object, ...] = (), **kwargs: Any) -> None:
        self.told = threading.Event()
        super().__init__(*args, observers=(_Teller(self.told), *observers), **kwargs)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any]:
        self.session = init_info.get("session")
        return super().init_weight_transfer_engine(init_info)

    def start_weight_update(self, session: str | None = None) -> None:
        self.told.clear()
        self.failure = None
        super().start_weight_update(session)

    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        try:
            return super().update_weights(update_info)
        except WeightTransferError as error:
            self.failure = error
            raise


class Worker:
    """One receiver with its model and its server."""

    def __init__(
        self,
        stage: Stage,
        config: dict[str, Any],
        weights: Sequence[Weight],
        *,
        seed: int = 0,
        device: str = "cpu",
        in_place: bool = False,
        port: int = 0,
        inference: bool = False,
        habit: str | None = None,
        draft: Sequence[Weight] = (),
    ) -> None:
        with torch.inference_mode(inference):
            self.model = Model(weights, seed, device)
        self.draft = Model(draft, seed + 1, device) if draft else None
        self.family = Family(self.model)
        self.loader = Loader(self.model, stage, habit)
        self._open = ExitStack()
        targets = {} if self.draft is None else {"draft": self.draft}
        load_weights = None if in_place else self.loader
        self.receiver = Receiver(config, self.model, load_weights=load_weights, targets=targets)
        self._open.callback(self.receiver.close)
        self.url = self._open.enter_context(serve(self.receiver, port=port)).url
        self._left: list[tuple[str, torch.Tensor, bytes]] = []
        self._reading = threading.Event()
        self._has_read = threading.Condition()
        self._read: dict[int | str, set[str]] = {}
        self._reader: threading.Thread | None = None

    def move(self, weight: str) -> None:
        """Give a parameter other memory, while it stays the same object; the old memory is watched."""
        parameter = self.model.get_parameter(weight)
        self._left.append((weight, parameter.data, raw_bytes(parameter)))
        parameter.data = torch.zeros_like(parameter)

    def overwritten(self) -> list[str]:
        """Return the moved parameters whose old memory was written since."""
        return [weight for weight, memory, before in self._left if raw_bytes(memory) != before]

    def read(self) -> None:
        """Begin to read version and weights again and again, as a sampler does, on a thread."""
        self._reading.set()
        self._reader = threading.Thread(target=self._sample, daemon=True)
        self._reader.start()

    def await_reading(self, version: int | str) -> None:
        """Wait until the reader has seen this version."""
        with self._has_read:
            if not self._has_read.wait_for(lambda: version in self._read, PATIENCE / 2):
                raise TransferTimeoutError(f"The reader has not seen version {version!r}.")

    def readings(self) -> list[list[Any]]:
        """Stop reading, and return each version that was seen, with its distinct digests."""
        self._reading.clear()
        if self._reader is not None:
            self._reader.join(10)
        return [[version, sorted(digests)] for version, digests in self._read.items()]

    def _sample(self) -> None:
        with suppress(WeightTransferError):  # the receiver was closed meanwhile
            while self._reading.is_set():
                with self.receiver.serving() as version:
                    seen = digest(self.model)
                with self._has_read:
                    self._read.setdefault(version, set()).add(seen)
                    self._has_read.notify_all()

    def remains(self) -> list[str]:
        """Close, let go of everything but the engine, and return the weights that are still held."""
        assert self.receiver._joined is not None  # noqa: SLF001  (what its engine holds is the question)
        engine, watch = self.receiver._joined.engine, Watch(self.model)  # noqa: SLF001
        self.close()
        vars(self).clear()
        return watch.remaining(engine)

    def draft_hashes(self) -> dict[str, str]:
        """Return the hashes of the second model."""
        assert self.draft is not None
        return hashes(self.draft)

    def abort(self) -> None:
        """Give up the update, as the trainer would have it."""
        self.receiver.abort_weight_update("the test aborted it", self.receiver.session)

    def close(self) -> None:
        """End the children, the reader, the server and the receiver."""
        self.family.end()
        self.loader.release()
        self._reading.clear()
        self._open.close()


def main(stage: Stage, threads: int | None = None) -> None:
    """Serve commands; each names the receiver that it is about, if there are several in this process."""
    if threads is not None:
        torch.set_num_threads(threads)
    workers: dict[str, Worker] = {}
    marks: list[MemoryMark] = []

    def open_(name: str, **spec: Any) -> str:
        workers[name] = Worker(stage, **spec)
        return workers[name].url

    def failure(name: str) -> dict[str, Any] | None:
        error = workers[name].receiver.failure
        return None if error is None else error_to_dict(error)

    with watched_unpickling() as unpickled:
        stage.say("ready")
        stage.serve(
            {
                "open": open_,
                "close": lambda name: workers.pop(name).close(),
                "hashes": lambda name: hashes(workers[name].model),
                "draft_hashes": lambda name: workers[name].draft_hashes(),
                "fork": lambda name, child: workers[name].family.fork(child),
                "child": lambda name, **order: workers[name].family.ask(**order),
                "remains": lambda name: workers.pop(name).remains(),
                "strays": lambda name: workers[name].model.strays(),
                "status": lambda name: workers[name].receiver.status(),
                "busy": lambda name: workers[name].receiver._lifecycle.busy,  # noqa: SLF001  (when to strike)
                "failure": failure,
                "init": lambda name, info: workers[name].receiver.init_weight_transfer_engine(info),
                "await_update": lambda name, seconds: workers[name].receiver.told.wait(seconds),
                "abort": lambda name: workers[name].abort(),
                "arm": lambda name, **at: workers[name].loader.arm(**at),
                "release": lambda name: workers[name].loader.release(),
                "move": lambda name, weight: workers[name].move(weight),
                "overwritten": lambda name: workers[name].overwritten(),
                "calls": lambda name: workers[name].loader.calls,
                "read": lambda name: workers[name].read(),
                "await_reading": lambda name, version: workers[name].await_reading(version),
                "readings": lambda name: workers[name].readings(),
                "held": lambda name: held(),
                "mark": lambda name: marks.append(MemoryMark()),
                "growth": lambda name: marks[-1].growth(),
                "unpickled": lambda name: list(unpickled),
                **Outages().commands(),
            }
        )
        for worker in workers.values():
            worker.close()
