"""Updates and faults for minutes, of all backends side by side: nothing may be torn, hang, or be left behind.

    python benchmarks/soak.py --seconds 600 --backend ipc nccl rdma --json soak.json

Exits with 1 if something was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

from soak_arena import Arena

from weight_transfer.testing.resources import abandoned

_OURS = ("ucx_", "torch_", "nccl-", "weight-transfer")  # what libraries beneath the backends call shared memory
_PROGRESS = 5.0  # seconds
_LAST = 180.0  # seconds in which episodes end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--backend", nargs="+", default=["ipc", "nccl", "rdma"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    before, since = abandoned(), time.monotonic()
    arenas = [Arena(backend, arguments.seed, since + arguments.seconds) for backend in arguments.backend]
    for arena in arenas:
        arena.start()
    while any(arena.is_alive() for arena in arenas):
        if time.monotonic() - since > arguments.seconds + _LAST:
            raise SystemExit("an episode does not end")
        time.sleep(_PROGRESS)
        print(f"\r{time.monotonic() - since:5.0f} s  {_line(arenas)}", end="", flush=True)
    left = {name for name in abandoned() - before if name.startswith(_OURS)}
    result = {arena.backend: _result(arena) for arena in arenas}
    result["all"] = {"shared memory left": sorted(left)}
    print("\n" + json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if left or any(any(arena.findings.values()) for arena in arenas) else 0


def _result(arena: Arena) -> dict[str, object]:
    found = {kind: len(texts) for kind, texts in arena.findings.items()}
    faults = sum(count for what, count in arena.counts.items() if what.startswith("fault: "))
    worst = {"seconds beyond a deadline, at most": round(arena.slowest, 2)}
    return {
        **found,
        "faults": faults,
        **dict(sorted(arena.counts.items())),
        **worst,
        "failures": arena.failures,
        "findings": arena.findings,
    }


def _line(arenas: list[Arena]) -> str:
    counts = sum((arena.counts for arena in arenas), Counter())
    faults = sum(count for what, count in counts.items() if what.startswith("fault: "))
    found = ", ".join(f"{sum(len(arena.findings[kind]) for arena in arenas)} {kind}" for kind in arenas[0].findings)
    return f"{counts['updates']} updates, {faults} faults, {counts['samples']} samples: {found}"


if __name__ == "__main__":
    sys.exit(main())
