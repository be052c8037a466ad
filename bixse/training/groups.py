"""Judgments become a group per query, and an epoch's rows.

Queries of equal text are one query, documents of equal text one document (`records.text_hash`), and
several judgments of one such pair are averaged: so a pair has one grade, wherever it meets in a
batch, and a copy of a relevant document is never a negative.

Preferences between two judged documents of a query are merged likewise, and so are clicks on a
judged document at a rank.

Shapes: Q queries, D documents, P judged pairs (in the order of their query), R preferences (too), O
observations of clicks (in the order of their pair).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bixse.place import Place
from bixse.records import text_hash
from bixse.training.texts import MappedTexts, column

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Reals = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Preferences:
    """Which of two judged documents of a query a pairwise judge prefers."""

    from_Q1: Ints
    """Those of query q are from `[q]` up to `[q + 1]`."""
    a_R: Ints
    """Document numbers, a below b."""
    b_R: Ints
    prob_a_R: Floats
    """Probability in [0, 1] that a is the more relevant."""


@dataclass(frozen=True)
class Clicks:
    """How often judged pairs were clicked where they were shown."""

    from_P1: Ints
    """Those of pair p are from `[p]` up to `[p + 1]`, one for each rank."""
    rate_O: Floats
    """Clicks an impression, in [0, 1]."""
    rank_bias_O: Floats
    """What the rank adds to the log-odds of a click."""
    weight_O: Floats
    """Of a query as many as it has pairs, shared out by impressions."""


@dataclass(frozen=True)
class Labels:
    """All that training reads. Documents that nobody judged are not in it."""

    query_text_Q: pa.Array | MappedTexts
    document_text_D: pa.Array | MappedTexts
    pairs_from_Q1: Ints
    """The pairs of query q are those from `[q]` up to `[q + 1]`, its documents rising."""
    document_P: Ints
    relevance_P: Floats
    suspects: Mapping[int, tuple[int, ...]]
    """Of a query, documents that nobody judged for it but that it was written from or is: not
    zeros."""
    judgments: int
    """Rows that were read, before equal pairs were merged."""
    preferences: Preferences | None = None
    clicks: Clicks | None = None

    @property
    def pairs(self) -> int:
        return len(self.document_P)

    def put(self, place: Place) -> "Labels":
        """The same, mapped texts at another place."""

        def there(texts: pa.Array | MappedTexts) -> pa.Array | MappedTexts:
            return texts.put(place) if isinstance(texts, MappedTexts) else texts

        return replace(
            self,
            query_text_Q=there(self.query_text_Q),
            document_text_D=there(self.document_text_D),
        )

    def query_of(self, pairs: Ints) -> Ints:
        """The query of each pair."""
        found: Ints = np.searchsorted(self.pairs_from_Q1, pairs, side="right") - 1
        return found


@dataclass(frozen=True)
class Preferred:
    """The columns of preferences."""

    query_ids: Sequence[str]
    doc_ids_a: Sequence[str]
    doc_ids_b: Sequence[str]
    prob_a: Floats


@dataclass(frozen=True)
class Clicked:
    """The columns of clicks."""

    query_ids: Sequence[str]
    doc_ids: Sequence[str]
    impressions: Ints
    clicks: Ints
    rank_bias: Reals
    weight: Reals
    """Of an impression."""


def group(
    query_ids: Sequence[str],
    doc_ids: Sequence[str],
    relevance: Floats,
    query_texts: Mapping[str, str],
    document_texts: Mapping[str, str],
    seed_doc_ids: Mapping[str, str],
    preferred: Preferred | None = None,
    clicked: Clicked | None = None,
) -> Labels:
    """Labels from the columns of judgments (and preferences, and clicks) and the texts that they
    name.

    `seed_doc_ids` names the document that a query was written from or is, where there is one.
    Raises ValueError when there is no judgment, none above 0, or one outside [0, 1], and for
    preferences as `_preferences`, for clicks as `_clicks`; KeyError for an id of a judgment without
    a text.
    """
    if not len(relevance):
        raise ValueError("no judgments to train on")
    if not ((relevance >= 0) & (relevance <= 1)).all():
        raise ValueError("a judgment has a relevance outside [0, 1]")
    if not (relevance > 0).any():
        raise ValueError(f"all {len(relevance)} judgments have relevance 0: nothing to learn from")
    query_row, query_names = _number(query_ids, query_texts)
    document_row, document_names = _number(doc_ids, document_texts)
    queries, documents = len(query_names), len(document_names)
    query = np.asarray([query_row[query_id] for query_id in query_ids], np.int64)
    document = np.asarray([document_row[doc_id] for doc_id in doc_ids], np.int64)
    keys, inverse = np.unique(query * documents + document, return_inverse=True)
    mean = np.bincount(inverse, weights=relevance) / np.bincount(inverse)
    seeds = [(query_row.get(q), document_row.get(d)) for q, d in seed_doc_ids.items()]
    known = [(q, d) for q, d in seeds if q is not None and d is not None]
    judged = np.isin(np.asarray([q * documents + d for q, d in known], np.int64), keys)
    suspects: dict[int, tuple[int, ...]] = {}
    for (q, d), is_judged in zip(known, judged.tolist(), strict=True):
        if not is_judged:
            suspects[q] = (*suspects.get(q, ()), d)
    return Labels(
        query_text_Q=column(query_texts, query_names),
        document_text_D=column(document_texts, document_names),
        pairs_from_Q1=np.searchsorted(keys, np.arange(queries + 1) * documents),
        document_P=keys % documents,
        relevance_P=mean.astype(np.float32),
        suspects=suspects,
        judgments=len(relevance),
        preferences=None
        if preferred is None
        else _preferences(preferred, query_row, document_row, keys, queries),
        clicks=None if clicked is None else _clicks(clicked, query_row, document_row, keys),
    )


def _preferences(
    preferred: Preferred,
    query_row: Mapping[str, int],
    document_row: Mapping[str, int],
    judged: Ints,
    queries: int,
) -> Preferences:
    """Preferences between documents that are judged; several of one pair are averaged.

    `judged` are the sorted keys (query * documents + document) of judged pairs. Raises ValueError
    for a probability outside [0, 1], and when no preference is left.
    """
    if not ((preferred.prob_a >= 0) & (preferred.prob_a <= 1)).all():
        raise ValueError("a preference has a prob_a outside [0, 1]")
    documents = max(document_row.values()) + 1

    def numbers(ids: Sequence[str], of: Mapping[str, int]) -> Ints:
        return np.asarray([of.get(name, -1) for name in ids], np.int64)

    query = numbers(preferred.query_ids, query_row)
    a, b = numbers(preferred.doc_ids_a, document_row), numbers(preferred.doc_ids_b, document_row)
    found = (query >= 0) & (a >= 0) & (b >= 0) & (a != b)
    for document in (a, b):
        found &= np.isin(query * documents + document, judged)
    if not found.any():
        raise ValueError(
            f"none of {len(found)} preferences is between two documents judged for its query"
        )
    query, a, b, prob_a = query[found], a[found], b[found], preferred.prob_a[found]
    swapped = a > b
    a, b = np.minimum(a, b), np.maximum(a, b)
    prob_a = np.where(swapped, 1 - prob_a, prob_a)
    (query, a, b), inverse = np.unique(np.stack([query, a, b]), axis=1, return_inverse=True)
    mean = np.bincount(inverse, weights=prob_a) / np.bincount(inverse)
    return Preferences(
        from_Q1=np.searchsorted(query, np.arange(queries + 1)),
        a_R=a,
        b_R=b,
        prob_a_R=mean.astype(np.float32),
    )


def _clicks(
    clicked: Clicked,
    query_row: Mapping[str, int],
    document_row: Mapping[str, int],
    judged: Ints,
) -> Clicks:
    """Clicks on judged pairs; those of equal texts where the rank does the same to them are summed.

    `judged` are the sorted keys (query * documents + document) of judged pairs; clicks on others
    are left out. Raises ValueError when a judged pair was never shown.
    """
    documents = max(document_row.values()) + 1
    query, document = (
        np.asarray([of.get(name, -1) for name in ids], np.int64)
        for of, ids in ((query_row, clicked.query_ids), (document_row, clicked.doc_ids))
    )
    key = np.where((query < 0) | (document < 0), -1, query * documents + document)
    pair = np.minimum(np.searchsorted(judged, key), len(judged) - 1)
    known = judged[pair] == key
    if len(np.unique(pair[known])) < len(judged):
        raise ValueError("a judged document was never shown: its clicks are of another log")
    bias, of_bias = np.unique(clicked.rank_bias[known], return_inverse=True)
    at, inverse = np.unique(pair[known] * len(bias) + of_bias, return_inverse=True)
    shown, clicks = clicked.impressions[known], clicked.clicks[known]
    pair, impressions = at // len(bias), np.bincount(inverse, shown)
    weight = np.bincount(inverse, shown * clicked.weight[known])
    query = judged[pair] // documents
    pairs_Q, weight_Q = np.bincount(judged // documents), np.bincount(query, weight)
    return Clicks(
        from_P1=np.searchsorted(pair, np.arange(len(judged) + 1)),
        rate_O=(np.bincount(inverse, clicks) / impressions).astype(np.float32),
        rank_bias_O=bias[at % len(bias)].astype(np.float32),
        weight_O=(weight * (pairs_Q / weight_Q)[query]).astype(np.float32),
    )


def _number(ids: Sequence[str], texts: Mapping[str, str]) -> tuple[dict[str, int], list[str]]:
    """A number for each id, shared by ids of equal text, and of each number its first id."""
    number: dict[str, int] = {}
    by_text: dict[str, int] = {}
    kept: list[str] = []
    for name in ids:
        if name in number:
            continue
        number[name] = by_text.setdefault(text_hash(texts[name]), len(kept))
        if number[name] == len(kept):
            kept.append(name)
    return number, kept


def count_rows(labels: Labels, docs_per_query: int) -> int:
    """Rows of an epoch: each query's pairs in pieces of `docs_per_query`."""
    sizes = np.diff(labels.pairs_from_Q1)
    return int(((sizes + docs_per_query - 1) // docs_per_query).sum())


def count_groups(labels: Labels, threshold: float) -> int:
    """Rows of an epoch of `epoch_groups`. Raises ValueError when there is none."""
    positive_P = labels.relevance_P >= threshold
    query_P = labels.query_of(np.arange(labels.pairs))
    queries = len(labels.query_text_Q)
    positives_Q = np.bincount(query_P[positive_P], minlength=queries)
    groups = int(positives_Q[np.bincount(query_P, minlength=queries) > positives_Q].sum())
    if not groups:
        raise ValueError(
            f"no query has both a document judged {threshold:g} or better and one below: "
            "there is nothing to tell apart"
        )
    return groups


def epoch_groups(
    labels: Labels, docs_per_query: int, threshold: float, seed: int, epoch: int
) -> list[Ints]:
    """A row for each positive, with up to `docs_per_query - 1` negatives of its query: for LCE.

    A positive is judged `threshold` or better. Negatives, judged less, are drawn anew every epoch;
    a positive whose query has none makes no row. A function of its arguments alone.
    """
    draw = np.random.default_rng([seed, epoch, 2])
    positive_P = labels.relevance_P >= threshold
    rows = []
    for start, stop in pairwise(labels.pairs_from_Q1.tolist()):
        pairs = np.arange(start, stop)
        negatives = pairs[~positive_P[start:stop]]
        if len(negatives):
            drawn = min(docs_per_query - 1, len(negatives))
            for positive in pairs[positive_P[start:stop]]:
                rows.append(np.append(draw.choice(negatives, drawn, replace=False), positive))
    return rows


def epoch_rows(labels: Labels, docs_per_query: int, seed: int, epoch: int) -> list[Ints]:
    """The rows of an epoch, each up to `docs_per_query` pairs of one query.

    Every pair stands in exactly one row; which pairs share a row changes with the epoch. A function
    of its arguments alone.
    """
    query_P = labels.query_of(np.arange(labels.pairs))
    draw_P = np.random.default_rng([seed, epoch, 0]).random(labels.pairs)
    shuffled_P = np.lexsort((draw_P, query_P))
    place_P = np.arange(labels.pairs) - labels.pairs_from_Q1[query_P]
    return np.split(shuffled_P, np.flatnonzero(place_P % docs_per_query == 0)[1:])
