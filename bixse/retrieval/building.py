"""One FAISS shard, written: what `retrieval/shard.py` reads.

Shapes: N documents, D dimensions.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bixse.records import CORPUS, Kind, Metadata
from bixse.retrieval.device import Device
from bixse.retrieval.library import faiss
from bixse.retrieval.metadata import write_metadata
from bixse.retrieval.scoring import Vectors
from bixse.retrieval.settings import Retrieval, Search
from bixse.retrieval.shard import DOCUMENTS_FILE, INDEX_FILE, SEARCH_FILE
from bixse.retrieval.stored import SCALES_FILE, VECTORS_FILE
from bixse.retrieval.structures import CODED, TRAINED, asked_search, fill, resolve, trained

_BLOCK = 8192


def build_shard(
    directory: Path,
    documents: pa.Table,
    vectors_ND: Vectors,
    settings: Retrieval,
    template: faiss.Index | None = None,
    metadata: Mapping[str, Metadata] | None = None,
    kinds: Mapping[str, Kind] | None = None,
    device: Device | None = None,
) -> None:
    """Write a shard of documents in any order into an existing directory.

    `metadata` of documents by `doc_id`, in fields of these `kinds`.

    A `template` is an empty index trained with these settings; without one the structure is decided
    by, and trained on, these vectors alone.
    Raises ValueError when vectors and documents differ in number, a `doc_id` stands twice, or there
    are too few vectors to train on.
    """
    if len(vectors_ND) != documents.num_rows:
        raise ValueError(f"{documents.num_rows} documents with {len(vectors_ND)} vectors")
    doc_ids = np.asarray(documents["doc_id"].to_pylist(), dtype=object)
    order = np.argsort(doc_ids, kind="stable")
    if (doc_ids[order][1:] == doc_ids[order][:-1]).any():
        raise ValueError("a doc_id stands twice in one shard")
    vectors = np.ascontiguousarray(vectors_ND[order], np.float32)
    if template is None:
        settings = resolve(settings, *vectors_ND.shape)
        template = trained(settings, vectors[: settings.train_rows], device)
    write_vectors(directory, vectors, settings, template, device)
    table = documents.select(CORPUS.names).take(pa.array(order)).cast(CORPUS)
    write_documents(directory, table.to_batches(max_chunksize=4096))
    known = metadata or {}
    write_metadata(directory, [known.get(doc_id) for doc_id in doc_ids[order]], kinds or {})
    if settings.structure in TRAINED or settings.structure == "hnsw":
        write_search(directory, asked_search(settings))


def write_vectors(
    directory: Path,
    vectors_ND: Vectors,
    settings: Retrieval,
    template: faiss.Index,
    device: Device | None = None,
) -> None:
    """Write the structure of vectors that stand in the order of `doc_id`, a block at a time.

    `vectors_ND` may be a memory-mapped array; `template` is trained and empty, and is filled.
    """
    fill(template, _blocks(vectors_ND), device)
    if settings.structure == "ivf_flat":
        lists: Any = template
        lists.make_direct_map(True)
    faiss.write_index(template, str(directory / INDEX_FILE))
    if settings.structure in CODED:
        _write_stored(directory, vectors_ND, settings.stored)


def write_documents(directory: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Write the stored fields; the batches must be in the order of `doc_id`."""
    path = str(directory / DOCUMENTS_FILE)
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, CORPUS) as writer:
        for batch in batches:
            writer.write_batch(batch)


def write_search(directory: Path, search: Search) -> None:
    (directory / SEARCH_FILE).write_text(search.model_dump_json())


def _write_stored(directory: Path, vectors_ND: Vectors, stored: str) -> None:
    npy: Any = np.lib.format
    dtype = np.dtype(stored)
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": vectors_ND.shape}
    scales = np.zeros(len(vectors_ND) if stored == "int8" else 0, np.float32)
    start = 0
    # Not through a mapped file: where the disk is full that ends the process, without a word.
    with (directory / VECTORS_FILE).open("wb") as out:
        npy.write_array_header_1_0(out, header)
        for block in _blocks(vectors_ND):
            end = start + len(block)
            if stored == "int8":
                # Each row by its own largest number, so that nothing is clipped.
                scales[start:end] = np.abs(block).max(axis=1) / 127
                block = np.rint(block / np.maximum(scales[start:end, None], np.float32(1e-30)))
            out.write(block.astype(dtype).tobytes())
            start = end
    if stored == "int8":
        np.save(directory / SCALES_FILE, scales)


def _blocks(vectors_ND: Vectors) -> Iterator[Vectors]:
    for start in range(0, len(vectors_ND), _BLOCK):
        yield np.ascontiguousarray(vectors_ND[start : start + _BLOCK], np.float32)
