"""Fusion by hand, and what holds for any two rankings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.records import Hit
from bixse.retrieval.fusion import fuse_ranks, fuse_scores
from bixse.retrieval.merge import ranked

DENSE = [Hit("a", 0.8, 1), Hit("b", 0.6, 2), Hit("c", 0.1, 3)]
LEXICAL = [Hit("c", 12.0, 1), Hit("a", 3.0, 2), Hit("z", 1.0, 3)]


def test_reciprocal_ranks_by_hand() -> None:
    assert fuse_ranks([DENSE, LEXICAL], 3) == [
        Hit("a", 1 / 61 + 1 / 62, 1),
        Hit("c", 1 / 63 + 1 / 61, 2),
        Hit("b", 1 / 62, 3),
    ]


def test_weighted_scores_by_hand() -> None:
    found = fuse_scores(DENSE, LEXICAL, 0.75, 4)
    assert [hit.doc_id for hit in found] == ["a", "c", "b", "z"]
    expected = [0.75 + 0.25 * 3 / 12, 0.75 * 1.1 / 1.8 + 0.25, 0.75 * 1.6 / 1.8, 0.25 / 12]
    assert [hit.score for hit in found] == pytest.approx(expected)


def test_a_ranking_without_hits_or_span_decides_nothing() -> None:
    assert [hit.doc_id for hit in fuse_ranks([DENSE, []], 10)] == ["a", "b", "c"]
    assert [hit.doc_id for hit in fuse_scores([], LEXICAL, 0.9, 10)] == ["c", "a", "z"]
    assert [hit.score for hit in fuse_scores([Hit("a", -1.0, 1)], [], 1.0, 10)] == [0.0]
    # A small span is one all the same.
    assert [hit.score for hit in fuse_scores([Hit("a", -0.5, 1)], [], 1.0, 10)] == [1.0]
    assert [hit.score for hit in fuse_scores([], [Hit("a", 0.5, 1)], 0.25, 10)] == [0.75]
    assert fuse_ranks([[], []], 10) == []


def test_ties_break_by_doc_id() -> None:
    assert [hit.doc_id for hit in fuse_ranks([[Hit("b", 1, 1)], [Hit("a", 9, 1)]], 2)] == ["a", "b"]


rankings = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 1, width=16)).map(
    lambda scores: ranked(((s, d) for d, s in scores.items()), 8)
)


@given(rankings, rankings, st.integers(1, 8))
def test_one_weight_alone_is_that_ranking(dense: list[Hit], lexical: list[Hit], k: int) -> None:
    only = [hit.doc_id for hit in fuse_scores(dense, lexical, 1.0, 8)]
    assert [d for d in only if d in {h.doc_id for h in dense}] == [h.doc_id for h in dense]
    # A shorter list is the head of a longer one.
    assert fuse_ranks([dense, lexical], k) == fuse_ranks([dense, lexical], 16)[:k]
