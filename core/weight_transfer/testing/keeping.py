"""What workers keep of the weights in `weight_transfer.testing.shards`, and in what memory: much of it is strided."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from weight_transfer.model.manifest import torch_dtype
from weight_transfer.model.regions import Region
from weight_transfer.model.shards import Target
from weight_transfer.testing.models import Model, Weight, raw_bytes
from weight_transfer.testing.shards import ALONE, Place, Places

WHOLE, ROWS, COLUMNS, EXPERTS = KINDS = ("whole", "rows", "columns", "experts")
"""All of each weight in a plain model; part of it by the first dimension; by the last one; whole experts, and all of
the others."""

_FUSED = {"qkv": (0, ("q", "k", "v")), "gate_up": (-1, ("gate", "up"))}
_MARGIN = 3  # elements


def regions_of(kind: str, weights: Sequence[Weight], worker: int, count: int) -> dict[str, list[Region]]:
    """Return the regions that one of several workers keeps, by name.

    Args:
        kind: one of `KINDS`.
        weights: of which.
        worker: its number.
        count: how many there are.
    """
    kept = {}
    for name, _, shape, _ in weights:
        if kind == EXPERTS and name.startswith("expert"):
            if len(shape) == 2:
                kept[name] = [Region.whole(shape)] if int(name.removeprefix("expert")) % count == worker else []
            else:
                kept[name] = [Region((own, 0, 0), (1, *shape[1:])) for own in range(worker, shape[0], count)]
        elif kind in (ROWS, COLUMNS) and shape:
            kept[name] = [Region.split(shape, 0 if kind == ROWS else -1, worker, count)]
        else:
            kept[name] = [Region.whole(shape)]
    return kept


class Kept:
    """A worker's memory.

    Rows of one tensor are the targets of three weights, and columns of another one those of two. The others lie in
    tensors of their own, in the order of the weight or turned, or amid a larger tensor, of which the rest must stay as
    it is.

    Args:
        kind: one of `KINDS`.
        weights: that are sent.
        worker: its number.
        count: how many there are.
        device: a torch device.
        alone: whether `ALONE`, which is among the weights, has no target.

    Attributes:
        model: what the receiver is given.
        needs: the targets; None for a plain model, which is known by its names.
        nbytes: bytes of all regions that it keeps.
    """

    def __init__(
        self, kind: str, weights: Sequence[Weight], worker: int, count: int, device: str, alone: bool = False
    ) -> None:
        self._weights = weights
        weights = [each for each in weights if not alone or each[0] != ALONE[0]]
        kept = regions_of(kind, weights, worker, count)
        self._margins: list[torch.Tensor] = []
        self._own: list[tuple[str, Region, torch.Tensor]] = []
        self.needs: dict[str, list[Target]] | None = None
        if kind == WHOLE:
            self.model: nn.Module = Model(self._weights, 0, device)
            state = self.model.state_dict(keep_vars=True)
            self._own = [(name, region, state[name]) for name, some in kept.items() for region in some]
        else:
            self.model = nn.Module()
            self._fuse(weights, kept, device)
            self._scatter(weights, kept, device)
            self.needs = {name: [] for name in kept}
            for name, region, tensor in self._own:
                self.needs[name].append(Target(region, tensor.detach()))
        self.nbytes = sum(region.volume * tensor.element_size() for _, region, tensor in self._own)
        if alone:
            if ALONE[0] not in self.model.state_dict():
                self.model.register_buffer(ALONE[0], _new(ALONE[1], ALONE[2], device))
            self._own.append((ALONE[0], Region.whole(ALONE[2]), self.model.state_dict(keep_vars=True)[ALONE[0]]))
        self._places = Places(self._weights, [Place(*own) for own in self._own])

    def unlike(self, seed: int) -> list[str]:
        """Return what has other bits than those of a seed, and what was written beside the targets."""
        strays = ["memory beside the targets"] if any(any(raw_bytes(margin)) for margin in self._margins) else []
        return [*self._places.unlike(seed), *strays]

    def _fuse(self, weights: Sequence[Weight], kept: dict[str, list[Region]], device: str) -> None:
        dtypes = {name: dtype for name, dtype, _, _ in weights}
        for fused, (dim, names) in _FUSED.items():
            if not kept.keys() >= set(names):
                continue
            regions = [kept[name][0] for name in names]
            shape = list(regions[0].shape)
            shape[dim] = sum(region.shape[dim] for region in regions)
            tensor = _new(dtypes[names[0]], shape, device)
            self.model.register_buffer(fused, tensor)
            parts = tensor.split([region.shape[dim] for region in regions], dim)
            self._own += zip(names, regions, parts, strict=True)

    def _scatter(self, weights: Sequence[Weight], kept: dict[str, list[Region]], device: str) -> None:
        fused = {name for _, names in _FUSED.values() for name in names}
        ways = itertools.cycle(("own", "amid", "turned"))
        for name, dtype, _, _ in weights:
            for number, region in enumerate(kept[name] if name not in fused else ()):
                way = next(ways) if region.shape else "own"
                if way == "amid":
                    room = _new(dtype, [*region.shape[:-1], region.shape[-1] + 2 * _MARGIN], device)
                    tensor = room[..., _MARGIN : _MARGIN + region.shape[-1]]
                    self._margins += [room[..., :_MARGIN], room[..., _MARGIN + region.shape[-1] :]]
                elif way == "turned":
                    tensor = _new(dtype, region.shape[::-1], device).permute(tuple(reversed(range(len(region.shape)))))
                else:
                    tensor = _new(dtype, region.shape, device)
                    self.model.register_buffer(f"own_{name}_{number}", tensor)
                self._own.append((name, region, tensor))


def _new(dtype: str, shape: Sequence[int], device: str) -> torch.Tensor:
    return torch.zeros(tuple(shape), dtype=torch.uint8, device=device).to(torch_dtype(dtype))
