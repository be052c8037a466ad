"""Labels: equal texts are one, every pair stands in one row of an epoch."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.training.batches import batch_of
from bixse.training.groups import (
    Labels,
    Preferred,
    count_groups,
    count_rows,
    epoch_groups,
    epoch_rows,
    group,
)


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


@given(
    st.dictionaries(
        st.tuples(st.integers(0, 5), st.integers(0, 9)),
        st.sampled_from([0.0, 0.25, 0.5, 1.0]),
        min_size=1,
    ),
    st.integers(2, 5),
)
def test_a_group_is_a_positive_with_negatives_of_its_query(
    judged: dict[tuple[int, int], float], docs_per_query: int
) -> None:
    judged |= {(6, 0): 1.0, (6, 1): 0.0}
    labels = labels_of([(f"q{q}", f"d{d}", z) for (q, d), z in judged.items()])
    rows = epoch_groups(labels, docs_per_query, 0.5, seed=7, epoch=1)
    assert len(rows) == count_groups(labels, 0.5)
    positives = []
    for row in rows:
        query = labels.query_of(row)
        below = labels.relevance_P[labels.query_of(np.arange(labels.pairs)) == query[0]] < 0.5
        assert (query == query[0]).all()
        assert len(set(row.tolist())) == len(row) == min(docs_per_query, 1 + below.sum())
        assert (labels.relevance_P[row] >= 0.5).tolist() == [False] * (len(row) - 1) + [True]
        positives.append(row[-1])
    # Each positive of a query with a negative, once.
    beaten = {q for (q, _), z in judged.items() if z < 0.5}
    assert len(set(positives)) == len(positives)
    assert len(positives) == sum(z >= 0.5 and q in beaten for (q, _), z in judged.items())
    again = epoch_groups(labels, docs_per_query, 0.5, seed=7, epoch=1)
    assert all((a == b).all() for a, b in zip(rows, again, strict=True))


def test_negatives_are_drawn_anew_every_epoch() -> None:
    labels = labels_of([("q", "d", 1.0), *(("q", f"d{d}", 0.0) for d in range(40))])
    drawn = [epoch_groups(labels, 9, 0.5, seed=0, epoch=epoch)[0] for epoch in range(5)]
    assert len({tuple(sorted(row.tolist())) for row in drawn}) == 5


def test_judgments_without_a_contrast_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to tell apart"):
        count_groups(labels_of([("q0", "a", 1.0), ("q1", "b", 0.0)]), 0.5)


JUDGED = [
    *(("q0", "a", 1.0), ("q0", "b", 0.5), ("q0", "c", 0.0)),
    *(("q1", "b", 0.25), ("q1", "c", 0.5)),
]


def preferring(*rows: tuple[str, str, str, float]) -> Labels:
    query_ids, a, b, prob_a = zip(*rows, strict=True)
    preferred = Preferred(query_ids, a, b, np.asarray(prob_a, np.float32))
    query_ids, doc_ids, relevance = zip(*JUDGED, strict=True)
    queries, documents = ({name: name for name in names} for names in (query_ids, doc_ids))
    # Equal texts are one document: A is a.
    documents["A"] = "A"
    doc_ids, query_ids = (*doc_ids, "A"), (*query_ids, "q0")
    return group(
        query_ids,
        doc_ids,
        np.asarray((*relevance, 1.0), np.float32),
        queries,
        documents,
        {},
        preferred,
    )


def test_preferences_of_a_pair_are_turned_one_way_and_averaged() -> None:
    labels = preferring(
        ("q0", "a", "b", 0.9),
        ("q0", "b", "A", 0.3),
        ("q0", "c", "b", 0.25),
        ("q0", "a", "A", 0.5),  # one document
        ("q1", "c", "b", 0.0),
        ("q1", "b", "a", 1.0),  # a was not judged for q1
        ("q1", "z", "b", 1.0),
        ("q2", "a", "b", 1.0),
        ("q0", "a", "z", 1.0),
    )
    found = labels.preferences
    assert found is not None
    assert found.from_Q1.tolist() == [0, 2, 3]
    assert found.a_R.tolist() == [0, 1, 1]
    assert found.b_R.tolist() == [1, 2, 2]
    assert found.prob_a_R.tolist() == pytest.approx([(0.9 + 0.7) / 2, 0.75, 1.0])
    # In the batch only those whose two documents are both there.
    part = batch_of(labels, np.asarray([0, 1, 3]))
    assert (part.row_R.tolist(), part.a_R.tolist(), part.b_R.tolist()) == ([0], [0], [1])
    assert batch_of(labels, np.asarray([0, 2, 3])).row_R.tolist() == [0, 0, 1]
    assert len(batch_of(labels, np.asarray([0, 2])).row_R) == 0


@pytest.mark.parametrize(
    "row, sentence",
    [
        (("q0", "a", "b", 1.5), "prob_a outside"),
        (("q0", "a", "b", float("nan")), "prob_a outside"),
        (("q1", "a", "c", 0.5), "none of 1 preferences is between two documents judged"),
    ],
)
def test_preferences_that_teach_nothing_are_refused(
    row: tuple[str, str, str, float], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        preferring(row)
