"""What the serving benchmark serves: made-up documents, their vectors, an index, the truth.

The search of an approximate structure is tuned to `RECALL`, on queries that nobody asks later.
"""

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bixse.artifacts import Artifact, begin
from bixse.models.encoder import Encoder
from bixse.records import CORPUS
from bixse.retrieval.building import build_shard, write_search
from bixse.retrieval.library import faiss
from bixse.retrieval.measuring import point, watch
from bixse.retrieval.settings import Retrieval, Search, Structure
from bixse.retrieval.shard import Shard
from bixse.retrieval.structures import resolve
from bixse.retrieval.tuning import Point, Requirements, grid, relevant, tune

K = 10
RECALL = 0.95
_ASKED, _TUNED_ON = 512, 200


@dataclass(frozen=True)
class Corpus:
    """What all systems serve and are asked."""

    place: Path
    index: Artifact
    queries: list[str]
    truth: list[frozenset[str]]


def made(
    rows: int, start: str, place: Path, structure: Structure, encoded: int | None = None
) -> Corpus:
    """Documents, their vectors, an index of one shard, queries and the truth.

    The first `encoded` documents are encoded, or all; vectors of the others lie around theirs.
    What stands at `place` from an earlier call is taken as it is.
    """
    from pydoc_data.topics import topics

    words = np.array(re.findall(r"[a-z]{3,}", " ".join(topics.values()).lower()))
    rng = np.random.default_rng(0)
    starts = rng.integers(len(words) - 12, size=rows)
    texts = [" ".join([*words[at : at + 8], *rng.choice(words, 4)]) for at in starts.tolist()]
    asked = rng.integers(len(words) - 6, size=_ASKED + _TUNED_ON).tolist()
    queries = [" ".join([*words[at : at + 4], str(rng.choice(words))]) for at in asked]
    encoder = Encoder.load(start, "cpu")
    if not (place / "vectors.npy").exists():
        first = texts[:encoded]
        print(f"encoding {len(first)} documents", file=sys.stderr, flush=True)
        (place / "texts.json").write_text(json.dumps(texts))
        vectors_ND = encoder.encode(first, "document")
        np.save(place / "encoded.npy", _with_neighbours(vectors_ND, rows, rng))
        (place / "encoded.npy").rename(place / "vectors.npy")
    vectors_ND = np.load(place / "vectors.npy")
    vectors_QD = encoder.encode(queries, "query")
    flat = faiss.IndexFlatIP(vectors_ND.shape[1])
    flat.add(vectors_ND)
    found = flat.search(vectors_QD, K)[1].tolist()
    truth = [frozenset(f"{row:09d}" for row in row_numbers) for row_numbers in found]
    config = {"rows": rows, "encoder": encoder.fingerprint, "structure": structure}
    config |= {} if encoded is None else {"encoded": encoded}
    index = begin(str(place / "index"), "index", config=config, inputs={})
    if not isinstance(index, Artifact):
        print(f"building {structure} over {rows} documents", file=sys.stderr, flush=True)
        settings = Retrieval(structure=structure, target_recall=RECALL)
        extra = {"encoder": encoder.fingerprint, "dim": vectors_ND.shape[1]}
        extra["canary"] = {"query": texts[0], "doc_id": f"{0:09d}", "score": 1.0}
        extra |= {"shards": ["shard-00000"], "shard_rows": [rows]}
        with tempfile.TemporaryDirectory() as local:
            extra |= _shard(
                Path(local), texts, vectors_ND, settings, vectors_QD[_ASKED:], truth[_ASKED:]
            )
            index.add_directory(Path(local), under="shard-00000/")
        index = index.finish(rows=rows, extra=extra)
    return Corpus(place, index, queries[:_ASKED], truth[:_ASKED])


def _with_neighbours(vectors_ND: np.ndarray, rows: int, rng: np.random.Generator) -> np.ndarray:
    """As many vectors as `rows`: those beyond the given ones are these again, moved by a third."""
    count, dim = vectors_ND.shape
    every = vectors_ND[np.arange(rows) % count]
    for start in range(count, rows, count):
        moved = every[start : start + count]
        moved += rng.standard_normal(moved.shape, np.float32) / np.float32(3 * dim**0.5)
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    return every


def _shard(
    folder: Path,
    texts: list[str],
    vectors_ND: np.ndarray,
    settings: Retrieval,
    vectors_QD: np.ndarray,
    truth: list[frozenset[str]],
) -> dict[str, Any]:
    """Build a shard, tuned on these queries; what its manifest says of it."""
    ids = [f"{row:09d}" for row in range(len(texts))]
    documents = pa.table([ids, [""] * len(ids), texts], schema=CORPUS)
    build_shard(folder, documents, vectors_ND, settings)
    if settings.structure == "exact":
        return {"recall@10": 1.0}
    settings = resolve(settings, *vectors_ND.shape)
    shard = Shard.load(folder)

    def measure(searches: Sequence[Search]) -> list[Point]:
        seen = watch(shard, settings, searches, vectors_QD, truth, K)
        true = K * len(truth)
        return [
            point(settings.structure, search, [of], true)
            for search, of in zip(searches, seen, strict=True)
        ]

    wanted = Requirements.of(settings)
    chosen = tune(grid(settings, len(texts), K), measure, wanted).chosen
    write_search(folder, chosen.search)
    return {"recall@10": chosen.recall, "search": relevant(settings.structure, chosen.search)}
