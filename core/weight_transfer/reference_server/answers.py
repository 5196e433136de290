"""The answers to a request, in OpenAI's format, with the version that made them."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.reference_server.hosted import UNFINISHED
from weight_transfer.reference_server.logprobs import Telling, Told, of_chat, of_completion

if TYPE_CHECKING:
    from weight_transfer.reference_server.batching import Batching, Sampling
    from weight_transfer.reference_server.hosted import Hosted
    from weight_transfer.reference_server.wishes import Wish
    from weight_transfer.values.events import Version


@attrs.frozen(kw_only=True)
class Part:
    """The next part of a continuation.

    Attributes:
        text: what came.
        tokens: ids of all tokens so far.
        told: how likely the tokens since the last part were; empty, unless the request asks for it.
        reason: why it ends here, ``"stop"`` or ``"length"``; None if it goes on.
    """

    text: str
    tokens: list[int]
    told: list[Told]
    reason: str | None = None


async def continuation(
    wish: Wish, prompt: list[int], sampling: Sampling, hosted: Hosted, batching: Batching
) -> AsyncGenerator[Part, None]:
    """Yield the parts of a continuation; the last one has a reason."""
    said = 0
    telling = Telling(hosted)
    told: list[Told] = []
    async with aclosing(batching.generate(prompt, wish.limit, sampling)) as generating:
        async for generated in generating:
            tokens = generated.tokens
            if wish.with_logprobs:
                told += [telling.tell(chosen) for chosen in generated.chosen]
            reason = "stop" if tokens[-1] in hosted.ends else "length" if len(tokens) >= wish.limit else None
            if reason is None and not wish.stop and not wish.stream:
                continue
            text = hosted.decode(tokens)
            found = [index for index in (text.find(stop, max(0, said - len(stop))) for stop in wish.stop) if index >= 0]
            if found:
                text, reason = text[: min(found)], "stop"
            safe = text if reason is not None else _safe(text, wish)
            yield Part(text=safe[said:], tokens=tokens, told=told, reason=reason)
            said = max(said, len(safe))
            told = []
            if reason is not None:
                return


def _safe(text: str, wish: Wish) -> str:
    """Return what may be told of an unfinished text: no half character, and no beginning of a text that ends it."""
    text = text.rstrip(UNFINISHED)
    held = max((_overlap(text, stop) for stop in wish.stop), default=0)
    return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` are the beginning of ``stop``."""
    return next((length for length in range(len(stop) - 1, 0, -1) if text.endswith(stop[:length])), 0)


class Answer:
    """What one request is answered.

    Args:
        wish: the request.
        model: the model's name.
        version: of the weights that make the answer.
    """

    def __init__(self, wish: Wish, model: str, version: Version) -> None:
        self._wish = wish
        kind = "chat.completion" if wish.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if wish.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind + (".chunk" if wish.chat and wish.stream else ""),
            "created": int(time.time()),  # noqa: TID251  (the time of day)
            "model": model,
            "weight_version": version,
        }

    def whole(self, continuations: list[Part]) -> dict[str, Any]:
        """Return the answer at once; each continuation has its whole text."""
        choices = []
        for index, part in enumerate(continuations):
            said = {"message": {"role": "assistant", "content": part.text}} if self._wish.chat else {"text": part.text}
            choices.append(self._choice(index, said, part))
        return self._head | {"choices": choices, "usage": self.usage([len(part.tokens) for part in continuations])}

    def chunk(self, index: int, part: Part) -> dict[str, Any]:
        """Return a part of the answer that is streamed."""
        delta = {"delta": {"role": "assistant", "content": part.text}} if self._wish.chat else {"text": part.text}
        return self._head | {"choices": [self._choice(index, delta, part)]}

    def last(self, counts: list[int]) -> dict[str, Any]:
        """Return the chunk after all others, with the numbers of tokens that were generated."""
        return self._head | {"choices": [], "usage": self.usage(counts)}

    def usage(self, counts: list[int]) -> dict[str, int]:
        """Return the numbers of tokens."""
        prompt, generated = sum(map(len, self._wish.prompts)), sum(counts)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def _choice(self, index: int, said: dict[str, Any], part: Part) -> dict[str, Any]:
        logprobs = None
        if self._wish.with_logprobs:
            logprobs = of_chat(part.told) if self._wish.chat else of_completion(part.told)
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": part.reason}
        if self._wish.with_tokens and part.reason is not None:
            choice["token_ids"] = part.tokens
        return choice
