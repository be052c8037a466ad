"""Judged pairs become a batch: queries, documents, and what is known of every cell between them.

A batch is a set of judged pairs. Its rows are their distinct queries, its columns their distinct
documents, so that a document that two queries share is encoded once and no cell counts twice
(methods 1.6, 2). A cell that was judged anywhere has its grade as target; a cell that may well be
relevant but was never judged is masked; every other cell has target 0.

Shapes: Q queries and D documents of the batch, P its judged pairs ("own" cells), L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from bixse.training.groups import Floats, Ints, Labels

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Bools = npt.NDArray[np.bool_]
Role = Literal["query", "document"]

# Texts encoded together: sorted by length, so that a long one pads few others.
_CHUNK = 32


@dataclass(frozen=True)
class Batch:
    """A global batch, the same on every rank."""

    query_Q: Ints
    document_D: Ints
    target_QD: Floats
    """Relevance in [0, 1]; 0 where nothing is known."""
    weight_QD: Floats
    """1, or 0 where the cell is masked."""
    known_QD: Bools
    """Judged, in this batch's pairs or elsewhere."""
    own_QD: Bools
    """Judged by a pair of this batch."""


def batch_of(labels: Labels, pairs: Ints) -> Batch:
    """The batch of some pairs; a function of the set of them, not of their order."""
    query_P = labels.query_of(pairs)
    query_Q, row_P = np.unique(query_P, return_inverse=True)
    document_D, column_P = np.unique(labels.document_P[pairs], return_inverse=True)
    shape = (len(query_Q), len(document_D))
    target_QD, weight_QD = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    known_QD, own_QD = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    own_QD[row_P, column_P] = True
    for row, query in enumerate(query_Q.tolist()):
        judged = slice(labels.pairs_from_Q1[query], labels.pairs_from_Q1[query + 1])
        document = labels.document_P[judged]
        column = np.minimum(np.searchsorted(document_D, document), len(document_D) - 1)
        here = document_D[column] == document
        target_QD[row, column[here]] = labels.relevance_P[judged][here]
        known_QD[row, column[here]] = True
        weight_QD[row, np.isin(document_D, labels.suspects.get(query, ()))] = 0
    return Batch(query_Q, document_D, target_QD, weight_QD, known_QD, own_QD)


@dataclass(frozen=True)
class Side:
    """Texts of one role, tokenised in chunks of like length."""

    role: Role
    chunks: Sequence[dict[str, Any]]
    """Features of sentence-transformers: `input_ids` [chunk, L], `attention_mask`, ..."""
    place: torch.Tensor
    """Where in the concatenated chunks each text stands."""
    count: int
    """Texts that count: 0 on a rank without any, which then encodes one and uses none."""


def prompt_of(model: "SentenceTransformer", role: Role) -> str | None:
    """The prompt that `encode_query` or `encode_document` of sentence-transformers puts first."""
    names = ("query",) if role == "query" else ("document", "passage", "corpus")
    found = (name for name in (*names, model.default_prompt_name) if name in model.prompts)
    name = next(found, None)
    return None if name is None else str(model.prompts[name])


def tokenise(
    model: "SentenceTransformer", texts: Sequence[str], role: Role, max_tokens: int, count: int
) -> Side:
    """One or more texts as `Encoder.encode` would read them, cut at `max_tokens`.

    The model's own limit holds where it is lower. Of the texts the first `count` are used.
    """
    own = model.max_seq_length
    limit = max_tokens if own is None else min(max_tokens, own)
    order = sorted(range(len(texts)), key=lambda text: len(texts[text]))
    chunks = []
    for start in range(0, len(texts), _CHUNK):
        chunk = [texts[text] for text in order[start : start + _CHUNK]]
        features = model.preprocess(
            chunk, prompt=prompt_of(model, role), task=role, max_length=limit
        )
        chunks.append(
            {
                name: value.to(model.device) if isinstance(value, torch.Tensor) else value
                for name, value in features.items()
            }
        )
    place = torch.empty(len(texts), dtype=torch.int64)
    place[torch.tensor(order)] = torch.arange(len(texts))
    return Side(role, chunks, place.to(model.device), count)
