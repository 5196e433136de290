"""How likely the tokens of an answer were, in OpenAI's two formats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.reference_server.hosted import UNFINISHED

if TYPE_CHECKING:
    from weight_transfer.reference_server.drawing import Chosen
    from weight_transfer.reference_server.hosted import Hosted


@attrs.frozen(kw_only=True)
class Likely:
    """A token and how likely it is.

    Attributes:
        token: its id.
        text: what it says by itself; None if it is a part of a character, or there is no tokenizer.
        logprob: natural logarithm of its probability.
    """

    token: int
    text: str | None
    logprob: float

    @property
    def name(self) -> str:
        """Its text, or ``token_id:`` and its id."""
        return self.by_id if self.text is None else self.text

    @property
    def by_id(self) -> str:
        """``token_id:`` and its id."""
        return f"token_id:{self.token}"


@attrs.frozen(kw_only=True)
class Told:
    """What is told of a token of an answer.

    Attributes:
        chosen: the token.
        top: the most likely tokens, the most likely one first.
        offset: characters before it in the text.
    """

    chosen: Likely
    top: Sequence[Likely]
    offset: int


class Telling:
    """Tells of the tokens of one continuation, in their order.

    Args:
        hosted: whose tokens they are.
    """

    def __init__(self, hosted: Hosted) -> None:
        self._hosted = hosted
        self._offset = 0
        self._window: list[int] = []
        self._read = 0  # tokens of the window that are before the offset

    def tell(self, chosen: Chosen) -> Told:
        """Return what is told of the next token."""
        told = Told(
            chosen=self._likely(chosen.token, chosen.logprob),
            top=[self._likely(token, logprob) for token, logprob in chosen.top],
            offset=self._offset,
        )
        self._advance(chosen.token)
        return told

    def _likely(self, token: int, logprob: float) -> Likely:
        return Likely(token=token, text=self._hosted.spell(token), logprob=logprob)

    def _advance(self, token: int) -> None:
        """Move the offset to the end of a token, or not yet, if that is inside of a character.

        What a token adds is seen behind the one before it, because some tokenizers begin a text otherwise.
        """
        self._window.append(token)
        before = self._hosted.decode(self._window[: self._read])
        after = self._hosted.decode(self._window)
        if not after.endswith(UNFINISHED):
            self._offset += len(after) - len(before)
            del self._window[: self._read]
            self._read = len(self._window)


def of_completion(told: Iterable[Told]) -> dict[str, list[Any]]:
    """Return the ``logprobs`` of a choice of ``/v1/completions``."""
    rows = list(told)
    return {
        "tokens": [row.chosen.name for row in rows],
        "token_logprobs": [row.chosen.logprob for row in rows],
        "top_logprobs": [_by_name([row.chosen, *row.top]) for row in rows],
        "text_offset": [row.offset for row in rows],
    }


def of_chat(told: Iterable[Told]) -> dict[str, Any]:
    """Return the ``logprobs`` of a choice of ``/v1/chat/completions``."""
    content = [_in_chat(row.chosen) | {"top_logprobs": [_in_chat(one) for one in row.top]} for row in told]
    return {"content": content, "refusal": None}


def _in_chat(one: Likely) -> dict[str, Any]:
    spelled = None if one.text is None else list(one.text.encode())
    return {"token": one.name, "logprob": one.logprob, "bytes": spelled}


def _by_name(likely: Iterable[Likely]) -> dict[str, float]:
    """Return log-probabilities by name; of tokens with the same text all but the first go by their ids."""
    named: dict[str, Likely] = {}
    for one in likely:
        if named.setdefault(one.name, one).token != one.token:
            named[one.by_id] = one
    return {name: one.logprob for name, one in named.items()}
