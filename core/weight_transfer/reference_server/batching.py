"""Generates with transformers' continuous batching: requests join and leave a batch that never stops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import attrs
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from weight_transfer.errors import LifecycleError, WeightTransferError
from weight_transfer.reference_server.drawing import Chosen, Drawing, Watched

if TYPE_CHECKING:
    from weight_transfer.reference_server.hosted import Hosted

_PAGE = 32  # tokens of a page of the cache
_BATCH = 512  # tokens that one forward pass takes on a CPU
_SHARE = 0.4  # of the free memory of a GPU, for the cache of each manager, of what those before it have left
_STOP = 20.0  # seconds
_NO_END = -1
_COLD = 1e-5  # temperature below which logits may overflow when they are divided by it


@attrs.frozen(kw_only=True)
class Sampling:
    """How tokens are chosen: the most likely one each time, or at random.

    Attributes:
        temperature: 0, or nearly so, for the most likely one.
        top_p: the least part of the probability that is sampled from.
        top_k: how many tokens are sampled from; None for all.
        seed: what the same tokens are drawn with again; None for others each time.
        logprobs: how many of the most likely tokens are told beside each that was chosen; None to tell of none.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature < _COLD


@attrs.frozen(kw_only=True)
class Generated:
    """What has been generated of a continuation.

    Attributes:
        tokens: ids of all tokens so far.
        chosen: how likely those are that came since the last time; empty, unless the tokens are drawn by `Drawing`.
    """

    tokens: list[int]
    chosen: Sequence[Chosen]


class Batching:
    """Some of transformers' managers, of which each is made when it is first needed.

    Greedy requests and others do not mix. One with a seed is computed alone: the sums of a batch are rounded otherwise
    when it has other members, so a token that is as good as another could be drawn instead of it.

    One that has ended after an error, such as that of weights that are not finite, is replaced by the next request.

    Nothing that a request has computed is kept for others: after an update it would be of the old weights.

    Args:
        hosted: the model.
        cache_tokens: how many tokens the cache of a manager has room for; None for a part of the GPU's memory.
        patience: seconds that a request waits for its next token.
    """

    def __init__(self, hosted: Hosted, cache_tokens: int | None, patience: float) -> None:
        self._hosted = hosted
        self._patience = patience
        self._cache_tokens = cache_tokens
        self._managers: dict[tuple[bool, bool], tuple[Any, Drawing]] = {}
        self._turn = asyncio.Lock()  # of those that are computed alone, so that each is waited for from its own start
        self._making = threading.Lock()
        self._count = 0
        self._closed = False

    async def generate(self, prompt: list[int], limit: int, sampling: Sampling) -> AsyncGenerator[Generated, None]:
        """Yield what there is so far, whenever there is more; close the iterator to end the request before its end.

        Args:
            prompt: token ids.
            limit: number of tokens to generate, unless one ends the text before.
            sampling: how they are chosen.

        Raises:
            WeightTransferError: generation failed.
        """
        alone = sampling.seed is not None
        async with self._turn if alone else nullcontext():
            manager, drawing = await asyncio.to_thread(self._manager, sampling.greedy, alone)
            self._count += 1
            name = f"request {self._count}"
            watched = self._watched(sampling)
            if watched is not None:
                drawing.watch(name, watched)
            outputs: asyncio.Queue[Any] = asyncio.Queue()
            manager.register_result_handler(name, outputs.put_nowait)
            seen, done = 0, False
            try:
                added = manager.add_request(
                    prompt,
                    request_id=name,
                    max_new_tokens=limit,
                    streaming=True,
                    eos_token_id=[*self._hosted.ends] or [_NO_END],
                    **self._warping(sampling),
                )
                if added is None:
                    raise WeightTransferError("Generation has ended after an error; the log of the worker says which.")
                while not done:
                    output = await self._next(outputs)
                    done = output.is_finished()
                    if output.error is not None:
                        raise WeightTransferError("Generation failed.", cause=str(output.error))
                    tokens = list(output.generated_tokens)
                    yield Generated(tokens=tokens, chosen=_chosen(watched, tokens, seen) if watched is not None else ())
                    seen = len(tokens)
            finally:
                if not done:
                    manager.cancel_request(name)
                    manager.output_router.result_handlers.pop(name, None)
                drawing.forget(name)

    def _watched(self, sampling: Sampling) -> Watched | None:
        if sampling.seed is None and sampling.logprobs is None:
            return None
        generator = None
        if sampling.seed is not None:
            generator = torch.Generator(self._hosted.model.device).manual_seed(sampling.seed)
        return Watched(top=sampling.logprobs or 0, generator=generator)

    async def _next(self, outputs: asyncio.Queue[Any]) -> Any:
        try:
            async with asyncio.timeout(self._patience):
                return await outputs.get()
        except TimeoutError as error:
            raise WeightTransferError(f"Generation stands still: no token came for {self._patience:g} s.") from error

    def close(self) -> None:
        """End all requests and the threads that generate."""
        with self._making:
            self._closed = True
            for manager, _ in self._managers.values():
                manager.stop(block=True, timeout=_STOP, hard_stop=True)

    def _warping(self, sampling: Sampling) -> dict[str, Any]:
        if sampling.greedy:
            return {}
        vocabulary = self._hosted.model.config.get_text_config().vocab_size
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": min(sampling.top_k or vocabulary, vocabulary),
        }

    def _manager(self, greedy: bool, alone: bool) -> tuple[Any, Drawing]:
        with self._making:
            if self._closed:
                raise LifecycleError("The worker is closing.", method="generate", state="closed")
            made = self._managers.get((greedy, alone))
            if made is None or not made[0].is_running():
                model = self._hosted.model
                manager = model.init_continuous_batching(_generation(greedy), self._settings(model.device.type, alone))
                made = manager, Drawing(manager, greedy)
                manager.start()
                self._managers[greedy, alone] = made
            return made

    def _settings(self, device: str, alone: bool) -> ContinuousBatchingConfig:
        blocks = None if self._cache_tokens is None else -(-self._cache_tokens // _PAGE)
        return ContinuousBatchingConfig(
            allow_block_sharing=False,
            auto_switch_to_flash=False,  # it might look for kernels in the network
            drop_unsupported_processors=False,
            max_batch_tokens=_BATCH if device == "cpu" else None,
            max_memory_percent=_SHARE,
            max_requests_per_batch=1 if alone else None,
            num_blocks=blocks,
            page_size=_PAGE,
            per_request_processors=True,
            use_async_batching=False,  # as `Drawing` wants it
            use_cuda_graph=False,
        )


def _chosen(watched: Watched, tokens: list[int], seen: int) -> list[Chosen]:
    """Return how likely the tokens are from the one at ``seen`` on.

    Raises:
        WeightTransferError: other tokens were drawn.
    """
    chosen = watched.chosen[seen : len(tokens)]
    if [one.token for one in chosen] != tokens[seen:]:
        raise WeightTransferError("Generation failed: transformers has not answered with the tokens that were drawn.")
    return chosen


def _generation(greedy: bool) -> GenerationConfig:
    """Return a configuration in which each request says how it is sampled, where that is not greedy.

    A manager makes room for those parameters only that are not neutral here.
    """
    if greedy:
        return GenerationConfig(do_sample=False, eos_token_id=_NO_END)
    return GenerationConfig(do_sample=True, eos_token_id=_NO_END, temperature=0.5, top_k=50, top_p=0.5)
