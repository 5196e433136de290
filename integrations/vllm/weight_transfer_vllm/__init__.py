"""vLLM as a worker of weight-transfer: it receives through any installed backend, as ``wt_<backend>``.

Importing this package imports nothing else; each public name comes from its module when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weight_transfer_vllm.channel import VllmChannel
    from weight_transfer_vllm.servers import VllmServer
    from weight_transfer_vllm.servers.async_llm import AsyncServer
    from weight_transfer_vllm.servers.http import HttpServer
    from weight_transfer_vllm.servers.offline import LlmServer
    from weight_transfer_vllm.servers.ray_actors import RayServer

__version__ = "0.1.0"

PREFIX = "wt_"
"""Of the names by which vLLM knows our backends."""

__all__ = ["AsyncServer", "HttpServer", "LlmServer", "RayServer", "VllmChannel", "VllmServer", "register"]

_HOME = {
    "AsyncServer": "servers.async_llm",
    "HttpServer": "servers.http",
    "LlmServer": "servers.offline",
    "RayServer": "servers.ray_actors",
    "VllmChannel": "channel",
    "VllmServer": "servers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'weight_transfer_vllm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"weight_transfer_vllm.{_HOME[name]}"), name)


def register() -> None:
    """Name every installed backend to vLLM, which calls this in each of its processes; no engine is imported.

    Raises:
        ConfigError: this vLLM is another version than those that are known to work.
    """
    from weight_transfer import backends
    from weight_transfer_vllm.compatibility import require_vllm

    require_vllm()
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    for ref in backends():
        name = PREFIX + ref.name
        if name not in WeightTransferEngineFactory._registry:  # noqa: SLF001  (there is no way to ask for it)
            WeightTransferEngineFactory.register_engine(name, "weight_transfer_vllm.engine", "Engine")
