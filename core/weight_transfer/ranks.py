"""Where this process stands among the trainer's, if torch.distributed knows it."""

from __future__ import annotations

import logging
import sys

from weight_transfer.config import ParallelConfig

logger = logging.getLogger(__name__)


def detected_ranks() -> ParallelConfig:
    """Return the rank and size of torch.distributed's default group; one process alone if nobody has initialised it.

    torch.distributed is asked only if it was imported already.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return ParallelConfig()
    found = ParallelConfig(rank=distributed.get_rank(), world_size=distributed.get_world_size())
    if found.rank:
        logger.info("rank %d of %d of torch.distributed's default group: rank 0 sends", found.rank, found.world_size)
    return found
