"""A GPU that FAISS sees: what is done there, and what stays on the CPU.

Files know nothing of it. An index is written and read as ever and copied when it is loaded, so that
a machine without a GPU serves what one with a GPU built, and the other way round.

    built there     centroids and the list of each row, of all inverted files; the true documents
                    that recall is measured against
    searched there  exact, ivf_flat
    on the CPU      hnsw, ivf_pq and ivf_rabitq, which FAISS 1.15's own GPU code does not know;
                    comparing what filters keep; more than `MOST` candidates or lists;
                    measuring, which counts the CPU's work; scores, by `retrieval/scoring.py` from
                    the stored vectors

Candidates are compared in float32 there too, and what is within `ROUNDING` is scored again, so
rankings are the same. That holds while cuBLAS multiplies float32 in full, as it does unless told
otherwise: TF32 (NVIDIA_TF32_OVERRIDE=1) keeps 10 of the 23 bits, and `find` refuses such a GPU.
Rounding may still put a row that is as near to two centroids into the other list, send a query to
another such list, and move the centroids of k-means: what is built there is not the same bytes.

Shapes: Q queries, F candidates of a query, D dimensions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from bixse.retrieval.library import faiss
from bixse.retrieval.scoring import ROUNDING

MOST = 2048
"""Most candidates, and most lists, of a search on a GPU: FAISS selects in registers."""

SCRATCH_BYTES = 256 << 20
"""Of GPU memory, for intermediate results. FAISS would keep 1.5 GiB; a search that needs more
allocates it for itself. It compares 32 queries with 262,144 vectors at a time, twice: 67 MB."""


class Device:
    """A GPU, for one thread at a time together with all that was copied to it."""

    def __init__(self, copy: Callable[[faiss.Index], faiss.Index]) -> None:
        """`copy` makes the index that is searched there, and raises RuntimeError as FAISS does."""
        self._copy = copy

    def copied(self, index: faiss.Index) -> faiss.Index:
        """An index as it is now, to be searched there; `searchable` says which can be.

        Raises ValueError when there is no room for it.
        """
        try:
            return self._copy(index)
        except RuntimeError as error:
            # FAISS raises nothing more telling.
            if "alloc fail" not in str(error):
                raise
            raise ValueError(
                f"the GPU has no room for {index.ntotal} vectors of {index.d} numbers "
                f"({4e-6 * index.ntotal * index.d:.0f} MB) beside what it holds: share it with "
                "less, make more shards, or stay on the CPU"
            ) from error

    def check(self) -> None:
        """Raises ValueError when products differ from exact ones by more than `ROUNDING`."""
        rows_ND = np.random.default_rng(0).normal(size=(1024, 64))
        vectors_ND = (rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)).astype(np.float32)
        index = faiss.IndexFlatIP(vectors_ND.shape[1])
        index.add(vectors_ND)
        queries_QD = vectors_ND[:32]
        scores_QF, rows_QF = self.copied(index).search(queries_QD, 16)
        exact_QF = np.einsum("qfd,qd->qf", vectors_ND[rows_QF], queries_QD.astype(np.float64))
        worst = float(np.abs(scores_QF - exact_QF).max())
        if not worst <= ROUNDING:
            raise ValueError(
                f"products of unit vectors on this GPU are wrong by up to {worst:.1g}, and "
                f"rankings need {ROUNDING:g}: unset NVIDIA_TF32_OVERRIDE, or stay on the CPU"
            )


def searchable(index: faiss.Index) -> bool:
    """Whether FAISS searches such an index on a GPU: whole vectors, in order or in lists."""
    return isinstance(index, faiss.IndexFlat | faiss.IndexIVFFlat)


def takes(params: Any, fetch: int) -> bool:
    """Whether a copy can be asked for `fetch` candidates so (`structures.parameters`).

    FAISS's own GPU code does not heed which rows a filter keeps.
    """
    if params is None:
        return fetch <= MOST
    return params.sel is None and max(fetch, params.nprobe) <= MOST


def find() -> Device | None:
    """The last GPU that this process sees, since an encoder takes the first; None without any.

    Ray 2.60 hides no GPU from who asked for none: ask only for whom it was given to.
    Raises ValueError as `Device.check`, and when not even FAISS's own memory can be had.
    """
    # A CPU build of FAISS answers 0, and has none of the other names.
    count = faiss.get_num_gpus()
    if not count:
        return None
    known: Any = faiss
    resources = known.StandardGpuResources()
    resources.setTempMemory(SCRATCH_BYTES)
    # 256 MiB that only queries of as much would pass through.
    resources.setPinnedMemory(0)
    device = Device(partial(_on_gpu, resources, count - 1))
    device.check()
    return device


def _on_gpu(resources: Any, number: int, index: faiss.Index) -> faiss.Index:
    # Not `index_cpu_to_gpu`: where memory runs out it never gives back what it had copied by then.
    known: Any = faiss
    whole = faiss.downcast_index(index)
    lists = isinstance(whole, faiss.IndexIVFFlat)
    config = known.GpuIndexIVFFlatConfig() if lists else known.GpuIndexFlatConfig()
    config.device = number
    make = known.GpuIndexIVFFlat if lists else known.GpuIndexFlat
    copy: faiss.Index = make(resources, whole, config)
    return copy
