"""What the benchmarks of one backend show of a case of ``weight-transfer bench``: a row for each thing timed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from weight_transfer.bench.configurations import ModelShape
from weight_transfer.bench.measuring import Case, Figures, measure
from weight_transfer.errors import WeightTransferError

if TYPE_CHECKING:
    from weight_transfer.bench.architectures import Shapes

Rows = dict[str, Figures]


def model(name: str, named: Shapes) -> ModelShape:
    """Return a model of these shapes, which nobody makes smaller."""
    return ModelShape(name=name, shapes=named, layers=1, published_layers=1, width=1)


def places(device: str, apart: bool) -> tuple[str, str]:
    """Return the devices of a trainer and a worker: one GPU, or with ``apart`` two.

    Raises:
        SystemExit: there are too few GPUs.
    """
    if device == "cpu":
        return "cpu", "cpu"
    needed, gpus = 1 + apart, torch.cuda.device_count()
    if gpus < needed:
        raise SystemExit(f"this needs {needed} CUDA devices, and there are {gpus}")
    return "cuda:0", f"cuda:{needed - 1}"


def measured(case: Case) -> Figures:
    """Measure a case; tell standard error each step.

    Raises:
        SystemExit: something failed, or other bits arrived.
    """

    def tell(step: str) -> None:
        print(f"{case.model.name}: {step}", file=sys.stderr, flush=True)

    try:
        return measure(case, tell)
    except (AssertionError, WeightTransferError) as error:  # a process has died or is late, or something failed in it
        raise SystemExit(f"the benchmark has failed: {error}") from error


def rows_of(found: Figures, way: str = "send") -> Rows:
    """Return what was timed: the limit, the parts of a send and all of it, and schemes."""
    names = {"limit": "limit", "engine": "engine", "update": "update", "send": way}
    schemes: Rows = found.get("schemes", {})
    return {title: found[name] for name, title in names.items()} | schemes


def show(rows: Rows) -> None:
    """Print a line for each row: the median, its rate and its share of the limit, and the best round."""
    for name, row in rows.items():
        share = row.get("of_limit", 1.0)
        print(
            f"  {name:16} {row['median'] * 1e3:9.2f} ms {row['gbps']:8.2f} GB/s   of limit {share:6.3f}"
            f"   best {row['min'] * 1e3:9.2f} ms",
            flush=True,
        )


def show_memory(memory: Mapping[str, Mapping[str, int]], what: str = "") -> None:
    """Print a line with what each process took beyond its weights."""
    in_mib = {who: "/".join(f"{count / 2**20:.0f}" for count in counts.values()) for who, counts in memory.items()}
    sides = ", ".join(f"{who} {told}" for who, told in in_mib.items())
    print(f"  extra MiB ({'/'.join(next(iter(memory.values())))}){what}: {sides}", flush=True)


def machine(device: str) -> str:
    """Return on what was measured, in words."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else f"{torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {name}"


def as_json(rows: Rows) -> dict[str, dict[str, Any]]:
    """Return rows as the files of benchmarks have them."""
    return {
        name: {"median_s": row["median"], "GBps": row["gbps"], "of_limit": row.get("of_limit", 1.0)}
        for name, row in rows.items()
    }
