"""What a language model writes and what is left of it, step after step, for `jobs.pipeline`.

Each step is an artefact of its own: a rerun goes on where the last one stopped, and another filter
writes nothing again. Under `--out`:

    synthetic-written     what came back for each request (`jobs.writing`)
    synthetic-unlike      of it, what repeats nothing
    encoder-first         trained on that, to find who comes back (round trip)
    scorer, generator     language models tuned on the labels (graded queries)
    log-pairs, log-scores candidates of queries that nobody graded, and the tuned scorer's grades
    scores, comparisons   what a scorer and a comparison say of it (graded queries)
    synthetic             what is left
    documents             documents written for given queries
    judgments-written     what it was written at, where `judgments` has the given grades beside it

With two rounds of graded queries, what the first made stands under the same names with `-1` behind.

It is a part of `Pipeline` in a file of its own, and reaches into it.
"""

from functools import partial
from typing import TYPE_CHECKING

from bixse.judging.prompts import PROMPTS
from bixse.synthesis.requests import draw, refuse_other_grades
from bixse.synthesis.settings import (
    AsksDocuments,
    FewShot,
    GradedDocuments,
    GradedQueries,
    RoundTrip,
)

if TYPE_CHECKING:
    from bixse.artifacts import Artifact
    from bixse.judging.settings import Pointwise
    from jobs.pipeline import Pipeline


def written_documents(pipeline: "Pipeline", settings: GradedDocuments) -> "Artifact":
    """Documents at every grade for the given queries that are not held out (SyCL)."""
    from jobs.writing import ask_queries

    queries, placement = pipeline.data().queries, pipeline.recipe.placement
    held_out = pipeline.held_out_query_ids([queries])
    return pipeline.once(
        "write",
        lambda: ask_queries(queries, settings, placement, pipeline.path("documents"), held_out),
        paid="documents",
    )


def written_judgments(pipeline: "Pipeline") -> "Artifact":
    """What was written at the grade it was written at; beside it the given grades, where the recipe
    trains on both."""
    from jobs.labels import label, with_given

    synthetic, documents = pipeline.synthetic(), pipeline.documents()
    settings, data = pipeline.recipe.synthesis, pipeline.data()
    out = pipeline.path("judgments")
    held_out = pipeline.held_out_query_ids([data.queries])
    both = isinstance(settings, GradedQueries | GradedDocuments) and settings.with_given
    if not both or not pipeline.graded_query_ids() - held_out:
        return pipeline.once("judge", lambda: label(synthetic, documents, out))
    written = pipeline.once(
        "label", lambda: label(synthetic, documents, pipeline.path("judgments-written"))
    )
    return pipeline.once("judge", lambda: with_given(written, data.qrels, held_out, out))


def sifted_queries(pipeline: "Pipeline", settings: AsksDocuments) -> "Artifact":
    """Queries written for documents, and of them what the recipe's filters leave."""
    if isinstance(settings, GradedQueries):
        return _graded_queries(pipeline, settings)
    round_trip = settings.round_trip if isinstance(settings, FewShot) else None
    unlike = _unlike(pipeline, settings, "synthetic-unlike" if round_trip else "synthetic")
    return unlike if round_trip is None else _returned(pipeline, unlike, round_trip)


def _unlike(
    pipeline: "Pipeline", settings: AsksDocuments, folder: str, suffix: str = ""
) -> "Artifact":
    """Queries written for documents, repeats apart."""
    from jobs.sifting import drop_repeats
    from jobs.writing import ask_documents

    data, placement = pipeline.data(), pipeline.recipe.placement
    held_out = pipeline.held_out_query_ids([data.queries])
    written_in = f"synthetic-written{suffix}"
    out = pipeline.path(written_in)
    written = pipeline.once(
        f"write{suffix}",
        lambda: ask_documents(
            data.corpus, data.queries, data.qrels, settings, placement, out, held_out
        ),
        paid=written_in,
    )
    near = settings.near_duplicate
    return pipeline.once(
        f"drop repeats{suffix}",
        lambda: drop_repeats(written, data.queries, near, pipeline.path(folder)),
    )


def _returned(pipeline: "Pipeline", queries: "Artifact", round_trip: RoundTrip) -> "Artifact":
    """Queries that find their document again (Promptagator's round trip)."""
    from jobs.sifting import keep_returned

    encoder, vectors = pipeline.start, None
    if round_trip.retriever == "trained":
        encoder = _first_encoder(pipeline, queries)
        vectors = pipeline.embeddings("first", encoder)
    elif round_trip.retriever == "base":
        vectors = pipeline.embeddings("base", encoder)
    corpus, lexical = pipeline.data().corpus, pipeline.recipe.lexical
    out = pipeline.path("synthetic")
    return pipeline.once(
        "round trip",
        lambda: keep_returned(queries, corpus, vectors, encoder, round_trip, lexical, out),
    )


def _first_encoder(pipeline: "Pipeline", queries: "Artifact") -> str:
    """The encoder trained on all written queries, before any is sifted by it, and on no other
    run's: it is asked about this corpus."""
    from jobs.labels import label
    from jobs.train import train

    corpus, recipe, start = pipeline.data().corpus, pipeline.recipe, pipeline.start
    judged = pipeline.once(
        "label first", lambda: label(queries, None, pipeline.path("judgments-first"))
    )
    out = pipeline.path("encoder-first")
    artifact = pipeline.once(
        "train first",
        lambda: train(
            judged,
            [queries],
            corpus,
            recipe.training,
            start,
            recipe.placement,
            out,
            dev=pipeline.dev(),
        ),
        paid="encoder-first",
    )
    return str(artifact.url)


def _graded_queries(pipeline: "Pipeline", settings: GradedQueries) -> "Artifact":
    """SSRA: a scorer and a generator tuned on labels, the generator on a log that the scorer has
    graded too, and in round 2 on what stayed of round 1.

    With no round, the models as they come. Raises ValueError when the scorer's scale is not the
    grades that queries are written at.
    """
    from jobs.tuning import read_labels, refuse_worse, tune_generator, tune_scorer, with_log

    recipe, scorer = pipeline.recipe, pipeline.recipe.judging.vllm
    # First: by the time that its scores are read, all has been tuned, written and scored.
    refuse_other_grades(PROMPTS[scorer.prompt].scale.values)
    if not settings.rounds:
        unlike = _unlike(pipeline, settings, "synthetic-unlike")
        return _agreed(pipeline, unlike, settings, scorer)
    data, tuning, placement = pipeline.data(), recipe.tuning, recipe.placement
    held_out = pipeline.held_out_query_ids([data.queries])
    labels = read_labels(data.corpus, data.queries, data.qrels, tuning, held_out)
    tuned = pipeline.once(
        "tune scorer",
        lambda: tune_scorer(labels, scorer, tuning, placement, pipeline.path("scorer")),
        paid="scorer",
    )
    refuse_worse(tuned)
    scorer = scorer.replace(model=tuned.url, revision=None)
    log = _scored_log(pipeline, settings, scorer)
    if log is not None:
        labels = with_log(labels, log, data.queries, data.corpus)
    kept: Artifact | None = None
    for number in range(1, settings.rounds + 1):
        suffix = "" if number == settings.rounds else f"-{number}"
        out, before, start = pipeline.path(f"generator{suffix}"), kept, settings.generator
        writer = pipeline.once(
            f"tune generator{suffix}",
            partial(tune_generator, labels, before, data.corpus, start, tuning, placement, out),
            paid=f"generator{suffix}",
        )
        # A tuned generator has learnt from the labels what examples would show it.
        asked = settings.replace(
            generator=start.replace(model=writer.url, revision=None), examples=0
        )
        if suffix:
            asked = asked.replace(documents=min(settings.documents, settings.first_documents))
        unlike = _unlike(pipeline, asked, f"synthetic-unlike{suffix}", suffix)
        kept = _agreed(pipeline, unlike, settings, scorer, suffix)
    assert kept is not None
    return kept


def _scored_log(
    pipeline: "Pipeline", settings: GradedQueries, scorer: "Pointwise"
) -> "Artifact | None":
    """The tuned scorer's grades of candidates of given queries that nobody has graded (SSRA).

    None where there is no such query, or none is wanted.
    """
    from jobs.pair import pair

    data, recipe, graded = pipeline.data(), pipeline.recipe, pipeline.graded_query_ids()
    query_ids = list(data.queries.column("query_id"))
    log = draw(
        (name for name in query_ids if name not in graded), settings.log_queries, settings.seed
    )
    if not log:
        return None
    others = frozenset(query_ids) - frozenset(log)
    pools = recipe.candidates
    vectors = pipeline.embeddings("base", pipeline.start) if pools.dense else None
    out = pipeline.path("log-pairs")
    pairs = pipeline.once(
        "pair log",
        lambda: pair(
            [data.queries], data.corpus, vectors, pipeline.start, pools, recipe.lexical, out, others
        ),
    )
    return _scored(pipeline, pairs, [data.queries], scorer, "score log", "log-scores")


def _scored(
    pipeline: "Pipeline",
    pairs: "Artifact",
    queries: "list[Artifact]",
    scorer: "Pointwise",
    stage: str,
    folder: str,
) -> "Artifact":
    """The scorer's judgments."""
    from jobs.judge import judge

    corpus, recipe = pipeline.data().corpus, pipeline.recipe
    judging = pipeline.judging().replace(judge="vllm", vllm=scorer)
    out = pipeline.path(folder)
    return pipeline.once(
        stage,
        lambda: judge(
            pairs, queries, corpus, None, judging, recipe.lexical, None, recipe.placement, out
        ),
        paid=folder,
    )


def _agreed(
    pipeline: "Pipeline",
    queries: "Artifact",
    settings: GradedQueries,
    scorer: "Pointwise",
    suffix: str = "",
) -> "Artifact":
    """Queries of the grade they were written at, by a scorer and by comparison (SSRA).

    The comparison is the untuned generator's: the tuned one only writes queries.
    """
    from jobs.comparing import ask_comparisons
    from jobs.sifting import keep_agreed, keep_consistent, seed_pairs

    corpus, recipe = pipeline.data().corpus, pipeline.recipe

    def path(name: str) -> str:
        return pipeline.path(f"{name}{suffix}")

    pairs = pipeline.once(f"seed pairs{suffix}", lambda: seed_pairs(queries, path("seed-pairs")))
    scores = _scored(pipeline, pairs, [queries], scorer, f"score{suffix}", f"scores{suffix}")
    agreed = pipeline.once(
        f"agreement{suffix}", lambda: keep_agreed(queries, scores, path("synthetic-agreed"))
    )
    compared = pipeline.once(
        f"compare{suffix}",
        lambda: ask_comparisons(agreed, corpus, settings, recipe.placement, path("comparisons")),
        paid=f"comparisons{suffix}",
    )
    tolerance, seed, out = settings.tolerance, settings.seed, path("synthetic")
    return pipeline.once(
        f"balance{suffix}", lambda: keep_consistent(agreed, compared, tolerance, seed, out)
    )
