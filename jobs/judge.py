"""pairs -> judgments: one seam, several judges (`jobs.judges`).

human copies the given grades of the train split. The others grade pairs in an actor pool: units of
pairs in, judgments or rejections out (`jobs.parts`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bixse.artifacts import Artifact, Draft, begin, part_name
from bixse.judging.asked import Asked, PairJudge
from bixse.judging.given import given
from bixse.judging.settings import Judging, config
from bixse.records import JUDGMENTS, Judgment, Rejection, document_text
from bixse.retrieval.settings import Lexical
from jobs.grades import import_grades
from jobs.judges.chat import chat
from jobs.judges.cross_encoder import cross_encoder
from jobs.judges.embedded import embedded
from jobs.judges.generative import generative
from jobs.judges.seam import Judge
from jobs.parts import Texts, row_units, rows_of, run_units
from jobs.recipe import Placement

TRAIN = "train"


def judge(
    pairs: Artifact | None,
    queries: Sequence[Artifact],
    corpus: Artifact,
    qrels: Artifact | None,
    judging: Judging,
    lexical: Lexical,
    embeddings: Artifact | None,
    placement: Placement,
    out: str,
) -> Artifact:
    """Judgments of `pairs`, or the train split of `qrels` when `judging.judge` is human.

    `embeddings` are the corpus under the packaged encoder, for features alone. Raises ValueError
    when what the chosen judge needs is missing, before anything is written.
    """
    if judging.judge == "human":
        return _judge_human(qrels, judging, out)
    if judging.judge == "given":
        return import_grades(queries, corpus, judging.given, config(judging), out)
    if pairs is None:
        raise ValueError(f"--judging.judge {judging.judge} needs pairs: run the pair stage first")
    chosen = choose(judging, corpus, embeddings, lexical, placement)
    inputs = {"pairs": pairs.fingerprint, "corpus": corpus.fingerprint, **chosen.inputs}
    inputs |= {f"queries-{n}": artifact.fingerprint for n, artifact in enumerate(queries)}
    shaping = {**config(judging), **chosen.config, "unit_pairs": judging.unit_pairs}
    draft = begin(out, "judgments", config=shaping, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    run_units(
        draft,
        row_units(pairs, judging.unit_pairs),
        JudgeUnit,
        (list(queries), corpus, chosen.build, chosen.arguments),
        label="judge",
        actors=placement.judge_actors,
        cpus=placement.cpus_per_actor,
        gpus=placement.gpus_per_actor,
    )
    device = "cuda" if placement.gpus_per_actor else "cpu"
    extra = {
        "scale": {"name": chosen.scale.name, "values": list(chosen.scale.values)},
        "origin": chosen.origin,
        "judges": _judges(draft),
        "pairs": pairs.manifest.rows,
    }
    return draft.finish(device=device, extra=extra)


def choose(
    judging: Judging,
    corpus: Artifact,
    embeddings: Artifact | None,
    lexical: Lexical,
    placement: Placement,
) -> Judge:
    """The judge that `judging.judge` names. Raises ValueError when it cannot judge."""
    if judging.judge == "vllm":
        return generative(judging.vllm, placement)
    if judging.judge == "openai":
        return chat(judging.openai)
    if judging.judge == "cross_encoder":
        return cross_encoder(judging.cross_encoder)
    return embedded(corpus, embeddings, lexical)


def _judge_human(qrels: Artifact | None, judging: Judging, out: str) -> Artifact:
    """Raises ValueError when nobody has graded a pair of the train split."""
    found = [] if qrels is None else [given(qrels.part(name), TRAIN) for name in qrels.parts()]
    if qrels is None or not sum(table.num_rows for table in found):
        raise ValueError(
            "no given grades to train on (qrels/train.tsv): set --judging.judge features or vllm"
        )
    draft = begin(out, "judgments", config=config(judging), inputs={"qrels": qrels.fingerprint})
    if isinstance(draft, Artifact):
        return draft
    for number, table in enumerate(found):
        draft.write_part(number, table)
    extra = {
        "scale": {"name": "given", "values": qrels.manifest.extra["scale"]},
        "origin": "human",
        "judges": _judges(draft),
    }
    return draft.finish(extra=extra)


class JudgeUnit:
    """Reads: query_id, doc_id. Adds: the rest of a judgment."""

    def __init__(
        self,
        queries: Sequence[Artifact],
        corpus: Artifact,
        build: Callable[..., PairJudge],
        arguments: tuple[Any, ...],
    ) -> None:
        self._queries = _query_texts(queries)
        self._texts = Texts(corpus)
        self._judge = build(*arguments)

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[Rejection]]:
        verdicts = self._judge(self._asked(rows)).verdicts
        kept = [verdict for verdict in verdicts if isinstance(verdict, Judgment)]
        rejected = [verdict for verdict in verdicts if isinstance(verdict, Rejection)]
        return rows_of(kept, JUDGMENTS), rejected

    def _asked(self, rows: pa.Table) -> list[Asked]:
        query_ids, doc_ids = rows["query_id"].to_pylist(), rows["doc_id"].to_pylist()
        documents = self._texts.get(doc_ids)
        return [
            Asked(query_id, doc.doc_id, self._queries[query_id], document_text(doc.title, doc.text))
            for query_id, doc in zip(query_ids, documents, strict=True)
        ]


def _query_texts(queries: Sequence[Artifact]) -> dict[str, str]:
    """All queries, by `query_id`."""
    tables = [artifact.table(["query_id", "text"]) for artifact in queries]
    return {row["query_id"]: row["text"] for table in tables for row in table.to_pylist()}


def _judges(draft: Draft) -> list[str]:
    """Everyone who signed a row; engines that chose another dtype are others."""
    found: set[str] = set()
    for number in sorted(draft.parts_done()):
        with draft.place.open(part_name(number)) as handle:
            found.update(pq.read_table(handle, columns=["judge"])["judge"].to_pylist())
    return sorted(found)


if __name__ == "__main__":
    from jobs.pipeline import main

    main("judge")
