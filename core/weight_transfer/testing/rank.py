"""The actor that plays one of a trainer's ranks: its senders have a part of the weights, which changes once sent."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist

from weight_transfer.config.settings import ParallelConfig
from weight_transfer.session.sender import WeightSender
from weight_transfer.testing.resources import MemoryMark
from weight_transfer.testing.shards import LAYOUTS, Places
from weight_transfer.testing.trainer import RecordingChannel

if TYPE_CHECKING:
    from weight_transfer.testing.actors import Stage
    from weight_transfer.testing.models import Weight


_AFTERWARDS = 999  # the seed of the bits that the shards get when they were sent


class Rank:
    """One sender with its shards.

    Args:
        ranks: this rank, and how many there are.
        config: of the sender.
        workers: URLs.
        layout: one of `LAYOUTS`.
        weights: of all ranks together.
        device: of the shards.
    """

    def __init__(
        self,
        stage: Stage,
        ranks: ParallelConfig,
        config: dict[str, Any],
        workers: Sequence[str],
        layout: str,
        weights: Sequence[Weight],
        device: str,
    ) -> None:
        self._source, places = LAYOUTS[layout](weights, ranks.rank, ranks.world_size, device)
        self._places = Places(weights, places)
        self._stage = stage
        self._hold_at: str | None = None
        self._holding = threading.Lock()
        timeout = float(config.get("timeout", 300))
        urls = workers if ranks.rank == 0 else ()
        self._channels = [RecordingChannel(url, timeout, self._before_call) for url in urls]
        self._sender = WeightSender(config, self._channels or workers, parallel_config=ranks)

    def send(self, seed: int, version: int) -> dict[str, Any]:
        """Give the shards the bits of a seed, send, and change them at once, as a trainer may when ``send`` returns.

        Returns:
            The report, and which of this rank's shards were changed by the update.
        """
        self._places.write(seed)
        try:
            report = self._sender.send(self._source, version=version, allow_rollback=True)
            changed = self._places.unlike(seed)
        finally:
            self._places.write(_AFTERWARDS)
        return {**attrs.asdict(report), "changed": changed}

    def hold(self, at: str | None = None) -> None:
        """Choose the call of a worker before which it says so and waits for ``release``; see `Trainer.hold`."""
        self._hold_at = at

    def _before_call(self, call: str) -> None:
        with self._holding:  # workers are called by threads
            if call == self._hold_at:
                self._hold_at = None
                self._stage.say("held")
                self._stage.await_command("release")

    def close(self) -> None:
        """Close the sender and its channels."""
        self._sender.close()
        for channel in self._channels:
            channel.close()


def main(stage: Stage, rank: int, world_size: int, store: str, threads: int | None = None) -> None:
    """Join the other ranks by the file ``store``, and serve commands; each names the sender that it is about."""
    if threads is not None:
        torch.set_num_threads(threads)
    ranks = ParallelConfig(rank=rank, world_size=world_size)
    senders: dict[str, Rank] = {}
    marks: list[MemoryMark] = []

    def open_(name: str, device: str, **spec: Any) -> None:
        if torch.device(device).type == "cuda" and not senders:
            torch.cuda.set_device(device)
            dist.all_reduce(torch.zeros(1, device=device))  # connects them, which takes longer than an update may
        senders[name] = Rank(stage, ranks, device=device, **spec)

    # Gathering from GPUs over gloo crashes in torch now and then; NCCL needs one for each rank.
    backends = "cpu:gloo,cuda:nccl" if world_size <= torch.cuda.device_count() else "gloo"
    dist.init_process_group(backends, init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        stage.say("ready")
        stage.serve(
            {
                "open": open_,
                "close": lambda name: senders.pop(name).close(),
                "send": lambda name, **what: senders[name].send(**what),
                "hold": lambda name, at: senders[name].hold(at),
                "mark": lambda name: marks.append(MemoryMark()),
                "growth": lambda name: marks[-1].growth(),
            }
        )
        for sender in senders.values():
            sender.close()
    finally:
        dist.destroy_process_group()
