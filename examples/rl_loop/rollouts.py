"""Samples, and the version of the weights that each was drawn from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from policy import sample

if TYPE_CHECKING:
    import weight_transfer as wt
    from policy import Policy

_BATCH = 64  # samples that are drawn from one version
_PATIENCE = 2.0  # seconds that a worker which has just come up waits for its first weights


@attrs.frozen
class Rollouts:
    """Some prompts, and an answer to each.

    Attributes:
        prompts: int64 of shape ``[count, DIGITS + 1]``.
        answers: int64 of shape ``[count, DIGITS]``.
        logprobs: of the answers' tokens, by the weights that they were drawn from; float32, the same shape.
        versions: of these weights; int64 of shape ``[count]``.
    """

    prompts: torch.Tensor
    answers: torch.Tensor
    logprobs: torch.Tensor
    versions: torch.Tensor

    def to_lists(self) -> dict[str, Any]:
        """Return what JSON takes; `from_lists` gives it back, each float as it was."""
        return {name: value.tolist() for name, value in attrs.asdict(self, recurse=False).items()}

    @classmethod
    def from_lists(cls, lists: dict[str, Any]) -> Rollouts:
        return cls(**{name: torch.tensor(value) for name, value in lists.items()})

    @classmethod
    def joined(cls, parts: list[Rollouts]) -> Rollouts:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in attrs.fields_dict(cls)))


def draw(receiver: wt.WeightReceiver, policy: Policy, prompts: torch.Tensor) -> Rollouts:
    """Answer prompts, a batch at a time: between two of them new weights may come.

    Raises:
        TransferTimeoutError: this worker has no weights yet.
    """
    parts = []
    for batch in prompts.split(_BATCH):
        with receiver.serving(_PATIENCE) as version:
            answers, likely = sample(policy, batch)
        parts.append(Rollouts(batch, answers, likely, torch.full((len(batch),), int(version))))
    return Rollouts.joined(parts)
