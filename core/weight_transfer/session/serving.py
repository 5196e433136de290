"""What a worker serves: one version of each of its models, and who samples from them."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING

import attrs

from weight_transfer.errors import LifecycleError
from weight_transfer.model.info import MODEL
from weight_transfer.values.deadline import LONG, Deadline

if TYPE_CHECKING:
    from weight_transfer.values.events import Version

logger = logging.getLogger(__name__)

_NAMED = 3  # threads and tasks that a message names
_LOOK = 1.0  # seconds between two looks at a version that does not come: an update may have been abandoned


class Signal(threading.Condition):
    """A condition that wakes event loops as well as threads."""

    def __init__(self) -> None:
        super().__init__()
        self._wakers: list[Callable[[], None]] = []

    def notify_all(self) -> None:
        super().notify_all()
        for wake in self._wakers:
            wake()

    @contextmanager
    def waking(self, event: asyncio.Event) -> Iterator[None]:
        """Set ``event`` of the running loop at each notification inside a ``with`` block."""
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed under whoever waited
                loop.call_soon_threadsafe(event.set)

        with self:
            self._wakers.append(wake)
        try:
            yield
        finally:
            with self:
                self._wakers.remove(wake)


@attrs.define(eq=False)
class _Hold:
    """One block that samples."""

    who: str


_mine: ContextVar[tuple[_Hold, ...]] = ContextVar("weight_transfer_serving", default=())
"""The blocks that this thread or task is in; tasks and threads that are started inside take it with them."""


@attrs.define(eq=False)
class Watch:
    """What a wait for a version asks for: whether to go on, until when, and what to say of the state meanwhile.

    Attributes:
        look: called before each look at the version, without a lock; raises if no version will ever come.
        deadline: when to give up.
        state: where the receiver stands, for messages.
        backend: for errors.
    """

    look: Callable[[], None]
    deadline: Deadline
    state: Callable[[], str]
    backend: str
    since: float = attrs.field(factory=time.monotonic)
    _told: bool = False

    def check(self) -> None:
        """Raise if the deadline has passed, and log once that the wait takes long."""
        what = f"waiting for a version to serve (state {self.state()})"
        self.deadline.check(what, backend=self.backend)
        if not self._told and time.monotonic() - self.since > LONG:
            self._told = True
            logger.warning("%s is %s for %.0f s now", _who(), what, time.monotonic() - self.since)


class Served:
    """The versions that are served, the blocks that hold them still, and those that wait for one.

    Attributes:
        versions: by target, of those whose weights are whole.
        updates: the ids of these weights, by target, as far as the trainers have told them.
        digests: the digests of their receipts, by target, as far as bytes were compared.
        committed: the last versions that were published, by target, whether or not their weights are still whole.
        torn: targets that an update has spoiled; while there is one, nothing is served.
        held_back: whether an update is open, so that nobody may begin to sample.
        published: when the model's version was published, in seconds since 1970; None before the first.
    """

    def __init__(self, changed: Signal) -> None:
        self.versions: dict[str, Version] = {}
        self.updates: dict[str, str | None] = {}
        self.digests: dict[str, str] = {}
        self.committed: dict[str, Version] = {}
        self.torn: set[str] = set()
        self.held_back = False
        self.published: float | None = None
        self._changed = changed
        self._holds: set[_Hold] = set()
        self._sampled = False
        self._curious: list[Callable[[], object]] = []

    @property
    def current(self) -> Version | None:
        """The model's version, if one may begin to sample."""
        return None if self.held_back or self.torn else self.versions.get(MODEL)

    @property
    def samplers(self) -> list[str]:
        """The threads and tasks that hold the version still."""
        return sorted({hold.who for hold in self._holds})

    def await_samplers(self, check: Callable[[str], None], deadline: Deadline) -> None:
        """Wait until nobody holds the version any more; ``check`` is told what for, and raises to end the wait."""
        since, told = time.monotonic(), False
        with self._changed:
            while samplers := self.samplers:
                check(
                    f"waiting for the sampling of the old version to end: {_some(samplers)} still in serving(); "
                    "let a block be one batch or step, or raise timeout"
                )
                if not told and time.monotonic() - since > LONG:
                    told = True
                    logger.warning("an update waits for %s to leave serving()", _some(samplers))
                self._changed.wait(min(deadline.remaining(), 0.1))

    def when_sampled(self, tell: Callable[[], object]) -> Callable[[], None]:
        """Have ``tell`` called once somebody samples for the first time, or at once; see `WeightReceiver`."""
        with self._changed:
            if self._sampled:
                tell()
            else:
                self._curious.append(tell)

        def forget() -> None:
            with self._changed:
                if tell in self._curious:
                    self._curious.remove(tell)

        return forget

    def publish(self, target: str, version: Version, update: str | None, digest: str = "") -> None:
        """Let samplers in, to new weights."""
        with self._changed:
            self.digests.pop(target, None)
            if digest:
                self.digests[target] = digest
            self.versions[target], self.updates[target] = version, update
            self.committed[target] = version
            if target == MODEL:
                self.published = time.time()  # noqa: TID251  (the time of day)
            self.torn.discard(target)
            self.resume()

    def tear(self, target: str) -> None:
        """The weights of ``target`` are no version any more."""
        with self._changed:
            self.versions.pop(target, None)
            self.updates.pop(target, None)
            self.digests.pop(target, None)
            self.torn.add(target)
            self.resume()

    def forget(self, target: str) -> None:
        """Another model has taken the place of ``target``: it has no version yet, and nothing has spoiled it."""
        with self._changed:
            self.versions.pop(target, None)
            self.updates.pop(target, None)
            self.digests.pop(target, None)
            self.committed.pop(target, None)
            self.torn.discard(target)
            self._changed.notify_all()

    def resume(self) -> None:
        """Let samplers in again."""
        with self._changed:
            self.held_back = False
            self._changed.notify_all()

    @contextmanager
    def hold(self, watch: Watch) -> Iterator[Version]:
        """Hold one version still on this thread."""
        while True:
            watch.look()
            with self._changed:
                taken = self._take()
                if taken is not None:
                    break
                watch.check()
                _require_no_loop()
                self._changed.wait(min(watch.deadline.remaining(), _LOOK))
        with self._inside(taken[0]):
            yield taken[1]

    @asynccontextmanager
    async def ahold(self, watch: Watch) -> AsyncIterator[Version]:
        """Hold one version still in this task; the event loop goes on meanwhile."""
        event = asyncio.Event()
        with self._changed.waking(event):
            while True:
                event.clear()
                watch.look()
                with self._changed:
                    taken = self._take()
                if taken is not None:
                    break
                watch.check()
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(watch.deadline.remaining(), _LOOK)):
                        await event.wait()
        with self._inside(taken[0]):
            yield taken[1]

    def _take(self) -> tuple[_Hold, Version] | None:
        """Begin a block if there is a version, or if this one lies inside another: then the version cannot change."""
        nested = any(hold in self._holds for hold in _mine.get())
        version = self.versions.get(MODEL) if nested else self.current
        if version is None:
            return None
        hold = _Hold(_who())
        self._holds.add(hold)
        if not self._sampled:
            self._sampled = True
            for tell in self._curious:
                tell()
            self._curious.clear()
        return hold, version

    @contextmanager
    def _inside(self, hold: _Hold) -> Iterator[None]:
        _mine.set((*_mine.get(), hold))
        try:
            yield
        finally:
            # not by a token: frameworks enter and leave such blocks in different contexts
            _mine.set(tuple(other for other in _mine.get() if other is not hold))
            with self._changed:
                self._holds.discard(hold)
                self._changed.notify_all()


def _running_task() -> str | None:
    """Return the name of the running task; None outside of event loops."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return None
    return task.get_name() if task is not None else "the event loop"


def _who() -> str:
    return _running_task() or threading.current_thread().name


def _require_no_loop() -> None:
    task = _running_task()
    if task is not None:
        raise LifecycleError(
            f"serving() would block the event loop of {task} until there is a version; use "
            "`async with receiver.aserving()` there, or call it on a thread.",
            method="serving",
            state="waiting",
        )


def _some(samplers: list[str]) -> str:
    named, others = ", ".join(samplers[:_NAMED]), len(samplers) - _NAMED
    return f"{named} and {others} more" if others > 0 else named
