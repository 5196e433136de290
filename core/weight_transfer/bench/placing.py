"""Which device each process gets, and how large a model may be there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from weight_transfer.errors import ConfigError
from weight_transfer.values.report import sized

if TYPE_CHECKING:
    from weight_transfer.bench.configurations import ModelShape

_QUICK = {"cpu": 96_000_000, "cuda": 17_000_000_000}  # bytes of a model that is not said to be larger
_KEPT_FREE = 6_000_000_000  # bytes of a GPU: contexts, kernels, what compares bits, and blocks of the limit
_COPIES = 2  # of the weights in each process: its own, and what a limit or a bucket takes


def devices(
    device: str, trainers: int, workers: int, one_each: bool, gpus: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the devices of the trainer's ranks and of the workers: on GPUs apart if there are enough.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        trainers: ranks.
        workers: number of them.
        one_each: whether each process needs a GPU of its own.
        gpus: how many this machine has.

    Raises:
        ConfigError: there are too few GPUs.
    """
    if device == "cpu":
        return ("cpu",) * trainers, ("cpu",) * workers
    needed = trainers + workers if one_each else 1
    if gpus < needed:
        each = ", one for each process," if one_each else ""
        raise ConfigError(f"it needs {needed} GPU{'s' * (needed > 1)}{each} and finds {gpus}")
    first = trainers if trainers + workers <= gpus else 0
    every = [f"cuda:{number % gpus}" for number in range(max(trainers, first + workers))]
    return tuple(every[:trainers]), tuple(every[first : first + workers])


def budget(trainers: tuple[str, ...], workers: tuple[str, ...]) -> int:
    """Return the bytes of a model that takes a few seconds, and for which these devices have room."""
    kind = "cuda" if trainers[0].startswith("cuda") else "cpu"
    return min(_QUICK[kind], room(trainers, workers))


def room(trainers: tuple[str, ...], workers: tuple[str, ...]) -> int:
    """Return the bytes of the largest model for which these devices have room, if each process holds all of it."""
    everyone = (*trainers, *workers)
    if everyone[0] == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return memory * 2 // 3 // (_COPIES * len(everyone) + len(workers))
    import torch

    busiest = max(map(everyone.count, set(everyone)))
    total = min(torch.cuda.get_device_properties(device).total_memory for device in set(everyone))
    return max(0, total - _KEPT_FREE) // (_COPIES * busiest)


def require_room(model: ModelShape, trainers: tuple[str, ...], workers: tuple[str, ...], tensor_parallel: int) -> None:
    """Raise `ConfigError` if a model does not fit, cut over the trainer's ranks and the workers as it is."""
    share = max(1 / len(trainers), 1 / tensor_parallel)
    there = room(trainers, workers)
    if model.nbytes * share > there:
        layers = f"{model.layers} of its {model.published_layers} layers"
        raise ConfigError(
            f"{model.name} with {layers} has {sized(model.nbytes)}, and this machine has room for "
            f"{sized(there / share)} in each of {len(trainers) + len(workers)} processes; give fewer --layers, or a "
            "larger --width"
        )
