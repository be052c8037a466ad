"""Who says what a document is worth to a query, step after step, for `jobs.pipeline`.

Which judge the recipe asks, of which pairs, and what of its answers training reads. Each step is an
artefact of its own. Under `--out`:

    judgments             what the judge said, or what of it the recipe keeps
    judgments-cheap       the cascade's first judge, of every pair
    pairs-strong          the pairs that it was in doubt about
    judgments-strong      the cascade's second judge, of those
    judgments-verified    what the recipe's verification leaves
    judgments-sampled     what the recipe's sampling leaves
    judgments-contrasted  for a reranker, given grades and unjudged candidates as irrelevant
    preferences           of a file
    clicks                what was shown and clicked, by rank
    pairings, judged-preferences  documents to compare, and what the judge prefers
    calibration, audit, audit-calibrated
                          what `jobs.audit` makes of the judgments: a map, and a report without one
                          or through one

It is a part of `Pipeline` in a file of its own, and reaches into it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bixse.artifacts import MANIFEST
from bixse.candidates.settings import Pools
from bixse.models.settings import PACKAGED
from bixse.place import Place
from jobs.command import absolute

if TYPE_CHECKING:
    from bixse.artifacts import Artifact
    from bixse.judging.settings import Judging
    from jobs.pipeline import Pipeline
    from jobs.recipe import Recipe


UNASKED = ("human", "given", "written", "neighbours", "clicks")
"""Judges that need no candidates: their grades stand somewhere already."""


def kept_judgments(pipeline: "Pipeline") -> "Artifact":
    """What training learns from: all that was judged, or what of it the recipe keeps."""
    judged, settings = _contrasted(pipeline), pipeline.recipe.stratified
    if settings is None:
        return judged
    from jobs.labels import sample

    out, map_ = pipeline.path("judgments-sampled"), calibration(pipeline)
    return pipeline.once("sample", lambda: sample(judged, settings, out, map_))


def _contrasted(pipeline: "Pipeline") -> "Artifact":
    judged, reranking = _verified(pipeline), pipeline.recipe.reranking
    given = pipeline.recipe.judging.judge in ("human", "given")
    if reranking is None or not reranking.negatives or not given:
        return judged
    from jobs.labels import contrast

    pools, out = pipeline.recipe.candidates, pipeline.path("judgments-contrasted")
    seed, depth = pools.seed, reranking.depth
    # From as deep as it will read: the first candidates are often relevant without a judgment. A
    # pool that is turned off stays off: BM25 has no words of some languages.
    head = Pools(
        bm25=depth * (pools.bm25 > 0), dense=depth * (pools.dense > 0), random=0, seed=seed
    )
    pairs, count = pipeline.candidates(head), reranking.negatives
    queries, corpus = pipeline.all_queries(), pipeline.data().corpus
    return pipeline.once(
        "contrast", lambda: contrast(judged, pairs, queries, corpus, count, seed, out)
    )


def _verified(pipeline: "Pipeline") -> "Artifact":
    judged, settings = _judged(pipeline), pipeline.recipe.verification
    if settings is None:
        return judged
    from jobs.labels import verify

    queries, corpus = pipeline.all_queries(), pipeline.data().corpus
    out, map_ = pipeline.path("judgments-verified"), calibration(pipeline)
    return pipeline.once("verify", lambda: verify(judged, queries, corpus, settings, out, map_))


def _judged(pipeline: "Pipeline") -> "Artifact":
    if not Place(pipeline.path("judgments")).exists(MANIFEST):
        _refuse_unnamed_endpoint(pipeline.recipe.judging, key=True)
    if pipeline.recipe.judging.judge == "written":
        from jobs.rounds import written_judgments

        return written_judgments(pipeline)
    if pipeline.recipe.neighbours is not None:
        from jobs.neighbours import judge_neighbours

        links, anchors = pipeline.links(), pipeline.anchors()
        settings, out = pipeline.recipe.neighbours, pipeline.path("judgments")
        corpus = pipeline.data().corpus
        assert anchors is not None
        return pipeline.once(
            "judge", lambda: judge_neighbours(links, anchors, corpus, settings, out)
        )
    if pipeline.recipe.judging.judge == "clicks":
        from jobs.clicks import judge_clicks

        shown, settings_ = clicks(pipeline), pipeline.recipe.judging.clicks
        out = pipeline.path("judgments")
        return pipeline.once("judge", lambda: judge_clicks(shown, settings_, out))
    if pipeline.recipe.judging.judge == "cascade":
        return _cascaded(pipeline)
    return _judged_by(pipeline, pipeline.judging(), pipeline.pairs(), "judge", "judgments")


def clicks(pipeline: "Pipeline") -> "Artifact":
    """What was shown and clicked, of queries that may be trained on."""
    from jobs.clicks import import_clicks

    settings, queries = pipeline.recipe.judging.clicks, pipeline.all_queries()
    corpus, held_out = pipeline.data().corpus, pipeline.held_out_query_ids(queries)
    return pipeline.once(
        "clicks",
        lambda: import_clicks(settings, queries, corpus, held_out, pipeline.path("clicks")),
    )


def _refuse_unnamed_endpoint(judging: "Judging", key: bool) -> None:
    """Raises ValueError when an endpoint is to judge and its address, model or `key` is missing:
    before pairs are made, queries written and a cascade's cheap judge paid."""
    cascade = judging.cascade
    asked = (cascade.cheap, cascade.strong) if judging.judge == "cascade" else (judging.judge,)
    if "openai" in asked:
        from jobs.endpoint import check_endpoint, check_key

        check_endpoint(judging.openai)
        if key:
            check_key(judging.openai)


def _cascaded(pipeline: "Pipeline") -> "Artifact":
    """Cheap judgments of every pair, strong ones of the most doubtful, and both in one."""
    from jobs.cascade import escalate, merge

    cascade = pipeline.recipe.judging.cascade
    cheap = pipeline.judging().replace(judge=cascade.cheap)
    found = _judged_by(pipeline, cheap, pipeline.pairs(), "judge cheap", "judgments-cheap")
    out = pipeline.path("pairs-strong")
    chosen = pipeline.once("escalate", lambda: escalate(found, cascade, out))
    strong = pipeline.judging().replace(judge=cascade.strong)
    better = _judged_by(pipeline, strong, chosen, "judge strong", "judgments-strong")
    return pipeline.once("judge", lambda: merge(found, better, pipeline.path("judgments")))


def _judged_by(
    pipeline: "Pipeline", judging: "Judging", pairs: "Artifact | None", stage: str, folder: str
) -> "Artifact":
    from jobs.judge import judge

    data, recipe, queries = pipeline.data(), pipeline.recipe, pipeline.all_queries()
    vectors = _judge_vectors(pipeline, judging.judge)
    return pipeline.once(
        stage,
        lambda: judge(
            pairs,
            queries,
            data.corpus,
            data.qrels,
            judging,
            recipe.lexical,
            vectors,
            recipe.placement,
            pipeline.path(folder),
        ),
    )


def unspent(settings: "Judging", judged: "Sequence[Artifact]") -> float | None:
    """What `judged` have left of `max_cost`; None where there is no limit."""
    if settings.max_cost is None:
        return None
    left, price = settings.max_cost, settings.price_per_gpu_hour or 0.0
    for usage in (one.manifest.extra.get("usage", {}) for one in judged):
        hours = usage.get("device_seconds", 0.0) / 3600
        left -= usage.get("cost", hours * price)
    return max(0.0, left)


def _judge_vectors(pipeline: "Pipeline", judge: str) -> "Artifact | None":
    """The corpus under the encoder of the features judge, which need not be the trained one."""
    if judge != "features":
        return None
    return pipeline.embeddings("base" if pipeline.start == PACKAGED else "judge", PACKAGED)


def planned(pipeline: "Pipeline") -> dict[str, Any]:
    """What judging will take, counted without judging, and what else the run asks of models.

    Raises ValueError when there is no pair to count, or when the pairs are of texts that a model
    has not written yet (`Pipeline.once`): a plan pays for none.
    """
    from jobs.judge import plan

    recipe = pipeline.recipe
    if recipe.judging.judge == "cascade":
        raise ValueError(
            "--plan counts one judge: name the cheap one of the cascade, then the strong one"
        )
    _refuse_unnamed_endpoint(recipe.judging, key=False)  # It asks nothing.
    uncounted = _uncounted(pipeline)
    if recipe.judging.judge in UNASKED and uncounted:
        raise ValueError(
            f"--judging.judge {recipe.judging.judge} is asked no pair, so that --plan has nothing "
            f"to count; the run is not free, it asks for {'; '.join(uncounted)}"
        )
    found = plan(
        pipeline.pairs(),
        pipeline.all_queries(),
        pipeline.data().corpus,
        pipeline.judging(),
        recipe.lexical,
        _judge_vectors(pipeline, recipe.judging.judge),
        recipe.placement,
        pipeline.path("judgments"),
    )
    # Again: the pairs may have had written queries sifted first.
    uncounted = _uncounted(pipeline)
    return {**found, "not_counted": "; ".join(uncounted)} if uncounted else found


def _uncounted(pipeline: "Pipeline") -> list[str]:
    """What the run will ask of models beside the judging of pairs."""
    recipe, found = pipeline.recipe, []
    settings = recipe.synthesis
    if settings is not None and settings.kind != "cloze":
        documents = settings.kind == "graded_documents"
        if not pipeline.finished("documents" if documents else "synthetic"):
            noun = "documents" if documents else "queries"
            found.append(f"{noun} that {settings.generator.model} writes")
            if settings.kind == "graded_queries":
                found.append("what tunes and sifts for them")
    if compares(recipe) and not pipeline.finished("judged-preferences"):
        settings_, model = recipe.preferring, recipe.judging.vllm.model
        most = f"up to {settings_.pairs_per_query} comparisons a query"
        found.append(f"{most}, each in both orders, by {model}")
    return found


def compares(recipe: "Recipe") -> bool:
    """Whether training asks a model which of two documents is preferred."""
    return recipe.preferring.train and recipe.judging.preferences is None


def preferences(pipeline: "Pipeline") -> "Artifact | None":
    """Which of two documents is preferred: a file says so, or the judge is asked."""
    file = pipeline.recipe.judging.preferences
    if file is None:
        return judged_preferences(pipeline) if compares(pipeline.recipe) else None
    from jobs.preferences import import_preferences

    corpus, queries = pipeline.data().corpus, pipeline.all_queries()
    out = pipeline.path("preferences")
    return pipeline.once("preferences", lambda: import_preferences(queries, corpus, file, out))


def judged_preferences(pipeline: "Pipeline") -> "Artifact":
    """Judged documents of a query, compared two by two."""
    from jobs.prefer import pairings, prefer

    # First: the judgments are paid for too.
    refuse_limited_comparisons(pipeline)
    judgments, queries = pipeline.judgments(), pipeline.all_queries()
    recipe, out, map_ = pipeline.recipe, pipeline.path("pairings"), calibration(pipeline)
    settings, model = recipe.preferring, recipe.judging.vllm
    chosen = pipeline.once("pairings", lambda: pairings(judgments, settings, out, map_))
    return pipeline.once(
        "prefer",
        lambda: prefer(
            chosen,
            queries,
            pipeline.data().corpus,
            settings,
            model,
            recipe.placement,
            pipeline.path("judged-preferences"),
        ),
    )


def refuse_limited_comparisons(pipeline: "Pipeline") -> None:
    """Raises ValueError when comparisons are still to be asked and a budget is set: it is one of
    judged pairs and counts no comparison, so that nothing would stop at it."""
    judging = pipeline.recipe.judging
    limits = {"max-pairs": judging.max_pairs, "max-cost": judging.max_cost}
    limit = next((name for name, value in limits.items() if value is not None), None)
    if limit is None or pipeline.finished("judged-preferences"):
        return
    raise ValueError(
        f"--judging.{limit} limits the judging of pairs and not the comparisons that "
        f"{judging.vllm.model} is asked for here: run python -m jobs.judge with it, then this "
        "without it (--preferring.pairs-per-query bounds the comparisons)"
    )


def calibration(pipeline: "Pipeline") -> "Artifact | None":
    """The map that judgments are read through."""
    url = pipeline.recipe.judging.calibration
    if url is None:
        return None
    from bixse.artifacts import Artifact

    return Artifact.open(absolute(url), "calibration")


def audited(pipeline: "Pipeline") -> "Artifact":
    """What the judgments, or those that `--audit.judgments` names, are worth beside the qrels."""
    from bixse.artifacts import Artifact
    from jobs.audit import audit
    from jobs.calibration import fit

    data, recipe, settings = pipeline.data(), pipeline.recipe, pipeline.recipe.audit
    brought, rejudged = (
        None if url is None else Artifact.open(absolute(url), "judgments")
        for url in (settings.judgments, settings.rejudged)
    )
    if settings.fit != "none" and recipe.judging.calibration is not None:
        raise ValueError("--audit.fit makes a map, --judging.calibration brings one: choose")
    judgments = brought or pipeline.judgments()
    applied = calibration(pipeline)
    if settings.fit != "none":
        sources, path = [(judgments, data.qrels)], pipeline.path("calibration")
        applied = fit(sources, settings.fit, settings.fit_split, path)
    # Of its own, so that who has audited may fit a map beside what was judged, and the reverse.
    out = pipeline.path("audit" if applied is None else "audit-calibrated")
    return pipeline.once(
        "audit",
        lambda: audit(
            data.corpus,
            pipeline.all_queries(),
            data.qrels,
            judgments,
            None if brought else pipeline.pairs(),
            rejudged,
            applied,
            settings,
            recipe.evaluation.relevant_from,
            out,
            None if brought else pipeline.documents(),
        ),
    )
