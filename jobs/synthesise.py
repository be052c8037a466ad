"""corpus -> queries: some documents, drawn by a hash of their ids, each asked one query.

The drawn documents are copied to an artefact of their own beside `out` (`<out>-seeds`), whose rows
Ray Data hands out in units. Each becomes one query or one rejection: rows and rejected of the
result add up to the seeds.
"""

import heapq
from collections.abc import Collection, Iterable

import pyarrow as pa
import pyarrow.compute as pc

from bixse.artifacts import (
    REJECTED_DIR,
    Artifact,
    Draft,
    begin,
    fingerprints,
    part_name,
)
from bixse.records import CORPUS, QUERIES, Document, Rejection, text_hash
from bixse.synthesis.queries import cloze, draw_order
from bixse.synthesis.settings import Cloze
from jobs.parts import rejected_table, row_units, run_units, sorted_out
from jobs.recipe import Placement

PART_ROWS = 10_000
UNIT_ROWS = 1000


def synthesise(
    corpus: Artifact,
    settings: Cloze,
    placement: Placement,
    out: str,
    given: Artifact | None = None,
) -> Artifact:
    """One query a drawn document, `settings.queries` documents at most.

    Of queries with equal text (case, white space and Unicode form aside) the one drawn first stays;
    none stays that equals one of `given`, which an evaluation may hold. Raises ArtifactError when
    `out` holds something made otherwise.
    """
    inputs = fingerprints(corpus=corpus, given=given)
    draft = begin(out, "queries", config=settings.model_dump(mode="json"), inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    seeds = _seeds(corpus, settings, f"{out}-seeds")
    units = row_units(seeds, UNIT_ROWS)
    run_units(
        draft,
        units,
        ClozeWork,
        (settings,),
        label="synthesise",
        actors=placement.judge_actors,
        cpus=placement.cpus_per_actor,
        gpus=0.0,
    )
    numbers = [unit.number for unit in units]
    _reject_repeated(draft, numbers, settings.seed, [] if given is None else [given])
    return draft.finish(extra={"documents": corpus.manifest.rows, "seeds": seeds.manifest.rows})


class ClozeWork:
    """Reads: doc_id, title, text. Adds: a query, or a rejection, for each."""

    def __init__(self, settings: Cloze) -> None:
        self._settings = settings

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[Rejection]]:
        made = [
            cloze(Document(**row), self._settings) for row in rows.select(CORPUS.names).to_pylist()
        ]
        return sorted_out(made, QUERIES)


def _seeds(corpus: Artifact, settings: Cloze, out: str) -> Artifact:
    """The documents with the smallest draw, in the order of the corpus.

    Two passes, the first over ids alone: memory follows `settings.queries`, not the corpus.
    """
    config = {"queries": settings.queries, "seed": settings.seed}
    draft = begin(out, "corpus", config=config, inputs=fingerprints(corpus=corpus))
    if isinstance(draft, Artifact):
        return draft
    order = ((draw_order(doc_id, settings.seed), doc_id) for doc_id in corpus.column("doc_id"))
    smallest = heapq.nsmallest(settings.queries, order)
    drawn = frozenset(doc_id for _, doc_id in smallest)
    done = draft.parts_done()
    for number, table in enumerate(_regrouped(corpus, drawn)):
        if number not in done:
            draft.write_part(number, table)
    return draft.finish()


def _regrouped(corpus: Artifact, drawn: Collection[str]) -> Iterable[pa.Table]:
    """The drawn rows in tables of `PART_ROWS`; one empty table when there is none."""
    waiting = CORPUS.empty_table()
    yielded = False
    for batch in corpus.batches(CORPUS.names):
        table = pa.Table.from_batches([batch]).cast(CORPUS)
        chosen = [doc_id in drawn for doc_id in table["doc_id"].to_pylist()]
        waiting = pa.concat_tables([waiting, table.filter(pa.array(chosen, pa.bool_()))])
        while waiting.num_rows >= PART_ROWS:
            yield waiting.slice(0, PART_ROWS).combine_chunks()
            waiting = waiting.slice(PART_ROWS)
            yielded = True
    if waiting.num_rows or not yielded:
        yield waiting.combine_chunks()


def _reject_repeated(
    draft: Draft, numbers: Iterable[int], seed: int, given: Iterable[Artifact]
) -> None:
    """Move every query that repeats another from the rows of its part to the rejected.

    A part is rewritten whole, rejections first. Killed in between, a rerun finds the same repeats
    and writes the same bytes; once rewritten, a part has none.
    """
    parts = {number: draft.part(part_name(number)) for number in numbers}
    taken = {
        text_hash(text): "equals a given query"
        for artifact in given
        for text in artifact.column("text")
    }
    rows = [row for table in parts.values() for row in table.to_pylist()]
    repeated: dict[str, Rejection] = {}
    for row in sorted(rows, key=lambda r: (draw_order(r["seed_doc_id"], seed), r["seed_doc_id"])):
        key = text_hash(row["text"])
        if key in taken:
            repeated[row["seed_doc_id"]] = Rejection(
                reason=taken[key],
                response=row["text"],
                query_id=row["query_id"],
                doc_id=row["seed_doc_id"],
            )
        else:
            taken[key] = f"equals the query {row['query_id']}"
    for number, table in parts.items():
        rejections = [repeated[x] for x in table["seed_doc_id"].to_pylist() if x in repeated]
        if not rejections:
            continue
        value_set = pa.array([rejection.doc_id for rejection in rejections], pa.string())
        kept = table.filter(pc.invert(pc.is_in(table["seed_doc_id"], value_set=value_set)))
        name = f"{REJECTED_DIR}/{part_name(number)}"
        rejected = rejected_table(rejections)
        if draft.place.exists(name):
            before = draft.part(name)
            again = pc.is_in(before["doc_id"], value_set=value_set)
            rejected = pa.concat_tables([before.filter(pc.invert(again)), rejected])
        draft.write_part(number, kept.combine_chunks(), rejected.combine_chunks())


if __name__ == "__main__":
    from jobs.verbs import program

    program("synthesise")
