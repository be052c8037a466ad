"""Grades that people gave into records: BEIR's files, one a split, or TREC's four columns.

A line that cannot be read, or that judges what is not there, becomes a rejection.
"""

from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bixse.artifacts import Artifact, begin
from bixse.records import QRELS, Judgment, Rejection, split_of, text_hash
from bixse.scale import Scale, linear
from jobs.files import short_name, unzipped
from jobs.formats import Row, read_grades
from jobs.incoming import Parts
from jobs.recipe import Ingest

SPLITS = {"train": "train", "dev": "dev", "validation": "dev", "valid": "dev", "test": "test"}


@dataclass(frozen=True)
class _Grade:
    """A line of a qrels file."""

    row: Row
    split: str
    query_id: str
    doc_id: str
    grade: float


def write_qrels(
    urls: Sequence[str],
    corpus: Artifact,
    queries: Artifact,
    settings: Ingest,
    inputs: dict[str, str],
    out: str,
    split: str | None = None,
) -> Artifact:
    config = {"grade_min": settings.grade_min, "grade_max": settings.grade_max}
    draft = begin(f"{out}/qrels", "qrels", config=config, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    parts = Parts(draft, QRELS, 1_000_000)
    # Test first: a query, by its text, that stands in two splits stays with the test.
    order = ("test", "dev", "train", None)
    urls = sorted(urls, key=lambda url: (order.index(SPLITS.get(_stem(url))), url))
    known_queries = {
        query_id: text_hash(text) for query_id, text in queries.rows("query_id", "text")
    }
    # Read twice: of the first time documents, their best grade and a number a grade are held.
    best: dict[str, float] = {}
    hashes = array("q")
    for grade in _read_all_grades(urls, split):
        if isinstance(grade, Rejection):
            parts.reject(grade)
        elif grade.query_id in known_queries:
            best[grade.doc_id] = max(grade.grade, best.get(grade.doc_id, grade.grade))
            hashes.append(hash((grade.query_id, grade.doc_id)))
    known_docs = _known(corpus, best)
    repeated = _repeated(hashes)
    scale = _scale(settings, [best[doc_id] for doc_id in known_docs])
    homes: dict[str, str] = {}
    judged: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    for grade in _read_all_grades(urls, split):
        if isinstance(grade, Rejection):
            continue
        ids = {"query_id": grade.query_id, "doc_id": grade.doc_id}
        problem = None
        if grade.query_id not in known_queries:
            problem = "unknown query_id"
        elif grade.doc_id not in known_docs:
            problem = "unknown doc_id"
        elif homes.setdefault(known_queries[grade.query_id], grade.split) != grade.split:
            home = homes[known_queries[grade.query_id]]
            problem = f"the query stands in split {home} already"
        elif (grade.query_id, grade.doc_id) in seen:
            problem = "judged twice"
        elif scale is None or not scale.values[0] <= grade.grade <= scale.values[-1]:
            problem = f"grade {grade.grade:g} is outside the scale"
        if problem is not None or scale is None:
            parts.reject(grade.row.reject(problem or "", **ids))
            continue
        if hash((grade.query_id, grade.doc_id)) in repeated:
            seen.add((grade.query_id, grade.doc_id))
        judged[grade.query_id] = grade.split
        parts.keep(_given(grade, scale))
    parts.close()
    values = list(scale.values) if scale else []
    extra = {"scale": values, "splits": _splits(judged), "rejected_for": parts.rejected_for}
    return draft.finish(extra=extra)


def why_rejected(qrels: Artifact) -> str:
    """How many lines were rejected and for what, to put behind a sentence that misses them."""
    reasons: dict[str, int] = qrels.manifest.extra.get("rejected_for", {})
    found = ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
    return f"; {qrels.manifest.rejected} lines of the qrels were rejected: {found}" if found else ""


def _given(grade: _Grade, scale: Scale) -> dict[str, Any]:
    """A row of QRELS."""
    probs = scale.grade_probs(grade.grade)
    judgment = Judgment(
        query_id=grade.query_id,
        doc_id=grade.doc_id,
        grade_probs=probs,
        relevance=scale.relevance(probs),
        judge="given",
        prompt="",
        origin="human",
    )
    return {"split": grade.split, **asdict(judgment)}


def _splits(judged: dict[str, str]) -> dict[str, int]:
    """Judged queries of each split."""
    return {split: list(judged.values()).count(split) for split in sorted(set(judged.values()))}


def _known(corpus: Artifact, doc_ids: Collection[str]) -> set[str]:
    """The ids that the corpus has."""
    if not doc_ids:
        return set()
    return {doc_id for doc_id in corpus.column("doc_id") if doc_id in doc_ids}


def _repeated(hashes: "array[int]") -> frozenset[int]:
    """The hashes that stand more than once."""
    found, counts = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
    return frozenset(found[counts > 1].tolist())


def _scale(settings: Ingest, grades: Sequence[float]) -> Scale | None:
    """The scale of the data: from `grade_min` to `grade_max`, or to the best grade that stands."""
    if not grades:
        return None
    maximum = settings.grade_max if settings.grade_max is not None else max(grades)
    if maximum <= settings.grade_min:
        raise ValueError(
            f"the qrels hold no grade above {settings.grade_min:g}: set --ingest.grade-min "
            "and --ingest.grade-max to the ends of their scale"
        )
    return linear(settings.grade_min, maximum)


def _stem(url: str) -> str:
    return unzipped(url.rsplit("/", 1)[-1]).rsplit(".", 1)[0]


def _read_all_grades(urls: Sequence[str], split: str | None) -> Iterator[_Grade | Rejection]:
    for url in urls:
        yield from _read_grades(url, split)


def _read_grades(url: str, split: str | None) -> Iterator[_Grade | Rejection]:
    stem = _stem(url)
    if split is None and stem != "qrels":
        if stem not in SPLITS:
            raise ValueError(
                f"{short_name(url)} names no split: expected train.tsv, dev.tsv or test.tsv"
            )
        split = SPLITS[stem]
    for row, ids, grade in read_grades(url):
        if grade is None:
            yield row.reject(row.problem)
        else:
            yield _Grade(row, split or split_of(ids[0]), *ids, grade)
