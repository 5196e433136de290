"""One manifest for all ranks of a trainer, each of which may list only the weights that it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weight_transfer.errors import ManifestMismatchError
from weight_transfer.model.manifest import Manifest, ParamMeta

if TYPE_CHECKING:
    from collections.abc import Sequence


def merged_manifest(manifests: Sequence[Manifest]) -> Manifest:
    """Return the weights that at least one rank lists, in the order in which they first appear, rank 0's first.

    Args:
        manifests: each rank's, in order. Those of ranks that list the same may be one object, which saves time.

    Returns:
        Rank 0's own, if all are alike.

    Raises:
        ManifestMismatchError: two ranks disagree about a weight's dtype or shape, about which weight a further name
            stands for, or about whether these are all weights; it names both ranks.
    """
    first = manifests[0]
    different = _different(manifests)
    if len(different) == 1:
        return first
    params: dict[str, tuple[int, ParamMeta]] = {}
    aliases: dict[str, tuple[int, str]] = {}
    for rank, manifest in different:
        if manifest.partial != first.partial:
            raise _disagreement(rank, "sends", 0, _extent(manifest), _extent(first))
        for param in manifest.params:
            known, other = params.setdefault(param.name, (rank, param))
            if not other.is_like(param):
                raise _disagreement(rank, f"has {param.name!r}:", known, _kind(param), _kind(other))
        for alias, name in manifest.aliases.items():
            known, target = aliases.setdefault(alias, (rank, name))
            if target != name:
                raise _disagreement(rank, f"has {alias!r} as", known, _tied(name), _tied(target))
    for alias, (rank, name) in aliases.items():
        if alias in params:
            raise _disagreement(rank, f"has {alias!r} as", params[alias][0], _tied(name), "a weight of its own")
    return Manifest(
        (param for _, param in params.values()),
        {alias: name for alias, (_, name) in aliases.items()},
        partial=first.partial,
    )


def _different(manifests: Sequence[Manifest]) -> list[tuple[int, Manifest]]:
    """Return each different manifest once, with the first rank that has it."""
    objects: dict[int, int] = {}
    for rank, manifest in enumerate(manifests):
        objects.setdefault(id(manifest), rank)
    if len(objects) == 1:
        return [(0, manifests[0])]
    digests: dict[str, int] = {}
    for rank in objects.values():
        digests.setdefault(manifests[rank].digest, rank)
    return [(rank, manifests[rank]) for rank in digests.values()]


def _disagreement(rank: int, has: str, other: int, mine: str, theirs: str) -> ManifestMismatchError:
    return ManifestMismatchError(
        f"Trainer rank {rank} {has} {mine}, rank {other} {theirs}; all ranks must have the same model."
    )


def _kind(param: ParamMeta) -> str:
    return f"{param.dtype} {list(param.shape)}"


def _tied(name: str) -> str:
    return f"a further name of {name!r}"


def _extent(manifest: Manifest) -> str:
    return "some of the weights" if manifest.partial else "all weights"
