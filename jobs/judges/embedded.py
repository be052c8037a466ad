"""The features judge: what a query, a document and their whole corpus say, without a model call."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bixse.artifacts import Artifact
from bixse.judging.asked import Answers, Asked
from bixse.judging.features import FeaturesJudge, features
from bixse.models.encoder import Encoder
from bixse.models.settings import PACKAGED
from bixse.records import Judgment, document_text
from bixse.retrieval.lexical import LexicalIndex
from bixse.retrieval.settings import Lexical
from jobs.judges.seam import Judge
from jobs.lexical import warn_of_script


def embedded(corpus: Artifact, embeddings: Artifact | None, lexical: Lexical) -> Judge:
    """`embeddings` are the corpus under the packaged encoder; raises ValueError if they are not.

    Its grades depend on the whole corpus and cost little: they stay out of the label store.
    """
    judge = FeaturesJudge.load()
    if embeddings is None or embeddings.manifest.extra.get("encoder") != judge.encoder:
        raise ValueError(
            f"--judging.judge features needs embeddings of its own encoder, {judge.encoder}"
        )
    warn_of_script(corpus, lexical)
    return Judge(
        build=EmbeddedJudge,
        arguments=(corpus, embeddings, lexical),
        scale=judge.scale,
        origin="features",
        config={"lexical": lexical.model_dump(mode="json")},
        inputs={"judge": judge.fingerprint, "embeddings": embeddings.fingerprint},
    )


class EmbeddedJudge:
    """Holds BM25 and the vectors of the whole corpus: memory follows its size."""

    def __init__(self, corpus: Artifact, embeddings: Artifact, lexical: Lexical) -> None:
        table = corpus.table(["doc_id", "title", "text"]).to_pylist()
        doc_ids = [row["doc_id"] for row in table]
        texts = [document_text(row["title"], row["text"]) for row in table]
        self._titles = {row["doc_id"]: row["title"] for row in table}
        self._lexical = LexicalIndex(doc_ids, texts, lexical)
        vectors = embeddings.table(["doc_id", "vector"])
        flat = vectors["vector"].combine_chunks().flatten().to_numpy()
        self._vectors_ND = flat.reshape(vectors.num_rows, -1)
        self._rows = {doc_id: row for row, doc_id in enumerate(vectors["doc_id"].to_pylist())}
        self._encoder = Encoder.load(PACKAGED)
        self._judge = FeaturesJudge.load()

    def __call__(self, asked: Sequence[Asked]) -> Answers:
        by_query: dict[str, list[Asked]] = {}
        for pair in asked:
            by_query.setdefault(pair.query_id, []).append(pair)
        texts = [pairs[0].query for pairs in by_query.values()]
        vectors_QD = self._encoder.encode(texts, "query")
        graded: dict[tuple[str, str], list[float]] = {}
        for vector_D, pairs in zip(vectors_QD, by_query.values(), strict=True):
            probs_NK = self._judge.grade_probs(self._evidence(vector_D, pairs))
            for pair, probs in zip(pairs, probs_NK.tolist(), strict=True):
                graded[pair.query_id, pair.doc_id] = probs
        verdicts = [
            Judgment(
                query_id=pair.query_id,
                doc_id=pair.doc_id,
                grade_probs=tuple(graded[pair.query_id, pair.doc_id]),
                relevance=self._judge.scale.relevance(graded[pair.query_id, pair.doc_id]),
                judge=self._judge.fingerprint,
                prompt="",
                origin="features",
            )
            for pair in asked
        ]
        return Answers(verdicts)

    def _evidence(
        self, vector_D: np.ndarray[Any, Any], pairs: Sequence[Asked]
    ) -> np.ndarray[Any, Any]:
        """[N, F]: the features of one query and its N documents."""
        query, doc_ids = pairs[0].query, [pair.doc_id for pair in pairs]
        return features(
            bm25_N=self._lexical.scores_of(query, doc_ids),
            bm25_top=float(self._lexical.scores(query).max()),
            cosine_N=self._vectors_ND[[self._rows[doc_id] for doc_id in doc_ids]] @ vector_D,
            query_terms=self._lexical.tokenize([query])[0],
            doc_terms=self._lexical.tokenize([pair.passage for pair in pairs]),
            title_terms=self._lexical.tokenize([self._titles[doc_id] for doc_id in doc_ids]),
        )
