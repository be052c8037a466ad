"""FAISS on the CPU in the place of a GPU: under its limits, and with rounding of its own."""

from typing import Any

import numpy as np

from bixse.retrieval.device import MOST, Device, searchable
from bixse.retrieval.library import faiss

NOISE = 4e-6
"""Less than half of what two kernels may differ by (`ROUNDING`)."""


class StandIn:
    """`device` copies as FAISS does; `asked` holds the candidates of each search of a copy."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.copies = 0
        self.device = Device(self._copy)

    def _copy(self, index: faiss.Index) -> faiss.Index:
        whole = faiss.downcast_index(index)
        assert searchable(whole), "not implemented on GPU"
        self.copies += 1
        copy: Any = faiss.clone_index(whole)
        search, noise = copy.search, np.random.default_rng(self.copies)

        def limited(vectors_QD: Any, k: int, *, params: Any = None) -> tuple[Any, Any]:
            assert k <= MOST, "GPU index only supports min/max-K selection up to 2048"
            if params is not None:
                assert isinstance(params, faiss.SearchParametersIVF), "unhandled SearchParameters"
                assert params.sel is None, "no selectors"
                assert params.nprobe <= MOST, "nprobe selection up to 2048"
            self.asked.append(k)
            scores_QK, rows_QK = search(vectors_QD, k, params=params)
            scores_QK = scores_QK + noise.uniform(-NOISE, NOISE, scores_QK.shape).astype("f4")
            order_QK = np.argsort(-scores_QK, axis=1)
            along = np.take_along_axis
            return along(scores_QK, order_QK, 1), along(rows_QK, order_QK, 1)

        copy.search = limited
        return copy
