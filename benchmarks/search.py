"""Shards of one machine against one FAISS index: queries a second at equal recall.

    python -m benchmarks.search --rows 100000 --structures exact hnsw ivf_flat ivf_rabitq
    python -m benchmarks.search --rows 20000 --threads 1
    python -m benchmarks.search --quick --json

The one index is FAISS itself as its documentation says to use it: all vectors in one index, a batch
of queries in one call on `threads` threads, codes refined by `IndexRefine`; it gives row numbers.
It is asked twice: as it is installed, and multiplying matrices as early as `retrieval/library.py`
lets it (`tuned_qps`, `ratio_to_tuned`; the kernels are those of that module either way).
The other side is what a replica does: all shards asked as one `ShardGroup`, scores in float64,
`doc_id`s looked up; of several threads each takes a part of the batch (FAISS on one).
Both are tuned to the same recall by the tuner of `bixse.retrieval.tuning`, each for itself, and
take rounds in turn; a ratio is the median of the rounds' ratios. Vectors are made up around
topics unless `--embeddings` names some; queries are held out of them.

`tuner` is the searches a second of the tuner's choice (least counted work) over those of the best
by brute force: the fastest of all searches of the grid that find enough, each asked everything
once, the winner and the choice timed again in turn. Above 1 the choice is the faster of the two.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tyro

from bixse.artifacts import Artifact
from bixse.records import CORPUS
from bixse.retrieval.building import build_shard
from bixse.retrieval.exact import vectors_of
from bixse.retrieval.group import ShardGroup
from bixse.retrieval.library import faiss, use_threads
from bixse.retrieval.measuring import point, watch
from bixse.retrieval.settings import Retrieval, Search, Structure
from bixse.retrieval.shard import Ranking, Shard
from bixse.retrieval.structures import CODED, Counter, empty, parameters, resolve, trained, work
from bixse.retrieval.tuning import Point, Requirements, grid, tune

K = 10
INSTALLED = 128_000
"""Queries times dimensions from which FAISS 1.15 multiplies matrices unless told otherwise."""
Vectors = np.ndarray[Any, Any]
Ask = Callable[[Vectors], Any]
"""A batch of queries to its rankings: row numbers of the one index, `Ranking`s of the shards."""


@dataclass(frozen=True)
class Options:
    """What is compared, and for how long."""

    embeddings: str | None = None
    """Vectors instead of made-up ones: an embeddings artefact, or a .npy as `benchmarks.serve`
    leaves in its `--corpus-dir`; the last rows are the queries."""
    rows: int = 100_000
    """Made-up vectors."""
    dim: int = 384
    """Dimension of made-up vectors."""
    shards: int = 2
    """Shards."""
    threads: int | None = None
    """Threads of either side; as many as shards when unset."""
    queries: int = 256
    """Held-out queries."""
    batch: int = 32
    """Queries of a call."""
    rounds: int = 9
    """Rounds each side takes, in turn."""
    target_recall: float = 0.95
    """Recall@10 that both sides are tuned to."""
    structures: tuple[Structure, ...] = ("exact", "hnsw", "ivf_flat", "ivf_pq", "ivf_rabitq")
    """What is compared."""
    quick: bool = False
    """Small and short: the mechanics only."""
    json: bool = False
    """One JSON object on standard output."""


def main() -> None:
    options = tyro.cli(Options)
    if options.quick:
        options = replace(options, rows=4000, dim=64, queries=64, rounds=3)
    vectors_ND, queries_QD = vectors(options)
    results = {}
    for structure in options.structures:
        results[structure] = result = compare(structure, vectors_ND, queries_QD, options)
        line = "  ".join(f"{name}={value}" for name, value in result.items())
        print(f"{structure}: {line}", file=sys.stderr)
    if options.json:
        sizes = {"rows": len(vectors_ND), "shards": options.shards, "threads": options.threads}
        print(json.dumps({**sizes, **results}))


def vectors(options: Options) -> tuple[Vectors, Vectors]:
    """Documents and queries, unit length."""
    if options.embeddings is not None:
        if options.embeddings.endswith(".npy"):
            every = np.load(options.embeddings)
        else:
            every = vectors_of(Artifact.open(options.embeddings, "embeddings").table())
        return every[: -options.queries], every[-options.queries :]
    rng = np.random.default_rng(0)
    topics = rng.normal(size=(max(8, options.rows // 500), options.dim)).astype(np.float32)
    count = options.rows + options.queries
    every = topics[rng.integers(len(topics), size=count)]
    every += 0.9 * rng.standard_normal((count, options.dim), np.float32)
    every /= np.linalg.norm(every, axis=1, keepdims=True)
    return every[: options.rows], every[options.rows :]


def compare(
    structure: Structure, vectors_ND: Vectors, queries_QD: Vectors, options: Options
) -> dict[str, Any]:
    """Both sides built, tuned and timed."""
    threads = options.threads or options.shards
    asked = Retrieval(structure=structure, target_recall=options.target_recall, ef_construction=100)
    settings = resolve(asked, *vectors_ND.shape)
    flat = faiss.IndexFlatIP(vectors_ND.shape[1])
    flat.add(vectors_ND)
    truth = [frozenset(rows) for rows in flat.search(queries_QD, K)[1].tolist()]
    template = trained(settings, vectors_ND[: settings.train_rows])
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(threads, initializer=use_threads, initargs=(1,)) as pool,
    ):
        one = _one_index(settings, template, vectors_ND, flat)
        places = _built(Path(folder), settings, template, vectors_ND, options.shards)
        # The tuner measures each shard alone, as `jobs.index` does; a group takes its shards.
        shards = [Shard.load(place) for place in places]
        group = ShardGroup([Shard.load(place) for place in places])
        columns = grid(settings, len(vectors_ND), K)

        def asks_one(search: Search, installed: bool = False) -> Ask:
            return lambda batch: _ask_one(one, settings, search, batch, threads, installed)

        def asks_shards(search: Search) -> Ask:
            return lambda batch: _ask_group(pool, group, search, batch, threads)

        wanted = Requirements(options.target_recall)
        mine = tune(columns, _measured(shards, settings, queries_QD, truth), wanted)
        theirs = tune(columns, _found(asks_one, settings, flat.ntotal, queries_QD, truth), wanted)
        sides = [
            asks_shards(mine.chosen.search),
            asks_one(theirs.chosen.search, installed=True),
            asks_one(theirs.chosen.search),
        ]
        rates = _in_turn(sides, queries_QD, options)
        recalls = [round(_recall(side, queries_QD, truth), 4) for side in sides[:2]]
        best = _by_brute_force(asks_shards, columns, queries_QD, truth, options)
        again = _in_turn([sides[0], asks_shards(best)], queries_QD, options)
    return {
        "shards_qps": round(float(np.median(rates[0])), 1),
        "one_index_qps": round(float(np.median(rates[1])), 1),
        "ratio": round(float(np.median(rates[0] / rates[1])), 3),
        "tuned_qps": round(float(np.median(rates[2])), 1),
        "ratio_to_tuned": round(float(np.median(rates[0] / rates[2])), 3),
        "recall@10": recalls,
        "search": [
            search.model_dump(exclude={"list_rows"})
            for search in (mine.chosen.search, theirs.chosen.search, best)
        ],
        "tuner": round(float(np.median(again[0] / again[1])), 3),
        "measured_points": len(mine.points),
    }


def _one_index(
    settings: Retrieval, template: faiss.Index, vectors_ND: Vectors, flat: faiss.Index
) -> faiss.Index:
    if settings.structure == "exact":
        return flat
    index = empty(settings, vectors_ND.shape[1])
    if settings.structure != "hnsw":
        index = faiss.clone_index(template)
    index.add(vectors_ND)
    return faiss.IndexRefine(index, flat) if settings.structure in CODED else index


def _built(
    folder: Path, settings: Retrieval, template: faiss.Index, vectors_ND: Vectors, count: int
) -> list[Path]:
    places = []
    for number in range(count):
        place = folder / str(number)
        place.mkdir()
        rows = range(number, len(vectors_ND), count)
        ids, empties = [f"{row:09d}" for row in rows], [""] * len(rows)
        documents = pa.table([ids, empties, empties], schema=CORPUS)
        build_shard(
            place, documents, vectors_ND[number::count], settings, faiss.clone_index(template)
        )
        places.append(place)
    return places


def _ask_one(
    index: Any,
    settings: Retrieval,
    search: Search,
    batch: Vectors,
    threads: int,
    installed: bool,
) -> Vectors:
    use_threads(threads)
    if installed:
        faiss.cvar.distance_compute_blas_threshold = INSTALLED
    if settings.structure in CODED:
        inner = parameters(faiss.downcast_index(index.base_index), search, K, K)
        make: Any = faiss
        params = make.IndexRefineSearchParameters(
            k_factor=search.refine_factor, base_index_params=inner
        )
    else:
        params = parameters(index, search, K, K)
    rows: Vectors = index.search(batch, K, params=params)[1]
    return rows


def _ask_group(
    pool: ThreadPoolExecutor, group: ShardGroup, search: Search, batch: Vectors, threads: int
) -> list[Ranking]:
    use_threads(1)
    parts = np.array_split(batch, threads)
    found = pool.map(lambda part: group.rankings(part, [K] * len(part), search), parts)
    return list(chain.from_iterable(found))


def _by_brute_force(
    asks: Callable[[Search], Ask],
    columns: Sequence[Sequence[Search]],
    queries_QD: Vectors,
    truth: list[frozenset[int]],
    options: Options,
) -> Search:
    """The fastest search that finds enough; a column grows slower, and ends at twice the best."""
    best, shortest = None, float("inf")
    for column in columns:
        for search in column:
            ask = asks(search)
            started, found = time.perf_counter(), []
            for batch in _batches(queries_QD, options):
                found += ask(batch)
            took = time.perf_counter() - started
            if took > 2 * shortest:
                break
            enough = _share(found, truth) >= options.target_recall
            if enough and took < shortest:
                best, shortest = search, took
    assert best is not None
    return best


def _measured(
    shards: Sequence[Shard], settings: Retrieval, queries_QD: Vectors, truth: list[frozenset[int]]
) -> Callable[[Sequence[Search]], list[Point]]:
    names = [frozenset(f"{row:09d}" for row in rows) for rows in truth]

    def measure(searches: Sequence[Search]) -> list[Point]:
        use_threads(1)
        seen = [watch(shard, settings, searches, queries_QD, names, K) for shard in shards]
        of_searches = zip(*seen, strict=True)
        true = sum(map(len, truth))
        pairs = zip(searches, of_searches, strict=True)
        return [point(settings.structure, search, of, true) for search, of in pairs]

    return measure


def _found(
    asks: Callable[[Search], Ask],
    settings: Retrieval,
    rows: int,
    queries_QD: Vectors,
    truth: list[frozenset[int]],
) -> Callable[[Sequence[Search]], list[Point]]:
    """Recall and counted work of the one index."""

    def measure(searches: Sequence[Search]) -> list[Point]:
        points = []
        for search in searches:
            counter = Counter()
            recall = _recall(asks(search), queries_QD, truth)
            distances = counter.distances() / len(queries_QD)
            read = work(settings, queries_QD.shape[1], rows, distances, search, K)
            points.append(Point(settings.structure, search, recall, read, latency_ms=0.0))
        return points

    return measure


def _recall(ask: Ask, queries_QD: Vectors, truth: list[frozenset[int]]) -> float:
    return _share(ask(queries_QD), truth)


def _share(rankings: Any, truth: list[frozenset[int]]) -> float:
    found = [
        set(map(int, ranking.doc_ids if isinstance(ranking, Ranking) else ranking))
        for ranking in rankings
    ]
    pairs = zip(truth, found, strict=True)
    return sum(len(true & rows) for true, rows in pairs) / sum(map(len, truth))


def _in_turn(sides: Sequence[Ask], queries_QD: Vectors, options: Options) -> Vectors:
    """Queries a second, [sides, rounds]; who goes first changes from round to round."""
    batches = _batches(queries_QD, options)
    rates = np.zeros((len(sides), options.rounds))
    for side in sides:
        side(batches[0])
    for number in range(options.rounds):
        for place in range(len(sides)):
            turn = (place + number) % len(sides)
            started, asked = time.perf_counter(), 0
            while asked == 0 or time.perf_counter() - started < 0.3:
                for batch in batches:
                    sides[turn](batch)
                    asked += len(batch)
            rates[turn, number] = asked / (time.perf_counter() - started)
    return rates


def _batches(queries_QD: Vectors, options: Options) -> list[Vectors]:
    starts = range(0, len(queries_QD), options.batch)
    return [queries_QD[start : start + options.batch] for start in starts]


if __name__ == "__main__":
    main()
