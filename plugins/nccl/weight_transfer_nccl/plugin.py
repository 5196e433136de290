"""What the core imports when a config says ``backend = "nccl"``; nothing heavy."""

from __future__ import annotations

from weight_transfer.authoring import API_VERSION, Backend, Capability, Check, Probe, hookimpl


@hookimpl
def weight_transfer_backend() -> Backend:
    return Backend(
        name="nccl",
        api_version=API_VERSION,
        summary="broadcast and regions over NCCL, or over gloo for CPU tensors",
        worker_engine="weight_transfer_nccl.engine:NcclWorkerEngine",
        trainer_engine="weight_transfer_nccl.engine:NcclTrainerEngine",
        options="weight_transfer_nccl.config:NcclOptions",
        probe="weight_transfer_nccl.plugin:probe",
        limit="weight_transfer_nccl.limit:limit",
        capabilities=frozenset(
            {
                Capability.CPU,
                Capability.CUDA,
                Capability.CROSS_PROCESS,
                Capability.CROSS_HOST,
                Capability.REGIONS,
            }
        ),
        one_device_each=True,
    )


@hookimpl
def weight_transfer_checks() -> list[Check]:
    from weight_transfer_nccl.doctor import checks

    return checks()


def probe() -> Probe:
    """Say which of NCCL and gloo this machine offers, and why not."""
    import torch
    from torch import distributed

    if not distributed.is_available():
        fix = "Install a torch build with torch.distributed."
        return Probe(available=False, reason="this torch was built without torch.distributed", fix=fix)
    gloo = distributed.is_gloo_available()
    if not distributed.is_nccl_available():
        nccl = "not in this torch build"
    elif not torch.cuda.is_available():
        nccl = "no CUDA device"
    else:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    details = {"NCCL": nccl, "gloo": "available" if gloo else "not in this torch build"}
    usable = [name for name, there in (("NCCL " + nccl, nccl[0].isdigit()), ("gloo", gloo)) if there]
    if not usable:
        fix = "Install a torch build with gloo or NCCL."
        return Probe(available=False, reason=f"no NCCL ({nccl}) and no gloo", fix=fix, details=details)
    missing = "" if nccl[0].isdigit() else f" for CPU tensors; no NCCL: {nccl}"
    return Probe(available=True, reason=" and ".join(usable) + missing, details=details)
