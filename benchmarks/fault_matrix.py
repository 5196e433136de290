"""Who dies or stands still, when, and how soon the other side knows, beside the deadline.

    python benchmarks/fault_matrix.py --backend ipc nccl rdma --json faults.json

Exits with 1 if somebody knows more than a second after the deadline, or if the next update is not good.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import attrs
from fault_cases import SIGNALS, Case, Outcome, cases, play

_HEAD = (
    "| backend | victim | fault | phase | deadline (s) | known after (s) | next update (s) | what the other side says |"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", nargs="+", default=["ipc", "nccl", "rdma"])
    parser.add_argument("--fault", nargs="+", default=["kill", "stop"], choices=SIGNALS)
    parser.add_argument("--timeout", type=float, default=3.0)
    parser.add_argument("--init-timeout", type=float, default=10.0)
    parser.add_argument("--only", default="", help="of the cases whose names contain this")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(_HEAD + "\n|" + "---|" * 8)
    outcomes, failed = [], 0
    for case in cases(arguments.backend, arguments.fault, arguments.timeout, arguments.init_timeout):
        if arguments.only not in str(case):
            continue
        try:
            outcome = play(case)
        except Exception as error:  # noqa: BLE001  (shown, and the next case is played)
            failed += 1
            print(_row(case, "", "", f"**{error}**"), flush=True)
            continue
        outcomes.append(outcome)
        print(_row(case, _known(outcome), f"{outcome.recovery:.1f}", outcome.error[:100]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([attrs.asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    late = sum(outcome.is_late for outcome in outcomes)
    print(f"\n{len(outcomes)} cases, {late} late, {failed} failed")
    return 1 if late or failed else 0


def _known(outcome: Outcome) -> str:
    if outcome.seconds is None:
        return ""
    return f"**{outcome.seconds:.1f}**" if outcome.is_late else f"{outcome.seconds:.1f}"


def _row(case: Case, known: str, recovery: str, text: str) -> str:
    victim = f"{case.victim}, replaced at once" if case.takeover else case.victim
    cells = (case.backend, victim, case.fault, case.phase, f"{case.deadline:g}", known, recovery, text)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
