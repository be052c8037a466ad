"""A graph's vectors: near are those that walks bring together; lists are exact, seeds decide."""

import numpy as np
import pytest

from bixse.candidates import graph
from bixse.candidates.bands import Bands, triplet_sources
from bixse.candidates.graph import linked, neighbour_lists, node_vectors
from bixse.candidates.settings import Neighbours

WALK = (0, 0, 1, 1)


def rings(count: int, size: int) -> list[tuple[str, str]]:
    """`count` rings of `size` nodes, each node linked with the next two."""
    return [
        (f"{ring}-{node:02}", f"{ring}-{(node + step) % size:02}")
        for ring in range(count)
        for node in range(size)
        for step in (1, 2)
    ]


def test_isolated_documents_are_no_nodes() -> None:
    assert linked([("b", "a"), ("c", "c"), ("a", "d")]) == ["a", "b", "d"]
    with pytest.raises(ValueError, match="'c' has no link with another"):
        node_vectors([("b", "a"), ("c", "c")], ["a", "b", "c"], 8, WALK, seed=0)


def test_a_walk_that_goes_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="a step whose weight is not 0"):
        Neighbours(walk=(0, 0))


def test_steps_of_a_walk_by_hand() -> None:
    # a - b - c: from a or c one step ends at b, from b at a or c.
    links = [("a", "b"), ("c", "b")]
    one, two = (node_vectors(links, ["a", "b", "c"], 8, walk, seed=3) for walk in ((1,), (0, 1)))
    start = np.random.default_rng(3).normal(size=(3, 8))
    unit = lambda row: row / np.linalg.norm(row)  # noqa: E731
    np.testing.assert_allclose(one[0], unit(start[1]), atol=1e-6)
    np.testing.assert_allclose(one[1], unit(start[0] + start[2]), atol=1e-6)
    np.testing.assert_allclose(two[0], unit(start[0] + start[2]), atol=1e-6)
    np.testing.assert_allclose(two[1], unit(start[1]), atol=1e-6)


def test_near_in_the_graph_is_near_in_the_vectors() -> None:
    links = rings(5, 20)
    nodes = linked(links)
    vectors = node_vectors(links, nodes, 64, WALK, seed=0)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for row, nearest in enumerate(neighbour_lists(vectors, 6)):
        assert row not in nearest
        assert {nodes[other][0] for other in nearest} == {nodes[row][0]}


def test_direction_order_and_loops_of_links_mean_nothing() -> None:
    links = rings(2, 10)
    nodes = linked(links)
    plain = node_vectors(links, nodes, 16, WALK, seed=0)
    turned = [(b, a) for a, b in reversed(links)] + [("0-00", "0-00")]
    np.testing.assert_array_equal(node_vectors(turned, nodes, 16, WALK, seed=0), plain)
    assert np.abs(node_vectors(links, nodes, 16, WALK, seed=1) - plain).max() > 0.1


def test_lists_are_exact_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    vectors[7] = vectors[3]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    whole = [rows.tolist() for rows in neighbour_lists(vectors, 100)]
    monkeypatch.setattr(graph, "BLOCK_ROWS", 8)
    assert [rows.tolist() for rows in neighbour_lists(vectors, 100)] == whole
    for row, found in enumerate(whole):
        assert sorted([*found, row]) == list(range(50))
        cosine = vectors[found] @ vectors[row]
        assert (np.diff(cosine) <= 1e-6).all()
    # A copy is the nearest, and of two copies the first stands first.
    assert (whole[3][0], whole[7][0]) == (7, 3)
    assert whole[0].index(3) + 1 == whole[0].index(7)


def test_triplets_are_the_same_whoever_draws_them() -> None:
    links = rings(6, 20)
    nodes = linked(links)
    vectors = node_vectors(links, nodes, 32, WALK, seed=0)
    bands = Bands(positive=(0, 6), hard=(20, 30))

    def drawn(of: list[str], seed: int) -> dict[str, object]:
        lists = dict(zip(nodes, neighbour_lists(vectors, bands.hard[1]), strict=True))
        return {
            node: triplet_sources(node, [nodes[n] for n in lists[node]], nodes, bands, seed=seed)
            for node in of
        }

    whole = drawn(nodes, seed=0)
    for workers in (2, 3, 7):
        shares = [drawn(nodes[worker::workers][::-1], seed=0) for worker in range(workers)]
        assert {node: found for share in shares for node, found in share.items()} == whole
    assert drawn(nodes, seed=1) != whole
