"""What the page says of a difference."""

import numpy as np
import pytest

from bixse.evaluation.page import page
from bixse.evaluation.report import Measured, summarise
from bixse.evaluation.settings import Evaluation

SETTINGS = Evaluation(bootstrap=1000)


def headline(*gains: float) -> str:
    """Of an encoder that gains so much over its base on each query."""
    base = np.full(len(gains), 0.4)
    values = {
        "base": {"ndcg@10": base},
        "trained": {"ndcg@10": base + gains},
    }
    queries = {f"q{number}": "a query" for number in range(len(gains))}
    report = {
        "recipe": "a recipe",
        "split": "test",
        **summarise(Measured(queries, values), SETTINGS),
        "unjudged@10": {},
        "queries": {"no_gain": 0, "none_relevant": 0, "themselves": 0},
        "n_documents": 9,
        "n_judgments": 9,
        "seconds": {},
        "config": {"evaluation": SETTINGS.model_dump()},
        "fingerprints": {},
        "versions": {},
    }
    (found,) = (line for line in page(report).splitlines() if line.startswith('<p class="head">'))
    return found


@pytest.mark.parametrize("gains", [(0.3,), (0.3, 0.2), (-0.1, -0.2, -0.3)])
def test_few_queries_prove_nothing_however_narrow_their_interval(gains: tuple[float, ...]) -> None:
    said = headline(*gains)
    assert 'class=""' in said
    assert "p is not below 0.05, so this is no proof of a change" in said


def test_a_change_is_proven_where_interval_and_test_agree() -> None:
    assert 'class="good"' in headline(*[0.1, 0.2] * 10)
    assert 'class="bad"' in headline(*[-0.1, -0.2] * 10)
    assert "the interval holds 0, so this is no proof" in headline(*[-0.1, 0.1] * 10)
    assert "no proof" not in headline(*[0.1, 0.2] * 10)
