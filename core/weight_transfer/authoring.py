"""What a backend's author imports, beside `weight_transfer.engine` and `weight_transfer.errors`.

The names stay here when the modules that they come from move. Each is imported from its module when it is first used,
so a plugin module that imports from here leaves torch alone.
"""

from __future__ import annotations

from typing import Any

_MODULES = {
    "config.settings": ("ParallelConfig", "WeightTransferConfig", "to_bytes", "to_seconds"),
    "config.structuring": ("register", "structure", "unstructure"),
    "config.switches": ("tracing",),
    "control.open_files": ("accepted",),
    "control.proofs": ("ANSWER_BYTES", "DIGEST_BYTES", "Challenge", "keyed_digest", "prove_secret"),
    "copying.boxes": ("Boxes",),
    "copying.gpu": ("LOCAL", "GpuCopies", "Tuning", "has_kernel"),
    "limit": ("CopyLimit", "Limit", "LimitSide", "timed"),
    "machine.checks": (
        "check_gpus",
        "check_locked_memory",
        "check_process_memory",
        "check_rdma_devices",
        "check_shared_memory",
        "check_torch",
    ),
    "machine.nvml": ("Gpus", "find_gpus"),
    "memory.companions": ("companions_of",),
    "memory.export": ("Export", "Exporter", "Segment"),
    "memory.gpu_copies": ("WeightCopies",),
    "memory.shared_memory": ("PrivateView", "SharedMemory"),
    "copying.host": ("HostCopies", "copy_on_host"),
    "model.bits": ("INTEGERS", "as_bits"),
    "model.info": ("WeightTransferInitInfo", "WeightTransferUpdateInfo", "sent_once"),
    "model.lending": ("private_copies",),
    "model.loading": ("destinations_of",),
    "model.manifest": ("Manifest", "ParamMeta", "digest_json", "dtype_name", "torch_dtype"),
    "model.source": ("WeightSource",),
    "model.staging": ("staged_tensors", "uncast_tensors"),
    "model.regions": ("Region",),
    "plan.boxes": ("Tensors", "boxes_of"),
    "plan.buckets": (
        "ALIGNMENT",
        "BucketPlan",
        "Packer",
        "Slot",
        "Unpacker",
        "as_bytes",
        "bucket_views",
        "copy_converted",
        "laid_out",
        "plan_buckets",
        "typed_view",
    ),
    "plan.exchange": ("IncomingRegions", "OutgoingRegions", "Taker"),
    "plan.layout": ("Layout", "Regions"),
    "plan.pieces": ("Pieces",),
    "plan.views": ("sources_of", "targets_of"),
    "plugins.backend": ("API_VERSION", "Backend", "Capability", "Check", "Probe", "Verdict"),
    "plugins.hookspecs": ("hookimpl",),
    "values.deadline": ("Deadline",),
    "values.events": ("TransferFinished", "TransferProgress", "TransferStarted"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605  (names only)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'weight_transfer.authoring' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"weight_transfer.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
