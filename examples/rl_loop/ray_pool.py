"""The workers as actors of a Ray cluster, and the trainer as another. Ray restarts a worker whose node is gone."""

from __future__ import annotations

from typing import Any

import ray
import torch
from ray.exceptions import RayActorError

import weight_transfer as wt
from loop import Loop, Settings
from policy import Policy
from rollouts import Rollouts, draw
from weight_transfer_ray import Place, RayChannel, RayWorker, ray_worker

_PATIENCE = 120.0  # seconds that samples may take


class Worker(RayWorker):
    """Serves a policy."""

    def __init__(self, config: dict[str, Any], seed: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self.policy = Policy()
        self.receive_weights(config, self.policy)

    def draw(self, prompts: torch.Tensor) -> Rollouts | None:
        """Answer prompts; None if this worker has only just come up, and has no weights yet."""
        assert self.receiver is not None
        try:
            return draw(self.receiver, self.policy, prompts)
        except wt.TransferTimeoutError:
            return None

    def node(self) -> str:
        """Return the id of the node that it runs on."""
        node: str = ray.get_runtime_context().get_node_id()
        return node


WorkerActor = ray_worker(num_cpus=1, max_restarts=-1, scheduling_strategy="SPREAD")(Worker)


class Actors:
    """Worker actors; a `Pool`."""

    def __init__(self, workers: list[Any]) -> None:
        self._workers = workers
        self._asked: list[Any] = []
        self.channels: list[Any] = [RayChannel(each, name=f"worker {n}") for n, each in enumerate(workers)]

    def ask(self, prompts: torch.Tensor) -> None:
        parts = prompts.chunk(len(self._workers))
        self._asked = [worker.draw.remote(part) for worker, part in zip(self._workers, parts, strict=True)]

    def take(self) -> list[Rollouts]:
        """Return what was drawn; a worker that has died meanwhile is left out."""
        answers = []
        for asked in self._asked:
            try:
                answers.append(ray.get(asked, timeout=_PATIENCE))
            except RayActorError as error:
                print(f"a worker is gone, the run goes on: {type(error).__name__}", flush=True)
        return [answer for answer in answers if answer is not None]

    def close(self) -> None:
        """The cluster ends them."""


class Trainer:
    """The loop as the one rank of a `TrainerGroup`."""

    def __init__(self, place: Place, settings: Settings, workers: list[Any]) -> None:
        torch.set_num_threads(1)
        self._loop = Loop(settings, Actors(workers))

    def step(self) -> dict[str, Any]:
        """Go one step on."""
        return self._loop.step()

    def close(self) -> None:
        """Let go of the workers."""
        self._loop.close()
