"""An ``AsyncLLM`` object of this process, on its event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import ConfigError
from weight_transfer_vllm.failures import foreign

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline
    from weight_transfer_vllm.servers import PauseMode


class AsyncServer:
    """vLLM's ``AsyncLLM``. Send with ``await sender.asend(...)``, or from another thread: its event loop must go on.

    Args:
        async_llm: the object.
        loop: the event loop that it runs on; default is the one that runs here.

    Raises:
        ConfigError: no loop is given, and none runs here.
    """

    def __init__(self, async_llm: Any, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.address = f"AsyncLLM {id(async_llm):#x}"
        self._llm = async_llm
        try:
            self._loop = loop or asyncio.get_running_loop()
        except RuntimeError as error:
            raise ConfigError(
                "An AsyncLLM needs the event loop that it runs on: AsyncServer(async_llm, loop), or make the channel "
                "in a task of that loop."
            ) from error

    def world_size(self, deadline: Deadline) -> int | None:
        count: int = self._llm.vllm_config.parallel_config.world_size_across_dp
        return count

    def init(self, info: dict[str, Any], deadline: Deadline) -> None:
        self._rpc("init_weight_transfer_engine", deadline, init_info=info)

    def start(self, draft: bool, deadline: Deadline) -> None:
        self._call(self._llm.start_draft_weight_update if draft else self._llm.start_weight_update, deadline)

    def update(self, info: dict[str, Any], deadline: Deadline) -> None:
        self._rpc("update_weights", deadline, update_info=info)

    def finish(self, version: str | None, deadline: Deadline) -> None:
        self._call(lambda: self._llm.finish_weight_update(version), deadline)

    def pause(self, mode: PauseMode, deadline: Deadline) -> None:
        self._call(lambda: self._llm.pause_generation(mode=mode, clear_cache=False), deadline)

    def resume(self, deadline: Deadline) -> None:
        self._call(self._llm.resume_generation, deadline)

    def reset_caches(self, recompute: bool, deadline: Deadline) -> bool:
        done = self._call(lambda: self._llm.reset_prefix_cache(recompute, True), deadline)
        self._call(self._llm.reset_encoder_cache, deadline)
        return bool(done)

    def close(self) -> None:
        """Nothing is held."""

    def _rpc(self, method: str, deadline: Deadline, **arguments: Any) -> None:
        """Do what ``AsyncLLM``'s method of that name does, without the class of vLLM's that it takes."""
        self._call(lambda: self._llm.collective_rpc(method, kwargs=arguments), deadline)

    def _call(self, call: Callable[[], Coroutine[Any, Any, Any]], deadline: Deadline) -> Any:
        begun = threading.Event()

        async def run() -> Any:
            begun.set()
            return await call()

        running = run()
        try:
            future = asyncio.run_coroutine_threadsafe(running, self._loop)
        except RuntimeError as error:  # the loop is closed
            running.close()
            raise foreign(ConnectionError(str(error)), self.address) from error
        try:
            return future.result(max(deadline.remaining(), 1e-3))
        except TimeoutError as error:
            if future.done() and not future.cancelled():
                raise foreign(error, self.address) from error
            future.cancel()
            what = (
                "waiting for vLLM"
                if begun.is_set()
                else (
                    "waiting for the event loop of vLLM, which stands still; send with `await sender.asend(...)` on it"
                )
            )
            raise deadline.timeout(what, peer=self.address) from error
        except Exception as error:
            raise foreign(error, self.address) from error
