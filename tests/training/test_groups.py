"""Labels: equal texts are one, every pair stands in one row of an epoch."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.training.groups import Labels, count_rows, epoch_rows, group


def labels_of(rows: list[tuple[str, str, float]], **seeds: str) -> Labels:
    """Labels whose texts are their ids."""
    query_ids, doc_ids, relevance = zip(*rows, strict=True)
    queries, documents = ({name: name for name in names} for names in (query_ids, doc_ids))
    return group(query_ids, doc_ids, np.asarray(relevance, np.float32), queries, documents, seeds)


def test_equal_texts_are_one_and_their_grades_are_averaged() -> None:
    labels = group(
        ["q1", "q2", "q1", "q3"],
        ["a", "b", "c", "a"],
        np.asarray([1.0, 0.5, 0.25, 0.0], np.float32),
        {"q1": "How far?", "q2": "how  FAR?", "q3": "Why?"},
        {"a": "text a", "b": "Text A", "c": "text c", "unread": "x"},
        {"q3": "c", "q1": "c", "q2": "unread"},
    )
    assert labels.query_text_Q.to_pylist() == ["How far?", "Why?"]
    assert labels.document_text_D.to_pylist() == ["text a", "text c"]
    assert labels.pairs_from_Q1.tolist() == [0, 2, 3]
    assert labels.document_P.tolist() == [0, 1, 0]
    assert labels.relevance_P.tolist() == [0.75, 0.25, 0.0]
    assert labels.query_of(np.arange(3)).tolist() == [0, 0, 1]
    assert labels.suspects == {1: (1,)}
    assert labels.judgments == 4


@pytest.mark.parametrize(
    "rows, sentence",
    [
        ([("q", "a", 0.0), ("q", "b", 0.0)], "all 2 judgments have relevance 0"),
        ([("q", "a", 1.5)], "outside"),
        ([("q", "a", float("nan"))], "outside"),
    ],
)
def test_labels_that_teach_nothing_are_refused(
    rows: list[tuple[str, str, float]], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        labels_of(rows)


def test_no_judgments_are_refused() -> None:
    with pytest.raises(ValueError, match="no judgments"):
        group([], [], np.zeros(0, np.float32), {}, {}, {})


@given(
    st.sets(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_every_pair_stands_in_one_row(
    pairs: set[tuple[int, int]], docs_per_query: int, epoch: int
) -> None:
    labels = labels_of([(f"q{q}", f"d{d}", 1.0) for q, d in pairs])
    rows = epoch_rows(labels, docs_per_query, seed=7, epoch=epoch)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(pairs)))
    assert len(rows) == count_rows(labels, docs_per_query)
    sizes = Counter(labels.query_of(row)[0] for row in rows if len(row) < docs_per_query)
    assert all(count == 1 for count in sizes.values())
    for row in rows:
        assert 1 <= len(row) <= docs_per_query
        assert len(set(labels.query_of(row).tolist())) == 1
    again = epoch_rows(labels, docs_per_query, seed=7, epoch=epoch)
    assert all((a == b).all() for a, b in zip(rows, again, strict=True))


def test_another_epoch_shares_rows_differently() -> None:
    labels = labels_of([("q", f"d{d}", 1.0) for d in range(40)])
    first, second = (epoch_rows(labels, 4, seed=0, epoch=epoch) for epoch in (0, 1))
    assert {tuple(row) for row in first} != {tuple(row) for row in second}
