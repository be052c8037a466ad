"""Tasks of `jobs.index`: train a structure, scatter rows to their shards, build a shard, measure
it, compare structures.

They return counts and measurements only. With `on_gpu`, which says that Ray gave a GPU to the task,
they use it where FAISS sees it.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bixse.artifacts import Draft
from bixse.place import Place
from bixse.retrieval.settings import Retrieval, Search
from bixse.retrieval.sources import Input, Source, shard_name
from bixse.retrieval.structures import TRAINED

RECALL_AT = 10
BUILT = "built.json"

Vectors = np.ndarray[Any, Any]


def compare_structures(
    source: Source, settings: Retrieval, vectors_QD: Vectors, on_gpu: bool
) -> list[dict[str, Any]]:
    from bixse.retrieval.comparing import compare
    from bixse.retrieval.device import find
    from bixse.retrieval.sources import sample

    assert source.embeddings is not None
    doc_ids, vectors_ND = sample(source.embeddings, settings.tune_rows, "tune")
    rows = source.embeddings.manifest.rows
    device = find() if on_gpu else None
    return compare(doc_ids, vectors_ND, vectors_QD, settings, rows, RECALL_AT, device)


def train_structure(draft: Draft, source: Source, settings: Retrieval, on_gpu: bool) -> int:
    from bixse.retrieval.device import find
    from bixse.retrieval.library import faiss
    from bixse.retrieval.sources import sample
    from bixse.retrieval.structures import trained

    assert source.embeddings is not None
    _, vectors_ND = sample(source.embeddings, settings.train_rows, "train")
    with tempfile.TemporaryDirectory() as folder:
        template = trained(settings, vectors_ND, find() if on_gpu else None)
        faiss.write_index(template, f"{folder}/index.faiss")
        draft.add_directory(Path(folder), under="trained/")
    return len(vectors_ND)


def scatter_some(
    source: Source, which: Input, parts: Sequence[str], number: int, shards: int, out: Place
) -> None:
    """What `number` says of some parts, for all shards, unless an earlier run has."""
    from bixse.retrieval.sources import scatter

    name = f"{number:05d}"
    if not out.exists(f"{which}/{name}.whole"):
        scatter(source, which, parts, name, shards, out)
        out.write(f"{which}/{name}.whole", b"")


def build_one(
    draft: Draft,
    source: Source,
    number: int,
    dim: int,
    vectors_QD: Vectors,
    settings: Retrieval,
    on_gpu: bool,
) -> dict[str, Any]:
    """Gather, build and write one shard, unless an earlier run has; its counts and its truth, and
    whether a GPU was used (None where there was nothing to do)."""
    # FAISS before torch would be loaded: one OpenMP runtime a process.
    from bixse.retrieval.building import write_vectors
    from bixse.retrieval.device import find
    from bixse.retrieval.library import faiss
    from bixse.retrieval.sources import exact_hits, gather
    from bixse.retrieval.structures import empty

    name = shard_name(number)
    if draft.place.exists(f"{name}/{BUILT}"):
        built: dict[str, Any] = json.loads(draft.place.read(f"{name}/{BUILT}"))
        return {**built, "used_gpu": None}
    device = find() if on_gpu else None
    with tempfile.TemporaryDirectory() as aside, tempfile.TemporaryDirectory() as folder:
        gathered = gather(source, number, settings.shards or 1, dim, Path(aside))
        if settings.structure in TRAINED:
            (Path(aside) / "trained.faiss").write_bytes(draft.place.read("trained/index.faiss"))
            template = faiss.read_index(f"{aside}/trained.faiss")
        else:
            template = empty(settings, dim)
        write_vectors(Path(folder), gathered.vectors_ND, settings, template, device)
        for file in ("documents.arrow", "metadata.arrow"):
            if (Path(aside) / file).exists():
                shutil.move(Path(aside) / file, folder)
        built = {
            "name": name,
            "rows": len(gathered.doc_ids),
            "added": gathered.added,
            "replaced": gathered.replaced,
            "deleted": gathered.deleted,
            "truth": [
                [[hit.doc_id, hit.score, hit.rank] for hit in hits]
                for hits in exact_hits(gathered, vectors_QD, RECALL_AT, device)
            ],
        }
        draft.add_directory(Path(folder), under=f"{name}/")
    # Last: the mark that the shard is whole.
    draft.write_file(f"{name}/{BUILT}", json.dumps(built).encode())
    return {**built, "used_gpu": device is not None}


def measure_one(
    draft: Draft,
    name: str,
    settings: Retrieval,
    searches: Sequence[Search],
    vectors_QD: Vectors,
    true: Sequence[frozenset[str]],
) -> list[Any]:
    from bixse.retrieval.measuring import watch
    from bixse.retrieval.shard import Shard

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(draft.place.path(name))
        if not draft.place.is_local:
            directory = Path(folder)
            # List this shard alone: a listing of the whole index grows with the number of shards.
            place = Place(f"{draft.place.url}/{name}")
            for file in place.names():
                if "/" not in file:
                    place.get(file, directory / file)
        shard = Shard.load(directory)
        return watch(shard, settings, searches, vectors_QD, true, RECALL_AT)
