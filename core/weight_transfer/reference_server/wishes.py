"""What a request asks for: OpenAI's fields, of which those that this server does not know are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.config.structuring import brief, structure
from weight_transfer.errors import ConfigError
from weight_transfer.reference_server.batching import Sampling

if TYPE_CHECKING:
    from weight_transfer.reference_server.hosted import Hosted

_COMMON: dict[str, Any] = {"frequency_penalty": 0, "presence_penalty": 0, "n": 1, "logit_bias": {}}
_NEUTRAL: dict[bool, dict[str, Any]] = {
    False: _COMMON | {"best_of": 1, "echo": False, "suffix": ""},
    True: _COMMON | {"logprobs": False, "tool_choice": "none", "tools": [], "response_format": {"type": "text"}},
}
"""Fields of a completion, and of a chat, that are taken as long as they ask for nothing."""
_IGNORED = ("metadata", "service_tier", "store", "stream_options", "user")
_COMPLETION = 16  # tokens, if a completion does not say how many; OpenAI's default
_MAX_STOPS = 16


@attrs.frozen(kw_only=True)
class _Fields:
    """The fields that this server knows, of both kinds of requests."""

    model: str | None = None
    stream: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    max_tokens: int | None = None
    stop: Any = ()
    return_token_ids: bool = False


@attrs.frozen(kw_only=True)
class Wish:
    """One request.

    Attributes:
        prompts: token ids; a chat has one prompt.
        limit: tokens that are generated at most.
        sampling: how they are chosen.
        stop: texts before which an answer ends.
        stream: whether the answer comes in parts.
        with_tokens: whether the answer has token ids, too.
        chat: whether it is a chat.
    """

    prompts: Sequence[list[int]]
    limit: int
    sampling: Sampling
    stop: Sequence[str]
    stream: bool
    with_tokens: bool
    chat: bool


def read(body: Mapping[str, Any], hosted: Hosted, chat: bool) -> Wish:
    """Read a request of ``/v1/completions`` or ``/v1/chat/completions``.

    Raises:
        ConfigError: a field is unknown or wrong; the sentence names it.
    """
    given = {name: value for name, value in body.items() if value is not None and name not in _IGNORED}
    for name, neutral in _NEUTRAL[chat].items():
        value = given.pop(name, neutral)
        if value != neutral:
            raise ConfigError(f"request: {name} is not supported by this server, got {brief(value)}.")
    if chat and "max_completion_tokens" in given:
        given["max_tokens"] = given.pop("max_completion_tokens")
    asked = given.pop("messages" if chat else "prompt", None)
    fields = structure(given, _Fields, "request")
    if fields.model not in (None, hosted.name):
        raise ConfigError(f"request: this server has no model {brief(fields.model)}; it has {hosted.name!r}.")
    prompts = [_of_chat(asked, hosted)] if chat else _prompts(asked, hosted)
    room = hosted.context - max(map(len, prompts))
    limit = fields.max_tokens if fields.max_tokens is not None else room if chat else min(room, _COMPLETION)
    if not 0 < limit <= room:
        raise ConfigError(
            f"request: max_tokens must be 1 to {room}, got {limit}: the context has {hosted.context} tokens."
        )
    return Wish(
        prompts=prompts,
        limit=limit,
        sampling=_sampling(fields),
        stop=_stops(fields.stop, hosted),
        stream=fields.stream,
        with_tokens=fields.return_token_ids,
        chat=chat,
    )


def _sampling(fields: _Fields) -> Sampling:
    if not 0 <= fields.temperature <= 100:
        raise ConfigError(f"request: temperature must be 0 to 100, got {fields.temperature}.")
    if not 0 < fields.top_p <= 1:
        raise ConfigError(f"request: top_p must be above 0 and at most 1, got {fields.top_p}.")
    if fields.top_k is not None and fields.top_k < 1:
        raise ConfigError(f"request: top_k must be at least 1, got {fields.top_k}.")
    return Sampling(temperature=fields.temperature, top_p=fields.top_p, top_k=fields.top_k)


def _stops(stop: Any, hosted: Hosted) -> Sequence[str]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, (list, tuple)) or not all(isinstance(text, str) and text for text in stops):
        raise ConfigError(f"request: stop must be a text or a list of texts, got {brief(stop)}.")
    if len(stops) > _MAX_STOPS:
        raise ConfigError(f"request: stop may have {_MAX_STOPS} texts, got {len(stops)}.")
    if stops and hosted.tokenizer is None:
        raise ConfigError(f"request: stop needs a tokenizer, and {hosted.name!r} has none.")
    return stops


def _prompts(prompt: Any, hosted: Hosted) -> list[list[int]]:
    """Return token ids of a text, of a list of texts, of token ids, or of lists of them."""
    prompts = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else prompt
    if not isinstance(prompts, list) or not prompts:
        raise ConfigError("request: prompt must be a text, a list of token ids, or a list of these.")
    return [_ids(each, hosted) for each in prompts]


def _ids(prompt: Any, hosted: Hosted) -> list[int]:
    if isinstance(prompt, str):
        if hosted.tokenizer is None:
            raise ConfigError(f"request: prompt must be token ids, since {hosted.name!r} has no tokenizer.")
        prompt = hosted.tokenizer(prompt)["input_ids"]
    vocabulary = hosted.model.config.get_text_config().vocab_size
    if not _is_ids(prompt) or not all(0 <= token < vocabulary for token in prompt):
        raise ConfigError(f"request: prompt must be a text, or token ids from 0 to {vocabulary - 1}; at least one.")
    return list(prompt)


def _is_ids(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def _of_chat(messages: Any, hosted: Hosted) -> list[int]:
    if hosted.tokenizer is None or hosted.tokenizer.chat_template is None:
        raise ConfigError(f"request: {hosted.name!r} has no chat template; use /v1/completions.")
    if not isinstance(messages, list) or not messages:
        raise ConfigError("request: messages must be a list with at least one message.")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ConfigError(f"request: a message has a role and a content, both texts, got {brief(message)}.")
    try:
        text = hosted.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise ConfigError("request: the chat template does not take these messages.", cause=str(error)) from error
    return _ids_of_template(text, hosted)


def _ids_of_template(text: str, hosted: Hosted) -> list[int]:
    """Return the token ids of a templated chat, which has its special tokens already."""
    return list(hosted.tokenizer(text, add_special_tokens=False)["input_ids"])
