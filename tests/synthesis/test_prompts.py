"""Prompts are values: the same words for the same arguments, another hash for another word."""

import json
from typing import get_args

import pytest

from bixse.reading.chats import Messages
from bixse.scale import UMBRELA
from bixse.synthesis import prompts
from bixse.synthesis.prompts import STYLES, TASKS, WRITTEN, Example, prompt_hash
from bixse.synthesis.settings import StyleName, TaskName

TEA = Example("how is tea made", "Tea is brewed from leaves.")
COFFEE = Example("what is coffee", "Coffee is brewed from beans.")


def test_few_shot_shows_each_example_as_a_turn_in_order_and_leaves_the_last_open() -> None:
    chat = prompts.few_shot(TASKS["claim"], [TEA, COFFEE], "Water boils.")
    assert [message["role"] for message in chat] == ["system", *["user", "assistant"] * 2, "user"]
    assert [json.loads(m["content"])["query"] for m in chat if m["role"] == "assistant"] == [
        "how is tea made",
        "what is coffee",
    ]
    assert chat[-1]["content"] == "Evidence:\nWater boils.\n\nClaim"
    assert TASKS["claim"].instruction in chat[0]["content"]
    assert chat == prompts.few_shot(TASKS["claim"], [TEA, COFFEE], "Water boils.")
    assert chat != prompts.few_shot(TASKS["claim"], [COFFEE, TEA], "Water boils.")


def test_every_task_and_style_has_its_words() -> None:
    assert set(TASKS) == set(get_args(TaskName))
    assert set(STYLES) == set(get_args(StyleName))
    asked = {prompts.few_shot(task, [], "d")[0]["content"] for task in TASKS.values()}
    assert len(asked) == len(TASKS)
    assert len({prompts.styled(style, "d")[1]["content"] for style in STYLES}) == len(STYLES)


def test_a_prompt_at_a_grade_says_the_grade_and_what_each_means() -> None:
    chat = prompts.at_grade(1, [Example("q", "d", 3)], "Tea is brewed.")
    assert chat[1]["content"].endswith("Query of grade 3")
    assert chat[-1]["content"].endswith("Query of grade 1")
    assert all(grade.meaning in chat[0]["content"] for grade in WRITTEN.grades)
    assert WRITTEN.values == UMBRELA.values  # A scorer on UMBRELA's scale can agree.


def test_one_chat_asks_for_a_passage_of_every_grade_the_best_first() -> None:
    chat = prompts.at_every_grade("how is tea made", "one or two sentences", "plain words")
    keys = [f"grade_{grade}" for grade in (3, 2, 1, 0)]
    places = [chat[0]["content"].index(f'"{key}"') for key in keys]
    assert places == sorted(places)
    assert "one or two sentences" in chat[1]["content"]


@pytest.mark.parametrize(
    "other",
    [
        prompts.few_shot(TASKS["search"], [TEA], "{d}"),
        prompts.few_shot(TASKS["question"], [TEA, COFFEE], "{d}"),
        prompts.few_shot(TASKS["search"], [COFFEE, TEA], "{d}"),
    ],
)
def test_the_hash_covers_task_examples_and_their_order(other: Messages) -> None:
    chat = prompts.few_shot(TASKS["search"], [TEA, COFFEE], "{d}")
    assert prompt_hash(chat, schema={}) == prompt_hash(list(chat), schema={})
    assert prompt_hash(chat, schema={}) != prompt_hash(other, schema={})
    assert prompt_hash(chat, schema={}) != prompt_hash(chat, schema={"type": "object"})


def test_the_words_sent_have_not_changed_unnoticed() -> None:
    """Known hashes: whoever changes a word changes what every manifest says, and says so here."""
    chat = prompts.few_shot(TASKS["search"], [TEA], "{document}")
    assert prompt_hash(chat, schema={}) == "37ae01c3afe7e6d8"
