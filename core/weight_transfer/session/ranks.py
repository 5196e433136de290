"""Where this process stands among the trainer's, if nobody has said so."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from weight_transfer.config.settings import ParallelConfig

if TYPE_CHECKING:
    from weight_transfer.model.source import WeightSource

ALONE = ParallelConfig()
"""One process that sends by itself."""


def detected_ranks() -> ParallelConfig:
    """Return the rank and size of torch.distributed's default group; one process alone if nobody has initialised it.

    torch.distributed is asked only if it was imported already.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return ALONE
    return ParallelConfig(rank=distributed.get_rank(), world_size=distributed.get_world_size())


def ranks_of(source: WeightSource) -> ParallelConfig:
    """Return the place of this process among those that gather the weights of a source.

    It is that in torch.distributed's default group. A process that has all of its weights is alone in that: nobody else
    would send them to its workers.
    """
    if not source.collective and source.whole:
        return ALONE
    return detected_ranks()
