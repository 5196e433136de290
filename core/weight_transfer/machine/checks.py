"""Checks of this machine that several backends need; a plugin returns those that matter to it, beside its own."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
from pathlib import Path

from weight_transfer.machine.nvml import find_gpus
from weight_transfer.plugins.backend import Check, Verdict
from weight_transfer.values.report import sized

_SHARED = Path("/dev/shm")  # noqa: S108  (it is looked at)
_ENOUGH_SHARED = 2**30  # bytes of /dev/shm
_ENOUGH_LOCKED = 2**30  # bytes
_CAP_SYS_PTRACE = 19


def check_torch() -> Check:
    """Look whether torch and the driver suit each other."""
    import torch

    gpus, built = find_gpus(), torch.version.cuda
    found = f"{torch.__version__}, {f'built for CUDA {built}' if built else 'without CUDA'}"
    if not gpus.indices or gpus.cuda is None:
        return Check(title="torch", found=found)
    found += f"; the driver supports CUDA {gpus.cuda[0]}.{gpus.cuda[1]}"
    if built is None:
        fix = f"Install a torch build for CUDA {gpus.cuda[0]}; https://pytorch.org/get-started names the command."
        return Check(title="torch", verdict=Verdict.LIMITED, found=found, fix=fix)
    if int(built.partition(".")[0]) > gpus.cuda[0]:
        fix = f"Update the NVIDIA driver, or install a torch build for CUDA {gpus.cuda[0]}."
        return Check(title="torch", verdict=Verdict.BROKEN, found=found, fix=fix)
    return Check(title="torch", found=found)


def check_gpus() -> Check:
    """Look which GPUs there are, and whether they can read each other's memory."""
    gpus = find_gpus()
    fixes = []
    if gpus.sliced:
        fixes.append(f"`nvidia-smi -i {','.join(map(str, gpus.sliced))} -mig 0` makes whole GPUs of slices.")
    if gpus.apart:
        fixes.append("`nvidia-smi topo -p2p r` says why; PCIe access control (ACS) and virtual machines prevent it.")
    limited = bool(fixes) or not gpus.indices
    return Check(title="GPUs", verdict=Verdict.LIMITED if limited else Verdict.OK, found=str(gpus), fix=" ".join(fixes))


def check_shared_memory(folder: Path = _SHARED) -> Check:
    """Look whether POSIX shared memory has room for a library's buffers."""
    if not folder.is_dir():
        return Check(
            title=str(folder), verdict=Verdict.LIMITED, found="there is none", fix=f"Mount a tmpfs on {folder}."
        )
    usage = shutil.disk_usage(folder)
    found = f"{sized(usage.free)} of {sized(usage.total)} are free"
    if usage.free >= _ENOUGH_SHARED:
        return Check(title=str(folder), found=found)
    fix = "In a container: docker run --shm-size=8g, or --ipc=host. Else remove what abandoned processes left there."
    return Check(title=str(folder), verdict=Verdict.LIMITED, found=found, fix=fix)


def check_rdma_devices(root: Path = Path("/sys/class/infiniband"), nodes: Path = Path("/dev/infiniband")) -> Check:
    """Look for InfiniBand and RoCE ports that are up."""
    title = "RDMA devices"
    ports = {f"{port.parents[1].name}:{port.name}": port for port in sorted(root.glob("*/ports/*"))}
    if not ports:
        return Check(title=title, verdict=Verdict.LIMITED, found="none: TCP between hosts")
    states = {name: _line(port / "state").rpartition(" ")[2] or "unknown" for name, port in ports.items()}
    described = [
        f"{name} {states[name].lower()}, {_line(port / 'rate') or 'rate unknown'}, {_line(port / 'link_layer') or '?'}"
        for name, port in ports.items()
    ]
    found = "; ".join(described)
    if not nodes.is_dir():
        found = f"{found}; but no {nodes}"
        fix = f"In a container: docker run --device {nodes}. Else load the kernel module ib_uverbs."
        return Check(title=title, verdict=Verdict.LIMITED, found=found, fix=fix)
    if "ACTIVE" not in states.values():
        fix = "Plug the cable in and see to the subnet manager; `ibstat` shows the port's physical state."
        return Check(title=title, verdict=Verdict.LIMITED, found=found, fix=fix)
    return Check(title=title, found=found)


def check_locked_memory(root: Path = Path("/sys/class/infiniband")) -> Check:
    """Look whether processes may lock the memory that RDMA devices read; without devices any limit will do."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    found = "unlimited" if limit == resource.RLIM_INFINITY else sized(limit)
    if limit == resource.RLIM_INFINITY or limit >= _ENOUGH_LOCKED or not any(root.glob("*")):
        return Check(title="locked memory", found=found)
    fix = "`ulimit -l unlimited` before the process starts, or docker run --ulimit memlock=-1."
    return Check(title="locked memory", verdict=Verdict.BROKEN, found=f"{found}: RDMA devices need more", fix=fix)


def check_process_memory(proc: Path = Path("/proc")) -> Check:
    """Look whether processes of one user may read each other's memory (cross memory attach)."""
    title = "cross memory attach"
    fix = "In a container: docker run --cap-add SYS_PTRACE."
    if refusal := _refusal_to_read():
        return Check(title=title, verdict=Verdict.LIMITED, found=f"process_vm_readv is refused: {refusal}", fix=fix)
    scope = _line(proc / "sys/kernel/yama/ptrace_scope") or "0"
    if scope != "0" and not _may_trace(proc):
        fix = f"`sysctl kernel.yama.ptrace_scope=0` as root. {fix}"
        found = f"kernel.yama.ptrace_scope is {scope}: processes copy twice, through shared memory"
        return Check(title=title, verdict=Verdict.LIMITED, found=found, fix=fix)
    return Check(title=title, found="processes of one user may read each other's memory")


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _refusal_to_read() -> str:
    """Read a byte of this process as if it were another's; return the system's error, or an empty text."""
    source, target = ctypes.create_string_buffer(b"x"), ctypes.create_string_buffer(1)
    ours, theirs = (_Vector(ctypes.addressof(buffer), 1) for buffer in (target, source))
    libc = ctypes.CDLL(None, use_errno=True)
    pid, one, none = ctypes.c_int(os.getpid()), ctypes.c_ulong(1), ctypes.c_ulong(0)
    read = libc.process_vm_readv(pid, ctypes.byref(ours), one, ctypes.byref(theirs), one, none)
    return "" if read == 1 else os.strerror(ctypes.get_errno())


def _may_trace(proc: Path) -> bool:
    lines = dict(line.split(":\t", 1) for line in (proc / "self/status").read_text().splitlines() if ":\t" in line)
    return bool(int(lines.get("CapEff", "0"), 16) >> _CAP_SYS_PTRACE & 1)


def _line(file: Path) -> str:
    """Return a file's first line; empty if it cannot be read."""
    try:
        return file.read_text().partition("\n")[0].strip()
    except OSError:
        return ""
