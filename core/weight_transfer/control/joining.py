"""What the workers behind one control channel answered, as one answer. All take answers in the order of the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weight_transfer.model.dtypes import joint_answer
from weight_transfer.values.report import WorkerReport

if TYPE_CHECKING:
    from weight_transfer.values.events import Version


def joint_init(answers: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the answer to ``init_weight_transfer_engine``; None if a worker does not know its dtypes."""
    return joint_answer(answers)


def joint_needs(answers: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Return the answer to ``weight_needs``; a worker that answered None needs all weights whole."""
    return {"needs": [own for answer in answers for own in (answer["needs"] if answer is not None else [None])]}


def joint_report(answers: Sequence[object]) -> dict[str, Any]:
    """Return the answer to ``update_weights``."""
    return WorkerReport.joint([WorkerReport.of(answer) for answer in answers]).to_dict()


def joint_status(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the answer to ``status``: the first worker's, but a version is None unless all have the same one."""
    states = {member.get("state") for member in members}
    targets = dict.fromkeys(target for member in members for target in member.get("versions") or {})
    return {
        "state": states.pop() if len(states) == 1 else "mixed",
        "version": _common([member.get("version") for member in members]),
        "versions": {
            target: _common([(member.get("versions") or {}).get(target) for member in members]) for target in targets
        },
        "backend": members[0].get("backend"),
        "workers": len(members),
        "error": next((member["error"] for member in members if member.get("error")), None),
        "id": ",".join(str(member["id"]) for member in members if member.get("id")),
    }


def _common(versions: list[Version | None]) -> Version | None:
    return versions[0] if len(set(versions)) == 1 else None
