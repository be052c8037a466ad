"""What a filter costs and finds, by how many of the rows it keeps.

    python -m benchmarks.filtered --rows 40000 --dim 64
    python -m benchmarks.filtered --rows 100000 --dim 384 --shares 0.4 0.2 0.1 0.05
    python -m benchmarks.filtered --quick --json

One shard a structure, searched among a part of its rows in three ways: `faiss` is FAISS's own
filtered search, as wide as without a filter (hnsw and ivf_flat), `all` compares every row kept, and
`served` is what `Shard` does (`retrieval/neighbours.py`).
Recall@10 is against exact search of the subset; milliseconds are the median and the mean of a
query alone. Vectors are made up around topics, of which filters know nothing, or, with
`--by-topic`, keep some whole: most queries then have their nearest documents filtered out.
"""

import json
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import tyro

from bixse.records import CORPUS
from bixse.retrieval import finder as finder_module
from bixse.retrieval.building import build_shard
from bixse.retrieval.library import faiss, use_threads
from bixse.retrieval.metadata import Kept
from bixse.retrieval.scoring import Vectors
from bixse.retrieval.settings import Retrieval, Structure
from bixse.retrieval.shard import Shard
from bixse.retrieval.structures import parameters

K = 10
TOPICS = 200


@dataclass(frozen=True)
class Options:
    """Sizes."""

    rows: int = 40_000
    """Documents of the shard."""
    dim: int = 64
    """Numbers a vector."""
    queries: int = 100
    """Queries, drawn as the documents are."""
    shares: tuple[float, ...] = (0.5, 0.05, 0.005)
    """Parts of the rows that a filter keeps."""
    by_topic: bool = False
    """Filters keep a random part of the topics, and not of the rows."""
    structures: tuple[Structure, ...] = ("exact", "hnsw", "ivf_flat", "ivf_pq")
    """What is built."""
    quick: bool = False
    """Small: the mechanics only."""
    json: bool = False
    """One JSON object on standard output."""


def main() -> None:
    options = tyro.cli(Options)
    if options.quick:
        options = replace(options, rows=10_000, dim=16, queries=5)
    use_threads(1)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(TOPICS, options.dim))
    topics = rng.integers(TOPICS, size=options.rows + options.queries)
    made = centres[topics]
    made = made + rng.normal(size=made.shape) * 0.7
    made = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)
    vectors, queries = made[: options.rows], made[options.rows :]
    draws = rng.random(options.rows)
    if options.by_topic:
        # Evenly, so that a share of the topics is that share.
        draws = (rng.permutation(TOPICS) / TOPICS)[topics[: options.rows]]
    results: list[dict[str, Any]] = []
    for structure in options.structures:
        with tempfile.TemporaryDirectory() as folder:
            build_shard(Path(folder), _documents(options.rows), vectors, _settings(structure))
            loaded = Shard.load(Path(folder))
            results += [
                {"structure": structure, "kept": share, "way": way}
                | _measured(loaded, vectors, queries, draws < share, way)
                for share in options.shares
                for way in ("faiss", "all", "served")
                if way != "faiss" or structure in ("hnsw", "ivf_flat")
            ]
    for row in [] if options.json else results:
        print(
            f"{row['structure']:<9} {row['kept']:<6} {row['way']:<6} "
            f"recall {row['recall']:.3f}  {row['ms']:.2f} ms, mean {row['mean_ms']:.2f}"
        )
    if options.json:
        json.dump({"rows": options.rows, "results": results}, sys.stdout)


def _documents(rows: int) -> pa.Table:
    ids = [f"d{number:08d}" for number in range(rows)]
    return pa.table([ids, [""] * rows, [""] * rows], schema=CORPUS)


def _settings(structure: Structure) -> Retrieval:
    return Retrieval(
        structure=structure, hnsw_m=16, ef_construction=80, ef_search=32, nprobe=8, refine_factor=16
    )


def _measured(
    loaded: Shard, vectors_ND: Vectors, queries_QD: Vectors, mask_N: Any, way: str
) -> dict[str, float]:
    kept = Kept.of(mask_N)
    width = loaded.finder.width

    def rows_of(query_1D: Vectors) -> Any:
        if way != "faiss":
            return loaded.search_rows(query_1D, K, width, kept)[0]
        params = parameters(loaded.finder.index, width, K, K)
        known: Any = faiss  # faiss' type stubs lack it.
        params.sel = known.IDSelectorBitmap(kept.bits)
        return loaded.finder.index.search(query_1D, K, params=params)[1]

    scores_QN = np.where(mask_N, queries_QD @ vectors_ND.T, -np.inf)
    found, milliseconds = 0, []
    # What is served where neighbours never suffice: every row kept is compared.
    never = mock.patch.object(finder_module, "neighbour_counts", return_value=[])
    with never if way == "all" else nullcontext():
        for query, scores_N in zip(queries_QD, scores_QN, strict=True):
            true = set(np.argpartition(-scores_N, K)[:K].tolist())
            started = time.perf_counter()
            (rows,) = rows_of(query[None])
            milliseconds.append((time.perf_counter() - started) * 1e3)
            found += len(true & set(rows.tolist()))
    return {
        "recall": found / (K * len(queries_QD)),
        "ms": round(statistics.median(milliseconds), 3),
        "mean_ms": round(statistics.mean(milliseconds), 3),
    }


if __name__ == "__main__":
    main()
