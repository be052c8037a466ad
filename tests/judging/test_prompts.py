"""Prompts as values: what they say, what they share, and what changes their hash."""

import pytest

from bixse.judging.prompts import ORDERS, PROMPTS, Order, Prompt
from bixse.scale import SCALES


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=list(PROMPTS))
def test_the_rubric_and_the_pair_are_in_every_order(prompt: Prompt) -> None:
    for order in ORDERS:
        system, user = prompt.messages("what is {tea}?", "Tea is {brewed} %s", order)
        for label, grade in zip(prompt.scale.labels, prompt.scale.grades, strict=True):
            assert f"{label}: {grade.meaning}" in system["content"]
        at = [user["content"].index(text) for text in ("what is {tea}?", "Tea is {brewed} %s")]
        assert at == sorted(at, reverse=order == "passage first")
    assert prompt.scale is SCALES[prompt.name]


def test_pairs_share_all_but_what_differs() -> None:
    """Instructions, then the query: the prefix that an engine computes once for a query."""
    prompt = PROMPTS["umbrela"]

    def text(query: str, passage: str, order: Order) -> str:
        return "".join(m["content"] for m in prompt.messages(query, passage, order))

    shared = f"{prompt.system}Query:\ntea\n\nPassage:\n"
    assert text("tea", "a leaf", "query first").startswith(shared)
    assert text("tea", "water", "query first").startswith(shared)
    shared = f"{prompt.system}Passage:\na leaf\n\nQuery:\n"
    assert text("tea", "a leaf", "passage first").startswith(shared)
    assert text("water", "a leaf", "passage first").startswith(shared)


def test_the_hash_follows_every_word_and_the_scale() -> None:
    prompt = PROMPTS["umbrela"]
    grades = prompt.scale.grades
    other_meaning = (*grades[:-1], grades[-1].replace(meaning="perfect"))
    other_value = (*grades[:-1], grades[-1].replace(value=4))
    changed = [
        prompt.replace(task="Grade."),
        prompt.replace(scale=prompt.scale.replace(grades=other_meaning)),
        prompt.replace(scale=prompt.scale.replace(grades=other_value)),
        PROMPTS["lightblue"],
    ]
    assert len({prompt.hash, *(p.hash for p in changed)}) == 5
    assert prompt.replace(source="elsewhere").hash == prompt.hash
