"""written texts -> judgments: a pair is worth what one side of it was written at. And judgments ->
fewer judgments, or more.

`label` asks no model: a query written for a document has that document as its answer, or at its
target grade; a document written for a query has the grade it was written at. `with_given` puts the
grades that people gave beside them, `contrast` candidates that nobody graded beside grades.
`verify` keeps of a judge's judgments those that training can rely on, `sample` those that cover the
range of a teacher.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from bixse.artifacts import Artifact, begin, fingerprints
from bixse.candidates.pools import head_negatives
from bixse.candidates.settings import Stratified
from bixse.candidates.strata import stratified
from bixse.judging.given import ASSUMED, given, written
from bixse.judging.settings import Verification
from bixse.judging.verified import Judged, unverified
from bixse.records import (
    JUDGMENTS,
    Hit,
    Judgment,
    Rejection,
    ids_hash,
    text_hash,
)
from bixse.scale import Scale, linear
from jobs.parts import rejected_table, rows_of
from jobs.supervision import read_rows
from jobs.texts import DocumentTexts


def label(queries: Artifact | None, documents: Artifact | None, out: str) -> Artifact:
    """Judgments of written queries (artefact "queries") or written documents ("documents").

    Raises ValueError when nothing was written that could be labelled.
    """
    artifact = queries if documents is None else documents
    if artifact is None:
        raise ValueError("--judging.judge written needs a recipe that writes queries or documents")
    if not artifact.manifest.rows:
        raise ValueError(
            f"no written text is left to train on: {artifact.url} has {artifact.manifest.rejected} "
            f"rejections, see rejected/ there ({commonest_rejection(artifact)})"
        )
    draft = begin(
        out, "judgments", config={"judge": "written"}, inputs=fingerprints(written=artifact)
    )
    if isinstance(draft, Artifact):
        return draft
    column = "seed_doc_id" if documents is None else "doc_id"
    scale = _scale(artifact)
    for number, name in enumerate(artifact.parts()):
        draft.write_part(number, rows_of(_judgments(artifact, name, column, scale), JUDGMENTS))
    extra = {
        "scale": scale.record,
        "origin": "synthetic",
        "judges": [_judge(artifact)],
    }
    return draft.finish(extra=extra)


def with_given(
    judgments: Artifact, qrels: Artifact, skip_query_ids: frozenset[str], out: str
) -> Artifact:
    """Judgments of `label`, and those of the train split of `qrels` behind them (SSRA).

    None of a query of `skip_query_ids`: those are held out. A given grade keeps its relevance; its
    distribution is the narrowest on the scale of `judgments` that has it.
    """
    inputs = fingerprints(judgments=judgments, qrels=qrels)
    inputs["skipped queries"] = ids_hash(skip_query_ids)
    draft = begin(out, "judgments", config={"judge": "written and given"}, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    extra = judgments.manifest.extra
    values = extra["scale"]["values"]
    scale = linear(values[0], values[-1])
    judges = set(extra["judges"])
    parts = [judgments.part(name) for name in judgments.parts()]
    for name in qrels.parts():
        rows = given(qrels.part(name), "train").to_pylist()
        rows = [row for row in rows if row["query_id"] not in skip_query_ids]
        for row in rows:
            row["grade_probs"] = scale.grade_probs(
                values[0] + row["relevance"] * (values[-1] - values[0])
            )
        judges |= {row["judge"] for row in rows}
        parts.append(pa.Table.from_pylist(rows, schema=JUDGMENTS))
    for number, table in enumerate(parts):
        draft.write_part(number, table)
    more = {"written_rows": judgments.manifest.rows, "qrels": qrels.fingerprint}
    return draft.finish(extra={**extra, "judges": sorted(judges), **more})


def contrast(
    judgments: Artifact,
    pairs: Artifact,
    queries: Sequence[Artifact],
    corpus: Artifact,
    count: int,
    seed: int,
    out: str,
) -> Artifact:
    """The judgments, and `count` candidates of each of their queries that have none, taken as
    irrelevant: the localised negatives of LCE, arXiv 2101.08751.

    A copy of a document that is judged for the query, or for another of its text, is none of them:
    training takes equal texts as one. A query keeps its draw whatever those of other texts are. The
    pairs and judgments are of these queries.
    """
    inputs = fingerprints(judgments=judgments, pairs=pairs, corpus=corpus)
    config = {"negatives": count, "seed": seed}
    draft = begin(out, "judgments", config=config, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    extra = judgments.manifest.extra
    values = extra["scale"]["values"]
    scale = linear(values[0], values[-1])
    judged: dict[str, set[str]] = {}
    for query_id, doc_id in judgments.rows("query_id", "doc_id"):
        judged.setdefault(query_id, set()).add(doc_id)
    proposed: dict[str, list[Hit]] = {}
    for query_id, doc_id, rank in pairs.rows("query_id", "doc_id", "rank"):
        if query_id in judged:
            proposed.setdefault(query_id, []).append(Hit(doc_id, 0.0, rank))
    doc_ids = {hit.doc_id for hits in proposed.values() for hit in hits}
    wanted = sorted(doc_ids.union(*judged.values()))
    hashes = dict(zip(wanted, map(text_hash, DocumentTexts(corpus).get(wanted)), strict=True))
    asked = {
        query_id: text_hash(text)
        for artifact in queries
        for query_id, text in artifact.rows("query_id", "text")
    }
    known: dict[str, set[str]] = {}
    for query_id, of_query in judged.items():
        known.setdefault(asked[query_id], set()).update(hashes[doc_id] for doc_id in of_query)
    drawn = []
    for query_id, hits in sorted(proposed.items()):
        own = [hit.doc_id for hit in hits if hashes[hit.doc_id] in known[asked[query_id]]]
        found = head_negatives(query_id, hits, own, len(hits), count, seed)
        probs = scale.grade_probs(values[0])
        drawn += [
            Judgment(query_id, hit.doc_id, probs, 0.0, ASSUMED, "", "assumed") for hit in found
        ]
    names = judgments.parts()
    for number, name in enumerate(names):
        draft.write_part(number, judgments.part(name))
    draft.write_part(len(names), rows_of(drawn, JUDGMENTS))
    judges = sorted({*extra["judges"], ASSUMED})
    return draft.finish(extra={**extra, "judges": judges, "negatives": len(drawn)})


def verify(
    judgments: Artifact,
    queries: Sequence[Artifact],
    corpus: Artifact,
    settings: Verification,
    out: str,
    calibration: Artifact | None = None,
) -> Artifact:
    """The judgments without those of `bixse.judging.verified.unverified`, which are rejected.

    They are read as training reads them, through the map that `calibration` holds, if any.
    """
    inputs = fingerprints(
        judgments=judgments, corpus=corpus, queries=queries, calibration=calibration
    )
    draft = begin(out, "judgments", config=settings.model_dump(), inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    judged = [Judged(*row) for row in read_rows(judgments, calibration)]
    seeds = {
        query_id: doc_id
        for artifact in queries
        for query_id, doc_id in artifact.rows("query_id", "seed_doc_id")
        if doc_id is not None
    }
    doc_ids = sorted({row.doc_id for row in judged})
    texts = dict(zip(doc_ids, DocumentTexts(corpus).get(doc_ids), strict=True))
    dropped = unverified(judged, seeds, texts, settings)
    for number, name in enumerate(judgments.parts()):
        table = judgments.part(name)
        reasons = [dropped.get((r["query_id"], r["doc_id"])) for r in _keys(table)]
        # Typed: a part all of whose pairs were rejected has no row to tell the type from.
        kept = table.filter(pa.array([reason is None for reason in reasons], pa.bool_()))
        rejected = [
            Rejection(reason, query_id=row["query_id"], doc_id=row["doc_id"])
            for row, reason in zip(_keys(table), reasons, strict=True)
            if reason is not None
        ]
        draft.write_part(number, kept, rejected_table(rejected))
    kinds = Counter(reason.split(":")[0] for reason in dropped.values())
    return draft.finish(
        extra={**judgments.manifest.extra, "unverified": dict(sorted(kinds.items()))}
    )


def sample(
    judgments: Artifact, settings: Stratified, out: str, calibration: Artifact | None = None
) -> Artifact:
    """Of each query the best judged document and others that cover the range of relevance.

    They are read as training reads them, through the map that `calibration` holds, if any. What is
    left out is rejected. A query keeps its draw whatever the other queries are.
    """
    inputs = fingerprints(judgments=judgments, calibration=calibration)
    draft = begin(out, "judgments", config=settings.model_dump(), inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    by_query: dict[str, list[tuple[str, float]]] = {}
    for query_id, doc_id, relevance in read_rows(judgments, calibration):
        by_query.setdefault(query_id, []).append((doc_id, relevance))
    kept: set[tuple[str, str]] = set()
    for query_id, judged in by_query.items():
        # Sorted by doc_id: the order in which they were judged must not matter.
        judged.sort()
        score_N = np.asarray([relevance for _, relevance in judged], np.float64)
        seed = int(text_hash(f"{settings.seed}:{query_id}"), 16)
        best = (int(score_N.argmax()),)
        rows = stratified(score_N, settings.documents, settings.by, seed, keep=best)
        kept.update((query_id, judged[row][0]) for row in rows)
    for number, name in enumerate(judgments.parts()):
        table = judgments.part(name)
        chosen = [(row["query_id"], row["doc_id"]) in kept for row in _keys(table)]
        left_out = table.filter(pa.array([not taken for taken in chosen], pa.bool_()))
        rejected = [
            Rejection("not in the sample", query_id=row["query_id"], doc_id=row["doc_id"])
            for row in _keys(left_out)
        ]
        inside = table.filter(pa.array(chosen, pa.bool_()))
        draft.write_part(number, inside, rejected_table(rejected))
    return draft.finish(extra=judgments.manifest.extra)


def _keys(table: pa.Table) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = table.select(["query_id", "doc_id"]).to_pylist()
    return rows


def _judgments(artifact: Artifact, name: str, column: str, scale: Scale) -> Iterator[Judgment]:
    judge, prompt = _judge(artifact), str(artifact.manifest.extra.get("prompt", ""))
    for row in artifact.part(name, ["query_id", column, "target_grade"]).to_pylist():
        if row[column] is None:
            raise ValueError(f"query {row['query_id']!r} names no document it was written from")
        yield written(row["query_id"], row[column], row["target_grade"], scale, judge, prompt)


def _scale(artifact: Artifact) -> Scale:
    """Grades 0 to 3 where texts were written at grades; else 1 for the answer and 0."""
    graded = any(grade is not None for grade in artifact.column("target_grade"))
    return linear(0, 3) if graded else linear(0, 1)


def _judge(artifact: Artifact) -> str:
    return f"written:{artifact.manifest.extra.get('generator', artifact.manifest.kind)}"


def commonest_rejection(artifact: Artifact) -> str:
    """The commonest reason of its rejections."""
    rejected = artifact.rejected()
    reasons = [] if rejected is None else rejected["reason"].to_pylist()
    kinds = [reason.split(":")[0] for reason in reasons]
    return max(sorted(set(kinds)), key=kinds.count) if kinds else "and there was nothing to write"
