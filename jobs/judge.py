"""pairs -> judgments: one seam, three judges.

human copies the given grades of the train split. features and vllm grade pairs in an actor pool:
units of pairs in, judgments or rejections out (`jobs.parts`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bixse.artifacts import Artifact, Draft, begin, part_name
from bixse.judging.features import FeaturesJudge, features
from bixse.judging.given import given
from bixse.judging.pointwise import judgment, refuse_unreadable, too_long
from bixse.judging.prompts import ORDERS, PROMPTS
from bixse.judging.settings import Judging, Pointwise, config
from bixse.judging.tokens import PromptTokenizer
from bixse.models.encoder import Encoder
from bixse.models.settings import PACKAGED
from bixse.records import JUDGMENTS, Judgment, Rejection, document_text
from bixse.retrieval.lexical import LexicalIndex
from bixse.retrieval.settings import Lexical
from jobs.engine import Engine, judge_name, pin
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
    if pairs is None:
        raise ValueError(f"--judging.judge {judging.judge} needs pairs: run the pair stage first")
    inputs = {"pairs": pairs.fingerprint, "corpus": corpus.fingerprint}
    inputs |= {f"queries-{n}": artifact.fingerprint for n, artifact in enumerate(queries)}
    shaping = config(judging)
    arguments: tuple[Any, ...]
    work: Any
    if judging.judge == "vllm":
        engine, identity = pin(judging.vllm)
        _check_gpus(engine, placement)
        PromptTokenizer.load(engine)  # A wrong label or template is an error before any engine.
        inputs["judge"] = identity
        prompt = PROMPTS[engine.prompt]
        shaping |= {"prompt": prompt.hash}
        scale, origin = prompt.scale, "llm"
        work, arguments = VllmUnit, (list(queries), corpus, engine, identity)
    else:
        embedded = FeaturesJudge.load()
        if embeddings is None or embeddings.manifest.extra.get("encoder") != embedded.encoder:
            raise ValueError(
                f"--judging.judge features needs embeddings of its own encoder, {embedded.encoder}"
            )
        inputs |= {"judge": embedded.fingerprint, "embeddings": embeddings.fingerprint}
        shaping |= {"lexical": lexical.model_dump(mode="json")}
        scale, origin = embedded.scale, "features"
        work, arguments = FeaturesUnit, (list(queries), corpus, embeddings, lexical)
    shaping |= {"unit_pairs": judging.unit_pairs}
    draft = begin(out, "judgments", config=shaping, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    run_units(
        draft,
        row_units(pairs, judging.unit_pairs),
        work,
        arguments,
        label="judge",
        actors=placement.judge_actors,
        cpus=placement.cpus_per_actor,
        gpus=placement.gpus_per_actor,
    )
    device = "cuda" if placement.gpus_per_actor else "cpu"
    extra = {
        "scale": {"name": scale.name, "values": list(scale.values)},
        "origin": origin,
        "judges": _judges(draft),
        "pairs": pairs.manifest.rows,
    }
    return draft.finish(device=device, extra=extra)


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


class VllmUnit:
    """Reads: query_id, doc_id. Adds: grade_probs, relevance, judge, prompt, origin."""

    def __init__(
        self, queries: Sequence[Artifact], corpus: Artifact, settings: Pointwise, identity: str
    ) -> None:
        self._queries = _query_texts(queries)
        self._texts = Texts(corpus)
        self._settings = settings
        self._tokens = PromptTokenizer.load(settings)
        self._engine = Engine(settings)
        judge = judge_name(settings, identity, self._engine.dtype)
        self._signature = (self._tokens.prompt, judge, settings.min_grade_mass)

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[Rejection]]:
        keys = list(zip(rows["query_id"].to_pylist(), rows["doc_id"].to_pylist(), strict=True))
        # One list an order, one prompt a pair.
        prompts = self._prompts(keys)
        lengths = [max(map(len, of_pair)) for of_pair in zip(*prompts, strict=True)]
        limit = self._settings.max_model_len - 1  # The answer takes a token too.
        fitting = [row for row, length in enumerate(lengths) if length <= limit]
        asked = [of_order[row] for of_order in prompts for row in fitting]
        answers = self._engine.logprobs(asked, self._tokens.label_ids)
        # Order after order, so that every len(fitting)-th answer is of the same pair.
        answers_of = {row: answers[at :: len(fitting)] for at, row in enumerate(fitting)}
        read = {row: judgment(*keys[row], answers_of[row], *self._signature) for row in fitting}
        refuse_unreadable(list(read.values()))
        verdicts = [
            read[row] if row in read else too_long(*key, lengths[row], limit)
            for row, key in enumerate(keys)
        ]
        kept = [verdict for verdict in verdicts if isinstance(verdict, Judgment)]
        rejected = [verdict for verdict in verdicts if isinstance(verdict, Rejection)]
        return rows_of(kept, JUDGMENTS), rejected

    def _prompts(self, keys: Sequence[tuple[str, str]]) -> list[list[list[int]]]:
        queries = [self._queries[query_id] for query_id, _ in keys]
        documents = self._texts.get([doc_id for _, doc_id in keys])
        passages = [document_text(document.title, document.text) for document in documents]
        orders = ORDERS[: self._settings.orders]
        return [self._tokens.encode(queries, passages, order) for order in orders]


class FeaturesUnit:
    """Reads: query_id, doc_id. Adds: grade_probs, relevance, judge, prompt, origin.

    Holds BM25 and the vectors of the whole corpus: memory follows its size.
    """

    def __init__(
        self,
        queries: Sequence[Artifact],
        corpus: Artifact,
        embeddings: Artifact,
        lexical: Lexical,
    ) -> None:
        self._queries = _query_texts(queries)
        self._texts = Texts(corpus)
        table = corpus.table(["doc_id", "title", "text"]).to_pylist()
        doc_ids = [row["doc_id"] for row in table]
        texts = [document_text(row["title"], row["text"]) for row in table]
        self._lexical = LexicalIndex(doc_ids, texts, lexical)
        vectors = embeddings.table(["doc_id", "vector"])
        flat = vectors["vector"].combine_chunks().flatten().to_numpy()
        self._vectors_ND = flat.reshape(vectors.num_rows, -1)
        self._rows = {doc_id: row for row, doc_id in enumerate(vectors["doc_id"].to_pylist())}
        self._encoder = Encoder.load(PACKAGED)
        self._judge = FeaturesJudge.load()

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[Rejection]]:
        by_query: dict[str, list[str]] = {}
        for pair in rows.select(["query_id", "doc_id"]).to_pylist():
            by_query.setdefault(pair["query_id"], []).append(pair["doc_id"])
        texts = [self._queries[query_id] for query_id in by_query]
        vectors_QD = self._encoder.encode(texts, "query")
        graded = {}
        for text, vector_D, (query_id, doc_ids) in zip(
            texts, vectors_QD, by_query.items(), strict=True
        ):
            probs_NK = self._judge.grade_probs(self._evidence(text, vector_D, doc_ids))
            for doc_id, probs in zip(doc_ids, probs_NK.tolist(), strict=True):
                graded[query_id, doc_id] = probs
        keys = zip(rows["query_id"].to_pylist(), rows["doc_id"].to_pylist(), strict=True)
        kept = [
            Judgment(
                query_id=query_id,
                doc_id=doc_id,
                grade_probs=tuple(graded[query_id, doc_id]),
                relevance=self._judge.scale.relevance(graded[query_id, doc_id]),
                judge=self._judge.fingerprint,
                prompt="",
                origin="features",
            )
            for query_id, doc_id in keys
        ]
        return rows_of(kept, JUDGMENTS), []

    def _evidence(
        self, query: str, vector_D: np.ndarray[Any, Any], doc_ids: Sequence[str]
    ) -> np.ndarray[Any, Any]:
        """[N, F]: the features of one query and its N documents."""
        documents = self._texts.get(doc_ids)
        scores = self._lexical.scores(query)
        whole = [document_text(document.title, document.text) for document in documents]
        return features(
            bm25_N=self._lexical.scores_of(query, doc_ids),
            bm25_top=float(scores.max()),
            cosine_N=self._vectors_ND[[self._rows[doc_id] for doc_id in doc_ids]] @ vector_D,
            query_terms=self._lexical.tokenize([query])[0],
            doc_terms=self._lexical.tokenize(whole),
            title_terms=self._lexical.tokenize([document.title for document in documents]),
        )


def _query_texts(queries: Sequence[Artifact]) -> dict[str, str]:
    """All queries, by `query_id`."""
    tables = [artifact.table(["query_id", "text"]) for artifact in queries]
    return {row["query_id"]: row["text"] for table in tables for row in table.to_pylist()}


def _check_gpus(settings: Pointwise, placement: Placement) -> None:
    wanted, given_ = settings.tensor_parallel, placement.gpus_per_actor
    if wanted > 1 and given_ < wanted:
        raise ValueError(
            f"--judging.vllm.tensor-parallel {wanted} needs --placement.gpus-per-actor {wanted}, "
            f"found {given_:g}"
        )


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
