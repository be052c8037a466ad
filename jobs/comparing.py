"""queries written at grades -> which of two a document answers better, as a language model says.

One row a pair of queries of one document, asked in both orders (`bixse.synthesis.writing.compare`).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from bixse.artifacts import Artifact, Draft, begin, fingerprints
from bixse.records import Query, Rejection
from bixse.synthesis import prompts
from bixse.synthesis.reading import Better
from bixse.synthesis.settings import GradedQueries
from bixse.synthesis.sifting import comparisons
from bixse.synthesis.writing import Comparison, compare
from jobs.generation import Writer, pin_generator
from jobs.parts import write_rows
from jobs.recipe import Placement
from jobs.requests import PART_ROWS, cut_documents, generator_config, run_requests
from jobs.texts import DocumentTexts

COMPARED = pa.schema(
    [
        ("doc_id", pa.string()),
        ("query_id_high", pa.string()),
        ("query_id_low", pa.string()),
        ("verdict", pa.string()),
    ]
)


def ask_comparisons(
    queries: Artifact,
    corpus: Artifact,
    settings: GradedQueries,
    placement: Placement,
    out: str,
    writer: Callable[..., Any] = Writer,
) -> Artifact:
    """Which of two queries of a document, written at different grades, it answers better."""
    generator, name = pin_generator(settings.generator, placement)
    generator = generator.replace(temperature=0.0)
    schema = Better.model_json_schema()
    shown = prompts.prompt_hash(prompts.closer("{document}", "{a}", "{b}"), schema=schema)
    inputs = fingerprints(queries=queries, corpus=corpus)
    draft = begin(
        out,
        "comparisons",
        config={"generator": generator_config(generator), "prompt": shown},
        inputs={**inputs, "generator": name},
    )
    if isinstance(draft, Artifact):
        return draft
    wanted = begin(f"{out}-requests", "comparisons", config={}, inputs=inputs)
    if isinstance(wanted, Draft):
        rows = [Query(**row) for row in queries.table().to_pylist()]
        write_rows(wanted, comparisons(rows), COMPARED.remove(3), PART_ROWS)
        wanted = wanted.finish()
    bound = settings.replace(generator=generator)
    arguments = (queries, corpus, bound, schema, writer)
    run_requests(draft, wanted, ComparisonUnit, arguments, generator.unit_requests, placement)
    extra = {"generator": name, "prompt": shown, "comparisons": wanted.manifest.rows}
    return draft.finish(device=placement.device, extra=extra)


class ComparisonUnit:
    """Reads: doc_id, query_id_high, query_id_low. Adds: verdict."""

    def __init__(
        self,
        queries: Artifact,
        corpus: Artifact,
        settings: GradedQueries,
        schema: Mapping[str, Any],
        writer: Callable[..., Any],
    ) -> None:
        self._queries = dict(queries.rows("query_id", "text"))
        self._texts = DocumentTexts(corpus)
        self._settings = settings
        self._writer = writer(settings.generator, schema)

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[Rejection]]:
        asked = [Comparison(**row) for row in rows.to_pylist()]
        shown = cut_documents(self._texts, [c.doc_id for c in asked], self._writer.cut)
        attempts, seed = self._settings.generator.attempts, self._settings.seed
        verdicts = compare(asked, self._queries, shown, attempts, seed, self._writer)
        found = [
            {**asdict(comparison), "verdict": verdict}
            for comparison, verdict in zip(asked, verdicts, strict=True)
            if isinstance(verdict, str)
        ]
        rejected = [verdict for verdict in verdicts if isinstance(verdict, Rejection)]
        return pa.Table.from_pylist(found, schema=COMPARED), rejected
