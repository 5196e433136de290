"""Whether a model still has its weights where targets were declared: views do not follow when a weight is moved."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch

from weight_transfer.model.naming import joined
from weight_transfer.model.overlap import Memory
from weight_transfer.model.state import local_part
from weight_transfer.model.targets import tensors_of
from weight_transfer.model.whereabouts import Whereabouts

if TYPE_CHECKING:
    from torch import nn

    from weight_transfer.model.shards import Target


class Anchors:
    """Declared targets, and in which of a model's tensors each lies.

    Args:
        model: the module.
        targets: by name.

    Attributes:
        targets: by name.
        devices: those of the model's tensors.
        owners: for each target its name, and the tensor of the model in whose memory it lies, by name; None if it lies
            elsewhere.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Sequence[Target]]) -> None:
        self.targets = targets
        slots = dict(_slots(model))
        self.devices = {slot.tensor.device for slot in slots.values()} or {torch.device("cpu")}
        memory = Memory({name: slot.tensor for name, slot in slots.items()})
        self.owners = [(name, memory.owner(target.tensor)) for name, some in targets.items() for target in some]
        found = [slots[owner] for owner in dict.fromkeys(owner for _, owner in self.owners) if owner is not None]
        self._tables, self._names = [slot.table for slot in found], [slot.name for slot in found]
        self._held = [slot.held for slot in found]
        self._sharded = [slot for slot in found if slot.tensor is not slot.held]
        self._whereabouts = Whereabouts((*(slot.tensor for slot in found), *tensors_of(targets)))

    @property
    def hold(self) -> bool:
        """Whether the model's tensors and the targets lie where they lay."""
        return (
            all(map(operator.is_, map(dict.get, self._tables, self._names), self._held))
            and all(local_part(slot.held) is slot.tensor for slot in self._sharded)
            and self._whereabouts.unchanged
        )

    def lost(self, now: Anchors) -> str | None:
        """Return the name of a target that no longer lies in the tensor of the model in which it lay, if there is one.

        Args:
            now: of the same targets.
        """
        both = zip(self.owners, now.owners, strict=True)
        return next((name for (name, owner), (_, other) in both if owner is not None and owner != other), None)


@attrs.frozen(eq=False)
class _Slot:
    """A place in a module's table of parameters or buffers, what it held, and the part of that on this rank."""

    table: dict[str, Any]
    name: str
    held: torch.Tensor
    tensor: torch.Tensor


def _slots(model: nn.Module) -> Iterator[tuple[str, _Slot]]:
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):  # noqa: SLF001  (seen, not touched)
            for name, held in table.items():
                if held is not None:
                    yield joined(path, name), _Slot(table, name, held, local_part(held))
