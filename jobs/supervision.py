"""What training learns from: judgments with the texts that they name, preferences and clicks."""

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from bixse.artifacts import Artifact
from bixse.records import CLICKS, CORPUS, PREFERENCES, document_text, is_document

if TYPE_CHECKING:
    from bixse.training.groups import Clicked, Labels


def read_labels(
    judgments: Artifact,
    queries: Sequence[Artifact],
    corpus: Artifact,
    calibration: Artifact | None = None,
    preferences: Artifact | None = None,
    documents: Artifact | None = None,
    clicks: Artifact | None = None,
    *,
    aside: Path,
) -> "Labels":
    """The judgments with the texts that they name, which go to files in the directory `aside`:
    of a text its number is held, of an unjudged document nothing.

    Preferences count where both their documents are judged; the others are left out.

    Raises ValueError when a judgment names a query or document that is not there (judgments are
    made from this corpus and these queries: other inputs are a mistake, not rows to skip), when one
    `query_id` has two texts, when a written document has the `doc_id` of one of the corpus, and as
    `group` and `calibration.relevance`.
    """
    from bixse.training.groups import Preferred, group
    from bixse.training.texts import StoredTexts

    table = judgments.table(["query_id", "doc_id", "relevance"])
    query_ids, doc_ids = table["query_id"].to_pylist(), table["doc_id"].to_pylist()
    seeds: dict[str, str] = {}
    query_texts = StoredTexts(_queries(queries, set(query_ids), seeds), aside)
    found = _documents(corpus, documents, set(doc_ids), query_texts, seeds)
    document_texts = StoredTexts(found, aside)
    _refuse_unknown("query", query_ids, query_texts, "the queries")
    _refuse_unknown("document", doc_ids, document_texts, "the corpus")
    relevance = read_relevance(judgments, calibration, table)
    preferred = None
    if preferences is not None:
        table = preferences.table(PREFERENCES.names)
        asked, a, b = (table[name].to_pylist() for name in ("query_id", "doc_id_a", "doc_id_b"))
        preferred = Preferred(asked, a, b, table["prob_a"].to_numpy())
    clicked = None if clicks is None else _clicked(clicks)
    texts = query_texts, document_texts
    return group(query_ids, doc_ids, relevance, *texts, seeds, preferred, clicked)


def _clicked(clicks: Artifact) -> "Clicked":
    from bixse.training.groups import Clicked

    table = clicks.table(CLICKS.names)
    ids = (table[name].to_pylist() for name in ("query_id", "doc_id"))
    numbers = ("impressions", "clicks", "rank_bias", "weight")
    return Clicked(*ids, *(table[name].to_numpy() for name in numbers))


def _queries(
    queries: Sequence[Artifact], wanted: Container[str], seeds: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """Wanted queries, each once; puts into `seeds` what they were written from."""
    known: dict[str, int] = {}
    for part in queries:
        for row in _rows_where(part, "query_id", wanted, ["query_id", "text", "seed_doc_id"]):
            query_id, text = row["query_id"], row["text"]
            if row["seed_doc_id"] is not None:
                seeds[query_id] = row["seed_doc_id"]
            # A hash: the texts themselves are not held.
            if query_id not in known:
                known[query_id] = hash(text)
                yield query_id, text
            elif known[query_id] != hash(text):
                raise ValueError(f"query {query_id!r} stands twice, with different texts")


def _documents(
    corpus: Artifact,
    written: Artifact | None,
    wanted: Container[str],
    query_texts: Mapping[str, str],
    seeds: dict[str, str],
) -> Iterator[tuple[str, str]]:
    """Wanted documents of the corpus, then written ones; puts into `seeds` queries that are one, of
    equal id and text."""
    known: set[str] = set()
    for part in (corpus, *([] if written is None else [written])):
        for row in _rows_where(part, "doc_id", wanted, CORPUS.names):
            if part is written and row["doc_id"] in known:
                raise ValueError(f"a written document has the id of another: {row['doc_id']!r}")
            if written is not None:
                known.add(row["doc_id"])
            doc_id, title, text = row["doc_id"], row["title"], row["text"]
            if doc_id in query_texts and is_document(query_texts[doc_id], title, text):
                seeds.setdefault(doc_id, doc_id)
            yield doc_id, document_text(title, text)


def read_relevance(judgments: Artifact, calibration: Artifact | None, table: pa.Table) -> Any:
    """The stored relevance of all rows, which are `table`, or what the map makes of the stored
    distributions. Raises ValueError as `calibration.relevance`."""
    if calibration is None:
        return table["relevance"].to_numpy().astype(np.float32)
    # Brings scikit-learn along, which training itself has no use for.
    from bixse.judging.calibration import load, relevance

    signed = judgments.table(["grade_probs", "judge", "prompt"])
    scale = judgments.manifest.extra["scale"]["values"]
    return relevance(signed, scale, load(calibration)).astype(np.float32)


def read_rows(
    judgments: Artifact, calibration: Artifact | None
) -> Iterator[tuple[str, str, float]]:
    """(query_id, doc_id, relevance) of every judgment, as training reads them. Raises as
    `read_relevance`."""
    table = judgments.table(["query_id", "doc_id", "relevance"])
    relevance = read_relevance(judgments, calibration, table).tolist()
    yield from zip(
        table["query_id"].to_pylist(), table["doc_id"].to_pylist(), relevance, strict=True
    )


def _rows_where(
    artifact: Artifact, key: str, values: Container[str], columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for batch in artifact.batches(columns):
        # Not Arrow's `is_in`, which hashes all the values anew for every batch.
        chosen = pa.array([value in values for value in batch[key].to_pylist()], pa.bool_())
        yield from batch.filter(chosen).to_pylist()


def _refuse_unknown(noun: str, ids: Sequence[str], texts: Container[str], where: str) -> None:
    unknown = [name for name in ids if name not in texts]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(ids)} judgments name a {noun} that {where} lack, "
            f"first {unknown[0]!r}: train on the {noun} texts that were judged"
        )
