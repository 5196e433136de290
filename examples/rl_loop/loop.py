"""The loop: ask for samples, learn from those that came before, send the new weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

import weight_transfer as wt
from learner import Learner
from rollouts import Rollouts
from task import make_prompts
from weight_transfer.observers.update_report import UpdateReport

if TYPE_CHECKING:
    from pools import Pool


@attrs.frozen(kw_only=True)
class Settings:
    """What a run is made of.

    Attributes:
        backend: of weight-transfer.
        prompts: how many in a step.
        group: answers to each.
        warm_up: steps in which the policy is shown solutions, before the first version is sent.
        seed: of everything that is random.
        report: an HTML page of all updates that is written; None for none.
    """

    backend: str = "ipc"
    prompts: int = 32
    group: int = 8
    warm_up: int = 9
    seed: int = 0
    report: Path | None = None

    @property
    def config(self) -> dict[str, Any]:
        """For sender and receivers: a worker that fails is left behind until it is back."""
        return {"backend": self.backend, "timeout": 60, "init_timeout": 120, "on_worker_failure": "continue"}


class Loop:
    """A run, step by step.

    Args:
        settings: see there.
        pool: the workers; they are ended with the run.
    """

    def __init__(self, settings: Settings, pool: Pool) -> None:
        torch.manual_seed(settings.seed)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._settings, self._pool = settings, pool
        self._learner = Learner(settings.group)
        self._learner.warm_up(settings.warm_up, self._generator)
        self._report = None if settings.report is None else UpdateReport(settings.report)
        observers = () if self._report is None else (self._report,)
        self._sender = wt.WeightSender(settings.config, pool.channels, observers=observers)
        self._began = time.monotonic()
        self._sender.send(self._learner.policy, 0)
        self._ask()

    def step(self) -> dict[str, Any]:
        """Learn from the samples that were asked for, while the next are drawn, and send the new weights."""
        samples = self._pool.take()
        self._ask()  # drawn from the version before the next: the lag
        version = self._sender.version
        assert isinstance(version, int)
        learnt = self._learner.step(Rollouts.joined(samples), version) if samples else None
        report = self._sender.send(self._learner.policy, version + 1)
        return {
            "version": version + 1,
            "seconds": round(time.monotonic() - self._began, 2),
            "send_ms": round(1e3 * report.total_seconds, 1),
            "lost": len(report.lost),
            "samples": sum(len(each.answers) for each in samples),
            **({} if learnt is None else attrs.asdict(learnt)),
        }

    def close(self) -> None:
        """End sender and workers."""
        self._sender.close()
        self._pool.close()
        if self._report is not None:
            self._report.flush()

    def _ask(self) -> None:
        prompts = make_prompts(self._settings.prompts, self._generator)
        self._pool.ask(prompts.repeat_interleave(self._settings.group, dim=0))
