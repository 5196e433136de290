"""What is told of the tokens of an answer: their names, and where they begin in its text."""

from __future__ import annotations

import random
from typing import Any

import pytest

from support.tiny_llama import tokenizer
from weight_transfer.reference_server.drawing import Chosen
from weight_transfer.reference_server.hosted import Hosted
from weight_transfer.reference_server.logprobs import Telling, Told, of_chat, of_completion

TEXT = "Où est le café? 日本語 🙂\n"


def hosted(words: Any = None) -> Hosted:
    return Hosted(name="tiny", model=None, tokenizer=words, trained=True, context=100)


def tell(server: Hosted, tokens: list[int]) -> list[Told]:
    telling = Telling(server)
    return [telling.tell(Chosen(token=token, logprob=-1.0, top=())) for token in tokens]


@pytest.mark.parametrize("seed", range(3))
def test_an_offset_is_where_a_token_begins_in_the_text(seed: int) -> None:
    words = tokenizer()
    sequence = random.Random(seed)
    noise = [sequence.randrange(len(words)) for _ in range(200)]
    tokens = words(TEXT)["input_ids"] + noise + words(TEXT)["input_ids"]
    told = tell(hosted(words), tokens)
    texts = [str(words.decode(tokens[:end], skip_special_tokens=True)) for end in range(len(tokens))]
    wholes = [(one.offset, len(text)) for one, text in zip(told, texts, strict=True) if not text.endswith("\ufffd")]
    assert len(wholes) > 50
    assert [offset for offset, _ in wholes] == [length for _, length in wholes]


def test_a_part_of_a_character_goes_by_its_id_and_begins_where_the_character_does() -> None:
    words = tokenizer()
    first, second = words("é")["input_ids"]
    told = of_completion(tell(hosted(words), [*words("a")["input_ids"], first, second, *words("b")["input_ids"]]))
    assert told["tokens"] == ["a", f"token_id:{first}", f"token_id:{second}", "b"]
    assert told["text_offset"] == [0, 1, 1, 2]


def test_without_a_tokenizer_all_tokens_go_by_their_ids() -> None:
    told = tell(hosted(), [3, 4])
    assert of_completion(told)["tokens"] == ["token_id:3", "token_id:4"]
    assert [one["bytes"] for one in of_chat(told)["content"]] == [None, None]


def test_of_tokens_with_the_same_text_the_chosen_one_has_it_as_its_name() -> None:
    class Same:
        def decode(self, tokens: list[int], **_options: Any) -> str:
            return "a" * len(tokens)

    chosen = Chosen(token=3, logprob=-3.0, top=[(1, -1.0), (2, -2.0)])
    told = of_completion([Telling(hosted(Same())).tell(chosen)])
    assert told["top_logprobs"] == [{"a": -3.0, "token_id:1": -1.0, "token_id:2": -2.0}]
