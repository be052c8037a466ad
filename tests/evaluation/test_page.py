"""What the page says of a difference."""

import re

import numpy as np
import numpy.typing as npt
import pytest

from bixse.evaluation.charts import dots
from bixse.evaluation.page import page
from bixse.evaluation.report import Measured, summarise
from bixse.evaluation.settings import Evaluation

SETTINGS = Evaluation(bootstrap=1000)


def headline(*gains: float) -> str:
    """Of an encoder that gains so much over its base on each query."""
    base = np.full(len(gains), 0.4)
    return headline_of({"base": base, "trained": base + gains})


def headline_of(ndcg: dict[str, npt.NDArray[np.float64]]) -> str:
    """Of systems with these nDCGs of each query."""
    values = {system: {"ndcg@10": found} for system, found in ndcg.items()}
    queries = {f"q{number}": "a query" for number in range(len(ndcg["base"]))}
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


def test_what_changed_is_counted_and_named_the_most_first() -> None:
    base = np.full(5, 0.5)
    trained = base + np.array([0.25, -0.375, 0, 0.125, 1e-12])
    values = {"base": {"ndcg@10": base}, "trained": {"ndcg@10": trained}}
    queries = {f"q{number}": f"query {number}" for number in range(5)}
    found = summarise(Measured(queries, values), SETTINGS)
    assert found["ndcg@10"] == {"base": 0.5, "trained": pytest.approx(0.5)}
    assert found["differences"]["trained-base"]["ndcg@10"]["mean"] == pytest.approx(0, abs=1e-9)
    changes = found["changes"]["trained-base"]
    # An nDCG that was added in another order is the same.
    assert [changes[name] for name in ("better", "worse", "same")] == [2, 1, 2]
    assert [row["query_id"] for row in changes["best"]] == ["q0", "q3"]
    assert changes["worst"] == [
        {"query_id": "q1", "text": "query 1", "trained": 0.125, "base": 0.5, "change": -0.375}
    ]
    assert changes["sorted"] == [-0.375, 0, 0, 0.125, 0.25]


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


def test_the_page_of_a_reranker_begins_with_the_reranker() -> None:
    """Whatever else was measured beside it."""
    names = ("bm25", "base", "bm25+reranker", "base+reranker", "base+feedback", "base+bm25")
    said = headline_of({name: np.full(5, n / 10) for n, name in enumerate(names)})
    assert said.startswith('<p class="head">nDCG@10 of base+reranker against base')


@pytest.mark.parametrize("name", ["base", "trained+feedback"])
def test_the_name_of_a_system_has_room_on_the_chart(name: str) -> None:
    drawn = dots({name: 0.4}, {name: (0.3, 0.5)}, {name: "red"})
    found = re.search(r'class="name" x="([\d.]+)" y="[\d.]+" text-anchor="end"', drawn)
    assert found is not None
    # Letters of 14 pixels are seldom wider than half of that.
    assert float(found[1]) >= 7 * len(name)
