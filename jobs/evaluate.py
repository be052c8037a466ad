"""encoders, embeddings, judgments -> report: is it better than its base and than BM25.

Every system ranks the whole corpus for every judged query of one split; the encoders by exact
search, so that the report measures the encoder and not an index. A reranker reads the head of what
each of the others has found.
"""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bixse.artifacts import (
    Artifact,
    Draft,
    begin,
    fingerprints,
    library_versions,
    parquet_bytes,
)
from bixse.evaluation.leakage import find_leaks
from bixse.evaluation.metrics import (
    Qrels,
    Rankings,
    measure,
    themselves,
    unjudged,
    without_relevant,
)
from bixse.evaluation.page import page
from bixse.evaluation.report import MAIN, Measured, summarise
from bixse.evaluation.settings import Evaluation
from bixse.evaluation.trec import gains_on_scale, write_qrels, write_run
from bixse.models.encoder import encoder_fingerprint, resolve
from bixse.retrieval.exact import refuse_other_encoder
from bixse.retrieval.fusion import FUSION_DEPTH
from bixse.retrieval.settings import Lexical
from bixse.training.seen import CURVE, DEV_CURVE
from jobs.held_out import kept_apart
from jobs.measuring import DEV, chosen_on
from jobs.parts import progress
from jobs.qrels import why_rejected
from jobs.rankings import (
    Encoders,
    after_feedback,
    by_vectors,
    by_words,
    fused_with_words,
    in_reranked_order,
)

if TYPE_CHECKING:
    from rich.table import Table

_ON_THE_PAGE_ONLY = ("mrr@10",)

FLATTERED = "; the trained encoder was chosen on them, which flatters it"

Curve = Sequence[tuple[float, float]]


def evaluate(
    corpus: Artifact,
    queries: Artifact,
    qrels: Artifact,
    split: str,
    encoders: Encoders,
    lexical: Lexical,
    settings: Evaluation,
    trained_on: Sequence[Artifact],
    recipe_name: str,
    seconds: Mapping[str, float],
    out: str,
    reranker: tuple[str, int] | None = None,
) -> Artifact:
    """Measure BM25 and each encoder on the judged queries of `split`; and, with a `reranker`, what
    it makes of the first so many documents of each of them.

    `trained_on` are the artefacts that training read: queries, and the judgments of them. Without
    judgments every query counts as trained on, but those of `queries` itself that `qrels` puts
    into a split other than train.

    Raises ValueError when the split has no judged query, when embeddings are of another encoder or
    corpus than the one beside them, and when a query of the split stands in training.
    """
    encoder_of = {name: encoder_fingerprint(resolve(path)) for name, (path, _) in encoders.items()}
    _check_embeddings(corpus, encoders, encoder_of)
    judged = judged_documents(qrels, split)
    texts = _texts(queries, judged, split)
    _refuse_leaks(texts, queries, qrels, trained_on)
    inputs = fingerprints(corpus=corpus, queries=queries, qrels=qrels)
    inputs |= {f"encoder {name}": value for name, value in encoder_of.items()}
    if reranker is not None:
        inputs["reranker"] = encoder_fingerprint(resolve(reranker[0], "reranker"))
    inputs |= {f"embeddings {name}": made.fingerprint for name, (_, made) in encoders.items()}
    inputs |= {f"trained on {n}": artifact.fingerprint for n, artifact in enumerate(trained_on)}
    config = {
        "split": split,
        "recipe": recipe_name,
        "lexical": lexical.model_dump(mode="json"),
        "evaluation": settings.model_dump(mode="json"),
        **({"rerank_depth": reranker[1]} if reranker else {}),
    }
    draft = begin(out, "report", config=config, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    itself = themselves(texts, judged, corpus.rows("doc_id", "title", "text"))
    rankings = _rankings(corpus, texts, encoders, lexical, settings, reranker, itself)
    values = {
        name: measure(ranking, judged, settings.relevant_from, settings.depth)
        for name, ranking in rankings.items()
    }
    measured = Measured(texts, values)
    report = {
        "recipe": recipe_name,
        "split": split,
        "chosen_on_split": _chosen_on(encoders, qrels, split),
        **summarise(measured, settings),
        "unjudged@10": {name: unjudged(ranking, judged, 10) for name, ranking in rankings.items()},
        "queries": {
            **without_relevant(judged, settings.relevant_from),
            "themselves": len(itself),
        },
        "n_documents": corpus.manifest.rows,
        "n_judgments": sum(map(len, judged.values())),
        # Of a document that is no longer there, for one: nobody can find it, nor be measured by it.
        "qrels": {
            "rejected": qrels.manifest.rejected,
            "rejected_for": qrels.manifest.extra.get("rejected_for", {}),
        },
        "seconds": dict(seconds),
        "config": config,
        "fingerprints": inputs,
        "versions": _versions(),
    }
    _write(draft, report, measured, rankings, _gains(qrels, judged), _curves(encoders, reranker))
    summary = {key: report[key] for key in (MAIN, "ci95", "differences", "n_queries", "recipe")}
    return draft.finish(rows=len(texts), extra=summary)


def _rankings(
    corpus: Artifact,
    texts: Mapping[str, str],
    encoders: Encoders,
    lexical: Lexical,
    settings: Evaluation,
    reranker: tuple[str, int] | None,
    itself: frozenset[str],
) -> dict[str, Rankings]:
    """What each system finds for each query, as deep as is kept."""
    # What reads a ranking again may read deeper than what is kept of it.
    again = (settings.feedback, reranker[1] if reranker else 0)
    depth = max(settings.depth, *again, FUSION_DEPTH if settings.hybrid else 0)
    systems = (1 + len(encoders)) * (1 if reranker is None else 2)
    with progress("evaluate", len(texts) * systems) as advance:
        rankings: dict[str, Rankings] = {"bm25": by_words(corpus, texts, lexical, depth, itself)}
        advance(len(texts))
        for name, (path, embeddings) in encoders.items():
            rankings[name] = by_vectors(path, embeddings, texts, depth, itself)
            advance(len(texts))
        if reranker is not None:
            rankings |= in_reranked_order(*reranker, rankings, texts, corpus, advance)
        if settings.feedback:
            rankings |= after_feedback(rankings, encoders, texts, settings, itself)
        if settings.hybrid:
            rankings |= fused_with_words(rankings, encoders, settings.depth)
    return {
        name: {query_id: hits[: settings.depth] for query_id, hits in ranking.items()}
        for name, ranking in rankings.items()
    }


def table(report: Artifact) -> "Table":
    """Systems by the measures that 80 columns hold, each mean above its 95 % interval."""
    from rich import box
    from rich.table import Table

    found = json.loads(report.place.read("report.json"))
    measures = [name for name in found["ci95"] if name not in _ON_THE_PAGE_ONLY]
    # An older report says neither this nor what it was chosen on.
    rejected = found.get("qrels", {}).get("rejected")
    shown = Table(
        title=f"{found['recipe']}, {found['split']} split: {found['n_queries']:,} queries, "
        f"{found['n_documents']:,} documents (95 % intervals)"
        + (f"; {rejected:,} lines of the qrels were rejected" if rejected else "")
        + (FLATTERED if found.get("chosen_on_split") else ""),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    shown.add_column("system")
    for name in measures:
        shown.add_column(name, justify="right", no_wrap=True)
    for system in found[MAIN]:
        cells = [_cell(found[name][system], found["ci95"][name][system], "") for name in measures]
        shown.add_row(system, *cells)
    for pair, differences in found["differences"].items():
        cells = [
            _cell(differences[name]["mean"], differences[name]["ci95"], "+") for name in measures
        ]
        shown.add_row(pair.replace("-", " - "), *cells, style="dim")
    return shown


def _cell(mean: float, ci95: Sequence[float], sign: str) -> str:
    """`.417` over `[.369, .464]`, as the field prints them; a bracket would be rich's markup."""
    low, high = (f"{value:.3f}".replace("0.", ".", 1) for value in ci95)
    return f"{mean:{sign}.3f}".replace("0.", ".", 1) + f"\n\\[{low}, {high}]"


def _check_embeddings(corpus: Artifact, encoders: Encoders, encoder_of: Mapping[str, str]) -> None:
    for name, (path, embeddings) in encoders.items():
        refuse_other_encoder(embeddings, path, encoder_of[name])
        embedded = embeddings.manifest.inputs.get("documents")
        if embedded != corpus.rows_fingerprint:
            raise ValueError(
                f"{embeddings.url} is of documents {embedded}, {corpus.url} holds "
                f"{corpus.rows_fingerprint}"
            )


def judged_documents(qrels: Artifact, split: str) -> dict[str, dict[str, float]]:
    """query_id -> doc_id -> relevance of one split, in the order of `query_id`.

    Raises ValueError where there is none.
    """
    judged: dict[str, dict[str, float]] = {}
    splits: set[str] = set()
    for home, query_id, doc_id, value in qrels.rows("split", "query_id", "doc_id", "relevance"):
        splits.add(home)
        if home == split:
            judged.setdefault(query_id, {})[doc_id] = value
    if not judged:
        there = f"there are {', '.join(sorted(splits))}" if splits else "there are none at all"
        raise ValueError(f"no judgments for split {split}: {there}{why_rejected(qrels)}")
    return dict(sorted(judged.items()))


def _texts(queries: Artifact, judged: Qrels, split: str) -> dict[str, str]:
    """query_id -> text of the judged queries, in the order of `judged`."""
    found = {
        query_id: text for query_id, text in queries.rows("query_id", "text") if query_id in judged
    }
    missing = [query_id for query_id in judged if query_id not in found]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(judged)} judged queries of split {split} are not in "
            f"{queries.url}, the first is {missing[0]}"
        )
    return {query_id: found[query_id] for query_id in judged}


def _refuse_leaks(
    texts: Mapping[str, str], queries: Artifact, qrels: Artifact, trained_on: Sequence[Artifact]
) -> None:
    leaks = find_leaks(texts, _trained(queries, qrels, trained_on))
    if leaks:
        first = leaks[0]
        raise ValueError(
            f"{len(leaks)} evaluation queries stand in training too: the first is "
            f"{first.query_id} ({first.text!r}), there {first.training_query_id}"
        )


def _trained(
    queries: Artifact, qrels: Artifact, trained_on: Sequence[Artifact]
) -> Iterator[tuple[str, str]]:
    """(query_id, text) of what training has seen."""
    judgments = [artifact for artifact in trained_on if artifact.manifest.kind == "judgments"]
    judged = {query_id for artifact in judgments for query_id in artifact.column("query_id")}
    apart = kept_apart(qrels)
    for artifact in trained_on:
        if artifact.manifest.kind != "queries":
            continue
        given = artifact.fingerprint == queries.fingerprint
        for query_id, text in artifact.rows("query_id", "text"):
            seen = query_id in judged if judgments else not (given and query_id in apart)
            if seen:
                yield query_id, text


def _chosen_on(encoders: Encoders, qrels: Artifact, split: str) -> bool:
    """Whether `train` kept, of several encoders, the best on these very queries."""
    if split != DEV or "trained" not in encoders:
        return False
    return chosen_on(resolve(encoders["trained"][0])).get("dev qrels") == qrels.fingerprint


def _curves(encoders: Encoders, reranker: tuple[str, int] | None) -> tuple[Curve, Curve]:
    """(step, loss) and (step, nDCG@10 on dev) of the training, where `train` has written them."""
    if reranker is not None:
        directory = resolve(reranker[0], "reranker")
    elif "trained" in encoders:
        directory = resolve(encoders["trained"][0])
    else:
        return [], []
    return _curve(directory / CURVE, "loss"), _curve(directory / DEV_CURVE, MAIN)


def _curve(path: Path, name: str) -> Curve:
    if not path.exists():
        return []
    lines = map(json.loads, path.read_text().splitlines())
    return [(line["step"], line[name]) for line in lines]


def _gains(qrels: Artifact, judged: Qrels) -> Qrels:
    """Judgments as `qrels.trec` holds them: grades above the minimum, where the scale is known."""
    scale = qrels.manifest.extra.get("scale")
    return gains_on_scale(judged, tuple(scale)) if scale else judged


def _write(
    draft: Draft,
    report: Mapping[str, Any],
    measured: Measured,
    rankings: Mapping[str, Rankings],
    gains: Qrels,
    curves: tuple[Curve, Curve],
) -> None:
    for system, ranking in rankings.items():
        draft.write_file(f"runs/{system}.trec", write_run(ranking, system))
    draft.write_file("qrels.trec", write_qrels(gains))
    draft.write_file("per_query.parquet", parquet_bytes(measured.table()))
    draft.write_file("report.html", page(report, *curves).encode())
    draft.write_file("report.json", json.dumps(report, indent=1, ensure_ascii=False).encode())


def _versions() -> dict[str, str]:
    measuring = {name: metadata.version(name) for name in ("ir-measures", "numpy")}
    return {"python": platform.python_version(), **library_versions(), **measuring}


if __name__ == "__main__":
    from jobs.verbs import program

    program("evaluate")
