"""The calls of a receiver for asyncio, for an RPC whose methods are coroutines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from weight_transfer.session.background import finished

if TYPE_CHECKING:
    from collections.abc import Callable

    from weight_transfer.values.events import Version

T = TypeVar("T")

_CANCELLED = "the task that called was cancelled"


class AwaitedCalls(ABC):
    """Each call of a receiver as a coroutine: it runs on a thread, and the event loop goes on meanwhile.

    A task that is cancelled while it joins, starts or updates has that aborted, and ends once nothing writes into the
    model any more; in another call it ends when that does.
    """

    async def ainit_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any]:
        """`init_weight_transfer_engine` for asyncio."""
        call = partial(self.init_weight_transfer_engine, init_info)
        return await self._aborting(call, "init_weight_transfer_engine", init_info.get("session"))

    async def astart_weight_update(self, session: str | None = None) -> None:
        """`start_weight_update` for asyncio."""
        await self._aborting(partial(self.start_weight_update, session), "start_weight_update", session)

    async def aupdate_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        """`update_weights` for asyncio."""
        call = partial(self.update_weights, update_info)
        return await self._aborting(call, "update_weights", update_info.get("session"))

    async def aweight_needs(self, request: dict[str, Any]) -> dict[str, Any]:
        """`weight_needs` for asyncio."""
        return await finished(partial(self.weight_needs, request), "weight-transfer weight_needs")

    async def afinish_weight_update(
        self, weight_version: Version | None = None, session: str | None = None, update: str | None = None
    ) -> None:
        """`finish_weight_update` for asyncio."""
        call = partial(self.finish_weight_update, weight_version, session, update)
        await finished(call, "weight-transfer finish_weight_update")

    async def aabort_weight_update(
        self, reason: str = "the trainer aborted the update", session: str | None = None
    ) -> None:
        """`abort_weight_update` for asyncio."""
        call = partial(self.abort_weight_update, reason, session)
        await finished(call, "weight-transfer abort_weight_update")

    async def aleave(self, reason: str = "the worker left its trainer") -> None:
        """`leave` for asyncio."""
        await finished(partial(self.leave, reason), "weight-transfer leave")

    async def aclose(self) -> None:
        """`close` for asyncio."""
        await finished(self.close, "weight-transfer close")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _aborting(self, call: Callable[[], T], name: str, session: str | None) -> T:
        give_up = partial(self.abort_weight_update, _CANCELLED, session)
        return await finished(call, f"weight-transfer {name}", give_up)

    @abstractmethod
    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any]: ...

    @abstractmethod
    def start_weight_update(self, session: str | None = None) -> None: ...

    @abstractmethod
    def update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]: ...

    @abstractmethod
    def weight_needs(self, request: dict[str, Any]) -> dict[str, Any]: ...

    @abstractmethod
    def finish_weight_update(
        self, weight_version: Version | None = None, session: str | None = None, update: str | None = None
    ) -> None: ...

    @abstractmethod
    def abort_weight_update(
        self, reason: str = "the trainer aborted the update", session: str | None = None
    ) -> None: ...

    @abstractmethod
    def leave(self, reason: str = "the worker left its trainer") -> None: ...

    @abstractmethod
    def close(self) -> None: ...
