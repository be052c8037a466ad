"""Stored vectors are read and scored alike, of whatever type and in however many files."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bixse.retrieval.building import build_shard
from bixse.retrieval.library import faiss
from bixse.retrieval.scoring import ROUNDING
from bixse.retrieval.settings import Retrieval
from bixse.retrieval.stored import Stored
from bixse.retrieval.structures import trained
from tests.retrieval.made import clustered, table, unit

RNG = np.random.default_rng(11)
VECTORS = clustered(640, 48, seed=3)
QUERIES = unit(RNG.normal(size=(9, 48)))
ROWS = np.array([RNG.permutation(640)[:70] for _ in QUERIES])


def stored(folder: Path, kind: str, cuts: list[int]) -> Stored:
    """The rows between these cuts, each run in files of its own."""
    wanted = {"structure": "ivf_pq", "nlist": 1, "pq_m": 4, "stored": kind}
    settings = Retrieval.model_validate(wanted)
    template = trained(settings, VECTORS)
    parts = []
    for start, end in pairwise(cuts):
        place = folder / f"{start}-{end}"
        place.mkdir()
        ids = [f"d{row:05d}" for row in range(start, end)]
        copy = faiss.clone_index(template)
        build_shard(place, table(ids), VECTORS[start:end], settings, copy)
        loaded = Stored.load(place)
        assert loaded is not None
        parts.append(loaded)
    return Stored.together(parts)


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_rows_of_several_files_are_those_of_one(kind: str, tmp_path: Path) -> None:
    whole = stored(tmp_path, kind, [0, 640])
    pieces = stored(tmp_path, kind, [0, 250, 251, 600, 640])
    assert len(whole) == len(pieces) == 640
    rows = RNG.permutation(640)
    assert (pieces.read(rows) == whole.read(rows)).all()
    assert np.abs(whole.read(rows) - VECTORS[rows]).max() < 0.01
    rows_QF = ROWS.copy()
    rows_QF[2, 5:] = -1
    found, expected = pieces.falling(QUERIES, rows_QF), whole.falling(QUERIES, rows_QF)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_float32_scores_fall_and_are_right(kind: str, tmp_path: Path) -> None:
    vectors = stored(tmp_path, kind, [0, 100, 640])
    rows_QF = ROWS.copy()
    rows_QF[2, 5:] = -1
    scores, rows = vectors.falling(QUERIES, rows_QF)
    assert (np.diff(scores[:, :5]) <= 0).all()
    assert np.sort(rows, axis=1).tolist() == np.sort(rows_QF, axis=1).tolist()
    held = rows >= 0
    read = np.stack([vectors.read(np.maximum(some, 0)) for some in rows]).astype(float)
    exact = np.einsum("qfd,qd->qf", read, QUERIES.astype(float))
    assert np.abs(scores - exact)[held].max() < ROUNDING
    assert (scores[~held] == -np.inf).all()
