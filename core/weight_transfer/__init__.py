"""Move a trainer's weights into inference workers, over whichever transport is installed.

Importing this package does nothing but define names: no scan for plugins, no torch, no logging set-up.
Each public name is imported from its module when it is first used.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "backend": ("API_VERSION", "Backend", "Capability"),
    "casting": ("CastSource",),
    "checkpoint": ("CheckpointSource",),
    "config": ("ParallelConfig", "WeightTransferConfig"),
    "control": ("ControlChannel", "HttpChannel", "LocalChannel", "Server", "create_app", "serve"),
    "discovery": ("BackendRef", "Provider", "backends"),
    "engine": ("TrainerWeightTransferEngine", "WeightTransferEngine", "WorkerSlot"),
    "errors": (
        "BackendConflictError",
        "BackendContractError",
        "BackendLoadError",
        "BackendNotFoundError",
        "BackendUnavailableError",
        "BackendVersionError",
        "ConfigError",
        "HandshakeError",
        "IntegrityError",
        "LifecycleError",
        "ManifestMismatchError",
        "PeerLostError",
        "PluginError",
        "SessionError",
        "TransferError",
        "TransferTimeoutError",
        "WeightTransferError",
    ),
    "events": ("TransferFinished", "TransferProgress", "TransferStarted"),
    "hookspecs": ("hookimpl",),
    "info": (
        "WeightTransferInitInfo",
        "WeightTransferInitRequest",
        "WeightTransferUpdateInfo",
        "WeightTransferUpdateRequest",
    ),
    "loading": ("CheckpointFormatLoader", "KernelFormatLoader"),
    "lora": ("MergedLoraSource",),
    "manager": ("LoadedBackend", "load_backend"),
    "manifest": ("Manifest", "ParamMeta"),
    "read_config": ("load_config",),
    "receiver": ("ReceiverState", "WeightReceiver"),
    "report": ("TransferReport", "WorkerReport"),
    "sender": ("WeightSender",),
    "source": ("ModuleSource", "WeightSource"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(["__version__", *_HOME])  # noqa: PLE0605  (names only)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'weight_transfer' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"weight_transfer.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
