"""The trainer: next-token prediction on the corpus, with Muon for the matrices and AdamW for the rest."""

from __future__ import annotations

import math
import os

import torch

from weight_transfer.demo.corpus import corpus
from weight_transfer.demo.model import CONTEXT, make_model
from weight_transfer.demo.muon import Muon

THREADS = min(2, os.cpu_count() or 1)
"""CPU threads of the trainer."""

_BATCH = 7  # windows per step
_ADAM_RATE = 6e-3
_MUON_RATE = 2.4e-2
_WARMUP = 10  # steps


class Trainer:
    """Trains a model of its own.

    Args:
        steps: after so many steps the learning rate has come down.
    """

    def __init__(self, steps: int) -> None:
        self.model = make_model(seed=0)
        self._steps = steps
        self._random = torch.Generator().manual_seed(0)
        text = corpus()
        self._starts = len(text)
        self._text = torch.cat([text, text[: CONTEXT + 1]])  # a ring: the first words are seen as often as the others
        self._optimizers = _optimizers(self.model)
        self._schedules = [torch.optim.lr_scheduler.LambdaLR(each, self._rate) for each in self._optimizers]

    def step(self) -> float:
        """Take one step and return the loss before it, in nats per byte."""
        starts = torch.randint(self._starts, (_BATCH,), generator=self._random)
        windows = torch.stack([self._text[start : start + CONTEXT + 1] for start in starts.tolist()])
        self.model.train()
        logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        self.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        for schedule in self._schedules:
            schedule.step()
        self.model.eval()
        return float(loss.detach())

    def _rate(self, step: int) -> float:
        """Warm up linearly, then follow a cosine down to a tenth."""
        done = min(1.0, max(0, step - _WARMUP) / max(1, self._steps - _WARMUP))
        return min((step + 1) / _WARMUP, 0.55 + 0.45 * math.cos(math.pi * done))


def _optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices and AdamW for the embedding and the norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.AdamW(others, lr=_ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        Muon(matrices, lr=_MUON_RATE),
    ]
