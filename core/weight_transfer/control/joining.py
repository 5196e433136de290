"""What the workers behind one control channel answered, as one answer. All take answers in the order of the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.model.dtypes import joint_answer
from weight_transfer.values.lease import Lease
from weight_transfer.values.report import WorkerReport

if TYPE_CHECKING:
    from weight_transfer.values.events import Version


def joint_init(answers: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the answer to ``init_weight_transfer_engine``: what all workers say; None if that is nothing."""
    schemes = [answer.get("digests") if isinstance(answer, Mapping) else None for answer in answers]
    digests = {"digests": schemes[0]} if schemes[0] is not None and schemes.count(schemes[0]) == len(schemes) else {}
    return {**digests, **(joint_answer(answers) or {})} or None


def joint_needs(answers: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Return the answer to ``weight_needs``; a worker that answered None needs all weights whole."""
    return {"needs": [own for answer in answers for own in (answer["needs"] if answer is not None else [None])]}


def joint_report(answers: Sequence[object]) -> dict[str, Any]:
    """Return the answer to ``update_weights``."""
    return WorkerReport.joint([WorkerReport.of(answer) for answer in answers]).to_dict()


def joint_status(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the answer to ``status``: the first worker's, but a version is None unless all have the same one.

    It was published when the last of them had it.
    """
    published = [member["published"] for member in members if member.get("published") is not None]
    states = {member.get("state") for member in members}
    return {
        "state": states.pop() if len(states) == 1 else "mixed",
        "version": _common([member.get("version") for member in members]),
        "versions": _by_target(members, "versions", _common),
        "digests": _joint_digests([member.get("digests") or {} for member in members]),
        "published": max(published) if len(published) == len(members) else None,
        "backend": members[0].get("backend"),
        "device": members[0].get("device"),
        "workers": len(members),
        "progress": _joint_progress([member["progress"] for member in members if member.get("progress")]),
        "error": next((member["error"] for member in members if member.get("error")), None),
        "id": ",".join(str(member["id"]) for member in members if member.get("id")),
        **_standing(members),
    }


def _joint_progress(told: Sequence[dict[str, int]]) -> dict[str, int] | None:
    return {key: sum(own[key] for own in told) for key in ("done", "total")} if told else None


def _joint_digests(members: Sequence[dict[str, str]]) -> dict[str, str]:
    """Return the digests that all workers have; those that keep different parts have none in common."""
    return {target: digest for target, digest in members[0].items() if all(m.get(target) == digest for m in members)}


def _standing(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return whose the workers are, and where they stand between two commits, if all tell that."""
    if not all("lease" in member for member in members):
        return {}
    newest = max((lease for lease in map(Lease.told, members) if lease is not None), default=None)
    return {
        "lease": None if newest is None else attrs.asdict(newest),
        "committed": _by_target(members, "committed", _latest),
        "updates": _by_target(members, "updates", _common),
        "prepared": next((member["prepared"] for member in members if member.get("prepared")), None),
    }


def _by_target(members: Sequence[dict[str, Any]], key: str, join: Callable[[list[Any]], Any]) -> dict[str, Any]:
    tables = [member.get(key) or {} for member in members]
    targets = dict.fromkeys(target for table in tables for target in table)
    return {target: join([table.get(target) for table in tables]) for target in targets}


def _latest(versions: list[Version | None]) -> Version | None:
    numbers = [version for version in versions if isinstance(version, int)]
    return max(numbers) if numbers else _common(versions)


def _common(versions: list[Version | None]) -> Version | None:
    return versions[0] if len(set(versions)) == 1 else None
