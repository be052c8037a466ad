"""labels -> language models: a scorer (query, document) -> grade, a generator (document, grade) ->
query, as SSRA has both (arXiv 2509.16717).

The rows are what the models are asked later, word for word: the judge's prompts with the label of
the grade that people gave, the generator's chats with the query that people graded so. Some of the
labelled queries are held out of both, and say whether tuning helped (`jobs.tuner`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from bixse.artifacts import Artifact, fingerprints
from bixse.judging.agreement import kappa
from bixse.judging.prompts import ORDERS
from bixse.judging.settings import Pointwise
from bixse.judging.tokens import PromptTokenizer
from bixse.records import ids_hash, text_hash
from bixse.scale import Scale
from bixse.synthesis import prompts
from bixse.synthesis.examples import grade_of
from bixse.synthesis.logs import Graded, of_several_grades
from bixse.synthesis.reading import WrittenQuery
from bixse.synthesis.requests import GRADES, draw, refuse_other_grades
from bixse.synthesis.settings import Generator
from bixse.synthesis.tokens import ChatTokenizer
from bixse.training.settings import Tuning
from jobs.loading import pin
from jobs.recipe import Placement
from jobs.texts import DocumentTexts, QueryTexts
from jobs.tuner import Labelled, Lessons, Row, tune

if TYPE_CHECKING:
    from bixse.training.tuning import Expected


@dataclass(frozen=True, slots=True)
class Labels:
    """What the models may learn from, and what they must not see."""

    known: list[Labelled]
    held_out: list[Labelled]
    inputs: Mapping[str, str]
    logged: Sequence[Labelled] = ()
    """Pairs of a query log that the tuned scorer has graded; for the generator alone."""


def read_labels(
    corpus: Artifact,
    queries: Artifact,
    qrels: Artifact,
    tuning: Tuning,
    skip_query_ids: frozenset[str],
) -> Labels:
    """The graded pairs of the train split, none of a query of `skip_query_ids`, equal texts once.

    The queries held out are drawn by a hash of their ids. Raises ValueError for labels of fewer
    than two queries.
    """
    rows = [
        (query_id, doc_id, relevance)
        for split, query_id, doc_id, relevance in qrels.rows(
            "split", "query_id", "doc_id", "relevance"
        )
        if split == "train" and query_id not in skip_query_ids
    ]
    asked = QueryTexts([queries]).get([query_id for query_id, _, _ in rows])
    shown = DocumentTexts(corpus).get([doc_id for _, doc_id, _ in rows])
    once: dict[tuple[str, str], Labelled] = {}
    # The first id of each text: under two ids a text could be both tuned on and held out.
    first: dict[str, str] = {}
    for (query_id, doc_id, relevance), query, text in zip(rows, asked, shown, strict=True):
        key = text_hash(query)
        found = Labelled(first.setdefault(key, query_id), doc_id, query, text, relevance)
        once.setdefault((key, text_hash(text)), found)
    query_ids = sorted({label.query_id for label in once.values()})
    if len(query_ids) < 2:
        raise ValueError(
            f"tuning needs the grades of two queries or more in qrels/train.tsv, found "
            f"{len(query_ids)}: put them beside the corpus, or set --synthesis.rounds 0"
        )
    count = min(len(query_ids) - 1, max(1, round(tuning.held_out * len(query_ids))))
    apart = frozenset(draw(query_ids, count, tuning.seed))
    inputs = fingerprints(corpus=corpus, queries=queries, qrels=qrels)
    return Labels(
        [label for label in once.values() if label.query_id not in apart],
        [label for label in once.values() if label.query_id in apart],
        {**inputs, "skipped queries": ids_hash(skip_query_ids)},
    )


def tune_scorer(
    labels: Labels, scorer: Pointwise, tuning: Tuning, placement: Placement, out: str
) -> Artifact:
    """The scorer tuned to give the grade nearest to each label, in every presentation order.

    Its manifest has `before` and `after` on the held-out labels: same_grade (share of pairs with
    the grade that people gave), kappa_quadratic, log_prob (mean log-probability of that grade).
    Raises ValueError as `pin`, `PromptTokenizer.load` and `Plan`; otherwise as `jobs.train`.
    """
    pinned, identity = pin(scorer)
    tokens = PromptTokenizer.load(pinned)
    scale = tokens.prompt.scale

    def rows_of(some: Sequence[Labelled]) -> list[list[Row]]:
        answers = [[tokens.label_ids[scale.nearest(label.relevance)]] for label in some]
        queries, documents = [label.query for label in some], [label.document for label in some]
        of_orders = [
            zip(tokens.encode(queries, documents, order), answers, strict=True)
            for order in ORDERS[: pinned.orders]
        ]
        return [list(rows) for rows in zip(*of_orders, strict=True)]

    config = {
        "prompt": tokens.prompt.hash,
        "orders": pinned.orders,
        "document_tokens": pinned.document_tokens,
        "max_model_len": pinned.max_model_len,
        "tuning": _shaping(tuning),
    }
    lessons = Lessons(
        labels.known,
        labels.held_out,
        rows_of,
        partial(_agreement, scale),
        pinned.max_model_len,
        tokens.label_ids,
    )
    inputs = {**labels.inputs, "start": identity}
    return tune(lessons, pinned, tuning, placement, out, config, inputs)


def tune_generator(
    labels: Labels,
    kept: Artifact | None,
    corpus: Artifact,
    generator: Generator,
    tuning: Tuning,
    placement: Placement,
    out: str,
) -> Artifact:
    """The generator tuned to write the query that a document was worth a grade for.

    `kept` are written queries that stayed in an earlier round, each at its target grade. The
    manifest has `before` and `after`: log_prob, a token of the held-out queries. Raises as
    `tune_scorer`.
    """
    pinned, identity = pin(generator)
    tokens = ChatTokenizer.load(pinned)

    def rows_of(some: Sequence[Labelled]) -> list[list[Row]]:
        chats = [
            prompts.at_grade(
                grade_of(label.relevance), (), tokens.cut(label.document, pinned.document_tokens)
            )
            for label in some
        ]
        answers = [prompts.answer(label.query) for label in some]
        return [[row] for row in tokens.answered(chats, answers)]

    known = [*labels.known, *labels.logged, *(_written(kept, corpus) if kept else [])]
    lessons = Lessons(known, labels.held_out, rows_of, _likelihood, pinned.max_model_len)
    chats = [prompts.at_grade(grade, (), "{document}") for grade in GRADES]
    config = {
        "prompt": prompts.prompt_hash(*chats, schema=WrittenQuery.model_json_schema()),
        "document_tokens": pinned.document_tokens,
        "max_model_len": pinned.max_model_len,
        "tuning": _shaping(tuning),
    }
    inputs = {**labels.inputs, "start": identity, **fingerprints(kept=kept)}
    return tune(lessons, pinned, tuning, placement, out, config, inputs)


def with_log(labels: Labels, scores: Artifact, queries: Artifact, corpus: Artifact) -> Labels:
    """The labels, and what a generator can learn from a query log that the tuned scorer has graded.

    `scores` are its judgments of candidates of the log's queries. Raises ValueError when they are
    not of the grades 0 to 3.
    """
    refuse_other_grades(scores.manifest.extra["scale"]["values"])
    rows = scores.rows("query_id", "doc_id", "grade_probs")
    chosen = of_several_grades(Graded.surest(*row) for row in rows)
    asked = QueryTexts([queries]).get([graded.query_id for graded in chosen])
    shown = DocumentTexts(corpus).get([graded.doc_id for graded in chosen])
    logged = [
        Labelled(graded.query_id, graded.doc_id, query, document, graded.grade / GRADES[-1])
        for graded, query, document in zip(chosen, asked, shown, strict=True)
    ]
    return replace(labels, logged=logged, inputs={**labels.inputs, "log": scores.fingerprint})


def refuse_worse(scorer: Artifact) -> None:
    """Raises ValueError when a tuned scorer is less often of people's opinion than it was."""
    before, after = (scorer.manifest.extra[when] for when in ("before", "after"))
    if after["same_grade"] < before["same_grade"]:
        raise ValueError(
            f"the tuned scorer gives {after['same_grade']:.3f} of the held-out pairs the grade "
            f"that people gave, before {before['same_grade']:.3f}: lower --tuning.learning-rate "
            "or --tuning.epochs, bring more labels, or set --synthesis.rounds 0"
        )


def _agreement(
    scale: Scale, labels: Sequence[Labelled], expected: "Expected"
) -> dict[str, float | None]:
    """The scorer's grade, by the mean of the orders' distributions, against people's."""
    grades = [scale.nearest(label.relevance) for label in labels]
    log_prob_RL = expected.label_RL
    steps = log_prob_RL.shape[1]
    probs_RL = np.exp(log_prob_RL - log_prob_RL.max(1, keepdims=True))
    probs_RL /= probs_RL.sum(1, keepdims=True)
    found = probs_RL.reshape(len(grades), -1, steps).mean(1).argmax(1)
    cells = np.asarray(grades) * steps + found
    counts = np.bincount(cells, minlength=steps * steps).reshape(steps, steps)
    quadratic = kappa(counts, "quadratic")
    return {
        "same_grade": float(np.mean(found == np.asarray(grades))),
        "kappa_quadratic": None if np.isnan(quadratic) else quadratic,
        "log_prob": float(np.mean(expected.answer_R)),
    }


def _likelihood(_: Sequence[Labelled], expected: "Expected") -> dict[str, float | None]:
    return {"log_prob": float(np.mean(expected.answer_R))}


def _written(kept: Artifact, corpus: Artifact) -> list[Labelled]:
    rows = kept.table(["query_id", "text", "seed_doc_id", "target_grade"]).to_pylist()
    documents = DocumentTexts(corpus).get([row["seed_doc_id"] for row in rows])
    return [
        Labelled(
            row["query_id"],
            row["seed_doc_id"],
            row["text"],
            document,
            row["target_grade"] / GRADES[-1],
        )
        for row, document in zip(rows, documents, strict=True)
    ]


def _shaping(tuning: Tuning) -> dict[str, Any]:
    """How often it is saved does not change what is made, nor, but for rounding, how it is cut."""
    return tuning.model_dump(mode="json", exclude={"checkpoint_every", "micro_batch_tokens"})
