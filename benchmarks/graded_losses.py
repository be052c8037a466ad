"""Graded BCE against other objectives: same rows, same seeds, full-corpus nDCG@10.

    python -m benchmarks.graded_losses --data DATA --sets cranfield mediqa2019-qa --out runs/losses
    python -m benchmarks.graded_losses --device cuda --workers 12 --noise 0 0.2 0.4 \\
        --docs-per-query 1 4 --batch-size 32 8 --start DIR --data DATA --out runs/losses
    python -m benchmarks.graded_losses --quick --json

DATA holds sets in BEIR layout. `trec-dl` stands for a pair of sets that is put together here: the
GPT-4o grades of TREC Deep Learning 2019 and 2020 to train on, the human grades of 2021 to test on,
each with the passages that were judged. `trec-dl-compared` trains on those of these passages alone
that GPT-4o also compared, two at a time, and has its preferences for the objective that reads them:
`pairdistill` is the recipe's, `pointwise_distill` the same without preferences.

Every set, noise, number of documents a row and rate is a table: the base encoder, and a retriever
for each objective and seed, from the given grades of the train split. The values of a query are
averaged over seeds before they are compared. `--noise` gives a share of the training grades another
value, drawn anew for each seed and the same for every objective. Retrievers are made by `--workers`
processes on one device, in the order of the tables, and each leaves its values in a file under
`--out`: the same command goes on where it was interrupted, `--report` shows what is finished.
`--quick` needs no data: it makes a small graded corpus of invented words, preferences and an
encoder for it.

It needs neither Ray nor vLLM nor FAISS.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from benchmarks.made_set import NAME, make_set
from benchmarks.wanted import Wanted
from bixse.evaluation.significance import interval, randomisation_p, resampled_means
from bixse.models.encoder import encoder_fingerprint, resolve
from bixse.models.settings import PACKAGED
from bixse.records import Split
from bixse.training.objective_settings import (
    Combined,
    GradedBCE,
    InfoNCE,
    LambdaLoss,
    ListKL,
    MarginMSE,
    Objective,
    RankNet,
)
from bixse.training.settings import Training
from jobs.recipes.ranking import pairdistill

OBJECTIVES: Mapping[str, Objective] = {
    "graded_bce": GradedBCE(),
    "infonce": InfoNCE(positives="all"),
    "infonce_threshold": InfoNCE(positives="threshold"),
    "infonce_weighted": InfoNCE(positives="weighted"),
    "list_kl": ListKL(),
    "ranknet": RankNet(),
    "lambda_loss": LambdaLoss(),
    "margin_mse": MarginMSE(),
    "pairdistill": pairdistill().training.objective,
    "pointwise_distill": Combined(
        parts=(ListKL(in_batch=False), InfoNCE(positives="threshold")), weights=(1.0, 1.0)
    ),
}
Name = Literal[
    "graded_bce", "infonce", "infonce_threshold", "infonce_weighted",
    "list_kl", "ranknet", "lambda_loss", "margin_mse", "pairdistill", "pointwise_distill",
]  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What is compared, and on what."""

    data: str = "../shared/data"
    """Directory of sets in BEIR layout."""
    sets: tuple[str, ...] = ("cranfield", "mediqa2019-qa", "chorus-electronics", "trec-dl")
    """Which of them."""
    objectives: tuple[Name, ...] = (
        "graded_bce", "infonce", "infonce_threshold", "infonce_weighted",
    )  # fmt: skip
    """Which objectives; list_kl, ranknet, lambda_loss and margin_mse compare a query's documents
    with each other and with the batch's; pairdistill needs a set with preferences."""
    seeds: int = 3
    """Training runs of each objective."""
    epochs: int = 1
    """Passes over the judgments."""
    max_steps: int | None = None
    """Stop training after this many steps, if sooner."""
    learning_rate: tuple[float, ...] = (2e-5,)
    """Peak rates, the same for every objective."""
    query_tokens: int = 32
    """Longest query."""
    document_tokens: int = 128
    """Longest document while training."""
    encoder_tokens: int | None = None
    """Longest text that any encoder here reads, the base too, while evaluating; unset: the most
    that `start` can."""
    docs_per_query: tuple[int, ...] = (1,)
    """Judged documents a row holds."""
    batch_size: tuple[int, ...] = (64,)
    """Rows a step: one number, or one for each of `docs_per_query`."""
    noise: tuple[float, ...] = (0.0,)
    """Shares of the training grades that become another grade of the scale."""
    start: str = PACKAGED
    """The base encoder."""
    split: Split = "test"
    """The evaluated split."""
    out: str = "runs/graded-losses"
    """Where the results go, and what is read on the way."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where retrievers are trained and encode."""
    workers: int = 1
    """Processes that do so at a time."""
    report: bool = False
    """Make nothing: show the results that are there."""
    quick: bool = False
    """A made-up set and encoder: the mechanics in minutes, no evidence."""
    json: bool = False
    """End with one JSON object on standard output."""


@dataclass(frozen=True)
class Table:
    """What all retrievers of a comparison share."""

    set: str
    noise: float
    docs_per_query: int
    batch_size: int
    learning_rate: float

    @property
    def folder(self) -> str:
        """Below the directory of the results."""
        parts = f"noise-{self.noise:g}-docs-{self.docs_per_query}-rate-{self.learning_rate:g}"
        return f"{self.set}/{parts}"

    def named(self, options: Options) -> str:
        """The set, and what differs between this run's tables of it."""
        differ = (
            ("noise", self.noise, options.noise),
            ("docs", self.docs_per_query, options.docs_per_query),
            ("rate", self.learning_rate, options.learning_rate),
        )
        return " ".join([self.set, *(f"{n} {own:g}" for n, own, all_ in differ if len(all_) > 1)])


def main() -> None:
    options = tyro.cli(Options)
    with redirect_stdout(sys.stderr):
        try:
            if options.quick:
                options = quick(options)
            base = encoder_fingerprint(resolve(options.start))
            if not options.report:
                make(options, base)
            results = dict(finished(options, base))
        except ValueError as error:
            sys.exit(f"error: {error}")
        for name, result in results.items():
            show(name, result)
    if options.json:
        print(json.dumps(results))


def tables(options: Options) -> list[Table]:
    """In the order in which they are made: all sets of the first rows, noise and rate first.

    Raises ValueError when sizes of batches and of rows do not pair up.
    """
    docs, batches = options.docs_per_query, options.batch_size
    if len(batches) == 1:
        batches *= len(docs)
    if len(batches) != len(docs):
        raise ValueError(
            f"{len(batches)} of --batch-size for {len(docs)} of --docs-per-query: "
            "give one for all, or one for each"
        )
    rows = zip(docs, batches, strict=True)
    return [
        Table(name, noise, docs_per_query, batch_size, rate)
        for (docs_per_query, batch_size), rate, noise, name in product(
            rows, options.learning_rate, options.noise, options.sets
        )
    ]


def wanted(options: Options, table: Table, base: str) -> dict[str, list[Wanted]]:
    """The files of each system of a table: one of the base, one a seed of each objective."""
    results = Path(options.out).resolve() / "results"

    def one(name: str, noise: float, settings: Training | None) -> Wanted:
        return Wanted(
            results, name, table.set, options.split, base, options.encoder_tokens, noise, settings
        )

    found = {"base": [one(f"{table.set}/base", 0.0, None)]}
    for objective in options.objectives:
        found[objective] = [
            one(
                f"{table.folder}/{objective}-{seed}",
                table.noise,
                training(options, table, OBJECTIVES[objective], seed),
            )
            for seed in range(options.seeds)
        ]
    return found


def training(options: Options, table: Table, objective: Objective, seed: int) -> Training:
    return Training(
        objective=objective,
        batch_size=table.batch_size,
        docs_per_query=table.docs_per_query,
        epochs=options.epochs,
        max_steps=options.max_steps,
        learning_rate=table.learning_rate,
        query_tokens=options.query_tokens,
        document_tokens=options.document_tokens,
        seed=seed,
    )


def make(options: Options, base: str) -> None:
    """Every retriever whose values are not there yet, whole rows of a table one after the other.

    Raises ValueError for values of other settings, for a device that is not there, and as
    `read_sources` and `make_all`.
    """
    files = [
        one
        for table in tables(options)
        for row in wanted(options, table, base).values()
        for one in row
    ]
    # The base of a set is in all its tables.
    todo = list({one.name: one for one in files if one.values() is None}.values())
    if not todo:
        return
    # torch and sentence-transformers take seconds to load, and --help and --report need neither.
    import torch

    from benchmarks.graded_data import read_sources
    from benchmarks.graded_runs import Prepared, make_all
    from benchmarks.retrievers import shortened

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")

    out = Path(options.out).resolve()
    start = shortened(options.start, options.encoder_tokens, out / f"base-{options.encoder_tokens}")

    def prepared(name: str) -> Prepared:
        return Prepared(name, read_sources(name, Path(options.data), out / name), options.split)

    make_all(todo, prepared, start, options.device, options.workers)


def finished(options: Options, base: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each table that has its base, by what distinguishes it; systems that lack a seed left out."""
    for table in tables(options):
        runs = {}
        for system, files in wanted(options, table, base).items():
            values = [one.values() for one in files]
            there = [np.array([found[q] for q in sorted(found)]) for found in values if found]
            if len(there) == len(files):
                runs[system] = there
            elif there:
                print(f"{table.folder}: {system} has {len(there)} of {len(files)} seeds so far")
        if "base" in runs:
            means = {system: np.mean(columns, axis=0) for system, columns in runs.items()}
            yield table.named(options), summary(means, runs, list(pairs(list(means))))


def summary(
    means: Mapping[str, np.ndarray[Any, Any]],
    runs: Mapping[str, Sequence[np.ndarray[Any, Any]]],
    compared: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Means and paired 95 % intervals over queries, of systems and of the differences between some;
    the seeds' own means beside them.
    """
    systems = list(means)
    values_QS = np.stack([means[system] for system in systems], axis=1)
    drawn_BS = resampled_means(values_QS, 10_000, seed=0)
    found: dict[str, Any] = {"n_queries": len(values_QS), "ndcg@10": {}, "differences": {}}
    for number, system in enumerate(systems):
        found["ndcg@10"][system] = {
            "mean": float(values_QS[:, number].mean()),
            "ci95": interval(drawn_BS[:, number]),
            "seeds": [round(float(run.mean()), 4) for run in runs[system]],
        }
    for one, other in compared:
        a, b = systems.index(one), systems.index(other)
        difference_Q1 = values_QS[:, [a]] - values_QS[:, [b]]
        found["differences"][f"{one}-{other}"] = {
            "mean": float(difference_Q1.mean()),
            "ci95": interval(drawn_BS[:, a] - drawn_BS[:, b]),
            "p": float(randomisation_p(difference_Q1, 10_000, seed=0)[0]),
        }
    return found


def pairs(systems: Sequence[str]) -> Iterator[tuple[str, str]]:
    trained = [system for system in systems if system in OBJECTIVES]
    yield from ((system, "base") for system in trained)
    if "graded_bce" in trained:
        yield from (("graded_bce", system) for system in trained if system != "graded_bce")


def show(name: str, result: Mapping[str, Any]) -> None:
    print(f"\n{name}: {result['n_queries']} queries, nDCG@10 [95 % interval]")
    for system, found in result["ndcg@10"].items():
        low, high = found["ci95"]
        print(f"  {system:<18} {found['mean']:.3f} [{low:.3f}, {high:.3f}] seeds {found['seeds']}")
    for pair, found in result["differences"].items():
        low, high = found["ci95"]
        print(f"  {pair:<36} {found['mean']:+.3f} [{low:+.3f}, {high:+.3f}] p {found['p']:.4f}")


def quick(options: Options) -> Options:
    """The made-up set, at a rate and for as long as its encoder takes to learn."""
    data = Path(options.out) / "quick-data"
    encoder = make_set(data)
    return replace(
        options, data=str(data), sets=(NAME,), start=str(encoder), seeds=1, epochs=10,
        learning_rate=(1e-2,), batch_size=(32,),
    )  # fmt: skip


if __name__ == "__main__":
    main()
