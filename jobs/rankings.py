"""What each system finds: rankings of every judged query over the whole corpus.

A query that is itself a document, `itself`, does not find itself.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from bixse.artifacts import Artifact
from bixse.evaluation.metrics import Rankings, others
from bixse.evaluation.report import FEEDBACK, HYBRID, RERANKED
from bixse.evaluation.settings import Evaluation
from bixse.models.encoder import Encoder
from bixse.models.reranker import Reranker, reranked
from bixse.records import Hit, document_text
from bixse.retrieval.exact import search_again, search_exact
from bixse.retrieval.fusion import FUSION_DEPTH, fuse_ranks
from bixse.retrieval.lexical import LexicalIndex
from bixse.retrieval.settings import Lexical
from jobs.lexical import warn_of_script

Encoders = Mapping[str, tuple[str, Artifact]]
"""System name -> the encoder, and the embeddings of the corpus that it made."""


def by_words(
    corpus: Artifact,
    texts: Mapping[str, str],
    lexical: Lexical,
    depth: int,
    itself: frozenset[str],
) -> Rankings:
    warn_of_script(corpus, lexical)
    rows = corpus.table(["doc_id", "title", "text"])
    titles, bodies = rows["title"].to_pylist(), rows["text"].to_pylist()
    documents = [document_text(t, x) for t, x in zip(titles, bodies, strict=True)]
    index = LexicalIndex(rows["doc_id"].to_pylist(), documents, lexical)
    found = [index.search(text, depth + bool(itself)) for text in texts.values()]
    return _of_others(texts, found, itself, depth)


def by_vectors(
    path: str,
    embeddings: Artifact,
    texts: Mapping[str, str],
    depth: int,
    itself: frozenset[str],
) -> Rankings:
    vectors_QD = Encoder.load(path).encode(list(texts.values()), "query")
    found = search_exact(embeddings, vectors_QD, depth + bool(itself))
    return _of_others(texts, found, itself, depth)


def _of_others(
    query_ids: Iterable[str],
    found: Iterable[Sequence[Hit]],
    itself: frozenset[str],
    depth: int,
) -> Rankings:
    """The first `depth` documents that each query found, without the query itself."""
    return {
        query_id: others(query_id, hits, itself)[:depth]
        for query_id, hits in zip(query_ids, found, strict=True)
    }


def after_feedback(
    rankings: Mapping[str, Rankings],
    encoders: Encoders,
    texts: Mapping[str, str],
    settings: Evaluation,
    itself: frozenset[str],
) -> dict[str, Rankings]:
    """What each encoder finds when its queries have moved towards what they had found."""
    made: dict[str, Rankings] = {}
    for name, (path, embeddings) in encoders.items():
        queries_QD = Encoder.load(path).encode(list(texts.values()), "query")
        found = [rankings[name][query_id] for query_id in texts]
        how = (settings.feedback, settings.feedback_weight, settings.depth + bool(itself))
        again = search_again(embeddings, queries_QD, found, *how)
        made[f"{name}{FEEDBACK}"] = _of_others(texts, again, itself, settings.depth)
    return made


def fused_with_words(
    rankings: Mapping[str, Rankings], encoders: Encoders, depth: int
) -> dict[str, Rankings]:
    """Each encoder's ranking fused with that of BM25, both from as deep as `/search` does."""
    words, fused = rankings["bm25"], max(depth, FUSION_DEPTH)
    return {
        f"{name}{HYBRID}": {
            query_id: fuse_ranks([hits[:fused], words[query_id][:fused]], depth)
            for query_id, hits in rankings[name].items()
        }
        for name in encoders
    }


def in_reranked_order(
    path: str,
    depth: int,
    rankings: Mapping[str, Rankings],
    texts: Mapping[str, str],
    corpus: Artifact,
    advance: Callable[[int], None],
) -> dict[str, Rankings]:
    """Each ranking with its first `depth` documents in the reranker's order.

    It reads as documents are read for an index: in bfloat16 where that is faster.
    """
    reranker = Reranker.load(path, precision="auto")
    wanted = {
        hit.doc_id for found in rankings.values() for hits in found.values() for hit in hits[:depth]
    }
    documents = {
        doc_id: document_text(title, text)
        for doc_id, title, text in corpus.rows("doc_id", "title", "text")
        if doc_id in wanted
    }
    made: dict[str, Rankings] = {}
    for name, found in rankings.items():
        ranking = {}
        for query_id, hits in found.items():
            head = [documents[hit.doc_id] for hit in hits[:depth]]
            ranking[query_id] = reranked(hits, reranker.score(texts[query_id], head).tolist())
            advance(1)
        made[f"{name}{RERANKED}"] = ranking
    return made
