"""Parameters that FSDP2 holds unsharded for the moment, after a forward pass for instance.

A module then has whole copies in the place of its shards. The optimiser updates the shards, so that a copy is stale
after the next step; it is never what is to be read.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from weight_transfer.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


class Resharding:
    """Brings the shards back into a module.

    Args:
        module: is looked through once; make a new one if modules were added.
    """

    def __init__(self, module: nn.Module) -> None:
        self._wrapped: list[tuple[str, Any]] = []
        self._managed: list[nn.Module] = []
        kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
        if kind is None:
            return
        paths: set[str] = set()
        for path, part in module.named_modules():
            if isinstance(part, kind):
                paths.add(path)
                self._wrapped.append((path, part))
            elif (
                getattr(part, "_is_fsdp_managed_module", False)
                and part._parameters  # noqa: SLF001  (seen, not touched)
                and paths.isdisjoint(_ancestors(path))
            ):
                self._managed.append(part)

    @property
    def needed(self) -> bool:
        """Whether FSDP2 has anything to do with the module."""
        return bool(self._wrapped or self._managed)

    @property
    def is_brief(self) -> bool:
        """Whether `reshard` takes no time to speak of if the module holds its shards."""
        return not self._managed

    def reshard(self) -> None:
        """Have each module hold its shards again; those that do are left alone.

        Raises:
            ConfigError: a module is in the middle of its forward pass.
        """
        for path, part in self._wrapped:
            part.reshard()
            if _is_unsharded(part):
                raise ConfigError(
                    f"FSDP2 holds the parameters of {path or type(part).__name__!r} unsharded, because its forward "
                    "pass is not over; send before or after it (after one that failed, call reset_iter_state() first)."
                )
        for part in self._managed:  # by a module above, which is not ours: this is how FSDP2 hears of it
            part.state_dict(keep_vars=True)


def _ancestors(path: str) -> list[str]:
    """Return the paths of what is above a module, the root's first."""
    parts = path.split(".")
    return ["", *(".".join(parts[:count]) for count in range(1, len(parts)))]


def _is_unsharded(part: Any) -> bool:
    """Whether FSDP2 has kept copies in a module that was to be resharded; torch has no public way to ask."""
    state = part._get_fsdp_state()  # noqa: SLF001
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.12
        groups = [getattr(state, "_fsdp_param_group", None)]
    return any(group is not None and not group.is_sharded for group in groups)
