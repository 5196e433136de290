"""Draws tokens inside of transformers' continuous batching: each request with its own generator, and what it drew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Generator, Tensor
from transformers import LogitsProcessor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

_UNLIKELY = -9999.0  # OpenAI's word for minus infinity, which JSON cannot say


@attrs.frozen(kw_only=True)
class Chosen:
    """A token that was chosen.

    Attributes:
        token: its id.
        logprob: natural logarithm of the probability that the model gave it: of the logits as they are, before
            temperature, top_k and top_p.
        top: ids and log-probabilities of the most likely tokens, the most likely one first.
    """

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]


@attrs.frozen(kw_only=True, eq=False)
class Watched:
    """A continuation whose tokens are drawn by `Drawing`.

    Attributes:
        top: how many of the most likely tokens are noted for each that is chosen.
        generator: what its tokens are drawn with, on the device of the model; None for torch's own.
        chosen: its tokens so far.
    """

    top: int
    generator: Generator | None
    chosen: list[Chosen] = attrs.field(factory=list, init=False)


class Drawing(ContinuousBatchingLogitsProcessor):
    """Draws the tokens of the requests that it watches; those of others are left to transformers.

    Args:
        manager: of continuous batching, which was not started yet, and works one batch after another without graphs.
        greedy: whether the most likely token is chosen each time.
    """

    def __init__(self, manager: Any, greedy: bool) -> None:
        self.supported_kwargs = {}
        self.ignored_kwargs = ()
        self._greedy = greedy
        self._first = _First()
        self._watched: dict[str, Watched] = {}
        self._rows: list[tuple[int, Watched]] = []
        processors = manager.logit_processor
        processors.logits_processor[:] = [self._first, *processors.logits_processor, self]
        processors.tensors_required += 1
        processors.do_processing = True

    def watch(self, request: str, watched: Watched) -> None:
        """Draw the tokens of a request that is added after this call."""
        self._watched[request] = watched

    def forget(self, request: str) -> None:
        """Leave a request that has ended; one that was never watched is none."""
        self._watched.pop(request, None)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Take no default: nothing is passed on in tensors."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Note which rows of the next batch are watched; the first rows are of these requests, in this order."""
        names = [request.state.request_id for request in requests_with_new_token]
        self._rows = [(row, self._watched[name]) for row, name in enumerate(names) if name in self._watched]
        return torch.zeros(len(names), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Draw from ``scores``, float32 (rows, vocabulary), and leave one token possible in each row that is watched.

        Raises:
            ValueError: a logit is not a number.
        """
        logits = self._first.take()
        if not self._rows:
            return scores
        rows = torch.tensor([row for row, _ in self._rows], device=scores.device)
        logprobs = logits[rows].log_softmax(-1)
        if logprobs.isnan().any():
            raise ValueError("The model's logits are not numbers.")
        drawn = self._drawn(scores[rows])
        self._note(drawn, logprobs.clamp_(min=_UNLIKELY))
        only = torch.full_like(logprobs, -torch.inf).scatter_(1, drawn, 0)
        return scores.index_copy(0, rows, only)

    def _drawn(self, scores: Tensor) -> Tensor:
        """Return a token for each row, int64 (rows, 1)."""
        if self._greedy:
            return scores.argmax(-1, keepdim=True)
        probabilities = scores.softmax(-1)
        drawn = torch.multinomial(probabilities, 1)
        for place, (_, watched) in enumerate(self._rows):
            if watched.generator is not None:
                drawn[place] = torch.multinomial(probabilities[place], 1, generator=watched.generator)
        return drawn

    def _note(self, drawn: Tensor, logprobs: Tensor) -> None:
        most = min(max(watched.top for _, watched in self._rows), logprobs.shape[-1])
        likely = logprobs.topk(most)
        of_drawn = logprobs.gather(1, drawn)
        columns = (drawn[:, 0].tolist(), of_drawn[:, 0].tolist(), likely.indices.tolist(), likely.values.tolist())
        for (_, watched), token, logprob, tokens, values in zip(self._rows, *columns, strict=True):
            top = list(zip(tokens, values, strict=True))[: watched.top]
            watched.chosen.append(Chosen(token=token, logprob=logprob, top=top))


class _First(LogitsProcessor):
    """Keeps the logits as the model gave them, for the length of one step."""

    supports_continuous_batching = True

    def __init__(self) -> None:
        self._logits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._logits = scores
        return scores

    def take(self) -> Tensor:
        """Return the logits of this step."""
        logits, self._logits = self._logits, None
        if logits is None:
            raise RuntimeError("Logits are taken once in each step, after they were kept.")
        return logits
