"""What a channel needs of a vLLM engine, and which of the classes here gives it, for each of vLLM's own forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

from weight_transfer.errors import ConfigError

if TYPE_CHECKING:
    from weight_transfer.authoring import Deadline

__all__ = ["PauseMode", "VllmServer", "server_of"]

PauseMode = Literal["keep", "wait", "abort"]
"""What vLLM does with running requests when it pauses: freeze them, let them end, or abort them."""


class VllmServer(Protocol):
    """A vLLM engine, reached in whichever way. Read in vLLM 0.33.

    Each call returns when all workers of the engine have done it, and raises a `WeightTransferError` otherwise:
    `PeerLostError` if the engine cannot be reached or has died, `TransferTimeoutError` at the deadline, a worker's own
    error if vLLM's text carries one. Calls come one at a time.

    Attributes:
        address: for messages.
    """

    address: str

    def world_size(self, deadline: Deadline) -> int | None:
        """Return the number of workers (TP * PP * DP); None if it cannot be asked."""

    def init(self, info: dict[str, Any], deadline: Deadline) -> None:
        """Call ``init_weight_transfer_engine``, which vLLM allows at any time, on all workers."""

    def start(self, draft: bool, deadline: Deadline) -> None:
        """Open vLLM's session of updates: for the model, or for the draft model."""

    def update(self, info: dict[str, Any], deadline: Deadline) -> None:
        """Call ``update_weights`` on all workers. vLLM's engine hears nothing else meanwhile."""

    def finish(self, version: str | None, deadline: Deadline) -> None:
        """Close the session, and set vLLM's weight version unless it is None."""

    def pause(self, mode: PauseMode, deadline: Deadline) -> None:
        """Generate no more."""

    def resume(self, deadline: Deadline) -> None:
        """Generate again."""

    def reset_caches(self, recompute: bool, deadline: Deadline) -> bool:
        """Forget what the old weights have computed: the prefix cache, that of a KV connector, and the encoder's.

        Args:
            recompute: push running requests back, to be computed anew; otherwise vLLM resets no cache that they use.
            deadline: for the call.

        Returns:
            Whether the caches were reset.
        """

    def close(self) -> None:
        """Let go of the connection; the engine goes on."""


_METHODS = ("world_size", "init", "start", "update", "finish", "pause", "resume", "reset_caches")


def server_of(target: Any) -> VllmServer:
    """Return the server for a URL, an ``LLM``, an ``AsyncLLM``, Ray handles of either, or a server.

    Raises:
        ConfigError: it is none of them; or an ``AsyncLLM`` outside of its event loop.
    """
    if isinstance(target, str):
        from weight_transfer_vllm.servers.http import HttpServer

        return HttpServer(target)
    if all(callable(getattr(target, method, None)) for method in _METHODS):
        server: VllmServer = target
        return server
    handles = target if isinstance(target, (list, tuple)) else [target]
    if handles and all(type(handle).__module__.partition(".")[0] == "ray" for handle in handles):
        from weight_transfer_vllm.servers.ray_actors import RayServer

        return RayServer(handles)
    if hasattr(target, "pause_generation") and hasattr(target, "collective_rpc"):
        from weight_transfer_vllm.servers.async_llm import AsyncServer

        return AsyncServer(target)
    if hasattr(target, "llm_engine") and hasattr(target, "collective_rpc"):
        from weight_transfer_vllm.servers.offline import LlmServer

        return LlmServer(target)
    raise ConfigError(
        f"{target!r} is no vLLM; give the URL of its server, such as 'http://127.0.0.1:8000', an LLM, an AsyncLLM, Ray "
        "handles of one, or an object with the methods of VllmServer."
    )
