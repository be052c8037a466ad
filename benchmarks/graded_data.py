"""What a graded set teaches and what it examines, in memory: from `jobs.ingest` on, without Ray.

`trec-dl` stands for a pair of sets that is put together here (`benchmarks.trec_dl`), and
`trec-dl-compared` for the part of it that GPT-4o also compared, with its preferences.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.label_noise import with_noise
from benchmarks.trec_dl import PREFERENCES, trec_dl
from bixse.artifacts import Artifact
from bixse.evaluation.leakage import find_leaks
from bixse.evaluation.metrics import Qrels
from bixse.judging.given import given
from bixse.records import Split, document_text
from bixse.training.groups import Labels, Preferred, group
from jobs.ingest import Ingested, ingest
from jobs.preferences import import_preferences
from jobs.recipe import Ingest

GRADES_FROM = {"mediqa2019-qa": 1.0}
"""Sets whose scale starts at 1 (excellent is 4, incorrect 1)."""


@dataclass(frozen=True)
class Sources:
    """A set's artefacts; what is learnt from and what is examined may be one set or two."""

    learnt: Ingested
    tested: Ingested
    preferences: Artifact | None


def read_sources(name: str, data: Path, out: Path) -> Sources:
    """The artefacts of a set below the directory `data`, made under `out` unless they are there.

    Raises ValueError as `ingest` and `import_preferences`.
    """
    source, apart = data / name, None
    if name in ("trec-dl", "trec-dl-compared"):
        apart = trec_dl(data, out, compared=name == "trec-dl-compared")
        source = apart.training
    read = Ingest(grade_min=GRADES_FROM.get(name, 0.0))
    learnt = ingest(str(source), read, f"{out}/training")
    tested = ingest(str(apart.test), read, f"{out}/test") if apart else learnt
    preferences = None
    if (source / PREFERENCES).exists():
        preferences = import_preferences(
            [learnt.queries], learnt.corpus, str(source / PREFERENCES), f"{out}/preferences"
        )
    return Sources(learnt, tested, preferences)


@dataclass(frozen=True)
class GradedSet:
    """Judgments of the train split, and the judged queries of another with a whole corpus."""

    judgments: pa.Table
    """JUDGMENTS."""
    grades: tuple[float, ...]
    """The steps of their scale."""
    queries: Mapping[str, str]
    """query_id -> text, of training."""
    documents: Mapping[str, str]
    """doc_id -> text, of training."""
    preferred: Preferred | None
    asked: Mapping[str, str]
    """query_id -> text, of the examination, in the order of `qrels`."""
    qrels: Qrels
    corpus: Mapping[str, str]
    """doc_id -> text, of the examination, as the corpus has them."""

    def labels(self, noise: float, seed: int, preferences: bool) -> Labels:
        """What training reads; a share of the grades is another one, drawn by the seed.

        Raises ValueError as `group` and `with_noise`, or for preferences that are not there.
        """
        if preferences and self.preferred is None:
            raise ValueError("this objective learns from preferences, and the set has none")
        table = self.judgments
        if noise:
            table = with_noise(table, self.grades, noise, seed)
        return group(
            table["query_id"].to_pylist(),
            table["doc_id"].to_pylist(),
            table["relevance"].to_numpy().astype(np.float32),
            self.queries,
            self.documents,
            {},
            self.preferred if preferences else None,
        )


def load(sources: Sources, split: Split) -> GradedSet:
    """Raises ValueError when nobody judged a query of `split`, or training reads one of them."""
    learnt, tested = sources.learnt, sources.tested
    queries = dict(learnt.queries.rows("query_id", "text"))
    judgments = given(learnt.qrels.table(), "train")
    rows = given(tested.qrels.table(), split).select(["query_id", "doc_id", "relevance"])
    qrels: dict[str, dict[str, float]] = {}
    for query_id, doc_id, relevance in zip(*(column.to_pylist() for column in rows), strict=True):
        qrels.setdefault(query_id, {})[doc_id] = relevance
    if not qrels:
        raise ValueError(f"no judgments for split {split}: take another with --split")
    of_tested = dict(tested.queries.rows("query_id", "text"))
    asked = {query_id: of_tested[query_id] for query_id in sorted(qrels)}
    taught = sorted(set(judgments["query_id"].to_pylist()))
    if leaks := find_leaks(asked, ((query_id, queries[query_id]) for query_id in taught)):
        raise ValueError(
            f"{len(leaks)} queries of split {split} stand in training too: the first is "
            f"{leaks[0].query_id} ({leaks[0].text!r})"
        )
    preferred = None
    if sources.preferences is not None:
        table = sources.preferences.table()
        query_ids, doc_ids_a, doc_ids_b = (
            table[name].to_pylist() for name in ("query_id", "doc_id_a", "doc_id_b")
        )
        preferred = Preferred(query_ids, doc_ids_a, doc_ids_b, table["prob_a"].to_numpy())
    return GradedSet(
        judgments=judgments,
        grades=tuple(learnt.qrels.manifest.extra["scale"]),
        queries=queries,
        documents=_documents(learnt.corpus),
        preferred=preferred,
        asked=asked,
        qrels={query_id: qrels[query_id] for query_id in asked},
        corpus=_documents(tested.corpus),
    )


def _documents(corpus: Artifact) -> dict[str, str]:
    rows = corpus.rows("doc_id", "title", "text")
    return {doc_id: document_text(title, text) for doc_id, title, text in rows}
