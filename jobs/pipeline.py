"""The table of contents: every stage in order, finished ones skipped.

A verb run by itself is the pipeline up to that verb: `python -m jobs.index bixse --data DIR
--encoder PATH --out runs/e` ingests, embeds and indexes. Under `--out` each artefact stands in a
directory of its own name.
"""

import os
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from bixse.models.settings import PACKAGED, Reranking
from jobs.command import Run

if TYPE_CHECKING:
    from bixse.artifacts import Artifact
    from jobs.measuring import DevSplit
    from jobs.mix import Supervision

Made = TypeVar("Made")
"""An artefact; of `ingest`, the three it makes."""


class Pipeline:
    """The stages of one run; each is made when it is first asked for, or found finished."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.recipe = run.recipe
        self.out = _absolute(run.out)
        self.start = _encoder(run.recipe.start)
        self.seconds: dict[str, float] = {}
        self._made: dict[str, Any] = {}

    def data(self) -> Any:
        """corpus, queries, qrels."""
        from jobs.ingest import ingest

        return self.once("ingest", lambda: ingest(self.run.data, self.recipe.ingest, self.out))

    def synthetic(self) -> "Artifact | None":
        """Queries that did not exist, repeats and whatever else the recipe sifts out apart."""
        settings = self.recipe.synthesis
        if settings is None or settings.kind == "graded_documents":
            return None
        if settings.kind != "cloze":
            from jobs.rounds import sifted_queries

            return sifted_queries(self, settings)
        from jobs.synthesise import synthesise

        data, placement = self.data(), self.recipe.placement
        return self.once(
            "synthesise",
            lambda: synthesise(
                data.corpus, settings, placement, self.path("synthetic"), data.queries
            ),
        )

    def documents(self) -> "Artifact | None":
        """Documents written for given queries; training reads them beside the corpus."""
        from jobs.rounds import written_documents

        settings = self.recipe.synthesis
        if settings is None or settings.kind != "graded_documents":
            return None
        return written_documents(self, settings)

    def links(self) -> "Artifact":
        """The graph of the documents."""
        from jobs.neighbours import import_links

        settings = self.recipe.neighbours
        assert settings is not None
        return self.once(
            "links",
            lambda: import_links(self.data().corpus, settings.links, self.path("links")),
        )

    def anchors(self) -> "Artifact | None":
        """Linked documents as queries, where the recipe has a graph."""
        if self.recipe.neighbours is None:
            return None
        from jobs.neighbours import anchors

        data, links = self.data(), self.links()
        return self.once(
            "anchors", lambda: anchors(links, data.corpus, data.queries, self.path("anchors"))
        )

    def all_queries(self) -> list["Artifact"]:
        made = (self.synthetic(), self.anchors())
        return [self.data().queries, *(queries for queries in made if queries is not None)]

    def pairs(self) -> "Artifact | None":
        """None where given judgments need no candidates."""
        if self.recipe.judging.judge in ("human", "given", "written", "neighbours"):
            return None
        from jobs.pair import pair

        recipe = self.recipe
        queries = self.all_queries()
        dense = self.embeddings("base", self.start) if recipe.candidates.dense else None
        held_out = self.held_out_query_ids(queries)
        return self.once(
            "pair",
            lambda: pair(
                queries,
                self.data().corpus,
                dense,
                self.start,
                recipe.candidates,
                recipe.lexical,
                self.path("pairs"),
                held_out,
            ),
        )

    def judgments(self) -> "Artifact":
        """What training learns from: all that was judged, or what of it the recipe keeps."""
        judged, settings = self._verified(), self.recipe.stratified
        if settings is None:
            return judged
        from jobs.labels import sample

        out = self.path("judgments-sampled")
        return self.once("sample", lambda: sample(judged, settings, out))

    def _verified(self) -> "Artifact":
        judged, settings = self._judged(), self.recipe.verification
        if settings is None:
            return judged
        from jobs.labels import verify

        queries, corpus = self.all_queries(), self.data().corpus
        out = self.path("judgments-verified")
        return self.once("verify", lambda: verify(judged, queries, corpus, settings, out))

    def _judged(self) -> "Artifact":
        if self.recipe.judging.judge == "written":
            from jobs.rounds import written_judgments

            return written_judgments(self)
        if self.recipe.neighbours is not None:
            from jobs.neighbours import judge_neighbours

            links, anchors, settings = self.links(), self.anchors(), self.recipe.neighbours
            assert anchors is not None
            return self.once(
                "judge",
                lambda: judge_neighbours(links, anchors, settings, self.path("judgments")),
            )
        if self.recipe.judging.judge == "cascade":
            return self._cascaded()
        return self._judged_by(self.judging(), self.pairs(), "judge", "judgments")

    def _cascaded(self) -> "Artifact":
        """Cheap judgments of every pair, strong ones of the most doubtful, and both in one."""
        from jobs.cascade import escalate, merge

        judging = self.judging()
        cascade = judging.cascade
        cheap = judging.replace(judge=cascade.cheap)
        found = self._judged_by(cheap, self.pairs(), "judge cheap", "judgments-cheap")
        chosen = self.once("escalate", lambda: escalate(found, cascade, self.path("pairs-strong")))
        strong = judging.replace(judge=cascade.strong)
        better = self._judged_by(strong, chosen, "judge strong", "judgments-strong")
        return self.once("judge", lambda: merge(found, better, self.path("judgments")))

    def _judged_by(
        self, judging: Any, pairs: "Artifact | None", stage: str, folder: str
    ) -> "Artifact":
        from jobs.judge import judge

        data, recipe, queries = self.data(), self.recipe, self.all_queries()
        vectors = self._judge_vectors(judging.judge)
        return self.once(
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
                self.path(folder),
            ),
        )

    def calibration(self) -> "Artifact | None":
        """The map that judgments are read through."""
        if self.recipe.judging.calibration is None:
            return None
        from bixse.artifacts import Artifact

        return Artifact.open(_absolute(self.recipe.judging.calibration), "calibration")

    def preferences(self) -> "Artifact | None":
        """Which of two documents is preferred: a file says so, or the judge is asked."""
        file = self.recipe.judging.preferences
        if file is None:
            return self.judged_preferences() if self.recipe.preferring.train else None
        from jobs.preferences import import_preferences

        corpus, queries = self.data().corpus, self.all_queries()
        return self.once(
            "preferences",
            lambda: import_preferences(queries, corpus, file, self.path("preferences")),
        )

    def audit(self) -> "Artifact":
        from bixse.artifacts import Artifact
        from jobs.audit import audit
        from jobs.calibration import fit

        data, recipe, settings = self.data(), self.recipe, self.recipe.audit
        brought, rejudged = (
            None if url is None else Artifact.open(_absolute(url), "judgments")
            for url in (settings.judgments, settings.rejudged)
        )
        if settings.fit != "none" and recipe.judging.calibration is not None:
            raise ValueError("--audit.fit makes a map, --judging.calibration brings one: choose")
        judgments = brought or self.judgments()
        calibration = self.calibration()
        if settings.fit != "none":
            sources, path = [(judgments, data.qrels)], self.path("calibration")
            calibration = fit(sources, settings.fit, settings.fit_split, path)
        return self.once(
            "audit",
            lambda: audit(
                data.corpus,
                self.all_queries(),
                data.qrels,
                judgments,
                None if brought else self.pairs(),
                rejudged,
                calibration,
                settings,
                recipe.evaluation.relevant_from,
                self.path("audit"),
            ),
        )

    def plan(self) -> dict[str, Any]:
        """What judging will take, counted without judging."""
        from jobs.judge import plan

        if self.recipe.judging.judge == "cascade":
            raise ValueError(
                "--plan counts one judge: name the cheap one of the cascade, then the strong one"
            )
        recipe = self.recipe
        return plan(
            self.pairs(),
            self.all_queries(),
            self.data().corpus,
            self.judging(),
            recipe.lexical,
            self._judge_vectors(recipe.judging.judge),
            recipe.placement,
            self.path("judgments"),
        )

    def _judge_vectors(self, judge: str) -> "Artifact | None":
        """The corpus under the encoder of the features judge, which need not be the trained one."""
        if judge != "features":
            return None
        return self.embeddings("base" if self.start == PACKAGED else "judge", PACKAGED)

    def judging(self) -> Any:
        """Judging with its label store: the one that is named, or one of this run."""
        judging = self.recipe.judging
        return judging.replace(store=_absolute(judging.store or self.path("labels")))

    def encoder(self) -> str:
        """The one that `--encoder` names, or the trained one; cut where the recipe says so."""
        encoder, dimensions = self._whole_encoder(), self.recipe.truncate
        if dimensions is None:
            return encoder
        from jobs.truncate import truncate

        out = self.path(f"encoder-{dimensions}")
        return str(self.once("truncate", lambda: truncate(encoder, dimensions, out)).url)

    def _whole_encoder(self) -> str:
        if self.run.encoder is not None:
            return _encoder(self.run.encoder)
        if self.recipe.reranking is not None:
            raise ValueError(
                f"recipe {self.recipe.name} trains a reranker, which makes no vectors: "
                "--encoder names an encoder to embed and index with"
            )
        return self._trained(self._reached, "encoder")

    def _reached(self) -> str:
        """Where training begins: at the encoder of the last round, once there is what it made."""
        first = self._made.get("train first")
        return str(first.url) if first else self.start

    def reranker(self, settings: Reranking) -> str:
        """The reranker that `--encoder` names, or the one that is trained."""
        if self.run.encoder is not None:
            return _encoder(self.run.encoder)
        return self._trained(lambda: _encoder(settings.start), "reranker")

    def _trained(self, start: Callable[[], str], folder: str) -> str:
        from jobs.train import train

        # First: without a dev split, or with a mix that is none, nothing is judged, nor paid for.
        dev, mix = self.dev(), self.mix
        judgments, queries, recipe = self.judgments(), self.all_queries(), self.recipe
        calibration, preferences = self.calibration(), self.preferences()
        if recipe.judging.judge == "given":
            self._refuse_held_out(judgments)
        documents = self.documents()
        artifact = self.once(
            "train",
            lambda: train(
                judgments,
                queries,
                self.data().corpus,
                recipe.training,
                # Only now: a round trip trains an encoder on its way to the judgments.
                start(),
                recipe.placement,
                self.path(folder),
                calibration,
                preferences,
                documents,
                dev,
                self.run.track,
                mix,
            ),
        )
        return str(artifact.url)

    @cached_property
    def mix(self) -> "list[Supervision]":
        """Other runs' judgments to train on; none of a query that this run is measured by."""
        from jobs.mix import open_run, refuse_held_out

        runs = [open_run(_absolute(url)) for url in self.recipe.training.mix]
        for run in runs:
            refuse_held_out(run, self.data().queries, self.data().qrels, "this run's")
        return runs

    def dev(self) -> "DevSplit | None":
        """What training is measured on, where the recipe asks for it."""
        if self.recipe.training.evaluate_every is None:
            return None
        from jobs.measuring import dev_split

        data = self.data()
        return dev_split(data.corpus, data.queries, data.qrels)

    def embeddings(self, name: str, encoder: str) -> "Artifact":
        from jobs.embed import embed

        corpus, placement = self.data().corpus, self.recipe.placement
        folder = "embeddings" if name == "trained" else f"embeddings-{name}"
        return self.once(
            f"embed {name}", lambda: embed(corpus, encoder, placement, self.path(folder))
        )

    def report(self) -> "Artifact":
        from jobs.evaluate import evaluate

        data, recipe = self.data(), self.recipe
        reranker: tuple[str, int] | None = None
        systems = {"base": (self.start, self.embeddings("base", self.start))}
        if recipe.reranking is not None:
            reranker = self.reranker(recipe.reranking), recipe.reranking.depth
        else:
            encoder = self.encoder()
            systems["trained"] = (encoder, self.embeddings("trained", encoder))
        # Of an encoder that was brought along nobody here knows what it has seen.
        trained_on = [] if self.run.encoder else [*self.all_queries(), self.judgments()]
        return self.once(
            "evaluate",
            lambda: evaluate(
                data.corpus,
                data.queries,
                data.qrels,
                self.run.split,
                systems,
                recipe.lexical,
                recipe.evaluation,
                trained_on,
                recipe.name,
                dict(self.seconds),
                self.path("report"),
                reranker,
            ),
        )

    def index(self) -> "Artifact":
        from jobs.index import index

        if self.run.base_index is not None:
            return self._generation(self.run.base_index)
        if self.run.delete is not None:
            raise ValueError("--delete needs --base-index: the index whose documents go")
        # First: a recipe without an encoder is refused before anything is written.
        encoder, data, recipe = self.encoder(), self.data(), self.recipe
        embeddings = self.embeddings("trained", encoder)
        return self.once(
            "index",
            lambda: index(
                embeddings,
                data.corpus,
                [data.queries],
                encoder,
                recipe.retrieval,
                recipe.placement,
                self.path("index"),
                lexical=recipe.lexical if recipe.retrieval.bm25 else None,
            ),
        )

    def _generation(self, base: str) -> "Artifact":
        """A new index from one that stands, the documents of `--data` if any, less `--delete`."""
        from bixse.artifacts import Artifact
        from jobs.index import index

        if self.run.encoder is None:
            raise ValueError("--base-index needs --encoder: the encoder that the index is of")
        if self.run.data is None and self.run.delete is None:
            raise ValueError("--base-index needs --data to add, --delete to leave out, or both")
        before, encoder = Artifact.open(_absolute(base), "index"), self.encoder()
        data = None if self.run.data is None else self.data()
        embeddings = None if data is None else self.embeddings("trained", encoder)
        return self.once(
            "index",
            lambda: index(
                embeddings,
                None if data is None else data.corpus,
                [data.queries] if data is not None and data.queries.manifest.rows else [],
                encoder,
                self.recipe.retrieval,
                self.recipe.placement,
                self.path("index"),
                before,
                _doc_ids(self.run.delete),
                self.recipe.lexical if self.recipe.retrieval.bm25 else None,
            ),
        )

    def judged_preferences(self) -> "Artifact":
        """Judged documents of a query, compared two by two."""
        from jobs.prefer import pairings, prefer

        judgments, queries, recipe = self.judgments(), self.all_queries(), self.recipe
        settings, model = recipe.preferring, recipe.judging.vllm
        chosen = self.once("pairings", lambda: pairings(judgments, settings, self.path("pairings")))
        return self.once(
            "prefer",
            lambda: prefer(
                chosen,
                queries,
                self.data().corpus,
                settings,
                model,
                recipe.placement,
                self.path("judged-preferences"),
            ),
        )

    def held_out_query_ids(self, artifacts: "list[Artifact]") -> frozenset[str]:
        """Queries of dev and test, and whatever other query has the text of one."""

        rows = self.data().qrels.table(["split", "query_id"]).to_pylist()
        held_out = {row["query_id"] for row in rows if row["split"] != "train"}
        return _with_copies(held_out, artifacts)

    def graded_query_ids(self) -> frozenset[str]:
        """Given queries that people graded, in any split, and those with the text of one."""
        graded = self.data().qrels.table(["query_id"])["query_id"].to_pylist()
        return _with_copies(set(graded), [self.data().queries])

    def _refuse_held_out(self, judgments: "Artifact") -> None:
        """A file of grades may hold any query; other judges are never asked about these."""
        judged = set(judgments.table(["query_id"])["query_id"].to_pylist())
        if shared := sorted(judged & self.held_out_query_ids(self.all_queries())):
            raise ValueError(
                f"{len(shared)} of the {len(judged)} queries in --judging.given.file stand in dev "
                f"or test, first {shared[0]!r}: they can be audited, and not trained on"
            )

    def artifact(self, stage: str) -> "Artifact":
        """What a stage of this run has made."""
        made: Artifact = self._made[stage]
        return made

    def path(self, name: str) -> str:
        return f"{self.out}/{name}"

    def once(self, stage: str, make: Callable[[], Made]) -> Made:
        if stage not in self._made:
            self._made[stage] = make()
            # A stage that was found finished still took what its manifest says.
            artifact = self._made[stage].corpus if stage == "ingest" else self._made[stage]
            self.seconds[stage] = artifact.manifest.seconds
        made: Made = self._made[stage]
        return made


def _absolute(path: str) -> str:
    """Workers run in directories of their own, on nodes of their own; a URL stays as it is."""
    return path.rstrip("/") if "://" in path else os.path.abspath(path)


def _with_copies(query_ids: "set[str]", artifacts: "list[Artifact]") -> frozenset[str]:
    """These queries, and whatever other has the text of one."""
    from bixse.records import text_hash

    queries = {
        row["query_id"]: text_hash(row["text"])
        for artifact in artifacts
        for row in artifact.table(["query_id", "text"]).to_pylist()
    }
    hashes = {queries[query_id] for query_id in query_ids}
    return frozenset(query_id for query_id, text in queries.items() if text in hashes)


def _doc_ids(path: str | None) -> frozenset[str]:
    """The lines of a file, white space at the ends taken off."""
    if path is None:
        return frozenset()
    with open(path, encoding="utf-8") as lines:
        return frozenset(filter(None, map(str.strip, lines)))


def _encoder(name: str) -> str:
    return _absolute(name) if os.path.isdir(name) else name


if __name__ == "__main__":
    from jobs.verbs import main

    main()
