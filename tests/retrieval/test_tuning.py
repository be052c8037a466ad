"""The tuner against brute force: on made-up curves, and on real structures by counted work."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.retrieval.building import build_shard
from bixse.retrieval.comparing import compare
from bixse.retrieval.measuring import point, watch
from bixse.retrieval.settings import Retrieval, Search
from bixse.retrieval.shard import Shard
from bixse.retrieval.structures import resolve
from bixse.retrieval.tuning import (
    Point,
    Requirements,
    Tuning,
    choose,
    grid,
    ladder,
    pareto,
    table,
    tune,
)
from tests.retrieval.made import clustered
from tests.retrieval.made import table as documents


def made_up(search: Search, ceiling: float = 1.0) -> Point:
    """Recall that saturates in nprobe and refine_factor; work that is linear in both."""
    refined = 1 - 0.5 ** (search.refine_factor + 1)
    recall = ceiling * refined * (1 - 0.9**search.nprobe)
    # No two searches have the same.
    work = 1000.0 + 100 * search.nprobe + 41 * search.refine_factor
    return Point("ivf_pq", search, recall, work, latency_ms=work / 1000)


@given(st.floats(0.05, 0.999), st.integers(2, 400))
def test_the_choice_is_the_best_of_the_grid(target: float, lists: int) -> None:
    columns = grid(Retrieval(structure="ivf_pq", nlist=lists), 1000, 10)
    every = [made_up(search) for column in columns for search in column]
    wanted = Requirements(target)
    asked: list[Search] = []

    def measure(searches: Sequence[Search]) -> list[Point]:
        asked.extend(searches)
        return [made_up(search) for search in searches]

    if not any(point.recall >= target for point in every):
        with pytest.raises(ValueError, match="reaches recall"):
            tune(columns, measure, wanted)
        return
    assert tune(columns, measure, wanted).chosen == choose(every, wanted)
    assert len(asked) == len(set(asked)) <= len(columns) * 8


def test_half_a_candidate_a_hit_more_is_a_search_of_its_own(tmp_path: Path) -> None:
    """Between two and three times as many candidates lie a third of all that are scored again."""
    settings = resolve(Retrieval(structure="ivf_pq", nlist=8, pq_m=16), ROWS, DIM)
    assert {2, 2.5, 3} < {column[0].refine_factor for column in grid(settings, ROWS, 10)}
    build_shard(tmp_path, documents(DOC_IDS), VECTORS, settings)
    finder = Shard.load(tmp_path).finder
    for factor, wanted in ((2, 20), (2.5, 25), (2.51, 26), (3, 30)):
        width = Search(nprobe=8, refine_factor=factor)
        assert finder.candidates(QUERIES, 10, width)[1].shape[1] == wanted


def test_what_was_asked_for_is_taken_whatever_it_finds() -> None:
    asked = Retrieval(structure="ivf_flat", nlist=100, nprobe=1, target_recall=0.99)
    columns = grid(asked, 1000, 10)
    found = tune(columns, lambda searches: [made_up(s) for s in searches], Requirements(0.99))
    assert found.chosen.search.nprobe == 1
    assert found.chosen.recall < 0.99
    assert len(grid(asked.replace(structure="exact"), 1000, 10)) == 1


def test_what_cannot_be_reached_is_refused_with_the_best() -> None:
    columns = grid(Retrieval(structure="ivf_pq", nlist=64), 1000, 10)

    def measure(searches: Sequence[Search]) -> list[Point]:
        return [made_up(search, ceiling=0.9) for search in searches]

    with pytest.raises(
        ValueError, match=r"no search of ivf_pq reaches recall 0\.95, the best is 0"
    ):
        tune(columns, measure, Requirements(0.95))
    with pytest.raises(ValueError, match=r"recall 0\.8 takes .* ms in ivf_pq, more than"):
        tune(columns, measure, Requirements(0.8, latency_ms=1.0))
    fast = tune(columns, measure, Requirements(0.8, latency_ms=10.0)).chosen
    assert fast.recall >= 0.8


def test_the_ladder_climbs_by_at_most_a_tenth() -> None:
    steps = ladder(2048)
    assert steps[0] == 1
    assert steps[-1] == 2048
    assert all(b - a == 1 or b <= 1.1 * a for a, b in itertools.pairwise(steps))
    assert ladder(1) == [1]
    assert ladder(10, 10) == [10]


def test_the_table_marks_what_none_beats() -> None:
    def of(work: float, recall: float) -> Point:
        return Point("hnsw", Search(ef_search=int(work)), recall, work, 1.0)

    points = [of(1, 0.5), of(2, 0.4), of(3, 0.9), of(4, 0.9)]
    assert pareto(points) == [points[0], points[2]]
    rows = table(points)
    assert [row["pareto"] for row in rows] == [True, False, True, False]
    assert rows[0]["search"] == {"ef_search": 1}


ROWS, DIM = 4000, 32
VECTORS, QUERIES = clustered(ROWS, DIM, seed=3), clustered(30, DIM, seed=4)
DOC_IDS = [f"d{n:05d}" for n in range(ROWS)]


@pytest.mark.parametrize("structure", ["hnsw", "ivf_flat", "ivf_pq", "ivf_rabitq"])
def test_the_choice_is_within_five_percent_of_brute_force(tmp_path: Path, structure: str) -> None:
    """Counted work of the tuner's choice against the cheapest of a grid of every nprobe or ef."""
    asked = Retrieval(structure=structure, nlist=64 if "ivf" in structure else None, hnsw_m=16,
                      ef_construction=60, pq_m=16)  # fmt: skip
    settings = resolve(asked, ROWS, DIM)
    build_shard(tmp_path, documents(DOC_IDS), VECTORS, settings)
    shard = Shard.load(tmp_path)
    order = np.argsort(-(QUERIES @ VECTORS.T), axis=1)[:, :10]
    truth = [frozenset(DOC_IDS[row] for row in rows) for rows in order]

    def measure(searches: Sequence[Search]) -> list[Point]:
        seen = watch(shard, settings, searches, QUERIES, truth, 10)
        return [point(structure, s, [w], 300) for s, w in zip(searches, seen, strict=True)]

    wanted = Requirements(0.95)
    chosen: Tuning = tune(grid(settings, ROWS, 10), measure, wanted)
    every = [Search(nprobe=nprobe, refine_factor=factor)
             for nprobe in range(1, 41, 1 if structure == "ivf_flat" else 3)
             for factor in ((1,) if structure == "ivf_flat" else (1, 2, 4, 8))]  # fmt: skip
    if structure == "hnsw":
        every = [Search(ef_search=ef) for ef in range(10, 120, 2)]
    best = choose(measure(every), wanted)
    assert chosen.chosen.recall >= 0.95
    assert chosen.chosen.work <= 1.05 * best.work


def test_structures_are_compared_on_a_sample() -> None:
    settings = Retrieval(ef_construction=40, hnsw_m=8, target_recall=0.9)

    def compared(asked: Retrieval) -> dict[str, dict[str, Any]]:
        found = compare(DOC_IDS[:1500], VECTORS[:1500], QUERIES, asked, 10**6, 10)
        return {row["structure"]: row for row in found}

    rows = compared(settings)
    assert list(rows) == ["exact", "hnsw", "ivf_flat", "ivf_pq", "ivf_rabitq"]
    assert rows["exact"]["recall"] == 1.0
    works = {name: row["work"] for name, row in rows.items()}
    chosen = next(name for name, row in rows.items() if row["chosen"])
    assert works[chosen] == min(works.values())
    assert works["exact"] == max(works.values())
    rows = compared(settings.replace(memory_budget_mb=50.0))
    assert "more than the memory budget" in rows["hnsw"]["out"]
    assert next(name for name, row in rows.items() if row["chosen"]) in ("ivf_pq", "ivf_rabitq")
    with pytest.raises(ValueError, match=r"no structure meets what is asked for: exact: .* memory"):
        compared(settings.replace(memory_budget_mb=1.0))
