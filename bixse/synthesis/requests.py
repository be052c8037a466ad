"""Which texts are wanted: one request a text, so that each becomes a text or a rejection.

A request depends on its document or query and the settings alone. Requests stand in the order of a
hash, so that what a filter keeps (the first of two equal queries) does not depend on the order of
the corpus.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from bixse.synthesis.prompts import WRITTEN
from bixse.synthesis.settings import AsksDocuments, FewShot, Styled

REQUESTS = pa.schema(
    [
        ("made_id", pa.string()),
        ("doc_id", pa.string()),
        ("query_id", pa.string()),
        ("style", pa.string()),
        ("target_grade", pa.int8()),
    ]
)

GRADES = tuple(int(value) for value in WRITTEN.values)


def refuse_other_grades(values: Sequence[float]) -> None:
    """Raises ValueError when a scorer's grades are not those that texts are written at."""
    if tuple(values) != GRADES:
        raise ValueError(
            f"the scorer must grade 0 to 3, as texts are written: found {list(values)}"
        )


@dataclass(frozen=True, slots=True)
class Request:
    """A wanted text: `made_id` is the id it will have, the rest what it is written from."""

    made_id: str
    doc_id: str | None = None
    query_id: str | None = None
    style: str | None = None
    target_grade: int | None = None


def draw(ids: Iterable[str], count: int, seed: int) -> list[str]:
    """The `count` ids of smallest hash, in that order: a sample that the order changes nothing of.

    Reads the ids once and holds `count` of them.
    """
    smallest = heapq.nsmallest(count, ((chance(f"{seed}:{name}"), name) for name in ids))
    return [name for _, name in smallest]


def chance(key: str) -> int:
    """64 bits that depend on the key alone."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def query_requests(doc_ids: Iterable[str], settings: AsksDocuments) -> Iterator[Request]:
    """The queries wanted of each document, in order."""
    for doc_id in doc_ids:
        if isinstance(settings, FewShot):
            for number in range(settings.queries_per_document):
                yield Request(f"few-shot:{doc_id}:{number}", doc_id)
        elif isinstance(settings, Styled):
            for style in settings.styles:
                for number in range(settings.queries_per_style):
                    yield Request(f"{style}:{doc_id}:{number}", doc_id, style=style)
        else:
            for grade in GRADES:
                for number in range(settings.queries_per_grade[grade]):
                    made_id = f"grade-{grade}:{doc_id}:{number}"
                    yield Request(made_id, doc_id, target_grade=grade)


def document_requests(query_ids: Iterable[str]) -> Iterator[Request]:
    """The documents wanted for each query: one a grade, which one answer gives together."""
    for query_id in query_ids:
        for grade in GRADES:
            made_id = f"written:{query_id}:{grade}"
            yield Request(made_id, query_id=query_id, target_grade=grade)
