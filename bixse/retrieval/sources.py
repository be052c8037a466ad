"""Which documents a shard holds, and their vectors and fields in the order of `doc_id`.

The documents of a new index come from embeddings and a corpus; those of a new generation also from
the shards of the index before it, less what was deleted or replaced. Vectors and texts pass through
files, a block at a time: of all the documents of a shard only ids and metadata are in memory. Where
a document lives is a hash, so that every part holds documents of every shard: each shard reads all
parts, or, of many shards, what `scatter` has made of them.

Shapes: N documents of the shard, D dimensions, Q queries.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bixse.artifacts import Artifact
from bixse.place import Place
from bixse.records import (
    CORPUS,
    METADATA_DIR,
    Document,
    Hit,
    Kind,
    Metadata,
    documents_at,
)
from bixse.retrieval.building import write_documents
from bixse.retrieval.device import Device
from bixse.retrieval.exact import vectors_of
from bixse.retrieval.finder import Finder
from bixse.retrieval.library import faiss
from bixse.retrieval.merge import merge
from bixse.retrieval.metadata import write_metadata
from bixse.retrieval.scoring import Vectors
from bixse.retrieval.shard import DOCUMENTS_FILE, Shard

_ROWS = 4096

_SCATTERED_ROWS = 1 << 15
"""Rows that are read and scattered to the shards at a time."""
_OPEN = 512
"""Shards whose files a task has open at once: a process may open about a thousand files."""

Input = Literal["embeddings", "corpus"]


@dataclass(frozen=True)
class Source:
    """What an index is made of. `embeddings` and `corpus` hold the same documents, or are None."""

    embeddings: Artifact | None
    corpus: Artifact | None
    base: Artifact | None = None
    deleted: frozenset[str] = frozenset()
    scattered: Place | None = None
    """Where `scatter` has put all rows of embeddings and corpus; None where no shard needs it."""

    def kinds(self) -> dict[str, Kind]:
        """The fields of the documents' metadata and what they hold.

        Raises ValueError when base and corpus hold different things under one name.
        """
        old, new = (
            artifact.manifest.extra.get("metadata", {}) if artifact else {}
            for artifact in (self.base, self.corpus)
        )
        for field, kind in new.items():
            if old.get(field, kind) != kind:
                raise ValueError(
                    f"metadata {field} is {old[field]} in the base index and {kind} in the corpus: "
                    "say its kind with --ingest.metadata, or make a new index"
                )
        return {**old, **new}

    def input(self, which: Input) -> Artifact | None:
        return self.embeddings if which == "embeddings" else self.corpus

    def rows(self, which: Input, columns: Sequence[str]) -> "Rows":
        """The rows of embeddings or corpus, for each shard to take its own."""
        at = None if self.scattered is None else Place(f"{self.scattered.url}/{which}")
        return Rows(self.input(which), columns, at)

    def base_shard(self, name: str) -> Shard | None:
        """A shard of the generation before, its files verified first."""
        if self.base is None:
            return None
        directory = self.base.local_directory(under=f"{name}/")
        Artifact.open(str(directory), "index", verify=False).verify(under=f"{name}/")
        return Shard.load(directory / name)


@dataclass(frozen=True)
class Rows:
    """Some columns of an artefact, `doc_id` among them; without one, no row."""

    artifact: Artifact | None
    columns: Sequence[str]
    scattered: Place | None = None

    def own(self, number: int, shards: int) -> Iterator[tuple[list[str], pa.RecordBatch]]:
        """The rows that live in this shard, a batch at a time."""
        if self.artifact is None:
            return
        if self.scattered is not None:
            place = Place(f"{self.scattered.url}/{shard_name(number)}")
            for name in place.names():
                with place.open(name) as handle, pa.ipc.open_file(handle) as file:
                    for position in range(file.num_record_batches):
                        batch = file.get_batch(position).select(list(self.columns))
                        yield batch["doc_id"].to_pylist(), batch
            return
        for batch in self.artifact.batches(self.columns, _ROWS):
            doc_ids = batch["doc_id"].to_pylist()
            rows = [row for row, doc_id in enumerate(doc_ids) if shard_of(doc_id, shards) == number]
            if rows:
                yield [doc_ids[row] for row in rows], batch.take(pa.array(rows))


def scatter(
    source: Source, which: Input, parts: Sequence[str], name: str, shards: int, out: Place
) -> None:
    """Write the rows of some parts to `<which>/<shard>/<name>.arrow`, one file for each shard."""
    artifact = source.input(which)
    assert artifact is not None
    columns = ["doc_id", "vector"] if which == "embeddings" else CORPUS.names
    for first in range(0, shards, _OPEN):
        homes = range(first, min(first + _OPEN, shards))
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            files: dict[int, tuple[Path, Any]] = {}
            for batch in artifact.batches(columns, _SCATTERED_ROWS, parts):
                home_N = np.array([shard_of(one, shards) for one in batch["doc_id"].to_pylist()])
                for home in np.intersect1d(home_N, homes).tolist():
                    if home not in files:
                        path = Path(folder) / f"{home}.arrow"
                        writer = stack.enter_context(pa.ipc.new_file(path, batch.schema))
                        files[home] = path, writer
                    rows = np.flatnonzero(home_N == home)
                    files[home][1].write_batch(batch.take(pa.array(rows)))
            for home, (path, writer) in files.items():
                writer.close()
                out.put(path, f"{which}/{shard_name(home)}/{name}.arrow")


@dataclass(frozen=True)
class Gathered:
    """The documents of one shard: their vectors, mapped from a file, and what became of whom."""

    doc_ids: list[str]
    vectors_ND: Vectors
    added: int
    replaced: int
    deleted: int


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def shard_of(doc_id: str, shards: int) -> int:
    """The shard a document lives in: a hash of its id, whatever the corpus."""
    return _hash(doc_id) % shards


def held(index: Artifact, doc_ids: Iterable[str]) -> set[str]:
    """Those of some documents that an index holds. Of the shards that they would live in the ids
    alone are read, a batch at a time, and nothing is verified."""
    shards = len(index.manifest.extra["shards"])
    wanted: dict[int, set[str]] = {}
    for doc_id in doc_ids:
        wanted.setdefault(shard_of(doc_id, shards), set()).add(doc_id)
    ids_alone = pa.ipc.IpcReadOptions(included_fields=[CORPUS.get_field_index("doc_id")])
    found: set[str] = set()
    for number, own in wanted.items():
        name = f"{shard_name(number)}/{DOCUMENTS_FILE}"
        with index.place.open(name) as handle, pa.ipc.open_file(handle, options=ids_alone) as file:
            for position in range(file.num_record_batches):
                found |= own.intersection(file.get_batch(position)["doc_id"].to_pylist())
    return found


def gather(source: Source, number: int, shards: int, dim: int, folder: Path) -> Gathered:
    """Write the documents of shard `number` into `folder`, and give their vectors.

    Raises ValueError when embeddings and corpus hold different documents, a `doc_id` stands twice,
    or one that is to be deleted is not in the base or comes again in the corpus.
    """
    listed = source.rows("embeddings", ["doc_id"]).own(number, shards)
    new = [doc_id for ids, _ in listed for doc_id in ids]
    fresh = set(new)
    if len(fresh) != len(new):
        raise ValueError("a doc_id stands twice in one shard")
    base = source.base_shard(shard_name(number))
    old = base.doc_ids(np.arange(base.size)) if base else []
    deleted = {doc_id for doc_id in source.deleted if shard_of(doc_id, shards) == number}
    refuse_deletes(deleted - set(old), deleted & fresh)
    kept_rows = np.array(
        [row for row, doc_id in enumerate(old) if doc_id not in deleted and doc_id not in fresh],
        np.int64,
    )
    doc_ids = sorted([*(old[row] for row in kept_rows.tolist()), *new])
    place = {doc_id: position for position, doc_id in enumerate(doc_ids)}
    raw, shape = folder / "vectors.f32", (len(doc_ids), dim)
    with raw.open("wb") as handle:
        for vectors, ids in _all_vectors(source, base, kept_rows, old, number, shards):
            if vectors.shape[1] != dim:
                raise ValueError(f"a vector of {vectors.shape[1]} numbers among those of {dim}")
            for vector, doc_id in zip(vectors, ids, strict=True):
                os.pwrite(handle.fileno(), vector.tobytes(), place[doc_id] * dim * 4)
    _gather_documents(source, base, doc_ids, fresh, number, shards, folder)
    _gather_metadata(source, base, old, doc_ids, fresh, number, shards, folder)
    vectors_ND = np.memmap(raw, np.float32, "r", shape=shape) if doc_ids else np.zeros(shape, "f4")
    return Gathered(
        doc_ids,
        vectors_ND,
        added=len(fresh.difference(old)),
        replaced=len(fresh.intersection(old)),
        deleted=len(deleted),
    )


def exact_hits(
    gathered: Gathered, vectors_QD: Vectors, k: int, device: Device | None = None
) -> list[list[Hit]]:
    """The best `k` documents of each query by comparing all, ties by `doc_id`: the truth."""
    best: list[list[Hit]] = [[] for _ in vectors_QD]
    for start in range(0, len(gathered.doc_ids), _ROWS):
        part = slice(start, start + _ROWS)
        index = faiss.IndexFlatIP(gathered.vectors_ND.shape[1])
        index.add(np.ascontiguousarray(gathered.vectors_ND[part]))
        ids = pa.table({"doc_id": gathered.doc_ids[part]})
        found = Shard(Finder(index, device=device), ids).search(vectors_QD, k)
        best = [merge(both, k) for both in zip(best, found, strict=True)]
    return best


def sample(embeddings: Artifact, count: int, salt: str) -> tuple[list[str], Vectors]:
    """The `count` documents with the smallest hash, in that order; equal whatever the parts."""
    found: list[tuple[int, str, Vectors]] = []
    limit = 1 << 64
    for batch in embeddings.batches(["doc_id", "vector"], _ROWS):
        vectors = vectors_of(batch)
        for row, doc_id in enumerate(batch["doc_id"].to_pylist()):
            if (key := _hash(salt + doc_id)) < limit:
                found.append((key, doc_id, vectors[row].copy()))
        if len(found) > 2 * count:
            found = sorted(found, key=lambda item: item[:2])[:count]
            limit = found[-1][0]
    found = sorted(found, key=lambda item: item[:2])[:count]
    if not found:
        return [], np.zeros((0, 0), np.float32)
    return [doc_id for _, doc_id, _ in found], np.stack([vector for _, _, vector in found])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def refuse_deletes(unknown: Set[str], again: Set[str]) -> None:
    """Raises ValueError for documents to be deleted that the base does not hold, or that the corpus
    brings again."""
    for doc_ids, where in ((unknown, "not in the base index"), (again, "in the corpus too")):
        if doc_ids:
            who, be = f"{min(doc_ids)!r}", "is"
            if more := len(doc_ids) - 1:
                who, be = f"{who} and {more} more", "are"
            raise ValueError(f"{who} {be} to be deleted and {be} {where}")


def _all_vectors(
    source: Source,
    base: Shard | None,
    kept_rows: npt.NDArray[np.int64],
    old: Sequence[str],
    number: int,
    shards: int,
) -> Iterator[tuple[Vectors, list[str]]]:
    for ids, batch in source.rows("embeddings", ["doc_id", "vector"]).own(number, shards):
        yield vectors_of(batch), ids
    for start in range(0, len(kept_rows) if base else 0, _ROWS):
        rows = kept_rows[start : start + _ROWS]
        assert base is not None
        yield base.vectors(rows), [old[row] for row in rows.tolist()]


def _gather_documents(
    source: Source,
    base: Shard | None,
    doc_ids: Sequence[str],
    fresh: set[str],
    number: int,
    shards: int,
    folder: Path,
) -> None:
    """Stream the new documents into one file, then write all in order from there and the base."""
    aside = folder / "unsorted.arrow"
    row_of: dict[str, int] = {}
    with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, CORPUS) as writer:
        for ids, batch in source.rows("corpus", CORPUS.names).own(number, shards):
            for doc_id in ids:
                row_of[doc_id] = len(row_of)
            writer.write_batch(batch.select(CORPUS.names))
    if row_of.keys() != fresh:
        names = [artifact.url for artifact in (source.embeddings, source.corpus) if artifact]
        raise ValueError(f"{' and '.join(names)} hold different documents")
    new = pa.ipc.open_file(pa.memory_map(str(aside))).read_all()
    old = base.doc_ids(np.arange(base.size)) if base else []
    rows_of = [(new, row_of), (base.table if base else new, {d: row for row, d in enumerate(old)})]
    write_documents(folder, _in_order(doc_ids, rows_of))
    aside.unlink()


def _gather_metadata(
    source: Source,
    base: Shard | None,
    old: Sequence[str],
    doc_ids: Sequence[str],
    fresh: set[str],
    number: int,
    shards: int,
    folder: Path,
) -> None:
    """Write what filters read of the new documents and of those of the base that stay."""
    kinds = source.kinds()
    if not kinds:
        return
    own = _metadata_of(source.corpus, number, shards)
    rows = {doc_id: row for row, doc_id in enumerate(old) if doc_id not in fresh}

    def known(doc_id: str) -> Metadata | None:
        if doc_id in rows and base is not None and base.fields is not None:
            return base.fields.at(rows[doc_id])
        return own.get(doc_id)

    write_metadata(folder, [known(doc_id) for doc_id in doc_ids], kinds)


def _metadata_of(corpus: Artifact | None, number: int, shards: int) -> dict[str, Metadata]:
    """The metadata of the corpus' documents that live in this shard, by `doc_id`."""
    found: dict[str, Metadata] = {}
    names = sorted(corpus.manifest.files) if corpus else []
    for name in names:
        if corpus and name.startswith(f"{METADATA_DIR}/"):
            for row in corpus.part(name).to_pylist():
                if shard_of(row["doc_id"], shards) == number:
                    found[row["doc_id"]] = json.loads(row["metadata"])
    return found


def _in_order(
    doc_ids: Sequence[str], tables: Sequence[tuple[pa.Table, dict[str, int]]]
) -> Iterator[pa.RecordBatch]:
    """Each document from the first table that has it."""
    for start in range(0, len(doc_ids), _ROWS):
        rows: list[Document] = []
        for doc_id in doc_ids[start : start + _ROWS]:
            table, row_of = next(found for found in tables if doc_id in found[1])
            rows += documents_at(table, [row_of[doc_id]])
        yield pa.RecordBatch.from_pylist([asdict(row) for row in rows], schema=CORPUS)
