"""A few threads for what leaves the interpreter's lock alone, such as copies: they take parts one after another.

Nobody waits for a thread that never ran, as OpenMP's threads do where trainer and workers share cores.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

_THREADS = 8  # at most; memory has no more to give
_Part = TypeVar("_Part")

_pool: list[ThreadPoolExecutor] = []
os.register_at_fork(after_in_child=_pool.clear)


def share_out(parts: Sequence[_Part], work: Callable[[_Part], object]) -> None:
    """Do ``work`` on each part, on this thread and on as many others as torch may use here, if they are free.

    After an error no further part is begun, and none is under way.
    """
    left = iter(parts)

    def take() -> None:
        for part in left:
            work(part)

    count = min(torch.get_num_threads(), _THREADS, len(parts) // 2)
    helpers = [_threads().submit(take) for _ in range(count - 1)]
    try:
        take()
    finally:
        deque(left, maxlen=0)
        begun = [helper for helper in helpers if not helper.cancel()]
        wait(begun)
    for helper in begun:
        helper.result()


def _threads() -> ThreadPoolExecutor:
    if not _pool:
        _pool.append(ThreadPoolExecutor(_THREADS, thread_name_prefix="weight-transfer copies"))
    return _pool[0]
