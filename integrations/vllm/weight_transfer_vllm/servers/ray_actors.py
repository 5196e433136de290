"""Ray actors that are an ``LLM`` or an ``AsyncLLM``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import ConfigError
from weight_transfer_vllm.failures import foreign

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline
    from weight_transfer_vllm.servers import PauseMode


class RayServer:
    """Handles of actors that were made of vLLM's ``LLM`` or ``AsyncLLM``, or of a class that inherits from one.

    Several handles are one engine: the data-parallel replicas of one vLLM, whose workers count their ranks through.
    Give engines that know nothing of each other a channel each.

    Args:
        handles: one or more.
        workers: how many workers there are behind them, if they cannot be asked: only an ``LLM`` can. The workers
            themselves tell it, too.

    Raises:
        ConfigError: there is no handle.
    """

    def __init__(self, handles: Sequence[Any], workers: int | None = None) -> None:
        if not handles:
            raise ConfigError("RayServer needs at least one handle of an actor.")
        self._handles = list(handles)
        self._workers = workers
        self.address = ", ".join(f"{handle}" for handle in self._handles)

    def world_size(self, deadline: Deadline) -> int | None:
        if self._workers is not None or not hasattr(self._handles[0], "get_world_size"):
            return self._workers
        counts: list[int] = self._each(lambda handle: handle.get_world_size.remote(), deadline)
        return max(counts)

    def init(self, info: dict[str, Any], deadline: Deadline) -> None:
        self._rpc("init_weight_transfer_engine", {"init_info": info}, deadline)

    def start(self, draft: bool, deadline: Deadline) -> None:
        self._rpc("start_draft_weight_update" if draft else "start_weight_update", {}, deadline)

    def update(self, info: dict[str, Any], deadline: Deadline) -> None:
        self._rpc("update_weights", {"update_info": info}, deadline)

    def finish(self, version: str | None, deadline: Deadline) -> None:
        self._each(lambda handle: handle.finish_weight_update.remote(version), deadline)

    def pause(self, mode: PauseMode, deadline: Deadline) -> None:
        def pause(handle: Any) -> Any:
            if _is_async(handle):
                return handle.pause_generation.remote(mode=mode, clear_cache=False)
            return handle.sleep.remote(level=0, mode=mode)

        self._each(pause, deadline)

    def resume(self, deadline: Deadline) -> None:
        def resume(handle: Any) -> Any:
            return handle.resume_generation.remote() if _is_async(handle) else handle.wake_up.remote(["scheduling"])

        self._each(resume, deadline)

    def reset_caches(self, recompute: bool, deadline: Deadline) -> bool:
        """See `VllmServer`; the encoder's cache can be reset in an ``AsyncLLM`` only."""
        done = self._each(lambda handle: handle.reset_prefix_cache.remote(recompute, True), deadline)
        self._each(lambda handle: handle.reset_encoder_cache.remote() if _is_async(handle) else None, deadline)
        return all(done)

    def close(self) -> None:
        """Nothing is held."""

    def _rpc(self, method: str, arguments: dict[str, Any], deadline: Deadline) -> None:
        """Call a method of the workers, as the engine's own method of that name does."""
        self._each(lambda handle: handle.collective_rpc.remote(method, kwargs=arguments), deadline)

    def _each(self, call: Callable[[Any], Any], deadline: Deadline) -> list[Any]:
        import ray

        try:
            called = [reference for reference in map(call, self._handles) if reference is not None]
            answers: list[Any] = ray.get(called, timeout=max(deadline.remaining(), 1e-3))
        except Exception as error:
            raise foreign(error, self.address) from error
        return answers


def _is_async(handle: Any) -> bool:
    return hasattr(handle, "pause_generation")
