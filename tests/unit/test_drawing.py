"""Tokens are drawn, and noted with the probabilities that the model gave them, for those rows that are watched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from weight_transfer.reference_server.drawing import Drawing, Watched

LOGITS = torch.tensor([[0.0, 3.0, 1.0, -torch.inf], [2.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 4.0]])


def step(greedy: bool, logits: torch.Tensor, watched: dict[str, Watched]) -> torch.Tensor:
    """Return what comes of the logits of ``a`` and ``b``, and a row to spare; ``c`` gets no new token now."""
    processors: Any = ContinuousBatchingLogitsProcessorList(LogitsProcessorList())
    drawing = Drawing(SimpleNamespace(logit_processor=processors), greedy)
    for name, one in watched.items():
        drawing.watch(name, one)
    requests: Any = [
        SimpleNamespace(state=SimpleNamespace(request_id=name), has_new_token=name != "c") for name in ("c", "a", "b")
    ]
    arguments = processors.prepare_tensor_args(requests, torch.zeros(1, 3, dtype=torch.int32))
    scores: torch.Tensor = processors(torch.zeros(3, dtype=torch.int32), logits, arguments)
    return scores


def test_only_rows_that_are_watched_are_drawn_here() -> None:
    watched = Watched(top=0, generator=None)
    scores = step(True, LOGITS, {"b": watched, "c": Watched(top=0, generator=None)})
    assert torch.equal(scores[[0, 2]], LOGITS[[0, 2]])
    assert scores[1].tolist() == [0.0, -torch.inf, -torch.inf, -torch.inf]
    assert [one.token for one in watched.chosen] == [0]
    assert torch.equal(step(True, LOGITS, {}), LOGITS)


def test_more_likely_tokens_than_there_are_end_with_the_impossible_ones() -> None:
    watched = Watched(top=20, generator=None)
    step(True, LOGITS, {"a": watched})
    [one] = watched.chosen
    assert [token for token, _ in one.top] == [1, 2, 0, 3]
    assert (one.token, one.top[0], one.top[-1]) == (1, (1, one.logprob), (3, -9999.0))


def test_each_generator_draws_for_its_own_request() -> None:
    def drawn(first: int, second: int) -> list[int]:
        watched = {name: Watched(top=0, generator=torch.Generator()) for name in ("a", "b")}
        for one, seed in zip(watched.values(), (first, second), strict=True):
            assert one.generator is not None
            one.generator.manual_seed(seed)
        step(False, torch.zeros(3, 10_000), watched)
        return [one.chosen[0].token for one in watched.values()]

    first, second = drawn(1, 2)
    assert first != second
    assert drawn(2, 1) == [second, first]


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_no_answer(greedy: bool, broken: float) -> None:
    logits = LOGITS.clone()
    logits[0, 0] = broken
    with pytest.raises(ValueError, match="not numbers"):
        step(greedy, logits, {"a": Watched(top=0, generator=None)})
