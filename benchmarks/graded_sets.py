"""Public graded sets as rows for the embedded judge: which pairs, their features, their grades.

Each set is a directory in BEIR layout (`corpus.jsonl`, `queries.jsonl`, `qrels/<split>.tsv`,
`info.json`).

Which pairs are rows. A judge sees candidates: documents chosen for how they look, never for their
grade. Where assessors judged (nearly) everything, rows are chosen by BM25 rank and chance alone and
an unjudged document has grade 0; adding relevant documents that nothing found would teach the judge
that weak evidence means relevance. Elsewhere rows are the judged pairs, whose pools were made by
search engines, and random documents as grade 0 where those cannot well be relevant.
"""

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bixse.judging.features import Floats, features
from bixse.models.encoder import Encoder
from bixse.records import document_text
from bixse.retrieval.lexical import LexicalIndex
from bixse.retrieval.settings import Lexical

SEED = 0
HEAD, DEPTH, TAIL = 10, 100, 10
"""Of exhaustively judged sets: the best HEAD of BM25, and TAIL drawn from the next, to DEPTH."""
QUERIES = 100
"""Most queries a set and split: seven coefficients need no more, and sets stay alike in size."""


@dataclass(frozen=True)
class Source:
    """How the grades of one set read on the scale, and which documents beside them are rows."""

    name: str
    klass: str
    grade_min: float
    grade_max: float
    exhaustive: bool
    random: int
    splits: tuple[str, ...] = ("train", "test")

    def grade(self, grade: float) -> float:
        """A grade of the set's own, linearly on UMBRELA's 0-3; fractions stay fractions."""
        return 3 * (grade - self.grade_min) / (self.grade_max - self.grade_min)


SOURCES = (
    # Random products may well fit queries such as "laptop": none is taken for irrelevant.
    Source("chorus-electronics", "A", 0, 3, exhaustive=False, random=0),
    # Grade 1 is "minimum interest", irrelevant is what is unjudged: the scale begins at 0.
    Source("cranfield", "B", 0, 4, exhaustive=True, random=5),
    Source("mediqa2019-qa", "B", 1, 4, exhaustive=False, random=2),
    Source("climate-fever-evidence", "B", 0, 1, exhaustive=False, random=2),
    Source("cacm", "B", 0, 1, exhaustive=True, random=5),
    Source("vaswani", "B", 0, 1, exhaustive=True, random=5),
    Source("noveleval", "A", 0, 2, exhaustive=False, random=0, splits=("test",)),
)

UNUSED = {
    "medquad": "its answers overlap those of mediqa2019-qa, which has grades where medquad is "
    "binary: it is neither fitted on nor measured on"
}


@dataclass(frozen=True)
class Rows:
    """N pairs of one set and split."""

    features: Floats
    """[N, F]"""
    grades: Floats
    """[N], 0 to 3"""
    human: npt.NDArray[np.bool_]
    """[N]: a person graded the pair; else it is taken as grade 0."""
    queries: int

    def graded(self) -> "Rows":
        """Only the pairs that a person graded."""
        return Rows(
            self.features[self.human], self.grades[self.human], self.human[self.human], self.queries
        )


class Vectors:
    """Unit vectors of documents by id, encoded once; kept in the file `cache` when given."""

    def __init__(self, encoder: Encoder, cache: Path | None) -> None:
        self.encoder, self._cache = encoder, cache
        self._known: dict[str, npt.NDArray[np.float32]] = {}
        if cache is not None and cache.exists():
            with np.load(cache) as stored:
                self._known = dict(zip(stored["ids"].tolist(), stored["vectors"], strict=True))

    def of(self, texts: dict[str, str]) -> npt.NDArray[np.float32]:
        """[len(texts), dim]."""
        missing = [key for key in texts if key not in self._known]
        found = self.encoder.encode([texts[key] for key in missing], "document")
        self._known |= dict(zip(missing, found, strict=True))
        if missing and self._cache is not None:
            vectors = np.stack(list(self._known.values()))
            np.savez(self._cache, ids=np.array(list(self._known)), vectors=vectors)
        return np.stack([self._known[key] for key in texts])


class Collection:
    """One set, indexed: rows of any split."""

    def __init__(self, source: Source, data: Path, encoder: Encoder, cache: Path | None) -> None:
        self.source, self._directory = source, data / source.name
        corpus = _jsonl(self._directory / "corpus.jsonl")
        self.titles = {row["_id"]: row.get("title", "") for row in corpus}
        self.texts = {
            row["_id"]: document_text(self.titles[row["_id"]], row["text"]) for row in corpus
        }
        self.queries = {
            row["_id"]: row["text"] for row in _jsonl(self._directory / "queries.jsonl")
        }
        self.index = LexicalIndex(list(self.texts), list(self.texts.values()), Lexical())
        self._vectors = Vectors(encoder, cache / f"{source.name}.npz" if cache else None)
        self.info = json.loads((self._directory / "info.json").read_text())

    def grades(self, split: str) -> dict[str, dict[str, float]]:
        """query_id -> doc_id -> grade on the 0-3 scale."""
        found: dict[str, dict[str, float]] = {}
        with open(self._directory / "qrels" / f"{split}.tsv", newline="") as lines:
            for row in csv.DictReader(lines, delimiter="\t"):
                grade = self.source.grade(float(row["score"]))
                found.setdefault(row["query-id"], {})[row["corpus-id"]] = grade
        return found

    def rows(self, split: str, queries: int = QUERIES) -> Rows:
        """The rows of at most `queries` queries of a split, drawn by the seed."""
        grades = self.grades(split)
        drawn = random.Random(SEED).sample(sorted(grades), min(queries, len(grades)))
        chosen = {query_id: self._choose(query_id, grades[query_id]) for query_id in drawn}
        doc_ids = sorted({doc_id for found in chosen.values() for doc_id in found})
        doc_vectors = self._vectors.of({doc_id: self.texts[doc_id] for doc_id in doc_ids})
        query_vectors = self._vectors.encoder.encode([self.queries[q] for q in drawn], "query")
        row_of = {doc_id: row for row, doc_id in enumerate(doc_ids)}
        doc_terms = self.index.tokenize([self.texts[d] for d in doc_ids])
        title_terms = self.index.tokenize([self.titles[d] for d in doc_ids])
        features_of, grade, human = [], [], []
        for number, (query_id, found) in enumerate(chosen.items()):
            at = [row_of[doc_id] for doc_id in found]
            text = self.queries[query_id]
            features_of.append(
                features(
                    bm25_N=self.index.scores_of(text, list(found)),
                    bm25_top=float(self.index.scores(text).max()),
                    cosine_N=doc_vectors[at] @ query_vectors[number],
                    query_terms=self.index.tokenize([text])[0],
                    doc_terms=[doc_terms[row] for row in at],
                    title_terms=[title_terms[row] for row in at],
                )
            )
            grade += list(found.values())
            human += [doc_id in grades[query_id] for doc_id in found]
        return Rows(np.concatenate(features_of), np.array(grade), np.array(human), len(drawn))

    def _choose(self, query_id: str, judged: dict[str, float]) -> dict[str, float]:
        """doc_id -> grade of the documents that are rows for a query (see the head of the file)."""
        rng = random.Random(f"{SEED}:{query_id}")
        if self.source.exhaustive:
            ranked = [hit.doc_id for hit in self.index.search(self.queries[query_id], DEPTH)]
            below = ranked[HEAD:]
            doc_ids = ranked[:HEAD] + rng.sample(below, min(TAIL, len(below)))
        else:
            doc_ids = list(judged)
        taken = {*doc_ids, *judged}
        rest = [doc_id for doc_id in self.index.doc_ids if doc_id not in taken]
        doc_ids += rng.sample(rest, min(self.source.random, len(rest)))
        return {doc_id: judged.get(doc_id, 0.0) for doc_id in doc_ids}


def _jsonl(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
