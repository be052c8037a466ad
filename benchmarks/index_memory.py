"""Peak memory of the worker that builds a shard, at N and at ten times N documents.

    python -m benchmarks.index_memory --rows 100000
    python -m benchmarks.index_memory --quick --json

The work is that of `jobs.index`'s task, in a process of its own: gather the documents of shard 0 in
the order of `doc_id`, build and write its files, compare all vectors with queries for the truth.
`shard_rows` is N in both runs, so that the larger corpus has ten shards, as the flag
`--retrieval.shard-rows` makes them. Memory is the process's anonymous pages (RssAnon): what it
holds itself, without mapped files, which the kernel may drop. What it held before the work is
taken off.
Vectors and texts are made up.
"""

import json
import multiprocessing
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tyro

from bixse.artifacts import Artifact, Draft, begin
from bixse.records import CORPUS, embeddings_schema
from bixse.retrieval.settings import Retrieval, Structure

PART = 10_000


@dataclass(frozen=True)
class Options:
    """Sizes."""

    rows: int = 100_000
    """N: documents of the smaller corpus, and of a shard."""
    dim: int = 384
    """Numbers a vector."""
    times: int = 10
    """How much larger the larger corpus is."""
    structures: tuple[Structure, ...] = ("exact", "ivf_flat", "ivf_rabitq")
    """What is built."""
    quick: bool = False
    """Small: the mechanics only."""
    json: bool = False
    """One JSON object on standard output."""


def main() -> None:
    options = tyro.cli(Options)
    if options.quick:
        options = replace(options, rows=5000, dim=64)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        sizes = (options.rows, options.rows * options.times)
        sources = [make(Path(folder) / str(rows), rows, options.dim) for rows in sizes]
        for structure in options.structures:
            peaks = [peak_mb(source, structure, options, Path(folder)) for source in sources]
            results[structure] = {
                "peak_mb": {str(rows): round(mb, 1) for rows, mb in zip(sizes, peaks, strict=True)},
                "ratio": round(peaks[1] / peaks[0], 3),
                "shard_mb": round(options.rows * options.dim * 4 / 1e6, 1),
            }
            print(f"{structure}: {results[structure]}", file=sys.stderr)
    if options.json:
        print(json.dumps(results))


def make(place: Path, rows: int, dim: int) -> tuple[str, str]:
    """Embeddings and corpus of so many documents, in parts."""
    drafts = [
        begin(str(place / kind), kind, config={}, inputs={}) for kind in ("embeddings", "corpus")
    ]
    embeddings, corpus = drafts
    assert isinstance(embeddings, Draft)
    assert isinstance(corpus, Draft)
    for number, start in enumerate(range(0, rows, PART)):
        rng = np.random.default_rng(start)
        count = min(PART, rows - start)
        vectors = rng.standard_normal((count, dim), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        ids = [f"d{row * 7919 % rows:09d}-{row}" for row in range(start, start + count)]
        lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim)
        schema = embeddings_schema(dim)
        embeddings.write_part(number, pa.table([pa.array(ids), lists], schema=schema))
        texts = [f"{doc_id} " * 40 for doc_id in ids]
        corpus.write_part(number, pa.table([ids, ids, texts], schema=CORPUS))
    return embeddings.finish().url, corpus.finish().url


def peak_mb(source: tuple[str, str], structure: Structure, options: Options, folder: Path) -> float:
    """Megabytes that the building process holds at most, beyond what it began with."""
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(dir=folder) as out,
        ProcessPoolExecutor(1, mp_context=spawn) as pool,
    ):
        return pool.submit(_peak, source, structure, options, out).result()


def _peak(source: tuple[str, str], structure: Structure, options: Options, out: str) -> float:
    from bixse.retrieval.sources import Source
    from bixse.retrieval.structures import TRAINED, resolve
    from jobs.shards import build_one, train_structure

    embeddings, corpus = (Artifact.open(url, verify=False) for url in source)
    rows = embeddings.manifest.rows
    asked = Retrieval(structure=structure, shard_rows=options.rows, nlist=256, train_rows=20_000)
    if structure in TRAINED and rows < 256 * 39:
        asked = asked.replace(nlist=32)
    settings = resolve(asked, rows, options.dim)
    draft = begin(f"{out}/index", "index", config={}, inputs={})
    assert isinstance(draft, Draft)
    made = Source(embeddings, corpus)
    if structure in TRAINED:
        train_structure(draft, made, settings, on_gpu=False)
    queries = np.eye(16, options.dim, dtype=np.float32)
    before, watch = _anonymous_mb(), _Watch()
    build_one(draft, made, 0, options.dim, queries, settings, on_gpu=False)
    return watch.stop() - before


class _Watch(threading.Thread):
    """The largest RssAnon while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._peak, self._stopped = 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stopped.is_set():
            self._peak = max(self._peak, _anonymous_mb())
            time.sleep(0.005)

    def stop(self) -> float:
        self._stopped.set()
        self.join()
        return self._peak


def _anonymous_mb() -> float:
    with open("/proc/self/status") as lines:
        return next(float(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3


if __name__ == "__main__":
    main()
