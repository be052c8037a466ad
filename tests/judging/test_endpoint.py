"""Choices of a stranger in, one answer or one reason out."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bixse.judging.endpoint import (
    Answer,
    Unreadable,
    choices_of,
    read,
    read_logprobs,
    read_votes,
    request,
    usage_of,
    verdict,
)
from bixse.judging.prompts import PROMPTS
from bixse.judging.settings import ChatEndpoint, Judging, config
from bixse.records import Judgment, Rejection

UMBRELA = PROMPTS["umbrela"]
LABELS = UMBRELA.scale.labels
SETTINGS = ChatEndpoint(base_url="http://127.0.0.1:1/v1", model="m", top_logprobs=5)


def choice(top: dict[str, Any] | list[tuple[str, Any]], **changes: Any) -> dict[str, Any]:
    entries = top.items() if isinstance(top, dict) else top
    found = [{"token": token, "logprob": value} for token, value in entries]
    content = [{"token": found[0]["token"], "logprob": 0.0, "top_logprobs": found}]
    return {"finish_reason": "length", "logprobs": {"content": content}, **changes}


def logs(**probs: float) -> dict[str, float]:
    return {token.removeprefix("_"): math.log(p) for token, p in probs.items()}


FIVE = logs(_0=0.1, _1=0.1, _2=0.2, _3=0.4, word=0.1)


def test_top_logprobs_by_hand() -> None:
    """Mass 0.8; a grade after a space is the same grade."""
    found = read_logprobs(choice(FIVE), LABELS, 5)
    assert isinstance(found, Answer)
    assert found.mass == pytest.approx(0.8)
    assert found.probs == pytest.approx((0.125, 0.125, 0.25, 0.5))
    spaced = {**logs(_0=0.1, _1=0.1, _2=0.2, _3=0.3, word=0.1), " 3": math.log(0.1)}
    found = read_logprobs(choice(spaced), LABELS, 5)
    assert isinstance(found, Answer)
    assert found.probs == pytest.approx((0.125, 0.125, 0.25, 0.5))


def test_a_grade_that_is_not_among_the_top_has_next_to_nothing() -> None:
    """Unseen probability is bounded by the least top token and by what is left."""
    sure = logs(_3=0.97, _2=0.02, a=0.005, b=0.002, c=0.001)
    found = read_logprobs(choice(sure), LABELS, 5)
    assert isinstance(found, Answer)
    assert found.probs == pytest.approx((0, 0, 0.02 / 0.99, 0.97 / 0.99))
    open_ = logs(_3=0.3, _2=0.2, a=0.1, b=0.1, c=0.05)
    unread = read_logprobs(choice(open_), LABELS, 5)
    assert unread == Unreadable("2 grades are not among the top tokens and may have 0.1")


@pytest.mark.parametrize(
    "bad,reason",
    [
        (choice({**FIVE, "3": math.nan}), "a top token without a log-probability"),
        (choice({**FIVE, "3": math.inf}), "a top token without a log-probability"),
        (choice({**FIVE, "3": "-0.1"}), "a top token without a log-probability"),
        (choice({**FIVE, "3": None}), "a top token without a log-probability"),
        (choice({**FIVE, "3": True}), "a top token without a log-probability"),
        (choice({**FIVE, "3": 0.4}), "a top token without a log-probability"),
        (choice({**FIVE, "word": -0.1}), "the top tokens have probability 1.7 together"),
        (choice([*FIVE.items(), ("3", -9.0)]), "a grade stands twice among the top tokens"),
        (choice({"yes": 0.0, **dict.fromkeys("abcd", -9999.0)}), "no grade is among the top"),
        (choice(logs(_3=0.9)), "1 top_logprobs where 5 were asked for"),
        (choice(FIVE, logprobs=None), "no logprobs"),
        (choice(FIVE, logprobs=[]), "no logprobs"),
        (choice(FIVE, logprobs={"content": []}), "no logprobs"),
        (choice(FIVE, logprobs={"content": [{}, {}]}), "2 tokens where one was asked for"),
        (choice(FIVE, logprobs={"content": ["3"]}), "no top_logprobs where 5"),
        (choice(FIVE, finish_reason="content_filter"), "the endpoint declined to answer"),
        (choice(FIVE, message={"refusal": "I would rather not"}), "the endpoint declined"),
        ("3", "no logprobs"),
        (None, "no logprobs"),
    ],
)  # fmt: skip
def test_nothing_strange_becomes_a_grade(bad: Any, reason: str) -> None:
    found = read_logprobs(bad, LABELS, 5)
    assert isinstance(found, Unreadable)
    assert found.reason.startswith(reason)


def vote(content: Any, finish: Any = "stop") -> dict[str, Any]:
    return {"finish_reason": finish, "message": {"role": "assistant", "content": content}}


def test_votes_are_whole_labels_or_nothing() -> None:
    votes = ["3", " 2\n", "3", "3.", "grade 3", "4", "-1", "", None, 3, ["3"], "\uff12", "33"]
    found = read_votes([*map(vote, votes), vote("3", "length"), vote("3", None), {}], LABELS)
    assert isinstance(found, Answer)
    assert found.probs == pytest.approx((0, 0, 1 / 3, 2 / 3))
    assert found.mass == pytest.approx(3 / 16)
    assert read_votes([vote("no")], LABELS) == Unreadable("none of 1 votes is a grade")
    five = SETTINGS.replace(votes=5)
    assert isinstance(read([vote("1")] * 5, five, LABELS), Answer)


def test_the_verdict_needs_every_order() -> None:
    first, second = Answer((0.5, 0.5, 0, 0), 0.9), Answer((0, 0, 0, 1.0), 0.6)
    found = verdict("q", "d", [first, second], UMBRELA, "m", 0.5)
    assert isinstance(found, Judgment)
    assert found.grade_probs == (0.25, 0.25, 0, 0.5)
    assert found.relevance == pytest.approx((0.25 + 1.5) / 3)
    assert (found.judge, found.prompt, found.origin) == ("m", UMBRELA.hash, "llm")
    for bad, reason in (
        (Answer((0, 0, 0, 1.0), 0.4), "grade mass 0.4 is below 0.5, passage first"),
        (Unreadable("status 500", "<html>"), "status 500, passage first"),
    ):
        lost = verdict("q", "d", [first, bad], UMBRELA, "m", 0.5)
        assert isinstance(lost, Rejection)
        assert (lost.reason, lost.query_id, lost.doc_id) == (reason, "q", "d")
        assert lost.response


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(["3", "stop", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "message",
                    "content",
                    "logprobs",
                    "top_logprobs",
                    "token",
                    "logprob",
                    "finish_reason",
                    "usage",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(JSON)
def test_any_json_is_read_without_an_accident(value: Any) -> None:
    assert isinstance(read_logprobs(value, LABELS, 2), Answer | Unreadable)
    assert isinstance(read_votes([value], LABELS), Answer | Unreadable)
    assert usage_of(value).requests == 1


@pytest.mark.parametrize("reply", [None, 3, [], {}, {"choices": []}, {"choices": [1, 2, 3]}])
def test_a_reply_without_the_choices_asked_for(reply: Any) -> None:
    with pytest.raises(ValueError, match="the reply has"):
        choices_of(reply, 2)
    assert choices_of({"choices": [reply]}, 2) == [reply]


@given(st.lists(st.floats(-30, 0), min_size=5, max_size=5))
def test_a_distribution_whatever_the_numbers(values: list[float]) -> None:
    found = read_logprobs(choice(dict(zip([*LABELS, "x"], values, strict=True))), LABELS, 5)
    if isinstance(found, Answer):
        assert sum(found.probs) == pytest.approx(1, abs=1e-9)
        assert 0 < found.mass <= 1
    else:
        assert sum(map(math.exp, values)) > 1


def test_a_request_says_what_it_wants() -> None:
    body = request(SETTINGS, UMBRELA, "tea", "Tea is brewed.", "passage first")
    assert body["messages"] == UMBRELA.messages("tea", "Tea is brewed.", "passage first")
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 5)
    changed = SETTINGS.replace(
        votes=3, extra='{"max_tokens": null, "max_completion_tokens": 4, "reasoning": "none"}'
    )
    body = request(changed, UMBRELA, "tea", "Tea is brewed.", "query first")
    assert "max_tokens" not in body
    assert "logprobs" not in body
    assert (body["max_completion_tokens"], body["reasoning"]) == (4, "none")
    assert body["temperature"] == 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {"base_url": "ftp://host/v1"},
        {"base_url": "host/v1"},
        {"base_url": "https://user:secret@host/v1"},
        {"base_url": "https://host/v1?key=secret"},
        {"extra": "[]"},
        {"extra": "{"},
        {"extra": '{"n": 3}'},
        {"api_key_env": "sk-secret"},
    ],
)
def test_settings_that_could_only_fail_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SETTINGS.replace(**changes)


def test_patience_shapes_no_judgment() -> None:
    def shaping(**changes: Any) -> object:
        return config(Judging(judge="openai", openai=SETTINGS.replace(**changes)))

    assert shaping() == shaping(
        concurrency=1, timeout_s=1, give_up_after_s=1, max_retries=0, max_wait_s=1
    )
    for change in ({"votes": 3}, {"extra": '{"seed": 1}'}, {"base_url": "http://other/v1"}):
        assert shaping(**change) != shaping()
