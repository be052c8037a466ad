"""Two judges, one artefact: which pairs the strong one sees, and whose judgment stands.

    cheap judgments -> the most doubtful pairs -> strong judgments -> judgments, each row signed

Judging itself is `jobs.judge`, once a judge; `jobs.pipeline` puts the steps in order.
"""

from collections.abc import Iterator

import pyarrow as pa

from bixse.artifacts import Artifact, begin, fingerprints
from bixse.judging.cascade import budget, doubt, most_doubtful
from bixse.judging.settings import Cascade
from bixse.records import JUDGMENTS, PAIRS, Pair
from jobs.parts import write_rows

PART_ROWS = 100_000


def escalate(cheap: Artifact, cascade: Cascade, out: str) -> Artifact:
    """The pairs for the strong judge: source `cascade`, `rank` by doubt, `score` the doubt.

    Raises ValueError when the budget is no pair, or the cheap judge says nothing of its doubt.
    """
    limit = budget(cascade, cheap.manifest.rows)
    if not limit:
        raise ValueError(
            f"the budget of the cascade is 0 of {cheap.manifest.rows} pairs: raise "
            "--judging.cascade.share or --judging.cascade.max-pairs"
        )
    shaping = {"by": cascade.by, "pairs": limit}
    draft = begin(out, "pairs", config=shaping, inputs=fingerprints(judgments=cheap))
    if isinstance(draft, Artifact):
        return draft
    chosen = most_doubtful(_doubts(cheap, cascade), limit)
    rows = [
        Pair(query_id, doc_id, "cascade", rank, score)
        for rank, (query_id, doc_id, score) in enumerate(chosen, start=1)
    ]
    # Pairs of a query side by side: a judge's prompts then share what comes first.
    rows.sort(key=lambda pair: (pair.query_id, pair.rank))
    write_rows(draft, rows, PAIRS, PART_ROWS)
    return draft.finish(extra={"judged": cheap.manifest.rows})


def _doubts(cheap: Artifact, cascade: Cascade) -> Iterator[tuple[str, str, float]]:
    rows = cheap.rows("query_id", "doc_id", "grade_probs", "disagreement")
    for query_id, doc_id, grade_probs, disagreement in rows:
        yield query_id, doc_id, doubt(cascade, grade_probs, disagreement)


def merge(cheap: Artifact, strong: Artifact, out: str) -> Artifact:
    """The judgments of `cheap`, with those of `strong` in their place where there are any.

    What the strong judge rejected keeps its cheap judgment, which its row says; the rejections
    stand in `strong`. What the cheap judge rejected is rejected. Memory follows `strong`.
    """
    inputs = fingerprints(cheap=cheap, strong=strong)
    draft = begin(out, "judgments", config={"judge": "cascade"}, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    better = {(row["query_id"], row["doc_id"]): row for row in strong.table().to_pylist()}
    judges: set[str] = set()
    seen = 0
    for number, name in enumerate(cheap.parts()):
        rows = cheap.part(name).to_pylist()
        merged = [better.get((row["query_id"], row["doc_id"]), row) for row in rows]
        seen += sum((row["query_id"], row["doc_id"]) in better for row in rows)
        judges |= {row["judge"] for row in merged}
        rejected = f"rejected/{name}"
        lost = cheap.part(rejected) if rejected in cheap.manifest.files else None
        draft.write_part(number, pa.Table.from_pylist(merged, schema=JUDGMENTS), lost)
    if seen != strong.manifest.rows:
        raise ValueError(f"{strong.url} judges pairs that {cheap.url} does not")
    scales = [artifact.manifest.extra["scale"] for artifact in (cheap, strong)]
    same = scales[0]["values"] == scales[1]["values"]
    extra = {
        # Of distributions on two scales only the relevance can be compared.
        "scale": scales[1] if same else {"name": "mixed", "values": []},
        "scales": {"cheap": scales[0], "strong": scales[1]},
        "origin": "cascade",
        "judges": sorted(judges),
        "strong_rows": strong.manifest.rows,
        "strong_rejected": strong.manifest.rejected,
    }
    return draft.finish(device=strong.manifest.device, extra=extra)
