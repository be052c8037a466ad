"""Doubt in numbers, budgets, and who is chosen."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.judging.cascade import budget, doubt, entropy, most_doubtful
from bixse.judging.settings import Cascade, Judging, Pointwise


def test_entropy_by_hand() -> None:
    assert entropy([1, 0, 0, 0]) == 0
    assert entropy([0.25] * 4) == pytest.approx(1)
    assert entropy([0.5, 0.5, 0, 0]) == pytest.approx(0.5)
    assert entropy([0.5, 0.5]) == pytest.approx(1)


@given(st.lists(st.floats(1e-9, 1), min_size=2, max_size=6))
def test_entropy_is_a_share(weights: list[float]) -> None:
    probs = [weight / math.fsum(weights) for weight in weights]
    assert 0 <= entropy(probs) <= 1


def test_doubt_is_what_was_asked_for() -> None:
    assert doubt(Cascade(by="entropy"), [0.5, 0.5], 0.1) == pytest.approx(1)
    assert doubt(Cascade(by="disagreement"), [0.5, 0.5], 0.1) == 0.1
    with pytest.raises(ValueError, match="features is asked once"):
        doubt(Cascade(by="disagreement"), [0.5, 0.5], None)


def test_a_cheap_judge_without_a_second_order_is_refused_before_it_is_asked() -> None:
    by_order = Cascade(cheap="vllm", strong="openai", by="disagreement")
    once = Pointwise(orders=1)
    Judging(judge="cascade", cascade=by_order)
    Judging(judge="human", cascade=by_order, vllm=once)
    Judging(judge="cascade", cascade=by_order.replace(by="entropy"), vllm=once)
    with pytest.raises(ValueError, match="vllm is asked once"):
        Judging(judge="cascade", cascade=by_order, vllm=once)
    with pytest.raises(ValueError, match="features is asked once"):
        Judging(judge="cascade", cascade=Cascade(by="disagreement"))


@pytest.mark.parametrize(
    "share,cap,pairs,expected",
    [(0.2, None, 10, 2), (0.29, None, 100, 29), (1.0, None, 7, 7), (0.2, None, 4, 0),
     (0.5, 3, 10, 3), (0.5, 30, 10, 5), (0.5, 0, 10, 0)],
)  # fmt: skip
def test_the_budget_is_the_smaller_bound(
    share: float, cap: int | None, pairs: int, expected: int
) -> None:
    assert budget(Cascade(share=share, max_pairs=cap), pairs) == expected


KEYS = st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"))


@given(st.dictionaries(KEYS, st.sampled_from([0.0, 0.25, 0.5, 1.0])), st.integers(0, 12))
def test_the_most_doubtful_in_any_order(doubts: dict[tuple[str, str], float], limit: int) -> None:
    rows = [(*key, value) for key, value in doubts.items()]
    expected = sorted(rows, key=lambda row: (-row[2], row[0], row[1]))[:limit]
    assert most_doubtful(rows, limit) == most_doubtful(reversed(rows), limit) == expected
