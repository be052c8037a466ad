"""What survives: filters of written queries as pure functions, each with its reasons.

A filter takes queries in order and gives query_id -> reason of those that it drops. `sift` runs
them one after another on what the one before has left, so that every query is kept or has exactly
one reason.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from bixse.records import Hit, Query, jaccard, text_hash, words
from bixse.synthesis.requests import chance
from bixse.synthesis.writing import Comparison, Verdict

Dropped = dict[str, str]
Filter = Callable[[Sequence[Query]], Dropped]


@dataclass(frozen=True, slots=True)
class Sifted:
    """The queries that stay, why each of the others went, and what each filter took."""

    kept: list[Query]
    dropped: Dropped
    counts: list[dict[str, object]]


def sift(queries: Sequence[Query], filters: Mapping[str, Filter]) -> Sifted:
    """Run the filters in order."""
    kept = list(queries)
    dropped: Dropped = {}
    counts: list[dict[str, object]] = []
    for name, filter_ in filters.items():
        gone = filter_(kept)
        counts.append({"filter": name, "in": len(kept), "dropped": len(gone)})
        dropped |= gone
        kept = [query for query in kept if query.query_id not in gone]
    return Sifted(kept, dropped, counts)


def repeated(queries: Sequence[Query], taken: Iterable[str], near_duplicate: float) -> Dropped:
    """Queries that equal or nearly equal an earlier one or one of `taken` (texts).

    Equal: text but for case, white space and Unicode form, or the same words in any order. Nearly:
    two queries of one document whose word sets have a Jaccard similarity of `near_duplicate`.
    """
    texts: dict[str, str] = {}
    bags: dict[tuple[str, ...], str] = {}
    for text in taken:
        texts[text_hash(text)] = "equals a given query"
        bags[tuple(sorted(words(text)))] = "has the words of a given query"
    of_document: dict[str | None, list[tuple[str, frozenset[str]]]] = {}
    dropped: Dropped = {}
    for query in queries:
        key, bag = text_hash(query.text), tuple(sorted(words(query.text)))
        own, siblings = frozenset(bag), of_document.setdefault(query.seed_doc_id, [])
        near = next((q for q, other in siblings if jaccard(own, other) >= near_duplicate), None)
        if key in texts:
            dropped[query.query_id] = texts[key]
        elif bag and bag in bags:
            dropped[query.query_id] = bags[bag]
        elif near is not None:
            dropped[query.query_id] = f"nearly equals a query of its document: {near}"
        else:
            texts[key] = f"equals a query: {query.query_id}"
            bags[bag] = f"has the words of a query: {query.query_id}"
            siblings.append((query.query_id, own))
    return dropped


def rank_of(seed_hash: str, hits: Sequence[Hit], text_hashes: Mapping[str, str]) -> int | None:
    """The best rank of a document with the seed's text: a copy is as good as the seed itself."""
    ranks = (hit.rank for hit in hits if text_hashes[hit.doc_id] == seed_hash)
    return min(ranks, default=None)


def lost(queries: Sequence[Query], ranks: Mapping[str, int | None], k: int) -> Dropped:
    """Round trip, Promptagator 2022: queries that do not find their document in the first `k`.

    `ranks` has the rank of the document among the hits of each query, from 1; None beyond them.
    """
    dropped: Dropped = {}
    for query in queries:
        rank = ranks[query.query_id]
        if rank is None or rank > k:
            dropped[query.query_id] = f"does not find its document in the first {k}"
    return dropped


def disagreeing(queries: Sequence[Query], grades: Mapping[str, int]) -> Dropped:
    """Agreement, SSRA 2025: queries that the scorer grades otherwise than they were written.

    A query without a grade in `grades` (the scorer's answer was rejected) is dropped too: nothing
    stands in for a grade.
    """
    dropped: Dropped = {}
    for query in queries:
        if query.query_id not in grades:
            dropped[query.query_id] = "the scorer gave it no grade"
        elif grades[query.query_id] != query.target_grade:
            dropped[query.query_id] = (
                f"written at grade {query.target_grade:g}, scored {grades[query.query_id]}"
            )
    return dropped


def comparisons(queries: Sequence[Query]) -> list[Comparison]:
    """Every two queries of one document that were written at different grades."""
    of_document: dict[str, list[Query]] = {}
    for query in queries:
        of_document.setdefault(query.seed_doc_id or "", []).append(query)
    found = []
    for doc_id, siblings in of_document.items():
        ordered = sorted(siblings, key=lambda q: -(q.target_grade or 0))
        for high, low in combinations(ordered, 2):
            if high.target_grade != low.target_grade:
                found.append(Comparison(doc_id, high.query_id, low.query_id))
    return found


def contradicted(
    queries: Sequence[Query], verdicts: Iterable[tuple[Comparison, Verdict]]
) -> Dropped:
    """Contradiction, SSRA 2025: both queries of a pair whose order a comparison reverses."""
    present = {query.query_id for query in queries}
    dropped: Dropped = {}
    for comparison, verdict in verdicts:
        high, low = comparison.query_id_high, comparison.query_id_low
        if verdict == "low" and high in present and low in present:
            dropped.setdefault(high, f"answered worse than a query of a lower grade: {low}")
            dropped.setdefault(low, f"answered better than a query of a higher grade: {high}")
    return dropped


def unbalanced(queries: Sequence[Query], tolerance: float, seed: int) -> Dropped:
    """Queries of the frequent grades beyond (1 + `tolerance`) times the rarest that is there.

    Which of a grade stay is drawn by a hash of `query_id`.
    """
    of_grade: dict[float | None, list[str]] = {}
    for query in queries:
        of_grade.setdefault(query.target_grade, []).append(query.query_id)
    rarest = min(map(len, of_grade.values()), default=0)
    limit = max(rarest, int(rarest * (1 + tolerance) + 1e-9))
    return {
        query_id: "one too many of its grade"
        for query_ids in of_grade.values()
        for query_id in sorted(query_ids, key=lambda name: (chance(f"{seed}:{name}"), name))[limit:]
    }


def histogram(queries: Iterable[Query]) -> dict[str, int]:
    """How many queries were written at each grade."""
    counts: dict[str, int] = {}
    for query in queries:
        name = "none" if query.target_grade is None else f"{query.target_grade:g}"
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))
