"""GRPO: answers to one prompt are compared with each other, and what was better than the others is made likelier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from policy import Policy, logprobs
from task import make_prompts, rewards, solutions

if TYPE_CHECKING:
    from rollouts import Rollouts

_CLIP = 0.2  # how far a token's probability may move in one step, as a part of it
_TRUNCATION = 2.0  # of the weights by which samples of older versions count
_MINIBATCHES = 2
_RATE, _WARM_UP_RATE = 3e-4, 1e-3


@attrs.frozen
class Step:
    """What one step of the trainer has seen.

    Attributes:
        reward: part of the answers that were right.
        lag: by how many versions the samples were older than the weights, on average.
        importance: of the samples' tokens, on average, before anything was learnt from them.
        clipped: part of the tokens whose weight was cut.
    """

    reward: float
    lag: float
    importance: float
    clipped: float


class Learner:
    """The trainer's policy.

    Args:
        group: how many answers there are to each prompt; they follow each other.
    """

    def __init__(self, group: int) -> None:
        self.policy = Policy()
        self._group = group
        self._optimizer = torch.optim.AdamW(self.policy.parameters(), _RATE, weight_decay=0.0)

    def warm_up(self, steps: int, generator: torch.Generator) -> None:
        """Show it some solutions, as pretraining would, so that some of its answers are right."""
        self._optimizer.param_groups[0]["lr"] = _WARM_UP_RATE
        for _ in range(steps):
            prompts = make_prompts(128, generator)
            self._descend(-logprobs(self.policy, prompts, solutions(prompts)).mean())
        self._optimizer.param_groups[0]["lr"] = _RATE

    def step(self, samples: Rollouts, version: int) -> Step:
        """Learn from samples.

        Args:
            samples: groups of answers to one prompt each.
            version: of the weights that the policy has now.
        """
        won = rewards(samples.prompts, samples.answers)
        groups = won.view(-1, self._group)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)
        with torch.no_grad():
            now = torch.cat([logprobs(self.policy, p, a) for p, a in self._parts(samples.prompts, samples.answers)])
        importance = (now - samples.logprobs).exp()  # 1 for samples of the present version
        weights = importance.clamp(max=_TRUNCATION)
        order = torch.randperm(len(won)).chunk(_MINIBATCHES)
        for some in order:
            likely = logprobs(self.policy, samples.prompts[some], samples.answers[some])
            ratio = (likely - now[some]).exp()
            gain = torch.min(ratio * advantages[some], ratio.clamp(1 - _CLIP, 1 + _CLIP) * advantages[some])
            self._descend(-(weights[some] * gain).mean())
        lag = (version - samples.versions).float().mean()
        return Step(
            reward=won.mean().item(),
            lag=lag.item(),
            importance=importance.mean().item(),
            clipped=(importance > _TRUNCATION).float().mean().item(),
        )

    def _parts(self, *tensors: torch.Tensor) -> zip[tuple[torch.Tensor, ...]]:
        return zip(*(tensor.chunk(_MINIBATCHES) for tensor in tensors), strict=True)

    def _descend(self, loss: torch.Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self._optimizer.step()
