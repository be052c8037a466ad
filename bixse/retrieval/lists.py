"""Inverted lists of several shards: scanned after one look at the centroids, or merged into one.

Both need lists under the same centroids, as shards of one index have.

Shapes: Q queries, D dimensions, F candidates of a query, P lists that are scanned of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bixse.retrieval.library import faiss
from bixse.retrieval.settings import Search
from bixse.retrieval.structures import Vectors, ivf_of, nprobe


@dataclass(frozen=True)
class Scan:
    """Queries on their way into inverted files, as far as it is the same in all that share
    centroids: rotated, and their nearest lists found.
    """

    vectors_QD: Vectors
    lists_QP: npt.NDArray[np.int64]
    products_QP: Vectors
    """Inner products of the queries with the centroids of those lists."""
    params: Any

    @classmethod
    def begin(cls, index: faiss.Index, vectors_QD: Vectors, search: Search, k: int) -> "Scan":
        """Find the lists to scan; the index must be an inverted file."""
        make: Any = faiss
        ivf = ivf_of(index)
        for rotation in _rotations(index):
            vectors_QD = rotation.apply(vectors_QD)
        params = make.SearchParametersIVF(nprobe=min(nprobe(search, k), ivf.nlist))
        products_QP, lists_QP = ivf.quantizer.search(vectors_QD, params.nprobe)
        return cls(vectors_QD, lists_QP, products_QP, params)

    def of(self, index: faiss.Index, fetch: int) -> tuple[Vectors, npt.NDArray[np.int64]]:
        """Scores and rows, [Q, fetch], of an index with the same centroids."""
        queries = len(self.vectors_QD)
        scores_QF = np.empty((queries, fetch), np.float32)
        rows_QF = np.empty((queries, fetch), np.int64)
        # faiss' own wrapper takes no parameters, and so only the nprobe that an index holds.
        ivf_of(index).search_preassigned_c(
            queries,
            faiss.swig_ptr(self.vectors_QD),
            fetch,
            faiss.swig_ptr(self.lists_QP),
            faiss.swig_ptr(self.products_QP),
            faiss.swig_ptr(scores_QF),
            faiss.swig_ptr(rows_QF),
            False,
            self.params,
        )
        return scores_QF, rows_QF


def share_centroids(indexes: Sequence[faiss.Index]) -> bool:
    """Whether one `Scan` does for all of these: inverted files with the same centroids, after the
    same rotation.
    """
    if any(ivf_of(index) is None for index in indexes):
        return False
    first, others = _before_lists(indexes[0]), map(_before_lists, indexes[1:])
    return all(len(first) == len(one) and all(map(np.array_equal, first, one)) for one in others)


def merge_lists(indexes: Sequence[faiss.Index]) -> faiss.Index | None:
    """The rows of all in the first, numbered one after the other; None where that cannot be.

    They must hold codes of one kind (`structures.CODED`), with one codebook, under the same
    centroids. Codes are moved, about a microsecond each: the others are empty afterwards.
    """
    first, *others = indexes
    codes = [_codebook(index) for index in indexes]
    if not share_centroids(indexes) or any(not np.array_equal(codes[0], one) for one in codes):
        return None
    into = ivf_of(first)
    for other in others:
        own = ivf_of(other)
        _move_what_faiss_cannot(into, own)
        into.merge_from(own, into.ntotal)
        other.ntotal = 0
    first.ntotal = into.ntotal
    return first


def _move_what_faiss_cannot(into: Any, other: Any) -> None:
    """Move the lists that FAISS 1.15 would write beyond the end of.

    `BlockInvertedLists::add_entries` takes a list for one of whole blocks where its number of rows
    is a multiple of a block's bytes, and copies too much.
    """
    known: Any = faiss
    to, of = (known.downcast_InvertedLists(ivf.invlists) for ivf in (into, other))
    row = np.empty(to.packer.code_size, np.uint8)
    for number in range(to.nlist):
        held, more = to.list_size(number), of.list_size(number)
        if not held or not more or held % to.block_size:
            continue
        to.resize(number, held + more)
        ids_N = known.rev_swig_ptr(to.get_ids(number), held + more)
        ids_N[held:] = known.rev_swig_ptr(of.get_ids(number), more) + into.ntotal
        for place in range(more):
            to.packer.unpack_1_c(of.get_codes(number), place, faiss.swig_ptr(row))
            to.packer.pack_1_c(faiss.swig_ptr(row), held + place, to.get_codes(number))
        of.resize(number, 0)


def _codebook(index: faiss.Index) -> Vectors:
    """What the codes of product codes stand for; those of RaBitQ need no more than centroids."""
    pq = getattr(ivf_of(index), "pq", None)
    return np.zeros(0, np.float32) if pq is None else faiss.vector_to_array(pq.centroids)


def _before_lists(index: faiss.Index) -> list[Vectors]:
    """The numbers that decide which lists of an inverted file a query meets."""
    ivf = ivf_of(index)
    numbers = [faiss.vector_to_array(rotation.A) for rotation in _rotations(index)]
    return [ivf.quantizer.reconstruct_n(0, ivf.nlist), *numbers]


def _rotations(index: faiss.Index) -> list[Any]:
    if not isinstance(index, faiss.IndexPreTransform):
        return []
    chain: Any = index.chain
    return [faiss.downcast_VectorTransform(chain.at(number)) for number in range(chain.size())]
