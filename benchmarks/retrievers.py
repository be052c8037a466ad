"""Retrievers tuned and measured one after another in one process, without Ray.

The rows, steps, vectors and order of documents are those of `jobs.train`, `jobs.embed` and
`jobs.evaluate`. What those do anew for each retriever is done once here: a model is loaded, a
corpus is tokenised.

Shapes: Q queries, N documents, D dimensions.
"""

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from bixse.chunks import Side, tokenise
from bixse.evaluation.metrics import Qrels, ndcg
from bixse.models.encoder import Encoder, load_model
from bixse.place import Place
from bixse.precision import autocast
from bixse.records import Hit
from bixse.training.gather import World
from bixse.training.groups import Labels
from bixse.training.loop import Run, Trained, train_loop
from bixse.training.settings import Training

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Vectors = npt.NDArray[np.float32]

CUTOFF = 10
UNIT_ROWS = 1024
"""Documents tokenised at a time, as `jobs.embed` has it: chunks, and with them rounding, are its
own."""
_CALL = {"cpu": 2048, "cuda": 65_536}
"""Tokens of one call of the model, as `Encoder.encode` has it."""


@dataclass(frozen=True)
class Tokens:
    """A corpus as an encoder reads it."""

    doc_ids: Sequence[str]
    """In the order of the sides: of each unit, those of the longest texts first."""
    sides: Sequence[Side]
    """Of each unit of documents."""

    def save(self, path: Path) -> None:
        plain = [{"chunks": side.chunks, "place": side.place} for side in self.sides]
        aside = path.with_suffix(f".{uuid.uuid4().hex}")
        torch.save({"doc_ids": list(self.doc_ids), "sides": plain}, aside)
        aside.rename(path)

    @classmethod
    def load(cls, path: Path, device: str) -> "Tokens":
        stored = torch.load(path, map_location=device, weights_only=True)
        sides = [
            Side("document", side["chunks"], side["place"], len(side["place"]))
            for side in stored["sides"]
        ]
        return cls(stored["doc_ids"], sides)


def tokens_of(model: "SentenceTransformer", corpus: Mapping[str, str]) -> Tokens:
    """What the model reads of each document, in chunks that suit its device."""
    rows, most = list(corpus.items()), _CALL[model.device.type]
    doc_ids, sides = [], []
    for start in range(0, len(rows), UNIT_ROWS):
        unit = sorted(rows[start : start + UNIT_ROWS], key=lambda row: -len(row[1]))
        texts = [opening(text, model.max_seq_length) for _, text in unit]
        sides.append(tokenise(model, texts, "document", most=most))
        doc_ids += [doc_id for doc_id, _ in unit]
    return Tokens(doc_ids, sides)


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
    """A base encoder twice: in float32 to tune, and as `Encoder.load` has it to read with."""

    def __init__(self, start: str, device: str) -> None:
        """Raises ValueError as `load_model`."""
        self._tuned = load_model(start, device)
        # On a GPU its weights are bfloat16: encoding with the other one would round what is tuned.
        self._reader = Encoder.load(start, device)
        self._base = {name: value.clone() for name, value in self._tuned.state_dict().items()}

    def reset(self) -> None:
        """Both are the base again."""
        for model in (self._tuned, self._reader.model):
            model.load_state_dict(self._base)

    def tune(self, labels: Labels, settings: Training) -> Trained:
        """The base, tuned on labels. Raises as `train_loop`."""
        self.reset()
        read = [opening(text, settings.document_tokens) for text in labels.document_text_D.tolist()]
        labels = replace(labels, document_text_D=pa.array(read))
        # Nobody goes on from the checkpoint of all steps: a disk is not made to wait for it.
        checkpoints = Place(f"memory://{uuid.uuid4().hex}")
        trained = train_loop(Run(settings, labels, checkpoints, "benchmark"), self._tuned, World())
        checkpoints.clear()
        self._reader.model.load_state_dict(self._tuned.state_dict())
        return trained

    def documents(self, tokens: Tokens) -> Vectors:
        """Unit vectors [N, D] of a corpus: those of `Encoder.encode`."""
        model = self._reader.model
        with torch.inference_mode(), autocast(model.device):
            found = [_read(model, side) for side in tokens.sides]
        vectors = np.concatenate(found)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def ndcg(self, tokens: Tokens, asked: Mapping[str, str], qrels: Qrels) -> dict[str, float]:
        """nDCG@10 of each query over the whole corpus."""
        queries_QD = self._reader.encode(list(asked.values()), "query")
        hits = search(queries_QD, self.documents(tokens), tokens.doc_ids, CUTOFF)
        return {
            query_id: ndcg(found, qrels[query_id], CUTOFF)
            for query_id, found in zip(asked, hits, strict=True)
        }


def _read(model: Any, side: Side) -> Vectors:
    # A copy: sentence-transformers adds its outputs to the features.
    made = [model(dict(chunk), task="document")["sentence_embedding"] for chunk in side.chunks]
    return np.asarray(torch.cat(made)[side.place].float().cpu().numpy())


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
