"""Queries that training must not see: those of dev and test, and whatever has the text of one."""

from collections.abc import Sequence

from bixse.artifacts import Artifact
from bixse.records import text_hash


def kept_apart(qrels: Artifact) -> set[str]:
    """Queries of dev and test."""
    rows = qrels.rows("split", "query_id")
    return {query_id for split, query_id in rows if split != "train"}


def held_out_query_ids(qrels: Artifact, queries: Sequence[Artifact]) -> frozenset[str]:
    """Queries of dev and test, and whatever other query has the text of one."""
    return _with_copies(kept_apart(qrels), queries)


def graded_query_ids(qrels: Artifact, queries: Sequence[Artifact]) -> frozenset[str]:
    """Queries that people graded, in any split, and those with the text of one."""
    return _with_copies(set(qrels.column("query_id")), queries)


def refuse_held_out(judgments: Artifact, held_out: frozenset[str]) -> None:
    """A file of grades may hold any query; other judges are never asked about these.

    Raises ValueError when one of them is judged.
    """
    judged = set(judgments.column("query_id"))
    if shared := sorted(judged & held_out):
        raise ValueError(
            f"{len(shared)} of the {len(judged)} queries in --judging.given.file stand in dev "
            f"or test, first {shared[0]!r}: they can be audited, and not trained on"
        )


def _with_copies(query_ids: set[str], queries: Sequence[Artifact]) -> frozenset[str]:
    """These queries, and whatever other has the text of one."""
    hashes_of = {
        query_id: text_hash(text)
        for artifact in queries
        for query_id, text in artifact.rows("query_id", "text")
    }
    hashes = {hashes_of[query_id] for query_id in query_ids}
    return frozenset(query_id for query_id, text in hashes_of.items() if text in hashes)
