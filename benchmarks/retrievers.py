"""Retrievers tuned and measured one after another in one process, without Ray.

The rows, steps, vectors and order of documents are those of `jobs.train`, `jobs.embed` and
`jobs.evaluate`. What those do anew for each retriever is done once here: a model is loaded, a set
is read.

Shapes: Q queries, N documents, D dimensions.
"""

import copy
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from bixse.evaluation.metrics import Qrels, ndcg
from bixse.models.encoder import Encoder, load_model
from bixse.place import Place
from bixse.records import Hit
from bixse.training.gather import World
from bixse.training.groups import Labels
from bixse.training.loop import Run, Trained, train_loop
from bixse.training.settings import Training

Vectors = npt.NDArray[np.float32]

CUTOFF = 10


def opening(text: str, tokens: int | None) -> str:
    """As much of a text as there can be to its first `tokens` tokens: tokenising all of a long one
    takes as long as training on it.

    A word is at least one token, but for one of nothing that a tokeniser keeps: hence two words a
    token.
    """
    if tokens is None:
        return text
    found = re.match(rf"\s*(?:\S+\s*){{0,{2 * tokens}}}", text)
    assert found is not None
    return found.group()


class Workbench:
    """A base encoder twice: in float32 to tune, and as `Encoder.reading` has it to read with."""

    def __init__(self, start: str, device: str) -> None:
        """Raises ValueError as `load_model`."""
        self._tuned = load_model(start, device)
        self._base = {name: value.clone() for name, value in self._tuned.state_dict().items()}
        self._reader = self._copied()

    def reset(self) -> None:
        """Both are the base again."""
        self._tuned.load_state_dict(self._base)
        self._reader = self._copied()

    def tune(self, labels: Labels, settings: Training) -> Trained:
        """The base, tuned on labels. Raises as `train_loop`."""
        self.reset()
        read = [opening(text, settings.document_tokens) for text in labels.document_text_D.tolist()]
        labels = replace(labels, document_text_D=pa.array(read))
        # Nobody goes on from the checkpoint of all steps: a disk is not made to wait for it.
        checkpoints = Place(f"memory://{uuid.uuid4().hex}")
        trained = train_loop(Run(settings, labels, checkpoints, "benchmark"), self._tuned, World())
        checkpoints.clear()
        self._reader = self._copied()
        return trained

    def _copied(self) -> Encoder:
        """To read with itself would round what is tuned."""
        return Encoder.reading(copy.deepcopy(self._tuned), "")

    def documents(self, corpus: Mapping[str, str]) -> Vectors:
        """Unit vectors [N, D] of a corpus."""
        limit = self._reader.model.max_seq_length
        read = [opening(text, limit) for text in corpus.values()]
        return self._reader.encode(read, "document")

    def queries(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors [Q, D]."""
        return self._reader.encode(texts, "query")

    def ndcg(
        self, corpus: Mapping[str, str], asked: Mapping[str, str], qrels: Qrels
    ) -> dict[str, float]:
        """nDCG@10 of each query over the whole corpus."""
        queries_QD = self.queries(list(asked.values()))
        hits = search(queries_QD, self.documents(corpus), list(corpus), CUTOFF)
        return {
            query_id: ndcg(found, qrels[query_id], CUTOFF)
            for query_id, found in zip(asked, hits, strict=True)
        }


def search(
    queries_QD: Vectors, documents_ND: Vectors, doc_ids: Sequence[str], k: int
) -> list[list[Hit]]:
    """The best `k` documents of each query by cosine in float64, ties by `doc_id`: those of
    `search_exact`, without FAISS."""
    rising = sorted(range(len(doc_ids)), key=lambda row: doc_ids[row])
    stored_ND = documents_ND[rising].astype(np.float64)
    scores_QN = (queries_QD.astype(np.float64) @ stored_ND.T).astype(np.float32)
    best_QK = np.argsort(-scores_QN, axis=1, kind="stable")[:, :k]
    return [
        [
            Hit(doc_ids[rising[row]], float(scores_N[row]), rank)
            for rank, row in enumerate(best_K.tolist(), start=1)
        ]
        for scores_N, best_K in zip(scores_QN, best_QK, strict=True)
    ]


def shortened(start: str, tokens: int | None, directory: Path) -> str:
    """The base encoder, or a copy at `directory` that reads no more than so many tokens."""
    if tokens is None:
        return start
    if not directory.exists():
        model = load_model(start, "cpu")
        model.max_seq_length = tokens
        aside = directory.with_suffix(".under-way")
        model.save_pretrained(str(aside), create_model_card=False)
        aside.rename(directory)
    return str(directory)


def share_machine(processes: int, device: str) -> None:
    """Settle this process as one of so many: its share of the cores, unless the environment says
    another, and of a GPU's kernels those that give the same numbers from run to run."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", threads)))
    # Read by the tokeniser when it is first called.
    os.environ.setdefault("RAYON_NUM_THREADS", threads)
    if device == "cuda":
        # Read by cuBLAS when it is first called.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True, warn_only=True)
