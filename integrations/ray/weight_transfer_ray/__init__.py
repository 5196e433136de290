"""Ray actors as the workers, and as the ranks of the trainer, of weight-transfer.

Importing this package imports nothing else; each public name comes from its module when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weight_transfer_ray.channel import RayChannel
    from weight_transfer_ray.place import Place
    from weight_transfer_ray.trainer import TrainerGroup
    from weight_transfer_ray.worker import RayWorker, ray_worker

__version__ = "0.1.0"

__all__ = ["Place", "RayChannel", "RayWorker", "TrainerGroup", "ray_worker"]

_HOME = {
    "Place": "place",
    "RayChannel": "channel",
    "RayWorker": "worker",
    "TrainerGroup": "trainer",
    "ray_worker": "worker",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'weight_transfer_ray' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"weight_transfer_ray.{_HOME[name]}"), name)
