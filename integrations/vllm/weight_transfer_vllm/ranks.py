"""What the ranks of one vLLM replica tell each other about a call: whether all of them have done it."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.parallel_state import get_pp_group, get_tp_group


def gathered(mine: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
    """Return what all ranks of this replica say, in their order: tensor parallel ranks within pipeline stages.

    Args:
        mine: what this rank says, JSON-safe.
        timeout: seconds to wait for the others.

    Raises:
        RuntimeError: a rank did not say anything in time, or has died.
    """
    said = [mine]
    for group in (get_tp_group(), get_pp_group()):
        if group.world_size > 1:
            said = [one for some in _exchange(said, group.cpu_group, group.world_size, timeout) for one in some]
    return said


def _exchange(mine: list[dict[str, Any]], group: Any, size: int, timeout: float) -> list[list[dict[str, Any]]]:
    """Gather JSON texts over a process group, in which nothing is pickled."""
    text = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
    lengths = _all([torch.zeros(1, dtype=torch.int64) for _ in range(size)], torch.tensor([len(text)]), group, timeout)
    longest = max(int(length) for length in lengths)
    padded = torch.nn.functional.pad(text, (0, longest - len(text)))
    texts = _all([torch.zeros(longest, dtype=torch.uint8) for _ in range(size)], padded, group, timeout)
    return [json.loads(bytes(one[: int(length)].tolist())) for one, length in zip(texts, lengths, strict=True)]


def _all(found: list[torch.Tensor], mine: torch.Tensor, group: Any, timeout: float) -> list[torch.Tensor]:
    dist.all_gather(found, mine, group=group, async_op=True).wait(timedelta(seconds=timeout))
    return found
