"""embeddings, corpus -> index: one task a shard, which returns counts and measurements only.

    structure  decided by rule for small corpora, else on a sample of the embeddings
    trained/   centroids and codes, trained once on a sample and shared by all shards
    scattered/ of many shards, all rows by the shard they live in; gone when those are built
    shard-*/   gathered in the order of `doc_id` and built, each by a task of its own
    search     the cheapest search that finds enough, tuned over all shards against exact search
    lexical/   of each shard, where asked for: BM25 by the statistics of the whole corpus

A new generation of an index (`base`) holds the base's documents, less what is deleted, with the
documents of the corpus added or put in place of those of the same `doc_id`. It is a whole index
again, compact, in a directory of its own; the base stays as it is. Nothing is encoded or trained
twice: vectors come from the base's shards, centroids from its `trained/`.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bixse.artifacts import Artifact, Draft, begin, fingerprints
from bixse.models.encoder import Encoder, encoder_fingerprint, resolve
from bixse.place import Place
from bixse.records import Hit, document_text
from bixse.retrieval.exact import refuse_other_encoder
from bixse.retrieval.merge import merge
from bixse.retrieval.settings import Lexical, Retrieval, Search
from bixse.retrieval.sources import Input, Source, held, refuse_deletes, shard_name
from bixse.retrieval.structures import TRAINED, resident_bytes
from bixse.retrieval.structures import resolve as resolve_structure
from bixse.retrieval.tuning import Point, Requirements, Tuning, grid, relevant, table, tune
from jobs.cluster import refuse_unmet, start_ray
from jobs.lexical import LEXICAL_MARK, build_words, count_words, warn_of_script
from jobs.parts import progress
from jobs.recipe import Placement
from jobs.shards import (
    BUILT,
    RECALL_AT,
    build_one,
    compare_structures,
    measure_one,
    scatter_some,
    train_structure,
)

SCATTERED_FROM = 8
"""Shards to be built from which all rows are put into files by shard first: each would otherwise
read all embeddings and all texts for its share."""
SCATTERED_ROWS = 1 << 18
"""Rows that one scattering task takes."""

PLAN = "plan.json"
QUERIES = "queries.json"
_KEPT = ("structure", "shards", "shard_rows", "hnsw_m", "ef_construction", "nlist", "pq_m",
         "rabitq_bits", "stored", "train_rows", "tune_rows")  # fmt: skip
"""Settings that a new generation has from its base."""

Vectors = np.ndarray[Any, Any]

_log = logging.getLogger(__name__)


def index(
    embeddings: Artifact | None,
    corpus: Artifact | None,
    queries: Sequence[Artifact],
    encoder: str,
    settings: Retrieval,
    placement: Placement,
    out: str,
    base: Artifact | None = None,
    deleted: frozenset[str] = frozenset(),
    lexical: Lexical | None = None,
) -> Artifact:
    """Shards under `out`, with recall@10 against exact search and latency in the manifest.

    Recall is measured on up to `truth_queries` of `queries`, else on those of the base, else on
    titles of the corpus; the manifest says which. With `lexical` words are indexed too; of a base
    that has them they are, as its own settings say.
    Raises ValueError when the embeddings are of another encoder or lack a document, when there are
    too few vectors to train on, or when what is asked for cannot be reached; before anything is
    written as `check_deleted`.
    """
    fingerprint = encoder_fingerprint(resolve(encoder))
    _check(embeddings, corpus, encoder, fingerprint, base)
    source = Source(embeddings, corpus, base, deleted)
    source.kinds()  # What cannot be is refused before anything is made.
    if base:
        check_deleted(base, corpus, deleted)
    _warn_of_metadata(base, corpus)
    inputs = fingerprints(embeddings=embeddings, corpus=corpus, base=base, queries=queries)
    if deleted:
        inputs["deleted"] = hashlib.sha256(json.dumps(sorted(deleted)).encode()).hexdigest()[:32]
    if base and base.manifest.extra.get("lexical"):
        lexical = Lexical.model_validate(base.manifest.extra["lexical"])
    config = settings.model_dump(mode="json")
    if lexical is not None:
        config["lexical"] = lexical.model_dump(mode="json")
    draft = begin(out, "index", config=config, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    if lexical is not None and corpus is not None:
        warn_of_script(corpus, lexical)
    asked = _truth_queries(queries, corpus, base, settings)
    vectors_QD = Encoder.load(encoder).encode(asked["texts"], "query")
    start_ray()
    refuse_unmet(1, placement.cpus_per_actor, placement.gpus_per_actor)
    run = _Run(draft, source, vectors_QD, placement)
    plan = _once(draft, PLAN, lambda: _plan(run, settings))
    # After the plan: where that is refused nothing is saved, and the flag may be corrected.
    asked = _once(draft, QUERIES, lambda: asked)
    chosen = Retrieval.model_validate(plan["settings"])
    run.train(chosen)
    built = run.build(chosen)
    rows = sum(shard["rows"] for shard in built)
    if not rows:
        raise ValueError("no document is left: an index holds at least one")
    tuning, best = run.tune(chosen, built, rows)
    _check_memory(draft, chosen)
    if lexical is not None:
        run.words(lexical, built)
    if chosen.structure != "exact":
        for shard in built:
            name = f"{shard['name']}/search.json"
            draft.write_file(name, tuning.chosen.search.model_dump_json().encode())
    changes = ("added", "replaced", "deleted")
    extra = {
        "encoder": fingerprint,
        "dim": int(vectors_QD.shape[1]),
        "structure": chosen.structure,
        "search": relevant(chosen.structure, tuning.chosen.search),
        "shards": [shard["name"] for shard in built],
        "shard_rows": [shard["rows"] for shard in built],
        f"recall@{RECALL_AT}": tuning.chosen.recall,
        "latency_ms": round(tuning.chosen.latency_ms, 3),
        "measured_queries": len(asked["texts"]),
        "measured_on": asked["source"],
        "tuning": table(tuning.points),
        "structures": plan["structures"],
        "settings": plan["settings"],
        "lexical": config.get("lexical"),
        "changes": {name: sum(shard[name] for shard in built) for name in changes},
        "canary": {"query": asked["texts"][0], "doc_id": best.doc_id, "score": best.score},
    }
    if kinds := source.kinds():
        extra["metadata"] = kinds
    used = any(shard["used_gpu"] for shard in built)
    return draft.finish(rows=rows, device="cuda" if used else "cpu", extra=extra)


def _check(
    embeddings: Artifact | None,
    corpus: Artifact | None,
    encoder: str,
    fingerprint: str,
    base: Artifact | None,
) -> None:
    for artifact in (embeddings, base):
        if artifact:
            refuse_other_encoder(artifact, encoder, fingerprint)
    if base and "settings" not in base.manifest.extra:
        raise ValueError(f"{base.url} was made before indexes had generations: make it again")
    if embeddings and corpus and embeddings.manifest.rows != corpus.manifest.rows:
        raise ValueError(
            f"{embeddings.manifest.rows} embeddings for {corpus.manifest.rows} documents"
        )
    if not embeddings and not base:
        raise ValueError("an index is made from embeddings, from a base index, or from both")


def check_deleted(base: Artifact, corpus: Artifact | None, deleted: frozenset[str]) -> None:
    """Raises ValueError when a document to be deleted is not in the base, or is in the corpus."""
    new = corpus.column("doc_id") if corpus and deleted else ()
    refuse_deletes(deleted - held(base, deleted), deleted.intersection(new))


def _warn_of_metadata(base: Artifact | None, corpus: Artifact | None) -> None:
    """Warn of a corpus without metadata that the base has: filters on it find none of it."""
    if base is None or corpus is None:
        return
    held, given = (one.manifest.extra.get("metadata", {}) for one in (base, corpus))
    if lacking := sorted(held.keys() - given.keys()):
        _log.warning(
            "no document of %s has %s, which documents of %s have: name them with "
            "--ingest.metadata, or filters on them find no document that is added or replaced",
            *(corpus.url, ", ".join(lacking), base.url),
        )


def _once(draft: Draft, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, saved under `name`: a rerun keeps what a killed run has decided."""
    if not draft.place.exists(name):
        draft.write_file(name, json.dumps(make(), indent=1).encode())
    found: dict[str, Any] = json.loads(draft.place.read(name))
    return found


def _truth_queries(
    queries: Sequence[Artifact], corpus: Artifact | None, base: Artifact | None, settings: Retrieval
) -> dict[str, Any]:
    """Texts to measure with, the first by a hash of their id, and where they are from."""
    count, source = settings.truth_queries, "given queries"
    found = [row for artifact in queries for row in artifact.rows("query_id", "text")]
    if not found and base:
        kept: dict[str, Any] = json.loads(base.place.read(QUERIES))
        return {"source": kept["source"], "texts": kept["texts"][:count]}
    if not found and corpus:
        source = "titles or opening words of sampled documents"
        for batch in corpus.batches(["doc_id", "title", "text"]):
            rows = batch.to_pylist()
            found += [(r["doc_id"], r["title"] or document_text("", r["text"])[:200]) for r in rows]
            found = sorted(found, key=_rank)[:count]
    if not found:
        raise ValueError("there is neither a query nor a document to measure recall with")
    return {"source": source, "texts": [text for _, text in sorted(found, key=_rank)[:count]]}


def _rank(row: tuple[str, str]) -> bytes:
    return hashlib.blake2b(row[0].encode(), digest_size=8).digest()


def _plan(run: "_Run", settings: Retrieval) -> dict[str, Any]:
    """The settings with everything decided, and how the structures compared if they did."""
    base, embeddings = run.source.base, run.source.embeddings
    dim, compared = int(run.vectors_QD.shape[1]), []
    if base:
        kept = base.manifest.extra["settings"]
        for name in _KEPT:
            asked = getattr(settings, name)
            if asked not in (Retrieval.model_fields[name].default, kept[name]):
                raise ValueError(f"{base.url} has {name} {kept[name]}, {asked} was asked for")
        settings = settings.replace(**{name: kept[name] for name in _KEPT})
    else:
        assert embeddings is not None
        rows = embeddings.manifest.rows
        settings = resolve_structure(settings, rows, dim)
        if settings.structure == "auto":
            compared = run.compare(settings)
            structure = next(row["structure"] for row in compared if row["chosen"])
            settings = resolve_structure(settings.replace(structure=structure), rows, dim)
        needed = resident_bytes(settings, settings.structure, rows, dim) / 1e6
        if settings.memory_budget_mb is not None and needed > settings.memory_budget_mb:
            raise ValueError(
                f"{settings.structure} of {rows} takes about {needed:.0f} MB, more than the "
                f"budget of {settings.memory_budget_mb:g}; ivf_rabitq takes least"
            )
    return {"settings": settings.model_dump(mode="json"), "structures": compared}


def _check_memory(draft: Draft, settings: Retrieval) -> None:
    if settings.memory_budget_mb is None:
        return
    names = [name for name in draft.place.names() if name.endswith("/index.faiss")]
    size = sum(draft.place.entry(name).bytes for name in names if name.startswith("shard-")) / 1e6
    if size > settings.memory_budget_mb:
        raise ValueError(
            f"the index takes {size:.0f} MB, more than --retrieval.memory-budget-mb "
            f"{settings.memory_budget_mb:g}: ivf_rabitq takes least"
        )


class _Run:
    """The Ray tasks of one index."""

    def __init__(
        self, draft: Draft, source: Source, vectors_QD: Vectors, placement: Placement
    ) -> None:
        import ray

        self.draft = draft
        self.source = source
        self.vectors_QD = vectors_QD
        self._asked = ray.put(vectors_QD)
        self._placement = placement
        self._on_gpu = placement.gpus_per_actor > 0

    def compare(self, settings: Retrieval) -> list[dict[str, Any]]:
        """The structures on a sample, a row each, the chosen one marked."""
        rows: list[dict[str, Any]]
        asked = (self.source, settings, self._asked, self._on_gpu)
        (rows,) = self._each(compare_structures, "compare", [asked], self._on_gpu)
        return rows

    def train(self, settings: Retrieval) -> None:
        """`trained/index.faiss`, unless the structure has nothing to train."""
        name = "trained/index.faiss"
        if settings.structure not in TRAINED or self.draft.place.exists(name):
            return
        if self.source.base:
            self.source.base.verify(under=name)
            self.draft.write_file(name, self.source.base.place.read(name))
            return
        asked = (self.draft, self.source, settings, self._on_gpu)
        self._each(train_structure, "train", [asked], self._on_gpu)

    def build(self, settings: Retrieval) -> list[dict[str, Any]]:
        shards = range(settings.shards or 1)
        dim = int(self.vectors_QD.shape[1])
        # The CPU builds a graph: no GPU is kept waiting for it.
        on_gpu = self._on_gpu and settings.structure != "hnsw"
        asked = (dim, self._asked, settings, on_gpu)
        source = self._scattered(len(shards))
        todo = [(self.draft, source, number, *asked) for number in shards]
        built = self._each(build_one, "index", todo, on_gpu)
        made = [shard for shard in built if shard["used_gpu"] is not None]
        if on_gpu and made and not any(shard["used_gpu"] for shard in made):
            _log.warning("FAISS saw no GPU where the index was built: faiss-gpu is not there")
        # Whichever session made it: its files are no part of the index.
        self._scatter_place.clear()
        return built

    @property
    def _scatter_place(self) -> Place:
        return Place(f"{self.draft.place.url}/scattered")

    def _scattered(self, shards: int) -> Source:
        """The source, its rows by shard where many shards would each read all of them."""
        names = [f"{shard_name(number)}/{BUILT}" for number in range(shards)]
        if sum(not self.draft.place.exists(name) for name in names) < SCATTERED_FROM:
            return self.source
        todo: list[tuple[Any, ...]] = []
        inputs: tuple[Input, Input] = ("embeddings", "corpus")
        for which in inputs:
            artifact = self.source.input(which)
            if artifact is None:
                continue
            parts = artifact.parts()
            pieces = min(len(parts), -(-artifact.manifest.rows // SCATTERED_ROWS))
            for number, some in enumerate(np.array_split(np.array(parts), max(1, pieces))):
                todo.append(
                    (self.source, which, some.tolist(), number, shards, self._scatter_place)
                )
        self._each(scatter_some, "scatter", todo)
        return replace(self.source, scattered=self._scatter_place)

    def tune(
        self, settings: Retrieval, built: Sequence[dict[str, Any]], rows: int
    ) -> tuple[Tuning, Hit]:
        """The tuned search of all shards, and its first hit of the first query."""
        import ray

        from bixse.retrieval.measuring import Seen, doc_ids_of, point

        of_queries = zip(*(shard["truth"] for shard in built), strict=True)
        truth = doc_ids_of([merge(_hits(of_query), RECALL_AT) for of_query in of_queries])
        true, known = ray.put(truth), sum(map(len, truth))
        best: dict[Search, list[Hit]] = {}

        def measure(searches: Sequence[Search]) -> list[Point]:
            seen: list[list[Seen]] = self._each(
                measure_one,
                "tune",
                [(self.draft, s["name"], settings, searches, self._asked, true) for s in built],
            )
            for search, of_shards in zip(searches, zip(*seen, strict=True), strict=True):
                best[search] = merge([[s.best] for s in of_shards if s.best], 1)
            return [
                point(settings.structure, search, of_shards, known)
                for search, of_shards in zip(searches, zip(*seen, strict=True), strict=True)
            ]

        wanted = Requirements.of(settings)
        tuning = tune(grid(settings, rows, RECALL_AT), measure, wanted)
        found = best[tuning.chosen.search]
        if not found:
            raise ValueError("the first measured query finds nothing: raise --retrieval.nprobe")
        return tuning, found[0]

    def words(self, settings: Lexical, built: Sequence[dict[str, Any]]) -> None:
        """The lexical part of every shard, each weighted by the words of all.

        Raises ValueError when no document holds a word.
        """
        import ray

        from bixse.retrieval.lexical_shard import Statistics

        names = [shard["name"] for shard in built]
        todo = [n for n in names if not self.draft.place.exists(f"{n}/{LEXICAL_MARK}")]
        if not todo:
            return
        counted = self._each(
            count_words, "count words", [(self.draft, name, settings) for name in names]
        )
        whole = ray.put(Statistics.total(counted))
        self._each(build_words, "bm25", [(self.draft, name, whole, settings) for name in todo])

    def _each(
        self,
        work: Callable[..., Any],
        label: str,
        arguments: Sequence[tuple[Any, ...]],
        on_gpu: bool = False,
    ) -> list[Any]:
        """The results of one task for each tuple of arguments, in their order."""
        import ray

        task = ray.remote(**task_options(self._placement, on_gpu))(work)
        pending = [task.remote(*each) for each in arguments]
        order = {reference: place for place, reference in enumerate(pending)}
        results: dict[int, Any] = {}
        with progress(label, len(pending)) as advance:
            while pending:
                ready, pending = ray.wait(pending)
                results |= {order[reference]: ray.get(reference) for reference in ready}
                advance(len(ready))
        return [results[place] for place in range(len(results))]


def task_options(placement: Placement, on_gpu: bool) -> dict[str, Any]:
    """What Ray is asked for; only what FAISS does on a GPU waits for one."""
    options: dict[str, Any] = {"num_cpus": placement.cpus_per_actor, "max_retries": 3}
    return {**options, "num_gpus": placement.gpus_per_actor} if on_gpu else options


def _hits(rankings: Sequence[Sequence[Sequence[Any]]]) -> list[list[Hit]]:
    return [[Hit(*fields) for fields in ranking] for ranking in rankings]


if __name__ == "__main__":
    from jobs.verbs import program

    program("index")
