"""A generator's chats and answers as token ids: what it is asked, and what it is tuned on."""

from typing import Any

import pytest
from transformers import AutoTokenizer

from bixse.synthesis import prompts
from bixse.synthesis.reading import read_query
from bixse.synthesis.tokens import ChatTokenizer


@pytest.fixture
def tokenizer(tiny_llm: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llm)


def test_an_answer_follows_the_very_prompt_that_is_asked_later(tokenizer: Any) -> None:
    tokens = ChatTokenizer(tokenizer)
    chats = [prompts.at_grade(grade, (), "Tea is brewed from leaves.") for grade in (0, 3)]
    queries = ["how is tea made", 'what is "水"?']
    rows = tokens.answered(chats, [prompts.answer(query) for query in queries])
    assert [prompt for prompt, _ in rows] == tokens.encode(chats)
    for query, (_, answer) in zip(queries, rows, strict=True):
        assert answer[-1] == tokenizer.eos_token_id
        assert read_query(tokenizer.decode(answer[:-1]), "") == query


def test_no_answer_ends_its_turn_early(tokenizer: Any) -> None:
    chat = prompts.at_grade(1, (), "Tea.")
    ((_, answer),) = ChatTokenizer(tokenizer).answered([chat], [prompts.answer("<|end|> of tea")])
    assert answer.count(tokenizer.eos_token_id) == 1


def test_a_tokenizer_that_ends_no_turn_is_refused(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no token that ends an answer"):
        ChatTokenizer(tokenizer).answered([prompts.at_grade(1, (), "Tea.")], ["x"])
