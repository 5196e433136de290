"""Move a trainer's weights into inference workers, over whichever transport is installed.

Importing this package does nothing but define names: no scan for plugins, no torch, no logging set-up.
Each public name is imported from its module when it is first used.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "config.settings": ("ParallelConfig", "WeightTransferConfig"),
    "control": (
        "ControlChannel",
        "HttpChannel",
        "HttpLimits",
        "LocalChannel",
        "Server",
        "Tls",
        "create_app",
        "serve",
    ),
    "engine": ("TrainerWeightTransferEngine", "WeightTransferEngine", "WorkerSlot"),
    "errors": (
        "BackendConflictError",
        "BackendContractError",
        "BackendLoadError",
        "BackendNotFoundError",
        "BackendUnavailableError",
        "BackendVersionError",
        "CommitError",
        "ConfigError",
        "HandshakeError",
        "IntegrityError",
        "LifecycleError",
        "ManifestMismatchError",
        "PeerLostError",
        "PluginError",
        "ReplacedError",
        "RollbackError",
        "SessionError",
        "StaleCommitError",
        "TransferError",
        "TransferTimeoutError",
        "WeightTransferError",
        "WeightsMovedError",
    ),
    "model.casting": ("CastSource",),
    "model.checkpoint": ("CheckpointSource",),
    "model.info": (
        "WeightTransferInitInfo",
        "WeightTransferInitRequest",
        "WeightTransferUpdateInfo",
        "WeightTransferUpdateRequest",
    ),
    "model.checkpoint_loading": ("CheckpointFormatLoader",),
    "model.loading": ("KernelFormatLoader",),
    "model.lora": ("MergedLoraSource",),
    "model.planned": ("PlannedLoader", "ServedLayers"),
    "model.manifest": ("Manifest", "ParamMeta"),
    "model.recorder": ("record",),
    "model.recording": ("Recording",),
    "model.regions": ("Region",),
    "model.shards": ("Shard", "Target"),
    "model.sharded_source": ("ShardedSource",),
    "model.source": ("ModuleSource", "WeightSource"),
    "plugins.backend": ("API_VERSION", "Backend", "Capability"),
    "plugins.discovery": ("BackendRef", "Provider", "backends"),
    "plugins.hookspecs": ("hookimpl",),
    "plugins.manager": ("LoadedBackend", "load_backend"),
    "plugins.read_config": ("load_config",),
    "session.connecting": ("connect",),
    "session.receiver": ("ReceiverState", "WeightReceiver"),
    "session.sender": ("WeightSender",),
    "values.events": ("MembershipChanged", "TransferFinished", "TransferProgress", "TransferStarted"),
    "values.report": ("Receipt", "TransferReport", "WorkerReport"),
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
