"""What a shard is in FAISS: made, trained, asked and weighed, a structure at a time.

    exact        every vector; nothing to train
    hnsw         a graph over whole vectors (arXiv 1603.09320); nothing to train
    ivf_flat     lists of whole vectors under their nearest centroid
    ivf_pq       the same lists of 4-bit product codes, scanned in registers (arXiv 1704.07355)
    ivf_rabitq   the same of RaBitQ codes, after a random rotation (arXiv 2405.12497)

What is trained is trained once on a sample of the whole corpus and shared by all shards, so that
equal `nprobe` scans equal lists whatever the number of shards. The product is the inner product of
unit vectors. Shapes: N vectors, D dimensions.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bixse.retrieval.device import Device
from bixse.retrieval.library import faiss
from bixse.retrieval.metadata import Kept
from bixse.retrieval.settings import EXACT_BELOW, Retrieval, Search

Vectors = npt.NDArray[np.float32]

POINTS_A_CENTROID = 39
"""Fewer training vectors a centroid and FAISS warns (`ClusteringParameters`)."""
_PQ_CENTROIDS = 16

TRAINED = frozenset({"ivf_flat", "ivf_pq", "ivf_rabitq"})
CODED = frozenset({"ivf_pq", "ivf_rabitq"})
"""Structures whose candidates are scored again from vectors stored beside the codes."""
_STORED_BYTES = {"float32": 4, "float16": 2, "int8": 1}

_TIMES_AS_LONG = {
    "ivf_flat": 1.0,
    "centroids": 0.5,
    "hnsw": 3.0,
    "ivf_pq": 4.0,
    "ivf_rabitq": 10.0,
    "again": 2.0,
}
"""How long a byte takes beside one of vectors that stand in order, as measured on one core: 60 to
71 us a megabyte (ivf_flat), the few centroids that caches hold 30, vectors far apart 180 along a
graph and 90 to 155 when codes are scored again, product codes 270 to 320, RaBitQ codes 690 in lists
of 156 and 1,360 in lists of 39. A constant, not a clock: the same corpus gives the same index."""


def resolve(settings: Retrieval, rows: int, dim: int) -> Retrieval:
    """The settings with `structure`, `shards`, `nlist` and `pq_m` decided for a corpus of `rows`.

    `auto` is decided where it is exact; beyond that it is left to `jobs.index`.
    Raises ValueError when there are too few vectors to train on, or `pq_m` does not divide `dim`.
    """
    shards = settings.shards or min(4096, max(1, math.ceil(rows / settings.shard_rows)))
    settings = settings.replace(shards=shards)
    if settings.structure == "auto" and rows <= EXACT_BELOW and _fits_exact(settings, rows, dim):
        settings = settings.replace(structure="exact")
    if settings.structure not in TRAINED:
        return settings
    sample = min(rows, settings.train_rows)
    enough = sample // POINTS_A_CENTROID
    name, needed = f"{settings.structure} of {settings.nlist} lists", settings.nlist or 1
    if settings.structure == "ivf_pq":
        needed = max(needed, _PQ_CENTROIDS)
    if settings.nlist is None:
        name = settings.structure
    if enough < needed:
        ways = [f"--retrieval.nlist {enough}"] if enough >= _PQ_CENTROIDS and settings.nlist else []
        if rows > sample:
            ways.append(f"--retrieval.train-rows {needed * POINTS_A_CENTROID} or more")
        ways.append("--retrieval.structure exact")
        raise ValueError(
            f"{name} needs {needed * POINTS_A_CENTROID} training vectors, there are {sample}: "
            f"choose {', or '.join(ways)}"
        )
    if settings.nlist is None:
        lists = min(4 * math.sqrt(rows), enough)
        settings = settings.replace(nlist=2 ** int(math.log2(lists)))
    if settings.structure == "ivf_pq":
        pq_m = settings.pq_m or (dim // 2 if dim % 2 == 0 else dim)
        if dim % pq_m:
            raise ValueError(f"--retrieval.pq-m {pq_m} does not divide the dimension {dim}")
        settings = settings.replace(pq_m=pq_m)
    return settings


def _fits_exact(settings: Retrieval, rows: int, dim: int) -> bool:
    budget = settings.memory_budget_mb
    return budget is None or resident_bytes(settings, "exact", rows, dim) <= budget * 1e6


def empty(settings: Retrieval, dim: int) -> faiss.Index:
    """An index without vectors, not yet trained; `settings` must be resolved."""
    inner = faiss.METRIC_INNER_PRODUCT
    if settings.structure == "exact":
        return faiss.IndexFlatIP(dim)
    if settings.structure == "hnsw":
        graph = faiss.IndexHNSWFlat(dim, settings.hnsw_m, inner)
        graph.hnsw.efConstruction = settings.ef_construction
        return graph
    bits = "" if settings.rabitq_bits == 1 else str(settings.rabitq_bits)
    codes = {
        "ivf_flat": f"IVF{settings.nlist},Flat",
        "ivf_pq": f"IVF{settings.nlist},PQ{settings.pq_m}x4fs",
        "ivf_rabitq": f"RR{dim},IVF{settings.nlist},RaBitQfs{bits}",
    }
    if settings.structure not in codes:
        raise ValueError(
            f"{settings.structure} was not decided: name a structure, or let jobs.index choose"
        )
    index: faiss.Index = faiss.index_factory(dim, codes[settings.structure], inner)
    return index


def trained(settings: Retrieval, sample_ND: Vectors, device: Device | None = None) -> faiss.Index:
    """An empty index whose centroids and codes are those of the sample."""
    index = empty(settings, sample_ND.shape[1])
    if index.is_trained:
        return index
    ivf = ivf_of(index)
    # FAISS does not own it: it is to live until the end.
    nearest = None if device is None else device.copied(faiss.IndexFlatIP(ivf.d))
    ivf.clustering_index = nearest
    index.train(np.ascontiguousarray(sample_ND, np.float32))
    ivf.clustering_index = None
    return index


def fill(index: faiss.Index, blocks: Iterable[Vectors], device: Device | None = None) -> None:
    """Add vectors, [any, D] at a time, to a trained index."""
    ivf = None if device is None else ivf_of(index)
    if device is None or ivf is None:
        for block in blocks:
            index.add(block)
        return
    centroids = ivf.quantizer
    # Rows ask the device for their list, and codes, one row at a time, memory for its centroid.
    nearest = device.copied(centroids)
    both = faiss.IndexRefine(nearest, centroids)
    ivf.quantizer = both
    try:
        for block in blocks:
            index.add(block)
    finally:
        ivf.quantizer = centroids


def read_index(path: Path) -> faiss.Index:
    """A FAISS file, mapped and read only; it must have been verified."""
    # A damaged header must not ask for more memory than the file can hold. FAISS counts in it the
    # table of ivf_pq, nlist x M x 16 float32, whether it makes one or not: at most 16 times the
    # centroids, which the file holds.
    faiss.set_deserialization_vector_byte_limit(17 * path.stat().st_size)
    flags = faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY
    index: faiss.Index = faiss.read_index(str(path), flags)
    return index


def asked_search(settings: Retrieval) -> Search:
    """The search parameters that the settings name, defaults where they name none."""
    names = ("ef_search", "nprobe", "refine_factor")
    asked = {name: getattr(settings, name) for name in names}
    return Search(**{name: value for name, value in asked.items() if value is not None})


def parameters(
    index: faiss.Index, search: Search, k: int, fetch: int, kept: Kept | None = None
) -> Any:
    """The FAISS search parameters for the best `fetch` candidates of a ranking of `k`.

    With `kept`, of those rows only, in all lists (`retrieval/neighbours.py` says when).
    """
    # faiss' type stubs know neither these classes nor what they take.
    make: Any = faiss
    ivf = ivf_of(index)
    only = {}
    if kept is not None:
        # Row numbers spare a flat index to look at the others; lists would search them for each.
        alone = kept.few and isinstance(index, faiss.IndexFlat)
        only["sel"] = make.IDSelectorArray(kept.rows) if alone else make.IDSelectorBitmap(kept.bits)
    if isinstance(index, faiss.IndexHNSW):
        return make.SearchParametersHNSW(efSearch=max(search.ef_search, fetch), **only)
    if ivf is None:
        return make.SearchParameters(**only) if only else None
    lists = ivf.nlist if kept is not None else min(nprobe(search, k), ivf.nlist)
    found = make.SearchParametersIVF(nprobe=lists, **only)
    if isinstance(index, faiss.IndexPreTransform):
        return make.SearchParametersPreTransform(index_params=found)
    return found


def widening(index: faiss.Index, search: Search) -> Search:
    """The same search, which meets more lists for a large k even where it was not told how long
    they are."""
    ivf = ivf_of(index)
    if ivf is None or search.list_rows:
        return search
    return search.replace(list_rows=max(1, index.ntotal) / ivf.nlist)


def nprobe(search: Search, k: int) -> int:
    """How many lists a ranking of `k` scans."""
    if not search.list_rows:
        return search.nprobe
    # Lists that hold 2 k documents on average; of the whole index, so that shards agree.
    return max(search.nprobe, math.ceil(2 * k / search.list_rows))


def ivf_of(index: faiss.Index) -> Any:
    """The inverted file inside an index, None where there is none."""
    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index if isinstance(index, faiss.IndexIVF) else None


def code_bytes(settings: Retrieval, structure: str, dim: int) -> float:
    """Bytes that a structure reads to compare a query with one vector."""
    if structure == "ivf_pq":
        return (settings.pq_m or dim // 2) / 2
    if structure == "ivf_rabitq":
        # Two float32 factors beside the sign bits; four with further bits.
        extra = settings.rabitq_bits - 1
        return dim / 8 * (1 + extra) + (16 if extra else 8)
    return 4.0 * dim


def work(
    settings: Retrieval, dim: int, rows: int, distances: float, search: Search, k: int
) -> float:
    """What a query reads in a shard of `rows` with so many distances, as bytes of vectors in order.

    Bytes read otherwise count as many times as they take longer (`_TIMES_AS_LONG`).
    """
    if settings.structure == "exact":
        return rows * 4.0 * dim
    compared = distances * code_bytes(settings, settings.structure, dim)
    read = compared * _TIMES_AS_LONG[settings.structure]
    if settings.structure in TRAINED:
        read += (settings.nlist or 0) * 4 * dim * _TIMES_AS_LONG["centroids"]
    if settings.structure in CODED:
        again = k * search.refine_factor * _STORED_BYTES[settings.stored] * dim
        read += again * _TIMES_AS_LONG["again"]
    return read


def resident_bytes(settings: Retrieval, structure: str, rows: int, dim: int) -> float:
    """Bytes of the FAISS files of all shards; vectors stored for scoring again are not counted."""
    per_row = code_bytes(settings, structure, dim)
    if structure == "hnsw":
        # Level 0 has 2 M links of 4 bytes; one node in M stands on the next level with M more.
        per_row += 8 * settings.hnsw_m + 4 * settings.hnsw_m / (settings.hnsw_m - 1) + 12
    if structure == "ivf_flat":
        per_row += 8  # from the row to its list and place
    if structure in TRAINED:
        per_row += 8  # the row number in its list
    centroids = (settings.nlist or 0) * 4 * dim * (settings.shards or 1)
    return rows * per_row + (centroids if structure in TRAINED else 0)


class Counter:
    """Distances computed by FAISS since it was made; FAISS counts in one place a process."""

    def __init__(self) -> None:
        self._start = self._now()

    def distances(self) -> int:
        return self._now() - self._start

    @staticmethod
    def _now() -> int:
        counts: Any = faiss.cvar
        return int(counts.indexIVF_stats.ndis + counts.hnsw_stats.ndis)
