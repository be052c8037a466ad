"""What a language model writes and what is left of it, step after step, for `jobs.pipeline`.

Each step is an artefact of its own: a rerun goes on where the last one stopped, and another filter
writes nothing again. Under `--out`:

    synthetic-written     what came back for each request (`jobs.writing`)
    synthetic-unlike      of it, what repeats nothing
    encoder-first         trained on that, to find who comes back (round trip)
    scores, comparisons   what a scorer and a comparison say of it (graded queries)
    synthetic             what is left
    documents             documents written for given queries

It is a part of `Pipeline` in a file of its own, and reaches into it.
"""

from typing import TYPE_CHECKING

from bixse.synthesis.settings import (
    AsksDocuments,
    FewShot,
    GradedDocuments,
    GradedQueries,
    RoundTrip,
)

if TYPE_CHECKING:
    from bixse.artifacts import Artifact
    from jobs.pipeline import Pipeline


def written_documents(pipeline: "Pipeline", settings: GradedDocuments) -> "Artifact":
    """Documents at every grade for the given queries that are not held out (SyCL)."""
    from jobs.writing import ask_queries

    queries, placement = pipeline.data().queries, pipeline.recipe.placement
    held_out = pipeline.held_out_query_ids([queries])
    return pipeline.once(
        "write",
        lambda: ask_queries(queries, settings, placement, pipeline.path("documents"), held_out),
    )


def sifted_queries(pipeline: "Pipeline", settings: AsksDocuments) -> "Artifact":
    """Queries written for documents, and of them what the recipe's filters leave."""
    from jobs.sifting import drop_repeats

    written, given = _written(pipeline, settings), pipeline.data().queries
    round_trip = settings.round_trip if isinstance(settings, FewShot) else None
    more = round_trip is not None or isinstance(settings, GradedQueries)
    unlike = pipeline.once(
        "drop repeats",
        lambda: drop_repeats(
            written,
            given,
            settings.near_duplicate,
            pipeline.path("synthetic-unlike" if more else "synthetic"),
        ),
    )
    if round_trip is not None:
        return _returned(pipeline, unlike, round_trip)
    return _agreed(pipeline, unlike, settings) if isinstance(settings, GradedQueries) else unlike


def _written(pipeline: "Pipeline", settings: AsksDocuments) -> "Artifact":
    from jobs.writing import ask_documents

    data, placement = pipeline.data(), pipeline.recipe.placement
    held_out = pipeline.held_out_query_ids([data.queries])
    out = pipeline.path("synthetic-written")
    return pipeline.once(
        "write",
        lambda: ask_documents(
            data.corpus, data.queries, data.qrels, settings, placement, out, held_out
        ),
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
    """The encoder trained on all written queries, before any is sifted by it."""
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
    )
    return str(artifact.url)


def _agreed(pipeline: "Pipeline", queries: "Artifact", settings: GradedQueries) -> "Artifact":
    """Queries of the grade they were written at, by a scorer and by comparison (SSRA)."""
    from jobs.comparing import ask_comparisons
    from jobs.judge import judge
    from jobs.sifting import keep_agreed, keep_consistent, seed_pairs

    corpus, recipe, path = pipeline.data().corpus, pipeline.recipe, pipeline.path
    pairs = pipeline.once("seed pairs", lambda: seed_pairs(queries, path("seed-pairs")))
    scorer = recipe.judging.replace(judge="vllm")
    scores = pipeline.once(
        "score",
        lambda: judge(
            pairs,
            [queries],
            corpus,
            None,
            scorer,
            recipe.lexical,
            None,
            recipe.placement,
            path("scores"),
        ),
    )
    agreed = pipeline.once(
        "agreement", lambda: keep_agreed(queries, scores, path("synthetic-agreed"))
    )
    compared = pipeline.once(
        "compare",
        lambda: ask_comparisons(agreed, corpus, settings, recipe.placement, path("comparisons")),
    )
    tolerance, seed, out = settings.tolerance, settings.seed, path("synthetic")
    return pipeline.once("balance", lambda: keep_consistent(agreed, compared, tolerance, seed, out))
