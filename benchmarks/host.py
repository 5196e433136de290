"""Everything that is measured on one host with several GPUs, in one call of under ten minutes.

    python benchmarks/host.py --gpus 4 --json host.json
    python benchmarks/host.py --gpus 4 --device cpu --quick     # the same commands on tiny weights, for trying

One command after another, the most important first, each in processes of its own with a time limit of its own: updates
by region (``shards.py``), from one trainer to workers on all other GPUs (``nccl.py``), and the conformance kit. Of N
GPUs, colocated layouts have N trainer ranks and N workers; those that are apart have half of the GPUs each. ``nccl``
needs a GPU for each process, so it is always apart, with half as many ranks and workers.

A command that fails or is late is ended with all its processes, and the next one begins; what does not fit into
``--seconds`` is left out. Both are said in the end, and the exit code is then 1. Figures are written after each
command; the tables in the end are those of the README, each figure with its ratio to the limit of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
from host_tables import tables

HERE = Path(__file__).resolve().parent
KITS = (
    "plugins/nccl/tests/test_conformance.py",
    "plugins/rdma/tests/test_conformance.py",
    "plugins/ipc/tests/test_conformance.py",
    "tests/conformance/test_loopback.py",
)
_LEAST = 40.0  # seconds in which a command may come to something
_GRACE = 20.0  # seconds in which a command that stops by itself says where it stands


@attrs.frozen
class Command:
    """One of those that are run.

    Attributes:
        name: for the reader, and for ``--only``.
        seconds: that it may take.
        arguments: of Python.
        stops: the option that takes the seconds after which it stops by itself.
        has_figures: whether it takes ``--json FILE``.
    """

    name: str
    seconds: float
    arguments: Sequence[str]
    stops: str | None = None
    has_figures: bool = True

    def within(self, seconds: float) -> list[str]:
        """Return the arguments for a limit in seconds."""
        return [*self.arguments, *([f"{self.stops}={seconds - _GRACE:.0f}"] if self.stops else [])]


def commands(options: argparse.Namespace) -> Iterator[Command]:
    """Yield what is to be run, the most important first."""
    yield from (regions(options, "ipc", layout, "dense") for layout in ("colocated", "apart", "hsdp"))
    yield from (one_to_all(options, case) for case in ("dense", "moe"))
    yield from (regions(options, "nccl", layout, "dense") for layout in ("apart", "hsdp"))
    yield from (regions(options, "rdma", layout, "dense") for layout in ("colocated", "apart", "hsdp"))
    yield regions(options, "ipc", "colocated", "moe")
    yield regions(options, "nccl", "apart", "moe")
    yield regions(options, "rdma", "colocated", "moe")
    yield kit(options)


def regions(options: argparse.Namespace, backend: str, layout: str, case: str) -> Command:
    """Return what measures updates by region; gathering only where it is to be compared."""
    is_apart = layout == "apart" or backend == "nccl"
    members = options.gpus // 2 if is_apart else options.gpus
    arguments = [str(HERE / "shards.py"), "--device", options.device, "--backend", backend, "--case", case]
    arguments += ["--trainers", str(members), "--workers", str(members), "--repeat", str(options.rounds)]
    arguments += ["--placement", "apart" if layout == "apart" else "colocated"]
    arguments += ["--mesh", "hsdp", "--replicas", "2"] if layout == "hsdp" else []
    arguments += ["--quick"] if options.quick else layers(options, case)
    is_first = layout == ("apart" if backend == "nccl" else "colocated")
    arguments += [] if is_first and (case == "dense" or backend == "ipc") else ["--skip-gathering"]
    return Command(f"{backend} {layout} {case}", 90 if case == "dense" else 240, arguments, stops="--life")


def one_to_all(options: argparse.Namespace, case: str) -> Command:
    """Return what measures ``nccl`` from one trainer to workers on all other GPUs."""
    arguments = [str(HERE / "nccl.py"), "--device", options.device, "--workers", str(options.gpus - 1)]
    named = {"dense": "toy", "moe": "toy-moe"}[case] if options.quick else case
    arguments += ["--case", named, "--rounds", str(options.rounds)]
    arguments += [] if options.quick else layers(options, case)
    return Command(f"nccl one-to-all {case}", 90 if case == "dense" else 150, arguments)


def layers(options: argparse.Namespace, case: str) -> list[str]:
    count = options.moe_layers if case == "moe" else options.dense_layers
    return ["--layers", str(count)] if count else []


def kit(options: argparse.Namespace) -> Command:
    """Return the conformance kit, on CUDA tensors where there are GPUs."""
    arguments = [
        "-m",
        "pytest",
        "-q",
        "-rfEs",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "-n",
        str(options.kit_processes),
        *KITS,
    ]
    return Command("kit", options.kit_seconds, arguments, stops="--session-timeout", has_figures=False)


def run(command: Command, seconds: float) -> dict[str, Any]:
    """Run a command, print what it says, and return its figures and how it ended."""
    given = command.within(seconds)
    print(f"\n== {command.name}: python {' '.join(given)}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures, output, errors = (Path(folder) / name for name in ("figures", "output", "errors"))
        arguments = [*given, *(["--json", str(figures)] if command.has_figures else [])]
        with output.open("w") as out, errors.open("w") as err:
            failed = _call(arguments, seconds, out, err)
        said, complained = (file.read_text(errors="replace") for file in (output, errors))
        print(said, end="", flush=True)
        if failed:
            print("\n".join([*complained.splitlines()[-40:], f"{command.name}: {failed}"]), flush=True)
        return {
            "name": command.name,
            "arguments": [argument.removeprefix(f"{HERE.parent}/") for argument in given],
            "failed": failed,
            "errors": complained[-20_000:] if failed else "",
            "wall_s": round(time.monotonic() - began, 1),
            "figures": json.loads(figures.read_text()) if figures.exists() else None,
            "last_line": (said.strip().splitlines() or [""])[-1],
        }


def _call(arguments: Sequence[str], seconds: float, out: Any, err: Any) -> str | None:
    """Run Python in a process group of its own, which ends with it; return what went wrong."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=HERE.parent, stdout=out, stderr=err, process_group=0)
    try:
        code = process.wait(seconds)
        return f"it failed with exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        return f"it took longer than {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=4, help="a multiple of four")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny weights and two rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dense-layers", type=int, help="of 32")
    parser.add_argument("--moe-layers", type=int, help="of 24")
    parser.add_argument("--kit-processes", type=int, default=12)
    parser.add_argument("--kit-seconds", type=float, default=150)
    parser.add_argument("--seconds", type=float, default=570, help="that all may take")
    parser.add_argument("--only", action="append", default=[], help="commands whose names contain this")
    parser.add_argument("--list", action="store_true", help="show the commands and their limits")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    if options.gpus < 4 or options.gpus % 4:
        parser.error(f"layouts are cut for a multiple of four GPUs, and --gpus is {options.gpus}")
    options.rounds = 2 if options.quick else options.rounds
    until = time.monotonic() + options.seconds
    wanted = [it for it in commands(options) if not options.only or any(only in it.name for only in options.only)]
    if options.list:
        for command in wanted:
            print(f"{command.name:22} {command.seconds:4.0f} s  python {' '.join(command.within(command.seconds))}")
        return
    found: list[dict[str, Any]] = []
    for command in wanted:
        left = until - time.monotonic()
        if left < _LEAST:
            found.append({"name": command.name, "failed": "it was left out, for the time was up", "figures": None})
        else:
            found.append(run(command, min(command.seconds, left)))
        if options.json:
            options.json.write_text(json.dumps(found, indent=2) + "\n")
    print(f"\n{tables(found)}", flush=True)
    if any(each["failed"] for each in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
