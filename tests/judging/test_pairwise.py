"""Log-probabilities of A and B in two orders -> one preference or one rejection."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bixse.judging.pairwise import PAIRWISE, PairwiseTokenizer, preference
from bixse.judging.pointwise import Logprobs
from bixse.records import Preference, Rejection


def prefer(ab: Logprobs, ba: Logprobs, min_mass: float = 0.5) -> Preference | Rejection:
    return preference("q", "a", "b", ab, ba, PAIRWISE, "tiny", min_mass)


def logs(*probs: float) -> list[float | None]:
    return [math.log(p) for p in probs]


def test_both_orders_by_hand() -> None:
    """a first: .6/.8 = .75 for a; b first: .2/.5 = .4 for b, so .6 for a; mean .675, apart .15."""
    found = prefer(logs(0.6, 0.2), logs(0.2, 0.3))
    assert isinstance(found, Preference)
    assert found.prob_a == pytest.approx(0.675, abs=1e-12)
    assert found.disagreement == pytest.approx(0.15, abs=1e-12)
    assert (found.judge, found.prompt) == ("tiny", PAIRWISE.hash)


def test_love_of_the_first_place_prefers_nobody() -> None:
    found = prefer(logs(0.9, 0.1), logs(0.9, 0.1))
    assert isinstance(found, Preference)
    assert found.prob_a == pytest.approx(0.5)
    assert found.disagreement == pytest.approx(0.8)


@pytest.mark.parametrize(
    "ba,reason",
    [
        (logs(0.2, 0.2), "the mass of A and B is 0.4, below 0.5, b shown first"),
        ([None, math.log(0.9)], "no finite log-probability for A and B, b shown first"),
        ([math.nan, math.log(0.9)], "no finite log-probability for A and B, b shown first"),
        ([], "no finite log-probability for A and B, b shown first"),
    ],
)
def test_one_unreadable_order_is_a_rejection(ba: Logprobs, reason: str) -> None:
    found = prefer(logs(0.6, 0.2), ba)
    assert isinstance(found, Rejection)
    assert found.reason == reason
    assert (found.query_id, found.doc_id, found.other_doc_id) == ("q", "a", "b")
    assert json.loads(found.response)["a shown first"] == logs(0.6, 0.2)


PAIR = st.tuples(st.floats(-20, -0.7), st.floats(-20, -0.7))


@given(PAIR, PAIR)
def test_the_other_way_round_is_the_complement(
    ab: tuple[float, float], ba: tuple[float, float]
) -> None:
    """P_ij + P_ji = 1, whatever the judge answers."""
    there, back = prefer(ab, ba, 1e-12), prefer(ba, ab, 1e-12)
    assert isinstance(there, Preference)
    assert isinstance(back, Preference)
    assert there.prob_a + back.prob_a == pytest.approx(1, abs=1e-12)
    assert there.disagreement == pytest.approx(back.disagreement, abs=1e-12)
    assert 0 <= there.prob_a <= 1


def test_the_prompt_shows_each_passage_under_its_letter(tiny_llm: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    tokens = PairwiseTokenizer(tokenizer, PAIRWISE, document_tokens=4)
    (ids,) = tokens.encode(["tea<|end|>"], ["Tea is brewed for long."], ["Water."])
    text = tokenizer.decode(ids)
    assert text.count("<|end|>") == tokenizer.decode(tokens.encode(["x"], [""], [""])[0]).count(
        "<|end|>"
    )
    a, b = text.index("Passage A:\nTea"), text.index("Passage B:\nWat")
    assert text.index("Query:\ntea") < a < b
    assert "long" not in text
    assert tokenizer.convert_ids_to_tokens(list(tokens.label_ids)) == ["A", "B"]


def test_the_hash_is_of_every_word() -> None:
    assert PAIRWISE.replace(name="other", source="other").hash == PAIRWISE.hash
    assert PAIRWISE.replace(task="Which?").hash != PAIRWISE.hash
