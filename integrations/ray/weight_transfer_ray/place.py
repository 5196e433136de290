"""What a rank of a `TrainerGroup` is told: who it is, and where the ranks meet."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import attrs
import ray

from weight_transfer import ParallelConfig, WeightSender, load_config
from weight_transfer_ray.channel import RayChannel


@attrs.frozen(kw_only=True)
class Place:
    """The place of one actor among the trainer's ranks; the first argument of its constructor.

    Attributes:
        rank: of this actor.
        world_size: number of ranks.
        address: of rank 0's node.
        port: where rank 0's sender listens for the others.
        group_port: where rank 0 opens torch.distributed's store.
        token: by which the ranks' senders know each other; drawn for the group, and known to its actors alone.
    """

    rank: int
    world_size: int
    address: str
    port: int
    group_port: int
    token: str = attrs.field(repr=False)

    @property
    def parallel_config(self) -> ParallelConfig:
        """For a sender of one's own."""
        return ParallelConfig(rank=self.rank, world_size=self.world_size)

    def sender(self, config: Any, workers: Sequence[Any], **options: Any) -> WeightSender:
        """Return this rank's sender: all ranks make one, and call its ``send``.

        Args:
            config: anything that ``load_config`` takes; rendezvous and token are the group's if it names none.
            workers: handles of `RayWorker` actors, each a worker of its own, and whatever `WeightSender` takes.
            options: further arguments of `WeightSender`.
        """
        settings = load_config(config)
        if self.world_size > 1 and settings.rendezvous is None:
            meeting = f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"
            settings = attrs.evolve(settings, rendezvous=meeting, token=settings.token or self.token)
        channels = [RayChannel(each) if isinstance(each, ray.actor.ActorHandle) else each for each in workers]
        return WeightSender(settings, channels, parallel_config=self.parallel_config, **options)

    def init_process_group(self, backend: str, timeout: float = 60.0) -> None:
        """Initialise torch.distributed's default group with all ranks.

        Args:
            backend: torch's, such as ``"nccl"`` or ``"gloo"``.
            timeout: seconds that meeting, and each collective, may take.
        """
        import torch.distributed as dist

        host = f"[{self.address}]" if ":" in self.address else self.address
        dist.init_process_group(
            backend,
            init_method=f"tcp://{host}:{self.group_port}",
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=timeout),
        )
