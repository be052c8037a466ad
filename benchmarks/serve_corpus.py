"""What the serving benchmark serves: made-up documents, their vectors, an index, the truth."""

import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa

from bixse.artifacts import Artifact, begin
from bixse.models.encoder import Encoder
from bixse.records import CORPUS
from bixse.retrieval.settings import Retrieval
from bixse.retrieval.shard import build_shard

K = 10


@dataclass(frozen=True)
class Corpus:
    """What all systems serve and are asked."""

    place: Path
    index: Artifact
    queries: list[str]
    truth: list[frozenset[str]]


def made(rows: int, start: str, place: Path) -> Corpus:
    """Documents, their vectors, an index of one shard, queries and the truth."""
    from pydoc_data.topics import topics

    words = np.array(re.findall(r"[a-z]{3,}", " ".join(topics.values()).lower()))
    rng = np.random.default_rng(0)
    starts = rng.integers(len(words) - 12, size=rows)
    texts = [" ".join([*words[at : at + 8], *rng.choice(words, 4)]) for at in starts.tolist()]
    asked = rng.integers(len(words) - 6, size=512).tolist()
    queries = [" ".join([*words[at : at + 4], str(rng.choice(words))]) for at in asked]
    print(f"encoding {rows} documents", file=sys.stderr, flush=True)
    encoder = Encoder.load(start, "cpu")
    vectors = encoder.encode(texts, "document")
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    found = flat.search(encoder.encode(queries, "query"), K)[1]
    truth = [frozenset(f"{row:09d}" for row in row_numbers) for row_numbers in found.tolist()]
    np.save(place / "vectors.npy", vectors)
    (place / "texts.json").write_text(json.dumps(texts))
    return Corpus(place, _index(place, texts, vectors, encoder.fingerprint), queries, truth)


def _index(place: Path, texts: list[str], vectors: np.ndarray, fingerprint: str) -> Artifact:
    draft = begin(str(place / "index"), "index", config={}, inputs={})
    assert not isinstance(draft, Artifact)
    ids = [f"{row:09d}" for row in range(len(texts))]
    documents = pa.table([ids, [""] * len(ids), texts], schema=CORPUS)
    with tempfile.TemporaryDirectory() as local:
        build_shard(Path(local), documents, vectors, Retrieval())
        draft.add_directory(Path(local), under="shard-00000/")
    known = {"query": texts[0], "doc_id": ids[0], "score": 1.0}
    extra = {"encoder": fingerprint, "dim": vectors.shape[1], "canary": known}
    extra |= {"shards": ["shard-00000"], "shard_rows": [len(ids)], "recall@10": 1.0}
    return draft.finish(rows=len(ids), extra=extra)
