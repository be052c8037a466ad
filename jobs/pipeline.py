"""The table of contents: every stage in order, finished ones skipped.

A verb run by itself is the pipeline up to that verb: `python -m jobs.index bixse --data DIR
--encoder PATH --out runs/e` ingests, embeds and indexes. Under `--out` each artefact stands in a
directory of its own name. How it comes to its judgments is `jobs.judging`, to what a language model
writes `jobs.rounds`.
"""

import os
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from bixse.candidates.settings import Pools
from bixse.models.settings import Reranking
from jobs import judging
from jobs.command import Run, absolute

if TYPE_CHECKING:
    from bixse.artifacts import Artifact
    from bixse.judging.settings import Judging
    from bixse.training.settings import Gated
    from jobs.measuring import DevSplit
    from jobs.mix import Supervision

Made = TypeVar("Made")
"""An artefact; of `ingest`, the three it makes."""


class Pipeline:
    """The stages of one run; each is made when it is first asked for, or found finished."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.recipe = run.recipe
        self.out = absolute(run.out)
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

    def shown_queries(self) -> "Artifact | None":
        """What people asked, where the recipe learns from what they clicked on."""
        if self.recipe.judging.judge != "clicks":
            return None
        from jobs.clicks import shown_queries

        settings, given = self.recipe.judging.clicks, self.data().queries
        return self.once(
            "shown queries", lambda: shown_queries(settings, given, self.path("shown-queries"))
        )

    @cached_property
    def _language_model(self) -> "tuple[Gated, str]":
        """What the recipe's `gated` says, bound to the language model that stands there now."""
        from jobs.loading import pin_language_model

        assert self.recipe.gated is not None
        return pin_language_model(self.recipe.gated)

    def chunks(self) -> "Artifact | None":
        """The corpus in groups of chunks, where the recipe trains on nothing else."""
        if self.recipe.gated is None:
            return None
        from jobs.chunking import chunk

        # First: without a language model nothing is ingested.
        settings, identity = self._language_model
        corpus, out = self.data().corpus, self.path("chunks")
        return self.once("chunk", lambda: chunk(corpus, settings, identity, out))

    def all_queries(self) -> list["Artifact"]:
        made = (self.synthetic(), self.anchors(), self.shown_queries())
        return [self.data().queries, *(queries for queries in made if queries is not None)]

    def pairs(self) -> "Artifact | None":
        """None where given judgments need no candidates."""
        if self.recipe.judging.judge in judging.UNASKED:
            return None
        return self.candidates(self.recipe.candidates)

    def candidates(self, pools: Pools) -> "Artifact":
        """Candidate pairs of each query that may be trained on, whoever judges."""
        from jobs.pair import pair

        recipe = self.recipe
        queries = self.all_queries()
        dense = self.embeddings("base", self.start) if pools.dense else None
        held_out = self.held_out_query_ids(queries)
        return self.once(
            "pair",
            lambda: pair(
                queries,
                self.data().corpus,
                dense,
                self.start,
                pools,
                recipe.lexical,
                self.path("pairs"),
                held_out,
            ),
        )

    def judgments(self) -> "Artifact":
        """What training learns from: all that was judged, or what of it the recipe keeps."""
        return judging.kept_judgments(self)

    def judging(self) -> "Judging":
        """Judging with its label store, the one that is named or one of this run, and with what
        the judgments that stand have left of `max_cost`: a run may judge several times."""
        settings = self.recipe.judging
        store = absolute(settings.store or self.path("labels"))
        return settings.replace(
            store=store, max_cost=judging.unspent(settings, self.made("judgments"))
        )

    def plan(self) -> dict[str, Any]:
        """What judging will take, counted without judging."""
        return judging.planned(self)

    def audit(self) -> "Artifact":
        """What the judgments are worth beside the grades that people gave."""
        return judging.audited(self)

    def calibration(self) -> "Artifact | None":
        """The map that judgments are read through."""
        return judging.calibration(self)

    def preferences(self) -> "Artifact | None":
        """Which of two documents is preferred: a file says so, or the judge is asked."""
        return judging.preferences(self)

    def judged_preferences(self) -> "Artifact":
        """Judged documents of a query, compared two by two."""
        return judging.judged_preferences(self)

    def encoder(self) -> str:
        """The one that `--encoder` names, or the trained one; cut where the recipe says so."""
        dimensions = self.recipe.truncate
        if dimensions is None:
            return self._whole_encoder()
        from jobs.truncate import refuse_narrow, truncate

        folder = f"encoder-{dimensions}"
        if self.run.encoder is None and not self.finished(folder):
            refuse_narrow(self.start, dimensions)  # Training makes them no more.
        encoder, out = self._whole_encoder(), self.path(folder)
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
        if self.recipe.truncate is not None:
            raise ValueError(
                f"--truncate cuts vectors, and recipe {self.recipe.name} trains a reranker"
            )
        if self.run.encoder is not None:
            return _encoder(self.run.encoder)
        return self._trained(lambda: _encoder(settings.start), "reranker")

    def _trained(self, start: Callable[[], str], folder: str) -> str:
        from jobs.held_out import refuse_held_out
        from jobs.train import check_clicks, check_preferences, refuse_uninstalled, train

        recipe = self.recipe
        if recipe.gated is not None:
            refuse_uninstalled(recipe.gated, self.run.track, self.path(folder))
        chunks = self.chunks()
        if chunks is not None:
            return self._trained_on(chunks, start(), folder)
        # First: without a dev split, with a mix or a map that is none, with preferences that the
        # objective does not read, with a budget that would not hold, or without a package that
        # training needs, nothing is judged, nor paid for.
        refuse_uninstalled(recipe.training, self.run.track, self.path(folder))
        compares = judging.compares(recipe)
        check_preferences(recipe.training, compares or recipe.judging.preferences is not None)
        check_clicks(recipe.training, recipe.judging.judge == "clicks")
        if compares:
            judging.refuse_limited_comparisons(self)
        dev, mix, calibration = self.dev(), self.mix, self.calibration()
        if calibration is not None:
            from jobs.calibration import refuse_in_sample

            refuse_in_sample(calibration, self.data().qrels, self.run.split)
        judgments, queries, preferences = self.judgments(), self.all_queries(), self.preferences()
        if recipe.judging.judge == "given":
            refuse_held_out(judgments, self.held_out_query_ids(queries))
        documents = self.documents()
        clicks = judging.clicks(self) if recipe.training.objective.reads_clicks else None
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
                calibration=calibration,
                preferences=preferences,
                documents=documents,
                clicks=clicks,
                dev=dev,
                track=self.run.track,
                mix=mix,
            ),
        )
        return str(artifact.url)

    def _trained_on(self, chunks: "Artifact", start: str, folder: str) -> str:
        from jobs.gated import train_gated

        (settings, identity), placement = self._language_model, self.recipe.placement
        out, track = self.path(folder), self.run.track
        artifact = self.once(
            "train",
            lambda: train_gated(chunks, settings, identity, start, placement, out, track),
        )
        return str(artifact.url)

    @cached_property
    def mix(self) -> "list[Supervision]":
        """Other runs' judgments to train on; none of a query that this run is measured by."""
        from jobs.mix import open_run, refuse_held_out

        runs = [open_run(absolute(url)) for url in self.recipe.training.mix]
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
        from jobs.evaluate import evaluate, judged_documents

        data, recipe = self.data(), self.recipe
        judged_documents(data.qrels, self.run.split)  # First: without any, nothing is embedded.
        self.refuse_trained_split()
        reranker: tuple[str, int] | None = None
        systems = {"base": (self.start, self.embeddings("base", self.start))}
        if recipe.reranking is not None:
            reranker = self.reranker(recipe.reranking), recipe.reranking.depth
        else:
            encoder = self.encoder()
            systems["trained"] = (encoder, self.embeddings("trained", encoder))
        # What an encoder that `--encoder` names was trained on is not known. No query where the
        # corpus alone is.
        unlabelled = self.run.encoder or recipe.gated is not None
        trained_on = [] if unlabelled else [*self.all_queries(), self.judgments()]
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
                reranker=reranker,
            ),
        )

    def refuse_trained_split(self) -> None:
        """Raises ValueError when the queries to evaluate are those that this run trains on: the
        report would be refused for it, after the training."""
        learnt = self.recipe.judging.judge not in ("given", "written", "neighbours", "clicks")
        learnt |= getattr(self.recipe.synthesis, "with_given", False)
        learnt &= self.recipe.gated is None
        if self.run.encoder is not None or self.run.split != "train" or not learnt:
            return
        if self.data().qrels.manifest.extra["splits"].get("train"):
            raise ValueError(
                "--split train evaluates on the queries that are trained on here: name dev or "
                "test, or with --encoder the encoder to measure"
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
        from jobs.index import check_deleted, index

        if self.run.encoder is None:
            raise ValueError("--base-index needs --encoder: the encoder that the index is of")
        if self.run.data is None and self.run.delete is None:
            raise ValueError("--base-index needs --data to add, --delete to leave out, or both")
        before, deleted = Artifact.open(absolute(base), "index"), _doc_ids(self.run.delete)
        check_deleted(before, None, deleted)  # Before documents are read and encoded.
        encoder = self.encoder()
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
                base=before,
                deleted=deleted,
                lexical=self.recipe.lexical if self.recipe.retrieval.bm25 else None,
            ),
        )

    def held_out_query_ids(self, queries: "list[Artifact]") -> frozenset[str]:
        """Queries of dev and test, and whatever other query has the text of one."""
        from jobs.held_out import held_out_query_ids

        return held_out_query_ids(self.data().qrels, queries)

    def graded_query_ids(self) -> frozenset[str]:
        """Given queries that people graded, in any split, and those with the text of one."""
        from jobs.held_out import graded_query_ids

        return graded_query_ids(self.data().qrels, [self.data().queries])

    def artifact(self, stage: str) -> "Artifact":
        """What a stage of this run has made."""
        made: Artifact = self._made[stage]
        return made

    def made(self, kind: str) -> "list[Artifact]":
        """Artefacts of a kind that this run has come to so far."""
        found = [made for stage, made in self._made.items() if stage != "ingest"]
        return [made for made in found if made.manifest.kind == kind]

    def path(self, name: str) -> str:
        return f"{self.out}/{name}"

    def finished(self, folder: str) -> bool:
        from bixse.artifacts import MANIFEST
        from bixse.place import Place

        return Place(self.path(folder)).exists(MANIFEST)

    def once(self, stage: str, make: Callable[[], Made], paid: str | None = None) -> Made:
        """`paid` is the folder of what a model writes, scores or learns for the stage. Raises
        ValueError when it is unfinished and the run is a plan, which asks no model for it."""
        if stage not in self._made:
            if paid is not None and self.run.plan and not self.finished(paid):
                raise ValueError(
                    f"--plan counts the pairs of finished texts, and {self.path(paid)} is not "
                    f"finished: run python -m jobs.synthesise {self.recipe.name} first, with the "
                    "same flags (what that costs is not counted)"
                )
            self._made[stage] = make()
            # A stage that was found finished still took what its manifest says.
            artifact = self._made[stage].corpus if stage == "ingest" else self._made[stage]
            self.seconds[stage] = artifact.manifest.seconds
        made: Made = self._made[stage]
        return made


def _doc_ids(path: str | None) -> frozenset[str]:
    """The lines of a file or URL, white space at the ends taken off.

    Raises ValueError when it cannot be read, or is not UTF-8.
    """
    if path is None:
        return frozenset()
    from jobs.files import open_bytes, short_name

    with open_bytes(path) as handle:
        try:
            lines = handle.read().decode("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise ValueError(f"{short_name(path)} is not UTF-8 text") from None
    return frozenset(filter(None, map(str.strip, lines)))


def _encoder(name: str) -> str:
    return absolute(name) if os.path.isdir(name) else name


if __name__ == "__main__":
    from jobs.verbs import program

    program()
