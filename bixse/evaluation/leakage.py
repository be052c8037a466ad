"""Text shared between training and test: a model must not be examined on what it was taught."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bixse.records import text_hash


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
