"""Text shared between training and test: a model must not be examined on what it was taught."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
from scipy.sparse import csr_array

from bixse.records import folded, text_hash

_CHUNK = 20_000
"""Training texts compared at a time; memory follows this and the evaluation, not training."""


@dataclass(frozen=True, slots=True)
class Leak:
    """An evaluation query whose text stands in training too, under this or another id."""

    query_id: str
    training_query_id: str
    text: str


def find_leaks(evaluated: Mapping[str, str], trained: Iterable[tuple[str, str]]) -> list[Leak]:
    """Leaked queries in the order of `evaluated` (query_id -> text), each once.

    `trained` gives (query_id, text) and is read once: memory follows the evaluation, not training.
    Texts that differ only in case, white space or Unicode form are the same (`records.text_hash`).
    """
    homes: dict[str, list[str]] = {}
    for query_id, text in evaluated.items():
        homes.setdefault(text_hash(text), []).append(query_id)
    found: dict[str, str] = {}
    for training_query_id, text in trained:
        for query_id in homes.get(text_hash(text), ()):
            found.setdefault(query_id, training_query_id)
    return [Leak(q, found[q], text) for q, text in evaluated.items() if q in found]


@dataclass(frozen=True, slots=True)
class NearLeak:
    """An evaluation query and the training query that is most like it without being equal."""

    query_id: str
    training_query_id: str
    similarity: float
    text: str
    training_text: str


def shingles(text: str, size: int) -> frozenset[str]:
    """Every run of `size` characters of the folded text; a shorter text is its own shingle."""
    whole = folded(text)
    return frozenset(whole[at : at + size] for at in range(max(1, len(whole) - size + 1)))


def find_near(
    evaluated: Mapping[str, str], trained: Iterable[tuple[str, str]], size: int, at_least: float
) -> list[NearLeak]:
    """Evaluation queries with a training query of Jaccard similarity >= `at_least`, each once.

    The similarity of two texts is that of their sets of shingles (Broder 1997), computed exactly:
    queries are short enough to need no MinHash. Equal texts are `find_leaks`'s and left out.
    `trained` is read once. Raises ValueError when `at_least` is not in (0, 1].
    """
    if not 0 < at_least <= 1:
        raise ValueError(f"a similarity lies in (0, 1], found {at_least:g}")
    sets = [shingles(text, size) for text in evaluated.values()]
    column = {shingle: n for n, shingle in enumerate(sorted(frozenset().union(*sets)))}
    ones_EG, sizes_E = _incidence(sets, column), np.array([len(one) for one in sets])
    hashes = [text_hash(text) for text in evaluated.values()]
    best: dict[int, tuple[float, str, str]] = {}
    for chunk in _chunks(trained):
        found = [shingles(text, size) for _, text in chunk]
        shared_ET = (ones_EG @ _incidence(found, column).T).tocoo()
        sizes_T = np.array([len(one) for one in found])
        union = sizes_E[shared_ET.row] + sizes_T[shared_ET.col] - shared_ET.data
        similarities = shared_ET.data / union
        for cell in np.flatnonzero(similarities >= at_least):
            row, (query_id, text) = int(shared_ET.row[cell]), chunk[shared_ET.col[cell]]
            similarity = float(similarities[cell])
            if similarity > best.get(row, (0.0,))[0] and text_hash(text) != hashes[row]:
                best[row] = similarity, query_id, text
    items = list(evaluated.items())
    return [
        NearLeak(items[r][0], best[r][1], best[r][0], items[r][1], best[r][2]) for r in sorted(best)
    ]


def _chunks(trained: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    rows = iter(trained)
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


def _incidence(sets: list[frozenset[str]], column: Mapping[str, int]) -> csr_array:
    """[texts, shingles]: 1 where a text holds a shingle that the evaluation holds too."""
    known = [[column[shingle] for shingle in one if shingle in column] for one in sets]
    ends = np.cumsum([0, *map(len, known)])
    columns = np.array([n for one in known for n in one], np.int64)
    ones = np.ones(len(columns), np.int64)
    return csr_array((ones, columns, ends), shape=(len(sets), len(column)))
