"""TREC run and qrels files, out and in.

    run     query_id Q0 doc_id rank score system
    qrels   query_id 0 doc_id gain

White space separates the columns, so white space and `%` inside an id are percent-encoded, and
decoded on reading; ids without them stand as they are. trec_eval ignores the rank, sorts by score
in float32, and breaks ties by `doc_id` from the end of the alphabet, where we begin at its start.
So a score that does not fall is written one float32 step below the one before: whoever scores the
files finds the numbers of the report.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import quote, unquote

import numpy as np

from bixse.evaluation.metrics import Qrels, Rankings
from bixse.records import Hit

_UNSAFE = re.compile(r"[\s%]")


def write_run(rankings: Rankings, system: str) -> bytes:
    """A run file of all rankings. Raises ValueError for an empty id or system name."""
    lines = [
        f"{_encode(query_id)} Q0 {_encode(hit.doc_id)} {rank} {score} {_encode(system)}\n"
        for query_id, hits in rankings.items()
        for rank, (hit, score) in enumerate(zip(hits, _falling(hits), strict=True), start=1)
    ]
    return "".join(lines).encode()


def read_run(data: bytes) -> dict[str, list[Hit]]:
    """Rankings of a run file, by its ranks.

    Raises ValueError naming the line that has other columns, or a document that stands twice.
    """
    rankings: dict[str, dict[str, Hit]] = {}
    for number, columns in _rows(data, "a run", 6):
        query_id, _, doc_id, rank, score, _ = columns
        try:
            hit = Hit(unquote(doc_id), float(score), int(rank))
        except ValueError:
            raise ValueError(f"line {number} of a run has rank {rank}, score {score}") from None
        hits = rankings.setdefault(unquote(query_id), {})
        if hit.doc_id in hits:
            raise ValueError(f"line {number} of a run names document {doc_id} again")
        hits[hit.doc_id] = hit
    return {
        query_id: sorted(hits.values(), key=lambda hit: hit.rank)
        for query_id, hits in rankings.items()
    }


def write_qrels(qrels: Qrels) -> bytes:
    """A qrels file; whole gains are written as integers, which is all that trec_eval reads."""
    lines = [
        f"{_encode(query_id)} 0 {_encode(doc_id)} {_number(gain)}\n"
        for query_id, judged in qrels.items()
        for doc_id, gain in judged.items()
    ]
    return "".join(lines).encode()


def read_qrels(data: bytes) -> dict[str, dict[str, float]]:
    """query_id -> doc_id -> gain.

    Raises ValueError naming the line that has other columns, no number, or a pair judged twice.
    """
    qrels: dict[str, dict[str, float]] = {}
    for number, (query_id, _, doc_id, gain) in _rows(data, "qrels", 4):
        judged = qrels.setdefault(unquote(query_id), {})
        if unquote(doc_id) in judged:
            raise ValueError(f"line {number} of qrels judges document {doc_id} again")
        try:
            judged[unquote(doc_id)] = float(gain)
        except ValueError:
            raise ValueError(f"line {number} of qrels has gain {gain}") from None
    return qrels


def gains_on_scale(qrels: Qrels, scale: tuple[float, ...]) -> Mapping[str, Mapping[str, float]]:
    """Relevance as grade above the minimum of its scale: whole again where the grades were.

    In the six digits that are sure of float32, whatever the width of the scale.
    """
    width = scale[-1] - scale[0]
    return {
        query_id: {doc_id: float(f"{value * width:.6g}") for doc_id, value in judged.items()}
        for query_id, judged in qrels.items()
    }


def _rows(data: bytes, what: str, width: int) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(data.decode().split("\n"), start=1):
        columns = line.split()
        if not columns:
            continue
        if len(columns) != width:
            raise ValueError(f"line {number} of {what} has {len(columns)} columns, not {width}")
        yield number, columns


def _falling(hits: Sequence[Hit]) -> Iterator[np.float32]:
    last = np.float32(np.inf)
    for hit in hits:
        last = min(np.float32(hit.score), np.nextafter(last, np.float32(-np.inf)))
        yield last


def _encode(name: str) -> str:
    if not name:
        raise ValueError("an empty id cannot stand in a TREC file")
    return _UNSAFE.sub(lambda match: quote(match.group()), name)


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
