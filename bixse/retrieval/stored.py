"""Whole vectors that stand beside codes, so that what the codes find is scored again.

They are memory-mapped, in the order of the rows of a shard, or of several shards one after the
other. Shapes as in `retrieval/scoring.py`; N rows.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bixse.retrieval.library import faiss
from bixse.retrieval.scoring import Rows, Vectors, joined, products

VECTORS_FILE = "vectors.npy"
SCALES_FILE = "scales.npy"


class _Part(NamedTuple):
    """The vectors of one shard."""

    vectors_ND: npt.NDArray[Any]
    scales_N: Vectors | None
    """What each row of int8 vectors is multiplied with."""

    def read(self, rows: Rows) -> Vectors:
        vectors = self.vectors_ND[rows].astype(np.float32, copy=False)
        return vectors if self.scales_N is None else vectors * self.scales_N[rows, None]


class Stored:
    """The stored vectors of rows that are numbered from 0."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part.vectors_ND) for part in parts])

    @classmethod
    def load(cls, directory: Path) -> "Stored | None":
        """Map the vectors of a shard, where it has any."""
        if not (directory / VECTORS_FILE).exists():
            return None
        vectors_ND = np.load(directory / VECTORS_FILE, mmap_mode="r").view(np.ndarray)
        scales_N = directory / SCALES_FILE
        return cls([_Part(vectors_ND, np.load(scales_N) if scales_N.exists() else None)])

    @classmethod
    def together(cls, several: Sequence["Stored"]) -> "Stored":
        """The rows of all, one after the other."""
        return cls(list(chain.from_iterable(one._parts for one in several)))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, rows: Rows) -> Vectors:
        """The vectors of rows, [len(rows), D]."""
        if len(self._parts) == 1:
            return self._parts[0].read(rows)
        home = np.searchsorted(self._ends, rows, side="right")
        found = np.empty((len(rows), self._parts[0].vectors_ND.shape[1]), np.float32)
        for number, (part, start) in enumerate(self._numbered()):
            places = np.flatnonzero(home == number)
            found[places] = part.read(rows[places] - start)
        return found

    def falling(self, vectors_QD: Vectors, rows_QF: Rows) -> tuple[Vectors, Rows]:
        """Float32 scores and rows of [Q, F] rows in any order, the highest score first."""
        # FAISS reads each float32 vector where it stands; others must be converted.
        if any(part.vectors_ND.dtype != np.float32 for part in self._parts):
            scores_QF = products(vectors_QD, rows_QF, self.read)
        elif len(self._parts) == 1:
            scores_QF = _scored(vectors_QD, rows_QF, self._parts[0])
        else:
            scores_QF = np.full(rows_QF.shape, -np.inf, np.float32)
            for part, start in self._numbered():
                own_QF = rows_QF - start
                own_QF[own_QF >= len(part.vectors_ND)] = -1
                np.maximum(scores_QF, _scored(vectors_QD, own_QF, part), out=scores_QF)
        return joined([(scores_QF, rows_QF)])

    def _numbered(self) -> Iterator[tuple[_Part, int]]:
        """The parts, each with the number of its first row."""
        return zip(self._parts, [0, *self._ends.tolist()], strict=False)


def _scored(vectors_QD: Vectors, rows_QF: Rows, part: _Part) -> Vectors:
    """Inner products with float32 vectors; -inf for a row below 0."""
    scores_QF = np.empty(rows_QF.shape, np.float32)
    pointers = map(faiss.swig_ptr, (scores_QF, vectors_QD, part.vectors_ND, rows_QF))
    known: Any = faiss  # faiss' type stubs lack it.
    known.fvec_inner_products_by_idx(*pointers, vectors_QD.shape[1], *rows_QF.shape)
    return scores_QF
