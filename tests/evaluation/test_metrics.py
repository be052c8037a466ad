import math

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bixse.evaluation.metrics import (
    measure,
    measures,
    ndcg,
    others,
    themselves,
    unjudged,
    without_relevant,
)
from bixse.records import Hit


def hits(*doc_ids, score=1.0):
    return [Hit(doc_id, score, rank) for rank, doc_id in enumerate(doc_ids, start=1)]


def test_ndcg_worked_by_hand():
    # found: 0.5, 1.0 and an unjudged one; best order: 1.0, 0.5, 0.25
    found = 0.5 / math.log2(2) + 1.0 / math.log2(3)
    best = 1.0 / math.log2(2) + 0.5 / math.log2(3) + 0.25 / math.log2(4)
    gains = {"a": 0.5, "b": 1.0, "c": 0.25, "d": 0.0}
    assert ndcg(hits("a", "b", "x"), gains, 10) == pytest.approx(found / best, abs=1e-15)
    assert ndcg(hits("b", "a", "c"), gains, 10) == 1.0


def test_ndcg_sees_no_further_than_k_in_the_best_order_too():
    assert ndcg(hits("a", "b"), {"a": 1.0, "b": 1.0}, 1) == 1.0
    assert ndcg(hits("x", "a"), {"a": 1.0}, 1) == 0.0


@pytest.mark.parametrize("unit", [0.25, 1 / 3, 7.0])
def test_ndcg_does_not_depend_on_the_unit_of_the_gain(unit):
    grades = {"a": 3.0, "b": 1.0, "c": 2.0}
    scaled = {doc_id: grade * unit for doc_id, grade in grades.items()}
    order = hits("b", "x", "a", "c")
    assert ndcg(order, scaled, 10) == pytest.approx(ndcg(order, grades, 10), abs=1e-12)


def test_a_query_without_gain_counts_as_zero_as_in_ir_measures():
    qrels = {"q1": {"a": 1.0}, "q2": {"a": 0.0}}
    run = {"q1": hits("a"), "q2": hits("a")}
    found = measure(run, qrels, 0.5, 100)
    assert found["ndcg@10"].tolist() == [1.0, 0.0]
    assert found["recall@10"].tolist() == [1.0, 0.0]
    whole = {"q1": {"a": 1}, "q2": {"a": 0}}
    scored = {"q1": {"a": 1.0}, "q2": {"a": 1.0}}
    theirs = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], whole, scored)
    assert found["ndcg@10"].mean() == theirs[ir_measures.nDCG @ 10] == 0.5


@pytest.mark.parametrize("tenths", range(1, 11))
def test_a_relevance_that_was_stored_as_float32_reaches_its_own_threshold(tenths):
    qrels = {"q": {"a": float(np.float32(tenths / 10)), "b": float(np.float32(tenths / 10 - 0.01))}}
    found = measure({"q": hits("b", "a")}, qrels, tenths / 10, 100)
    assert (found["mrr@10"].tolist(), found["recall@10"].tolist()) == ([0.5], [1.0])
    assert without_relevant(qrels, tenths / 10)["none_relevant"] == 0
    assert without_relevant(qrels, tenths / 10 + 0.01)["none_relevant"] == 1


def test_a_query_for_which_nothing_was_found_is_zero_and_stays_in_the_mean():
    qrels = {"q1": {"a": 1.0}, "q2": {"b": 1.0}, "q3": {"c": 1.0}}
    found = measure({"q1": hits("a"), "q2": []}, qrels, 0.5, 100)
    for name in measures(100):
        assert found[name].tolist() == [1.0, 0.0, 0.0], name


def test_a_query_that_nobody_judged_does_not_count():
    found = measure({"q1": hits("a"), "q9": hits("b")}, {"q1": {"a": 1.0}}, 0.5, 100)
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(measures(100), 1)


def test_the_cut_decides_what_is_relevant():
    qrels = {"q": {"a": 1 / 3, "b": 0.5, "c": 1.0}}
    run = {"q": hits("a", "b", "x")}
    assert measure(run, qrels, 0.5, 100)["mrr@10"][0] == 0.5
    assert measure(run, qrels, 0.5, 100)["recall@10"][0] == 0.5
    assert measure(run, qrels, 1 / 3, 100)["mrr@10"][0] == 1.0
    assert measure(run, qrels, 0.6, 100)["mrr@10"][0] == 0.0


def test_the_rank_decides_though_scores_tie():
    qrels = {"q": {"a": 1.0}}
    for order in (["a", "b", "c"], ["c", "b", "a"]):
        found = measure({"q": hits(*order)}, qrels, 0.5, 100)
        assert found["mrr@10"][0] == 1 / (order.index("a") + 1)
        assert found["ndcg@10"][0] == 1 / math.log2(order.index("a") + 2)


def test_no_recall_deeper_than_the_ranking():
    assert "recall@100" not in measures(50)
    assert "recall@100" not in measure({"q": hits("a")}, {"q": {"a": 1.0}}, 0.5, 50)


def test_judged_and_unjudged_agree():
    qrels = {"q1": {"a": 1.0, "b": 0.0}, "q2": {"c": 1.0}}
    run = {"q1": hits("a", "x", "b", "y"), "q2": hits("z")}
    assert measure(run, qrels, 0.5, 100)["judged@10"].tolist() == [0.5, 0.0]
    assert unjudged(run, qrels, 10) == 3
    assert unjudged(run, qrels, 1) == 1


def test_queries_that_no_ranking_can_score_on_are_counted():
    qrels = {"q1": {"a": 1.0}, "q2": {"a": 0.2}, "q3": {"a": 0.0}}
    assert without_relevant(qrels, 0.5) == {"no_gain": 1, "none_relevant": 2}


def test_a_query_that_is_a_document_does_not_find_itself():
    texts = {"a": "green tea", "b": "black tea", "c": "white tea", "x": "red wine"}
    documents = [
        *(("a", "", "Green tea"), ("b", "black", "tea"), ("c", "", "white tea")),
        *(("x", "", "blue"), ("d", "", "green tea")),
    ]
    # c was judged for itself, x is another text, and d is a copy under another id.
    itself = themselves(texts, {"a": {"d": 1.0}, "c": {"c": 1.0}}, documents)
    assert itself == {"a", "b"}
    assert others("a", hits("d", "a", "c"), itself) == hits("d", "c")
    assert others("c", hits("c", "a"), itself) == hits("c", "a")


def test_a_document_twice_in_a_ranking_is_refused():
    with pytest.raises(ValueError, match="query q names a document twice"):
        measure({"q": hits("a", "a")}, {"q": {"a": 1.0}}, 0.5, 100)


DOC_IDS = [f"d{n}" for n in range(30)]
RANKING = st.lists(st.sampled_from(DOC_IDS), unique=True, max_size=30)
JUDGED = st.dictionaries(st.sampled_from(DOC_IDS), st.integers(0, 4), min_size=1)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(RANKING, JUDGED), min_size=1, max_size=4), st.integers(1, 4))
def test_integer_grades_give_what_ir_measures_gives(queries, cut):
    rankings = {f"q{n}": hits(*order) for n, (order, _) in enumerate(queries)}
    qrels = {f"q{n}": judged for n, (_, judged) in enumerate(queries)}
    relevance = {q: {d: grade / 4 for d, grade in judged.items()} for q, judged in qrels.items()}
    ours = measure(rankings, relevance, cut / 4, 100)
    run = {
        query_id: {hit.doc_id: 100.0 - hit.rank for hit in order}
        for query_id, order in rankings.items()
        if order
    }
    theirs = {
        "ndcg@10": ir_measures.nDCG @ 10,
        "mrr@10": ir_measures.RR(rel=cut) @ 10,
        "recall@10": ir_measures.R(rel=cut) @ 10,
        "recall@100": ir_measures.R(rel=cut) @ 100,
        "judged@10": ir_measures.Judged @ 10,
    }
    found = {
        (metric.measure, metric.query_id): metric.value
        for metric in ir_measures.iter_calc(list(theirs.values()), qrels, run)
    }
    for name, foreign in theirs.items():
        expected = [found[foreign, query_id] for query_id in qrels]
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=1e-9, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(RANKING, st.dictionaries(st.sampled_from(DOC_IDS), st.floats(0, 1), min_size=1))
def test_ndcg_of_float_gains_is_a_share_and_the_best_order_has_all_of_it(order, gains):
    value = ndcg(hits(*order), gains, 10)
    assert -1e-12 <= value <= 1 + 1e-9
    best = sorted(gains, key=lambda doc_id: -gains[doc_id])
    if _gained(gains):
        assert ndcg(hits(*best), gains, 10) == pytest.approx(1.0)


def _gained(gains):
    # Below the smallest normal number a product with a discount may round to 0.
    return max(gains.values()) > 1e-300
