"""judgments, corpus, queries, qrels -> audit: what the labels are worth, before they are spent on.

    python -m jobs.audit <recipe> --data DIR --out DIR [--audit.fit isotonic]

The report (`report.json`) holds: agreement with the human grades of each split, before and after a
calibration map; grades by judge and by the pairs' source; texts that stand twice; relevant texts
that serve as negatives under another id; unknown ids; rejections by reason; queries that training
and evaluation share, by id, by text and nearly; changes against a second set of judgments.
`--audit.fit` fits a map, which `--judging.calibration OUT/calibration` applies. A report through a
map stands at OUT/audit-calibrated, one without at OUT/audit.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bixse.artifacts import Artifact, begin, fingerprints
from bixse.evaluation.leakage import find_leaks, find_near
from bixse.judging.audit import changes, copies, histogram, matched, positives_among_negatives
from bixse.judging.calibration import relevance, signers
from bixse.judging.settings import Audit
from bixse.records import JUDGMENTS, document_text, text_hash
from bixse.scale import reaches
from jobs.calibration import agreement
from jobs.parts import progress

if TYPE_CHECKING:
    from rich.table import Table

TRAIN = "train"

_COLUMNS, _RANGES = 10, 5
"""A scale of more grades than the first is shown in so many ranges."""


def audit(
    corpus: Artifact,
    queries: Sequence[Artifact],
    qrels: Artifact,
    judgments: Artifact,
    pairs: Artifact | None,
    rejudged: Artifact | None,
    calibration: Artifact | None,
    settings: Audit,
    relevant_from: float,
    out: str,
    documents: Artifact | None = None,
) -> Artifact:
    """The audit of `judgments`; `pairs` are those that were judged, where candidates were drawn,
    `documents` those that were written and judged beside the corpus.

    Raises ValueError when the map is of another judge or scale, and when `rejudged` shares no pair
    with the judgments or is on another scale.
    """
    given = {"corpus": corpus, "qrels": qrels, "judgments": judgments, "pairs": pairs}
    given |= {"rejudged": rejudged, "calibration": calibration, "documents": documents}
    given |= {f"queries-{n}": artifact for n, artifact in enumerate(queries)}
    read = {name: artifact for name, artifact in given.items() if artifact is not None}
    inputs = fingerprints(**read)
    elsewhere = {"judgments", "rejudged", "fit", "fit_split"}
    config = settings.model_dump(mode="json", exclude=elsewhere) | {"relevant_from": relevant_from}
    draft = begin(out, "audit", config=config, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    table = judgments.table(JUDGMENTS.names)
    texts = [row for artifact in queries for row in artifact.rows("query_id", "text")]
    both = [corpus] if documents is None else [corpus, documents]
    hashes, lengths = _documents(both, set(table["doc_id"].to_pylist()))
    limit = settings.examples
    report = {
        "judgments": _described(judgments, table),
        "agreement": agreement(judgments, table, qrels, calibration, lengths, settings),
        "grades": _grades(judgments, table, pairs, qrels),
        "order_disagreement": _order_disagreement(table),
        "duplicates": {
            "documents": _copies(copies(hashes), limit),
            "queries": _copies(copies(_query_hashes(texts)), limit),
        },
        "positives_among_negatives": _hidden(table, texts, hashes, relevant_from, limit),
        "unknown": {
            "query_id": _unknown(table["query_id"], {query_id for query_id, _ in texts}, limit),
            "doc_id": _unknown(table["doc_id"], lengths.keys(), limit),
        },
        "rejected": {
            name: _reasons(artifact)
            for name, artifact in read.items()
            if artifact.manifest.rejected
        },
        "leakage": _leakage(table, texts, qrels, settings),
        "rejudged": _rejudged(judgments, table, rejudged),
        "config": config,
        "fingerprints": inputs,
    }
    found = json.dumps(_without_nan(report), indent=1)
    draft.write_file("report.json", found.encode())
    return draft.finish(rows=table.num_rows, extra={"checks": checks(json.loads(found))})


def _documents(parts: Sequence[Artifact], judged: set[str]) -> tuple[pa.Table, dict[str, int]]:
    """(doc_id, hash) of every document, and the characters of the judged ones."""
    doc_ids, hashes, lengths = [], [], {}
    columns = ["doc_id", "title", "text"]
    with progress("audit", sum(part.manifest.rows for part in parts)) as advance:
        for batch in chain.from_iterable(part.batches(columns) for part in parts):
            rows = (batch[name].to_pylist() for name in columns)
            found = []
            for doc_id, title, text in zip(*rows, strict=True):
                whole = document_text(title, text)
                found.append(text_hash(whole))
                if doc_id in judged:
                    lengths[doc_id] = len(whole)
            doc_ids.append(batch["doc_id"])
            hashes.append(pa.array(found, pa.string()))
            advance(batch.num_rows)
    return pa.table(
        {"doc_id": pa.chunked_array(doc_ids), "hash": pa.chunked_array(hashes)}
    ), lengths


def _query_hashes(texts: Sequence[tuple[str, str]]) -> pa.Table:
    rows = [{"query_id": query_id, "hash": text_hash(text)} for query_id, text in texts]
    schema = pa.schema([("query_id", pa.string()), ("hash", pa.string())])
    return pa.Table.from_pylist(rows, schema=schema)


def _described(judgments: Artifact, table: pa.Table) -> dict[str, Any]:
    return {
        "rows": table.num_rows,
        "rejected": judgments.manifest.rejected,
        "queries": len(pc.unique(table["query_id"])),
        "documents": len(pc.unique(table["doc_id"])),
        "signed": [list(signer) for signer in signers(table)],
        "origin": judgments.manifest.extra.get("origin"),
        "scale": judgments.manifest.extra["scale"],
    }


def _grades(
    judgments: Artifact, table: pa.Table, pairs: Artifact | None, qrels: Artifact
) -> dict[str, Any]:
    """Counts of each grade of the judgments' own scale. Judges on several have none in common (a
    cascade): then of the qrels' scale, or no counts where nobody gave a grade."""
    scale, scale_of = judgments.manifest.extra["scale"]["values"], "judgments"
    if not scale:
        scale, scale_of = qrels.manifest.extra["scale"], "qrels"
    if not scale:
        return {"scale": [], "scale_of": None}
    stored_N = relevance(table, scale, None)
    by = {"judge": histogram(stored_N, scale, np.array(table["judge"].to_pylist(), object))}
    if pairs is not None:
        drawn = pairs.table(["query_id", "doc_id", "source"])
        rows, others = matched(table, drawn)
        sources = np.array(drawn["source"].take(pa.array(others)).to_pylist(), object)
        by["source"] = histogram(stored_N[rows], scale, sources)
    return {"scale": scale, "scale_of": scale_of, **by}


def _order_disagreement(table: pa.Table) -> dict[str, float] | None:
    """Largest change of a probability between presentation orders; None of one order."""
    values = table["disagreement"].drop_null().to_numpy()
    if not len(values):
        return None
    p95 = float(np.quantile(values, 0.95))
    found = {"mean": float(values.mean()), "p95": p95, "largest": float(values.max())}
    return {"pairs": len(values), **found}


def _copies(groups: Mapping[str, Sequence[str]], limit: int) -> dict[str, Any]:
    """Rows that share their text with another, in how many groups, the largest ones named."""
    largest = sorted(groups.values(), key=len, reverse=True)
    rows = sum(map(len, largest))
    return {
        "rows": rows,
        "texts": len(largest),
        "examples": [ids[:limit] for ids in largest[:limit]],
    }


def _hidden(
    table: pa.Table,
    texts: Sequence[tuple[str, str]],
    hashes: pa.Table,
    relevant_from: float,
    limit: int,
) -> dict[str, Any]:
    copies_of = {
        doc_id: [other for other in ids if other != doc_id]
        for ids in copies(hashes).values()
        for doc_id in ids
    }
    query_key = {query_id: text_hash(text) for query_id, text in texts}
    columns = (table[name].to_pylist() for name in ("query_id", "doc_id", "relevance"))
    rows = [row for row in zip(*columns, strict=True) if row[0] in query_key]
    found = positives_among_negatives(rows, query_key, copies_of, relevant_from)
    judged_low = [one for one in found if one.copy_relevance is not None]
    unjudged = [one for one in found if one.copy_relevance is None]
    return {
        "positives": sum(reaches(row[2], relevant_from) for row in rows),
        "positives_with_one": len({(one.query_id, one.doc_id) for one in found}),
        "judged_low": len(judged_low),
        "unjudged": len(unjudged),
        "examples": [asdict(one) for one in (*judged_low[:limit], *unjudged[:limit])],
    }


def _unknown(ids: pa.ChunkedArray, known: Any, limit: int) -> dict[str, Any]:
    unknown = Counter(name for name in ids.to_pylist() if name not in known)
    return {"rows": unknown.total(), "ids": len(unknown), "examples": list(unknown)[:limit]}


def _reasons(artifact: Artifact) -> dict[str, int]:
    rejected = artifact.rejected()
    reasons = [] if rejected is None else rejected["reason"].to_pylist()
    return dict(Counter(reasons).most_common(20))


def _leakage(
    table: pa.Table, texts: Sequence[tuple[str, str]], qrels: Artifact, settings: Audit
) -> dict[str, Any]:
    """Queries of dev and test that training would see, were it to read these judgments."""
    judged = set(table["query_id"].to_pylist())
    trained = [row for row in texts if row[0] in judged]
    split_of = dict(qrels.rows("query_id", "split"))
    evaluated = {
        query_id: text for query_id, text in texts if split_of.get(query_id, TRAIN) != TRAIN
    }
    same_id = [query_id for query_id in evaluated if query_id in judged]
    others = [row for row in trained if row[0] not in evaluated]
    same_text = find_leaks(evaluated, others)
    near = find_near(evaluated, others, settings.shingle, settings.near) if evaluated else []
    return {
        "training_queries": len(trained),
        "evaluation_queries": len(evaluated),
        "by_id": {"queries": len(same_id), "examples": same_id[: settings.examples]},
        "by_text": _found(same_text, settings.examples),
        "near": {**_found(near, settings.examples), "similarity_from": settings.near},
    }


def _found(leaks: Sequence[Any], limit: int) -> dict[str, Any]:
    return {"queries": len(leaks), "examples": [asdict(leak) for leak in leaks[:limit]]}


def _rejudged(
    judgments: Artifact, table: pa.Table, rejudged: Artifact | None
) -> dict[str, Any] | None:
    if rejudged is None:
        return None
    scale = judgments.manifest.extra["scale"]["values"]
    other = rejudged.manifest.extra["scale"]["values"]
    if not (scale and other):
        raise ValueError(
            "--audit.rejudged compares judgments on one scale, the judges of a cascade are on "
            "several: name the judgments of one of them with --audit.judgments"
        )
    if other != scale:
        raise ValueError(f"the judgments are on the scale {scale}, the second ones on {other}")
    found = changes(table, rejudged.table(JUDGMENTS.names), scale)
    return {**asdict(found), "flip_rate": found.flip_rate}


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: a measure without a value is null."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def checks(report: Mapping[str, Any]) -> dict[str, int]:
    """What should be 0, by name."""
    hidden, leakage = report["positives_among_negatives"], report["leakage"]
    return {
        "documents that share a text": report["duplicates"]["documents"]["rows"],
        "queries that share a text": report["duplicates"]["queries"]["rows"],
        "copies of a positive judged irrelevant": hidden["judged_low"],
        "copies of a positive that nobody judged": hidden["unjudged"],
        "judgments of an unknown query": report["unknown"]["query_id"]["rows"],
        "judgments of an unknown document": report["unknown"]["doc_id"]["rows"],
        "evaluation queries that are judged too": leakage["by_id"]["queries"],
        "evaluation queries whose text is judged": leakage["by_text"]["queries"],
        "evaluation queries nearly equal to a judged one": leakage["near"]["queries"],
    }


def tables(artifact: Artifact) -> list["Table"]:
    """Agreement, grades and checks, for the console."""
    from rich.table import Table

    report = json.loads(artifact.place.read("report.json"))
    shown = []
    for split, found in (report["agreement"] or {}).items():
        sides = [side for side in ("judged", "calibrated") if side in found]
        fitted = ", the map was fitted on them" if found.get("in_sample") else ""
        table = Table(
            "measure",
            *sides,
            title=f"against human grades, {split} split: {found['pairs']:,} pairs of "
            f"{found['queries']:,} queries (95 % intervals{fitted})",
        )
        for name in found["judged"]["measures"]:
            table.add_row(name, *(_cell(found[side]["measures"][name]) for side in sides))
        shown.append(table)
    shown.append(_grade_table(report["grades"]))
    table = Table("should be 0", "found", title="checks")
    for name, count in checks(report).items():
        table.add_row(name, f"{count:,}", style="bold" if count else None)
    if report["rejudged"]:
        rate = report["rejudged"]["flip_rate"]
        table.add_row("grades that flip on asking again", f"{rate:.1%}")
    return [*shown, table]


def _grade_table(grades: Mapping[str, Any]) -> "Table":
    from rich.table import Table

    # An audit that stands finished may be older than `scale_of`.
    titles = {
        "judgments": "grades",
        "qrels": "grades, on the scale of the given ones: the judges are on several",
        None: "grades: not counted, the judges are on several scales and no grade is given",
    }
    scale = [f"{value:g}" for value in grades["scale"]]
    # The steps of one from 0 to 100 are more than a console has columns.
    size = 1 if len(scale) <= _COLUMNS else -(-len(scale) // _RANGES)
    starts = range(0, len(scale), size)
    ranges = [dict.fromkeys((scale[n], scale[n : n + size][-1])) for n in starts]
    names = [" to ".join(ends) for ends in ranges]
    table = Table("judgments by", *names, title=titles[grades.get("scale_of", "judgments")])
    for by in ("judge", "source"):
        for name, counts in grades.get(by, {}).items():
            of_ranges = (f"{sum(counts[n : n + size]):,}" for n in starts)
            table.add_row(f"{by} {name[:16]}", *of_ranges)
    return table


def _cell(measure: Mapping[str, Any]) -> str:
    if measure["value"] is None:
        return "none"
    low, high = measure["ci95"]
    interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    return f"{measure['value']:.3f}{interval}"


if __name__ == "__main__":
    from jobs.verbs import program

    program("audit")
