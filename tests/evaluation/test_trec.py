from itertools import pairwise

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bixse.evaluation.trec import gains_on_scale, read_qrels, read_run, write_qrels, write_run
from bixse.records import Hit

IDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


def test_a_run_reads_as_trec_expects():
    run = {"q 1": [Hit("a%b", 2.5, 1), Hit("c", -1.0, 2)]}
    assert write_run(run, "bm25") == (b"q%201 Q0 a%25b 1 2.5 bm25\nq%201 Q0 c 2 -1.0 bm25\n")


def test_whole_gains_are_integers_others_are_not():
    qrels = {"q": {"a": 2.0, "b": 0.0, "c": 0.25}}
    assert write_qrels(qrels) == b"q 0 a 2\nq 0 b 0\nq 0 c 0.25\n"


@settings(deadline=None)
@given(
    st.dictionaries(
        IDS,
        st.lists(
            st.tuples(IDS, st.floats(-9, 9)), min_size=1, max_size=4, unique_by=lambda x: x[0]
        ),
        max_size=4,
    )
)
def test_runs_read_back(found):
    run = {
        query_id: [Hit(doc_id, score, rank) for rank, (doc_id, score) in enumerate(pairs, start=1)]
        for query_id, pairs in found.items()
    }
    back = read_run(write_run(run, "s"))
    assert {q: [hit.doc_id for hit in hits] for q, hits in back.items()} == {
        q: [hit.doc_id for hit in hits] for q, hits in run.items()
    }
    for hits in back.values():
        assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
        # trec_eval holds scores in float32 and must find the same order there.
        scores = [np.float32(hit.score) for hit in hits]
        assert all(a > b for a, b in pairwise(scores))


def test_scores_that_fall_are_kept_and_ties_fall_one_step():
    scores = [np.float32(0.9), np.float32(0.7), np.float32(0.7), np.float32(0.1)]
    run = {"q": [Hit(f"d{n}", float(score), n + 1) for n, score in enumerate(scores)]}
    back = [np.float32(hit.score) for hit in read_run(write_run(run, "s"))["q"]]
    assert [back[0], back[1], back[3]] == [scores[0], scores[1], scores[3]]
    assert back[2] == np.nextafter(scores[2], np.float32(-1))


@settings(deadline=None)
@given(st.dictionaries(IDS, st.dictionaries(IDS, st.floats(0, 4), min_size=1), max_size=4))
def test_qrels_read_back(qrels):
    assert read_qrels(write_qrels(qrels)) == qrels


def test_ir_measures_reads_the_same():
    run = {"q": [Hit("a", 2.0, 1), Hit("b", 1.0, 2)]}
    qrels = {"q": {"a": 1.0, "b": 2.0}}
    theirs = list(ir_measures.read_trec_run(write_run(run, "s").decode()))
    assert [(r.query_id, r.doc_id, r.score) for r in theirs] == [("q", "a", 2.0), ("q", "b", 1.0)]
    theirs = list(ir_measures.read_trec_qrels(write_qrels(qrels).decode()))
    assert [(r.query_id, r.doc_id, r.relevance) for r in theirs] == [("q", "a", 1), ("q", "b", 2)]


def test_the_rank_orders_a_run_whatever_the_lines_or_scores_say():
    data = b"q Q0 b 2 1.0 s\nq Q0 a 1 1.0 s\n\n"
    assert [hit.doc_id for hit in read_run(data)["q"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"q Q0 a 1 1.0\n", "line 1 of a run has 5 columns, not 6"),
        (b"q Q0 a 1 1 s\nq Q0 a first 1 s\n", "line 2 of a run has rank first"),
        (b"q Q0 a 1 1 s\nq Q0 a 2 1 s\n", "line 2 of a run names document a again"),
    ],
)
def test_a_broken_run_is_one_sentence(data, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_run(data)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"q 0 a\n", "line 1 of qrels has 3 columns, not 4"),
        (b"q 0 a good\n", "line 1 of qrels has gain good"),
        (b"q 0 a 1\nq 0 a 2\n", "line 2 of qrels judges document a again"),
    ],
)
def test_broken_qrels_are_one_sentence(data, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_qrels(data)


def test_an_empty_id_is_refused():
    with pytest.raises(ValueError, match="empty id"):
        write_run({"": [Hit("a", 1.0, 1)]}, "s")


def test_relevance_becomes_whole_grades_again():
    third = 0.3333333432674408  # 1/3 in float32, as artefacts hold it
    assert gains_on_scale({"q": {"a": third, "b": 1.0}}, (0.0, 1.0, 2.0, 3.0)) == {
        "q": {"a": 1.0, "b": 3.0}
    }
    assert gains_on_scale({"q": {"a": third}}, (1.0, 2.0, 3.0, 4.0)) == {"q": {"a": 1.0}}


def test_every_grade_of_a_wide_scale_is_whole_again():
    relevance = {str(n): float(np.float32(n / 1000)) for n in range(1001)}
    gains = gains_on_scale({"q": relevance}, (0.0, 1000.0))["q"]
    assert gains == {str(n): float(n) for n in range(1001)}
