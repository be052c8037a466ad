"""Neighbours change places in a share of the lists, with all that is said of them."""

from collections import Counter

import pytest
from pydantic import ValidationError

from bixse.records import Document, Hit
from serve.fanout import Answer, Coverage
from serve.messages import Found
from serve.ranking import hits_of
from serve.settings import ServeArgs
from serve.swaps import Swaps, swapped

SEEN = Coverage(1.0, 1, 1, ())


def found(hits: int) -> Found:
    doc_ids = [f"d{n}" for n in range(hits)]
    ranked = [Hit(doc_id, 1 - n / 10, n + 1) for n, doc_id in enumerate(doc_ids)]
    return Found(ranked, [Document(doc_id, "", f"text of {doc_id}") for doc_id in doc_ids])


def test_two_neighbours_change_places_and_keep_their_scores_and_texts():
    hits = hits_of(swapped(found(4), 2))
    assert [(h.doc_id, h.rank, h.score) for h in hits] == [
        ("d0", 1, 1.0), ("d2", 2, 0.8), ("d1", 3, 0.9), ("d3", 4, 0.7),
    ]  # fmt: skip
    assert [h.text for h in hits] == [f"text of {h.doc_id}" for h in hits]


def test_a_share_of_the_lists_changes_at_every_rank_alike():
    swaps, ranks = Swaps(0.3), Counter()
    for _ in range(2000):
        shown, of_lists = swaps.of(Answer([found(5), found(1), found(0)], SEEN, {}))
        (rank, *none) = of_lists
        assert none == [None, None]
        ranks[rank] += 1
        expected = found(5) if rank is None else swapped(found(5), rank)
        assert shown.results[0] == expected
    assert 1300 < ranks[None] < 1500
    assert all(100 < ranks[rank] < 200 for rank in (1, 2, 3, 4))


def test_a_long_list_changes_where_people_look():
    swaps = Swaps(1.0)
    ranks = {swaps.of(Answer([found(60)], SEEN, {}))[1][0] for _ in range(600)}
    assert ranks == set(range(1, 20))


def test_nothing_changes_unless_it_is_asked_for():
    answer = Answer([found(5)], SEEN, {})
    assert Swaps(0.0).of(answer) == (answer, [None])


def test_swaps_that_no_log_tells_of_are_refused():
    with pytest.raises(ValidationError, match="--swap-share changes lists for --request-log"):
        ServeArgs(index="a", encoder="b", swap_share=0.1)
