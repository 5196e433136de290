"""On what something was measured: the machine, without its name, and the versions of what took part."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from weight_transfer import __version__
from weight_transfer.plugins.discovery import backends


def machine() -> dict[str, Any]:
    """Return ``system``, ``cpu``, ``cores``, ``memory_bytes`` and ``gpus``, a list of names."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the core, of Python, torch and its libraries, and of the backends' distributions."""
    told = {"weight-transfer": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    if torch.cuda.is_available():
        told["cuda"] = str(torch.version.cuda)
        if torch.distributed.is_nccl_available():
            told["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    chosen = set(names)
    providers = [ref.provider for ref in backends() if ref.name in chosen]
    return told | {provider.distribution: provider.version for provider in providers}


def _processor(info: Path = Path("/proc/cpuinfo")) -> str:
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
