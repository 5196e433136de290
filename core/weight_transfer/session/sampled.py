"""Who samples from a receiver, and how an update waits for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from weight_transfer.session.occupied import Occupied
from weight_transfer.session.serving import Watch
from weight_transfer.values.deadline import Deadline

if TYPE_CHECKING:
    from weight_transfer.session.update import Update
    from weight_transfer.values.events import Version

_ANSWER = 0.9
"""Part of ``timeout`` after which samplers are given up, so that their names reach the trainer in time."""


class Sampled(Occupied):
    """A receiver as those see it who sample from its model."""

    def serving(self, timeout: float | None = None) -> AbstractContextManager[Version]:
        """Hold one version still while sampling from it: ``with receiver.serving() as version: ...``.

        Waits until a version is served. An update that arrives meanwhile waits until the block is left. A block inside
        another one, on the same thread or task or on one that was started inside, does not wait.

        Args:
            timeout: seconds to wait for a version; default is ``config.timeout``.

        Raises:
            TransferTimeoutError: no version was served within that time.
            LifecycleError: the receiver is closed; or the wait would block the event loop that runs on this thread, on
                which `aserving` waits.
        """

        def look() -> None:
            self._give_up_on_thread()
            self._lifecycle.require_open("serving")

        return self._served.hold(self._watch(look, timeout))

    def aserving(self, timeout: float | None = None) -> AbstractAsyncContextManager[Version]:
        """`serving` for asyncio: ``async with receiver.aserving() as version: ...``; the event loop goes on meanwhile.

        Args:
            timeout: seconds to wait for a version; default is ``config.timeout``.

        Raises:
            TransferTimeoutError: no version was served within that time.
            LifecycleError: the receiver is closed.
        """

        def look() -> None:
            self._give_up_on_thread()
            self._lifecycle.require_open("aserving")

        return self._served.ahold(self._watch(look, timeout))

    def when_sampled(self, tell: Callable[[], object]) -> Callable[[], None]:
        """Have ``tell`` called when somebody enters `serving` for the first time, or at once if that has happened.

        Until then no update waits for samplers, so a trainer may begin one on all workers at once.

        Args:
            tell: called on whichever thread that is; returns at once.

        Returns:
            What takes that back.
        """
        return self._served.when_sampled(tell)

    def _watch(self, look: Callable[[], None], timeout: float | None) -> Watch:
        deadline = Deadline(self.config.timeout if timeout is None else timeout)
        return Watch(look, deadline, lambda: self._lifecycle.state, self.config.backend)

    def _hold_samplers(self, update: Update, phase: str) -> None:
        """Let nobody begin to sample, and wait until nobody samples; end the update if that takes too long."""
        with self._changed:
            self._served.held_back = True
            answer = Deadline(_ANSWER * self.config.timeout)  # the trainer's deadline comes a moment later

            def check(what: str) -> None:
                answer.check(what, backend=self.config.backend, phase=phase)
                update.check(what)

            try:
                self._served.await_samplers(check, answer)
            except BaseException as error:
                self._end_update(str(error))
                raise

    @contextmanager
    def _without_samplers(self) -> Iterator[None]:
        """Wait until nobody samples, and let nobody begin to, for the length of a block."""
        deadline = Deadline(_ANSWER * self.config.timeout)
        with self._changed:
            self._served.held_back = True
        try:
            self._served.await_samplers(
                lambda what: deadline.check(what, backend=self.config.backend, phase="init"), deadline
            )
            yield
        finally:
            self._served.resume()
