"""What a request asks for: OpenAI's fields, of which those that this server does not know are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from weight_transfer.config.structuring import brief, require_text, structure
from weight_transfer.errors import ConfigError
from weight_transfer.reference_server.batching import Sampling

if TYPE_CHECKING:
    from weight_transfer.reference_server.hosted import Hosted

_COMMON: dict[str, Any] = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}}
_NEUTRAL: dict[bool, dict[str, Any]] = {
    False: _COMMON | {"best_of": 1, "echo": False, "suffix": "", "top_logprobs": 0},
    True: _COMMON | {"tool_choice": "none", "tools": [], "response_format": {"type": "text"}},
}
"""Fields of a completion, and of a chat, that are taken as long as they ask for nothing."""
_IGNORED = ("metadata", "service_tier", "store", "user")
_COMPLETION = 16  # tokens, if a completion does not say how many; OpenAI's default
_ALL = -1  # of top_k, as in vLLM
_MAX_STOPS = 16
_MAX_COPIES = 128  # continuations of a prompt; OpenAI's limit
_MAX_CONTINUATIONS = 2048  # of one request
_MAX_LOGPROBS = 20  # of one token; as in OpenAI's chats, and in vLLM
_MAX_FIGURES = 1 << 20  # log-probabilities of one answer, of up to 400 bytes each until it is sent
_SEEDS = 1 << 64  # of torch's generators


class NoModelError(ConfigError):
    """A request names a model that is not served."""


@attrs.frozen(kw_only=True)
class _Fields:
    """The fields that this server knows, of both kinds of requests."""

    model: str | None = None
    stream: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = _ALL
    max_tokens: int | None = None
    n: int = 1
    seed: Any = None
    logprobs: Any = None
    top_logprobs: int | None = None
    stop: Any = ()
    stream_options: Mapping[str, bool] = attrs.field(factory=dict)
    return_token_ids: bool = False


@attrs.frozen(kw_only=True)
class Wish:
    """One request.

    Attributes:
        prompts: token ids; a chat has one prompt.
        copies: continuations of each prompt.
        limit: tokens that are generated at most.
        sampling: how they are chosen.
        stop: texts before which an answer ends.
        stream: whether the answer comes in parts.
        with_usage: whether numbers of tokens come after the last part.
        with_tokens: whether the answer has token ids, too.
        chat: whether it is a chat.
    """

    prompts: Sequence[list[int]]
    copies: int
    limit: int
    sampling: Sampling
    stop: Sequence[str]
    stream: bool
    with_usage: bool
    with_tokens: bool
    chat: bool

    @property
    def with_logprobs(self) -> bool:
        """Whether the answer tells how likely its tokens were."""
        return self.sampling.logprobs is not None

    @property
    def continued(self) -> list[tuple[list[int], Sampling]]:
        """What is continued, in the order of the answer's choices, and how: each copy of a prompt has its own seed."""
        return [(prompt, self._sampling_of(copy)) for prompt in self.prompts for copy in range(self.copies)]

    def _sampling_of(self, copy: int) -> Sampling:
        seed = self.sampling.seed
        return self.sampling if seed is None else attrs.evolve(self.sampling, seed=(seed + copy) % _SEEDS)


def read(body: Mapping[str, Any], hosted: Hosted, chat: bool) -> Wish:
    """Read a request of ``/v1/completions`` or ``/v1/chat/completions``.

    Raises:
        NoModelError: it names another model.
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
        raise NoModelError(f"request: this server has no model {brief(fields.model)}; it has {hosted.name!r}.")
    if not 0 < fields.n <= _MAX_COPIES:
        raise ConfigError(f"request: n must be 1 to {_MAX_COPIES}, got {fields.n}.")
    prompts = [_of_chat(asked, hosted)] if chat else _prompts(asked, hosted)
    if len(prompts) * fields.n > _MAX_CONTINUATIONS:
        raise ConfigError(
            f"request: {len(prompts)} prompts, each {fields.n} times, are more than the {_MAX_CONTINUATIONS} "
            "continuations that one request may ask for."
        )
    longest = max(map(len, prompts))
    room = hosted.context - longest
    if room < 1:
        raise ConfigError(
            f"request: a prompt has {longest} tokens, and the context {hosted.context}, with room for none after it."
        )
    limit = fields.max_tokens if fields.max_tokens is not None else room if chat else min(room, _COMPLETION)
    if not 0 < limit <= room:
        raise ConfigError(
            f"request: max_tokens must be 1 to {room}, got {limit}: the context has {hosted.context} tokens."
        )
    logprobs = _logprobs(fields, chat)
    _require_room(logprobs, len(prompts) * fields.n, limit)
    return Wish(
        prompts=prompts,
        copies=fields.n,
        limit=limit,
        sampling=_sampling(fields, logprobs),
        stop=_stops(fields.stop, hosted),
        stream=fields.stream,
        with_usage=fields.stream_options.get("include_usage", False),
        with_tokens=fields.return_token_ids,
        chat=chat,
    )


def _sampling(fields: _Fields, logprobs: int | None) -> Sampling:
    if not 0 <= fields.temperature <= 100:
        raise ConfigError(f"request: temperature must be 0 to 100, got {fields.temperature}.")
    if not 0 < fields.top_p <= 1:
        raise ConfigError(f"request: top_p must be above 0 and at most 1, got {fields.top_p}.")
    if fields.top_k < _ALL:
        raise ConfigError(f"request: top_k must be at least 1, or {_ALL} or 0 for all tokens, got {fields.top_k}.")
    return Sampling(
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=max(fields.top_k, 0) or None,
        seed=None if fields.seed is None else _seed(fields.seed),
        logprobs=logprobs,
    )


def _logprobs(fields: _Fields, chat: bool) -> int | None:
    """Return how many of the most likely tokens are told beside the chosen one; None to tell of none."""
    if not chat:
        return _most(fields.logprobs, "logprobs")
    if not isinstance(fields.logprobs, bool | None):
        raise ConfigError(f"request: logprobs of a chat must be true or false, got {brief(fields.logprobs)}.")
    most = _most(fields.top_logprobs, "top_logprobs") or 0
    if most and not fields.logprobs:
        raise ConfigError(f"request: top_logprobs needs logprobs to be true, got {most} without it.")
    return most if fields.logprobs else None


def _seed(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -_SEEDS // 2 <= value < _SEEDS // 2:
        raise ConfigError(f"request: seed must be a whole number from -2**63 to 2**63 - 1, got {brief(value)}.")
    return value % _SEEDS


def _most(value: Any, name: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_LOGPROBS:
        raise ConfigError(f"request: {name} must be 0 to {_MAX_LOGPROBS}, got {brief(value)}.")
    return value


def _require_room(logprobs: int | None, continuations: int, limit: int) -> None:
    figures = 0 if logprobs is None else continuations * limit * (logprobs + 1)
    if figures > _MAX_FIGURES:
        raise ConfigError(
            f"request: {continuations} continuations of {limit} tokens with {logprobs} + 1 logprobs each are {figures} "
            f"log-probabilities, and one answer may have {_MAX_FIGURES}; ask for fewer of them, or set max_tokens."
        )


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
        prompt = hosted.tokenizer(_text(prompt, "prompt"))["input_ids"]
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
    plain = [_message(message) for message in messages]
    try:
        text = hosted.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise ConfigError("request: the chat template does not take these messages.", cause=str(error)) from error
    # it has its special tokens already
    return list(hosted.tokenizer(_text(text, "messages"), add_special_tokens=False)["input_ids"])


def _message(message: Any) -> dict[str, Any]:
    """Return a message whose content is one text, which it may say in parts."""
    if isinstance(message, dict):
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            texts = [part.get("text") for part in content]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
        if isinstance(message.get("role"), str) and isinstance(content, str):
            return message | {"content": content}
    raise ConfigError(f"request: a message has a role and a content, both texts, got {brief(message)}.")


def _text(text: str, field: str) -> str:
    try:
        return require_text(text)
    except ValueError as error:
        raise ConfigError(f"request: {field}: {error}.") from error
