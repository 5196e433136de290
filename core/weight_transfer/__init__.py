"""Move a trainer's weights into inference workers, over whichever transport is installed.

Importing this package does nothing but define names: no scan for plugins, no torch, no logging set-up.
Each public name is imported from its module when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from weight_transfer.backend import API_VERSION, Backend, Capability
    from weight_transfer.config import ParallelConfig, WeightTransferConfig, load_config
    from weight_transfer.control import ControlChannel, HttpChannel, LocalChannel, Server, create_app, serve
    from weight_transfer.discovery import BackendRef, Provider, backends
    from weight_transfer.engine import TrainerWeightTransferEngine, WeightTransferEngine, WorkerSlot
    from weight_transfer.errors import (
        BackendConflictError,
        BackendContractError,
        BackendLoadError,
        BackendNotFoundError,
        BackendUnavailableError,
        BackendVersionError,
        ConfigError,
        HandshakeError,
        IntegrityError,
        LifecycleError,
        ManifestMismatchError,
        PeerLostError,
        PluginError,
        TransferError,
        TransferTimeoutError,
        WeightTransferError,
    )
    from weight_transfer.events import TransferFinished, TransferProgress, TransferStarted
    from weight_transfer.hookspecs import hookimpl
    from weight_transfer.info import (
        WeightTransferInitInfo,
        WeightTransferInitRequest,
        WeightTransferUpdateInfo,
        WeightTransferUpdateRequest,
    )
    from weight_transfer.loading import CheckpointFormatLoader, KernelFormatLoader
    from weight_transfer.manager import LoadedBackend, load_backend
    from weight_transfer.manifest import Manifest, ParamMeta
    from weight_transfer.receiver import ReceiverState, WeightReceiver
    from weight_transfer.report import TransferReport
    from weight_transfer.sender import WeightSender
    from weight_transfer.source import CheckpointSource, ModuleSource, WeightSource

_MODULES = {
    "backend": ("API_VERSION", "Backend", "Capability"),
    "config": ("ParallelConfig", "WeightTransferConfig", "load_config"),
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
    "manager": ("LoadedBackend", "load_backend"),
    "manifest": ("Manifest", "ParamMeta"),
    "receiver": ("ReceiverState", "WeightReceiver"),
    "report": ("TransferReport",),
    "sender": ("WeightSender",),
    "source": ("CheckpointSource", "ModuleSource", "WeightSource"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [  # noqa: PLE0604  (every entry is a string; the star hides that from the linter)
    "__version__",
    *sorted(_HOME),
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'weight_transfer' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"weight_transfer.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
