"""What clicks teach an encoder, with and without what a rank does to them: full-corpus nDCG@10.

    python -m benchmarks.click_models --data DATA --set climate-fever-evidence --out runs/clicks
    python -m benchmarks.click_models --quick --json

Clicks are simulated (arXiv 2506.20501). The base encoder shows its best documents for each query of
the train split `--lists` times in the order of `--policy`, two neighbours of a list changed in
`--swap-share` of the lists as `serve.app --swap-share` does. A document at rank k is clicked with
probability sigma(gamma - log k), where gamma rises with its grade. The same log teaches every
system:

    base        not trained
    two_tower   the recipe's objective on clicks, what ranks do as the log tells it
    debiased    graded BCE on the relevance that the recipe's judge makes of the clicks
    rank_blind  the objective on clicks as if every rank were the first
    click_rate  graded BCE on clicks over impressions
    human       graded BCE on the grades themselves, of the same documents: what no log can pass

It needs neither Ray nor vLLM nor FAISS.
"""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import tyro

from bixse.judging.clicks import RankBias, Shown, rank_bias, relevance_of
from bixse.models.settings import PACKAGED
from bixse.records import Split
from bixse.training.groups import Clicked, Labels, group
from bixse.training.objective_settings import ClickBCE, GradedBCE
from bixse.training.settings import Training
from jobs.recipes.clicks import two_tower

System = Literal["two_tower", "debiased", "rank_blind", "click_rate", "human"]
TRAINED: tuple[System, ...] = get_args(System)


@dataclass(frozen=True)
class Options:
    """What is simulated, and on what."""

    data: str = "../shared/data"
    """Directory of sets in BEIR layout."""
    set: str = "climate-fever-evidence"
    """Which of them."""
    split: Split = "test"
    """The evaluated split."""
    lists: int = 50
    """Lists shown for each query."""
    ranks: int = 10
    """Documents of a list."""
    policy: Literal["best_first", "shuffled"] = "best_first"
    """Order of a list before anything is swapped: the base encoder's, or one drawn for each query
    and kept, of a policy that knows nothing of relevance."""
    swap_share: float = 0.2
    """Share of the lists in which two neighbours have changed places."""
    irrelevant: float = -3.0
    """Log-odds of a click on an irrelevant document at rank 1."""
    relevant: float = 1.0
    """Log-odds of a click on the most relevant."""
    systems: tuple[System, ...] = TRAINED
    """What learns from it."""
    queries: int | None = None
    """Queries of the train split; unset: all."""
    seeds: int = 3
    """Logs and training runs."""
    epochs: int = 1
    """Passes over the shown documents."""
    learning_rate: float = 2e-5
    """Peak rate."""
    document_tokens: int = 128
    """Longest document while training."""
    start: str = PACKAGED
    """The base encoder, and who ranks the lists."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where encoders train and encode."""
    out: str = "runs/click-models"
    """What is read on the way."""
    quick: bool = False
    """A made-up set and encoder: the mechanics in a minute, no evidence."""
    json: bool = False
    """End with one JSON object on standard output."""


@dataclass(frozen=True)
class Ranked:
    """The logging policy's lists, and what each document in them is worth."""

    queries: dict[str, str]
    documents: dict[str, str]
    ids: list[tuple[str, str]]
    """query_id and doc_id of each pair, in the order of query and rank."""
    relevance_P: np.ndarray[Any, Any]


def main() -> None:
    options = tyro.cli(Options)
    with redirect_stdout(sys.stderr):
        try:
            if options.quick:
                options = quick(options)
            found = compare(options)
        except ValueError as error:
            sys.exit(f"error: {error}")
        from benchmarks.graded_losses import show

        show(options.set, found)
        print(f"  rank bias {found['rank_bias']}, true {found['true_rank_bias']}")
    if options.json:
        print(json.dumps(found))


def quick(options: Options) -> Options:
    """The made-up set, at a rate and for as long as its encoder takes to learn."""
    from benchmarks.made_set import NAME, make_set

    data = Path(options.out) / "quick-data"
    start = str(make_set(data))
    made = replace(options, data=str(data), set=NAME, start=start, seeds=1, lists=200)
    return replace(made, swap_share=0.5, epochs=10, learning_rate=1e-2)


def compare(options: Options) -> dict[str, Any]:
    """Every system on the logs of every seed; paired intervals over queries. Raises ValueError."""
    from benchmarks.graded_data import load, read_sources
    from benchmarks.graded_losses import summary
    from benchmarks.retrievers import Workbench

    out = Path(options.out).resolve() / options.set
    graded = load(read_sources(options.set, Path(options.data), out), options.split)
    bench = Workbench(options.start, options.device)
    ranked = _ranked(bench, graded, options)
    values: dict[str, list[dict[str, float]]] = {}
    bench.reset()
    values["base"] = [bench.ndcg(graded.corpus, graded.asked, graded.qrels)]
    for seed in range(options.seeds):
        shown = _log(ranked, options, seed)
        bias = rank_bias(shown, options.ranks, two_tower().judging.clicks.rank_deviation)
        if not bias.known_K.all():
            raise ValueError(
                "a rank is not connected with the first: raise --lists or --swap-share"
            )
        for system in options.systems:
            objective = ClickBCE() if system in ("two_tower", "rank_blind") else GradedBCE()
            settings = _training(options, seed).replace(objective=objective)
            bench.tune(_labels(ranked, shown, bias, system), settings)
            found = bench.ndcg(graded.corpus, graded.asked, graded.qrels)
            values.setdefault(system, []).append(found)
            mean = sum(found.values()) / len(found)
            print(f"seed {seed} {system}: nDCG@10 {mean:.4f}", flush=True)
    runs = {
        system: [np.array([one[query] for query in sorted(one)]) for one in of_seeds]
        for system, of_seeds in values.items()
    }
    means = {system: np.mean(columns, axis=0) for system, columns in runs.items()}
    compared = [(system, "base") for system in options.systems]
    if "two_tower" in options.systems:
        compared += [("two_tower", name) for name in options.systems if name != "two_tower"]
    return {
        **summary(means, runs, compared),
        "rank_bias": np.round(bias.theta_K, 2).tolist(),
        "true_rank_bias": np.round(-np.log(np.arange(1, options.ranks + 1)), 2).tolist(),
        "train_queries": len(ranked.queries),
    }


def _training(options: Options, seed: int) -> Training:
    return two_tower().training.replace(
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        document_tokens=options.document_tokens,
        seed=seed,
    )


def _ranked(bench: Any, graded: Any, options: Options) -> Ranked:
    from benchmarks.retrievers import search

    relevance = {
        (row["query_id"], row["doc_id"]): row["relevance"]
        for row in graded.judgments.select(["query_id", "doc_id", "relevance"]).to_pylist()
    }
    query_ids = sorted({query_id for query_id, _ in relevance})[: options.queries]
    queries = {query_id: graded.queries[query_id] for query_id in query_ids}
    vectors_QD = bench.queries(list(queries.values()))
    documents_ND = bench.documents(graded.documents)
    lists = search(vectors_QD, documents_ND, list(graded.documents), options.ranks)
    asked = zip(queries, lists, strict=True)
    ids = [(query_id, hit.doc_id) for query_id, hits in asked for hit in hits]
    found = np.array([relevance.get(key, 0.0) for key in ids])
    return Ranked(queries, dict(graded.documents), ids, found)


def _log(ranked: Ranked, options: Options, seed: int) -> Shown:
    """Impressions and clicks by pair and rank."""
    draw = np.random.default_rng([seed, 7])
    ranks, count = options.ranks, len(ranked.queries)
    order_QK = np.tile(np.arange(ranks), (count, 1))
    if options.policy == "shuffled":
        order_QK = draw.permuted(order_QK, axis=1)
    place = np.tile(order_QK, (options.lists, 1, 1))
    swapped = np.argwhere(draw.random((options.lists, count)) < options.swap_share)
    upper = draw.integers(ranks - 1, size=len(swapped))
    list_S, query_S = swapped.T
    moved_SK = place[list_S, query_S]
    above_SK, below_SK = moved_SK == upper[:, None], moved_SK == upper[:, None] + 1
    place[list_S, query_S] = moved_SK + above_SK - below_SK
    worth_QK = ranked.relevance_P.reshape(count, ranks)
    gamma_QK = options.irrelevant + (options.relevant - options.irrelevant) * worth_QK
    logit = gamma_QK - np.log(place + 1.0)
    clicked = draw.random(logit.shape) < 1 / (1 + np.exp(-logit))
    pair = np.broadcast_to(np.arange(count * ranks).reshape(count, ranks), place.shape)
    key = pair.ravel() * ranks + place.ravel()
    impressions = np.bincount(key, minlength=count * ranks * ranks)
    clicks = np.bincount(key, clicked.ravel(), minlength=count * ranks * ranks).astype(np.int64)
    (kept,) = np.nonzero(impressions)
    return Shown(kept // ranks, kept % ranks + 1, impressions[kept], clicks[kept])


def _labels(ranked: Ranked, shown: Shown, bias: RankBias, system: str) -> Labels:
    theta_O = bias.theta_K[shown.rank_O - 1]
    if system == "rank_blind":
        theta_O = np.zeros_like(theta_O)
    impressions_P, clicks_P = (
        np.bincount(shown.pair_O, column) for column in (shown.impressions_O, shown.clicks_O)
    )
    relevance_P = {
        "human": ranked.relevance_P,
        "click_rate": clicks_P / impressions_P,
    }.get(system, relevance_of(shown, theta_O, two_tower().judging.clicks.prior_deviation))
    query_ids, doc_ids = zip(*ranked.ids, strict=True)
    clicked = None
    if system in ("two_tower", "rank_blind"):
        clicked = Clicked(
            [query_ids[pair] for pair in shown.pair_O.tolist()],
            [doc_ids[pair] for pair in shown.pair_O.tolist()],
            shown.impressions_O,
            shown.clicks_O,
            theta_O,
            np.ones(len(theta_O)),
        )
    return group(
        query_ids,
        doc_ids,
        relevance_P.astype(np.float32),
        ranked.queries,
        ranked.documents,
        {},
        clicked=clicked,
    )


if __name__ == "__main__":
    main()
