"""What an audit finds in judgments, on rows made by hand."""

import numpy as np
import pyarrow as pa
import pytest

from bixse.judging.audit import (
    Hidden,
    align,
    changes,
    copies,
    histogram,
    matched,
    positives_among_negatives,
)
from bixse.records import JUDGMENTS
from bixse.scale import UMBRELA

SCALE = UMBRELA.values


def judgments(rows: dict[tuple[str, str], list[float]]) -> pa.Table:
    found = [
        {
            "query_id": query_id, "doc_id": doc_id, "grade_probs": probs, "judge": "j",
            "relevance": UMBRELA.relevance(probs), "prompt": "", "origin": "llm",
        }
        for (query_id, doc_id), probs in rows.items()
    ]  # fmt: skip
    return pa.Table.from_pylist(found, schema=JUDGMENTS)


def keys(*pairs: tuple[str, str]) -> pa.Table:
    return pa.table({"query_id": [q for q, _ in pairs], "doc_id": [d for _, d in pairs]})


def test_pairs_are_matched_by_both_ids() -> None:
    left = keys(("q1", "a"), ("q1", "b"), ("q2", "a"), ("q1", "a"))
    right = keys(("q2", "a"), ("q1", "a"), ("q9", "b"))
    rows, others = matched(left, right)
    assert rows.tolist() == [0, 2, 3]
    assert others.tolist() == [1, 0, 1]


def test_alignment_keeps_values_with_their_pairs() -> None:
    table = judgments(
        {("q1", "a"): [0, 0, 0, 1], ("q1", "b"): [1, 0, 0, 0], ("q2", "a"): [0, 1, 0, 0]}
    )
    human = pa.table(
        {
            "query_id": ["q2", "q1"],
            "doc_id": ["a", "a"],
            "relevance": pa.array([0.25, 1.0], pa.float32()),
        }
    )
    found = align(table, np.array([0.9, 0.0, 0.3]), human, [0, 1, 2, 3], {"a": 7, "b": 5})
    assert found.judged_N.tolist() == [0.9, 0.3]
    assert found.human_N.tolist() == [1.0, 0.25]
    assert found.query_N[0] != found.query_N[1]
    assert found.length_N is not None
    assert found.length_N.tolist() == [7, 7]


def test_copies_are_grouped_by_text() -> None:
    table = pa.table({"doc_id": ["c", "a", "b", "d"], "hash": ["x", "x", "y", "z"]})
    assert copies(table) == {"x": ["a", "c"]}


def test_positives_among_negatives_are_named() -> None:
    """`a` and `b` share a text; q1 and q2 are the same question."""
    copies_of = {"a": ["b"], "b": ["a"], "c": []}
    key = {"q1": "tea", "q2": "tea", "q3": "coffee"}

    def find(*rows: tuple[str, str, float]) -> list[Hidden]:
        return positives_among_negatives(rows, key, copies_of, 0.5)

    assert find(("q1", "a", 1.0), ("q1", "b", 0.1)) == [Hidden("q1", "a", 1.0, "b", 0.1)]
    assert find(("q1", "a", 1.0)) == [Hidden("q1", "a", 1.0, "b", None)]
    assert find(("q1", "a", 1.0), ("q1", "b", 0.6)) == []
    assert find(("q1", "c", 1.0), ("q2", "c", 0.0)) == [Hidden("q1", "c", 1.0, "c", 0.0)]
    # Irrelevant everywhere, relevant to another question, or judged twice by different judges:
    assert find(("q1", "a", 0.1), ("q1", "b", 0.4)) == []
    assert find(("q1", "c", 1.0), ("q3", "c", 0.0)) == []
    assert find(("q1", "c", 1.0), ("q1", "c", 0.2)) == []
    assert find(("q1", "a", 0.2), ("q1", "a", 0.4)) == []
    # Stored as float32, 0.7 is a little less.
    stored = float(np.float32(0.7))
    lone = [Hidden("q1", "a", stored, "b", None)]
    assert positives_among_negatives([("q1", "a", stored)], key, copies_of, 0.7) == lone


def test_histogram_counts_the_nearest_grade_by_name() -> None:
    names = np.array(["bm25", "dense", "bm25"], object)
    assert histogram(np.array([0.0, 0.6, 1.0]), SCALE, names) == {
        "bm25": [1, 0, 0, 1],
        "dense": [0, 0, 1, 0],
    }


def test_changes_of_a_second_answer() -> None:
    first = judgments(
        {("q", "a"): [0, 0, 0, 1], ("q", "b"): [0.6, 0.4, 0, 0], ("q", "c"): [1, 0, 0, 0]}
    )
    second = judgments(
        {("q", "b"): [0.4, 0.6, 0, 0], ("q", "a"): [0, 0, 0.25, 0.75], ("q", "z"): [1, 0, 0, 0]}
    )
    found = changes(first, second, SCALE)
    assert found.pairs == 2
    # a: 1 -> 11/12 stays grade 3; b: 2/15 -> 1/5 goes from grade 0 to 1.
    assert found.flips == 1
    assert found.flip_rate == 0.5
    assert found.largest_change == pytest.approx(0.25)
    assert found.mean_change == pytest.approx((1 / 12 + 1 / 15) / 2)
    assert changes(first, first, SCALE).flips == 0


def test_changes_need_a_common_pair() -> None:
    with pytest.raises(ValueError, match="share no pair"):
        changes(judgments({("q", "a"): [1, 0, 0, 0]}), judgments({("q", "b"): [1, 0, 0, 0]}), SCALE)
