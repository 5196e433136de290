"""The soak's actor that plays one of a trainer's ranks."""

from __future__ import annotations

import builtins
import faulthandler
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from processes import everything_held
from soak_clock import Clock
from soak_scene import Scene, seed_of

import weight_transfer as wt
from weight_transfer.testing.models import PassingSource
from weight_transfer.testing.resources import MemoryMark, threads
from weight_transfer.testing.shards import LAYOUTS, Places

if TYPE_CHECKING:
    from weight_transfer.testing.actors import Stage


class Rank:
    """One sender with its shards.

    Args:
        scene: the episode's.
        workers: URLs.
        rank: this one's.
    """

    def __init__(self, scene: Scene, workers: Sequence[str], rank: int) -> None:
        self._salt = scene.salt
        self._fail_at: int | None = None
        layout = "plain" if scene.layout == "passing" else scene.layout
        self._source, places = LAYOUTS[layout](scene.weights, rank, scene.ranks, "cpu")
        self._places = Places(scene.weights, places)
        if scene.layout == "passing":
            module = self._source.module  # type: ignore[attr-defined]  # that of a module
            self._source = PassingSource(module, self._before_each)
        ranks = wt.ParallelConfig(rank=rank, world_size=scene.ranks) if scene.ranks > 1 else None
        self._clock = Clock()
        self.sender = wt.WeightSender(scene.config, workers, parallel_config=ranks)

    def send(self, version: int, fail_at: int | None = None) -> dict[str, Any]:
        """Send a version, and change the weights at once; return how that went, and the seconds that it took.

        Args:
            version: to send.
            fail_at: index of the weight at which the source fails; None for none.
        """
        self._fail_at = fail_at
        self._places.write(seed_of(self._salt, version))
        joins = not all(peer.joined for peer in self.sender._fleet.peers)  # noqa: SLF001  (joining has its own deadline)
        since = self._clock.now()
        outcome: dict[str, Any] = {"workers": [], "lost": [], "error": None}
        try:
            report = self.sender.send(self._source, version=version)
            outcome |= {"workers": report.workers, "lost": report.lost}
        except wt.WeightTransferError as error:
            outcome["error"] = f"{type(error).__name__}: {error}"
        outcome |= {"seconds": self._clock.now() - since, "joins": joins}
        self._places.write(seed_of(self._salt, 0))
        return outcome

    def _before_each(self, index: int) -> None:
        if index == self._fail_at:
            raise builtins.RuntimeError("the source was told to fail")


def main(stage: Stage, scene: dict[str, Any], workers: Sequence[str], rank: int, store: str, mark: str) -> None:
    """Serve commands."""
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1)
    os.environ["SOAK_MARK"] = mark
    played = Scene(**scene)
    marks: list[MemoryMark] = []
    if played.ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=played.ranks)
    trainer = Rank(played, workers, rank)
    try:
        stage.say(os.getpid())
        stage.serve(
            {
                "send": trainer.send,
                "held": everything_held,
                "threads": lambda: list(threads().items()),
                "mark": lambda: marks.append(MemoryMark()),
                "growth": lambda: marks[-1].growth()["private"],
            }
        )
    finally:
        trainer.sender.close()
        if played.ranks > 1:
            with suppress(RuntimeError):  # the others were killed
                dist.destroy_process_group()
