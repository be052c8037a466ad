"""Graded BCE against other objectives: same rows, same seeds, full-corpus nDCG@10.

    python -m benchmarks.graded_losses --data DATA --sets cranfield mediqa2019-qa --out runs/losses
    python -m benchmarks.graded_losses --quick --json

DATA holds sets in BEIR layout. `trec-dl` stands for a pair of sets that is put together here: the
GPT-4o grades of TREC Deep Learning 2019 and 2020 to train on, the human grades of 2021 to test on,
each with the passages that were judged. `trec-dl-compared` trains on those of these passages alone
that GPT-4o also compared, two at a time, and has its preferences for the objective that reads them:
`pairdistill` is the recipe's, `pointwise_distill` the same without preferences.

For each set: ingest, judge (the given grades), embed with the base encoder; then for each seed
train and embed with every objective, and evaluate all of them. Every stage is an artefact under
`--out`, so that an interrupted run goes on. The values of a query are averaged over seeds before
they are compared. `--noise` gives a share of the training grades another value, drawn anew for each
seed and the same for every objective. `--quick` needs no data: it makes a small graded corpus of
invented words, preferences and an encoder for it.
"""

import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from benchmarks.label_noise import noisy_judgments
from benchmarks.trec_dl import PREFERENCES, trec_dl
from bixse.artifacts import Artifact
from bixse.evaluation.settings import Evaluation
from bixse.evaluation.significance import interval, randomisation_p, resampled_means
from bixse.judging.settings import Judging
from bixse.models.encoder import load_model
from bixse.models.settings import PACKAGED
from bixse.retrieval.settings import Lexical
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
from jobs.embed import embed
from jobs.evaluate import evaluate
from jobs.ingest import ingest
from jobs.judge import judge
from jobs.preferences import import_preferences
from jobs.recipe import Ingest, Placement
from jobs.recipes.ranking import pairdistill
from jobs.train import train

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
GRADES_FROM = {"mediqa2019-qa": 1.0}
"""Sets whose scale starts at 1 (excellent is 4, incorrect 1)."""


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
    learning_rate: float = 2e-5
    """Peak rate, the same for every objective."""
    query_tokens: int = 32
    """Longest query."""
    document_tokens: int = 128
    """Longest document while training."""
    encoder_tokens: int | None = None
    """Longest text that any encoder here reads, the base too, while evaluating; unset: the most
    that `start` can."""
    batch_size: int = 64
    """Rows a step."""
    docs_per_query: int = 1
    """Judged documents a row holds."""
    noise: float = 0.0
    """Share of the training grades that become another grade of the scale."""
    start: str = PACKAGED
    """The base encoder."""
    split: str = "test"
    """The evaluated split."""
    out: str = "runs/graded-losses"
    """Where the artefacts go."""
    gpus: float = 0
    """GPUs of each worker."""
    quick: bool = False
    """A made-up set and encoder: the mechanics in minutes, no evidence."""
    json: bool = False
    """End with one JSON object on standard output."""


def main() -> None:
    options = tyro.cli(Options)
    if options.quick:
        options = quick(options)
    with redirect_stdout(sys.stderr):
        results = {name: compare(name, options) for name in options.sets}
        for name, result in results.items():
            show(name, result)
    if options.json:
        print(json.dumps(results))


def compare(name: str, options: Options) -> dict[str, Any]:
    """Mean nDCG@10 of every system on one set, and graded BCE against each other one."""
    # Ray's workers run in directories of their own.
    out = f"{Path(options.out).resolve()}/{name}"
    source = Path(options.data) / name
    apart = None
    if name in ("trec-dl", "trec-dl-compared"):
        apart = trec_dl(Path(options.data), Path(out), compared=name == "trec-dl-compared")
        source = apart.training
    read = Ingest(grade_min=GRADES_FROM.get(name, 0.0))
    learnt = ingest(str(source), read, f"{out}/training")
    tested = ingest(str(apart.test), read, f"{out}/test") if apart else learnt
    start = shortened(options.start, options.encoder_tokens, Path(out) / "base")
    placement = Placement(gpus_per_actor=options.gpus)
    lexical = Lexical()
    labels = judge(
        None, [learnt.queries], learnt.corpus, learnt.qrels, Judging(), lexical, None, placement,
        f"{out}/judgments",
    )  # fmt: skip
    preferences = None
    if (source / PREFERENCES).exists():
        preferences = import_preferences(
            [learnt.queries], learnt.corpus, str(source / PREFERENCES), f"{out}/preferences"
        )
    base = embed(tested.corpus, start, placement, f"{out}/embeddings-base")
    values: dict[str, list[np.ndarray[Any, Any]]] = {}
    out += variant(options)
    for seed in range(options.seeds):
        if options.noise:
            given = noisy_judgments(labels, options.noise, seed, f"{out}/judgments-{seed}")
        else:
            given = labels
        systems = {"base": (start, base)}
        for objective in options.objectives:
            here = f"{out}/{objective}-{seed}"
            settings = training(options, OBJECTIVES[objective], seed)
            reads = settings.objective.reads_preferences
            encoder = train(
                given, [learnt.queries], learnt.corpus, settings, start, placement,
                f"{here}/encoder", preferences=preferences if reads else None,
            )  # fmt: skip
            made = embed(tested.corpus, encoder.url, placement, f"{here}/embeddings")
            systems[objective] = (encoder.url, made)
        report = evaluate(
            tested.corpus, tested.queries, tested.qrels, options.split, systems, lexical,
            Evaluation(), [learnt.queries, given], name, {}, f"{out}/report-{seed}",
        )  # fmt: skip
        for system, column in per_query(report).items():
            values.setdefault(system, []).append(column)
    means = {system: np.mean(runs, axis=0) for system, runs in values.items()}
    return summary(means, values, list(pairs(list(means))))


def variant(options: Options) -> str:
    """Where runs on other rows stand: the plain ones are not moved."""
    parts = [f"noise-{options.noise:g}"] if options.noise else []
    parts += [f"docs-{options.docs_per_query}"] if options.docs_per_query > 1 else []
    return "/" + "-".join(parts) if parts else ""


def shortened(start: str, tokens: int | None, directory: Path) -> str:
    """The base encoder, or a copy at `directory` that reads no more than so many tokens."""
    if tokens is None:
        return start
    if not directory.exists():
        model = load_model(start, "cpu")
        model.max_seq_length = tokens
        aside = directory.with_suffix(".under-way")
        model.save_pretrained(str(aside), create_model_card=False)
        aside.rename(directory)
    return str(directory)


def training(options: Options, objective: Objective, seed: int) -> Training:
    return Training(
        objective=objective,
        batch_size=options.batch_size,
        docs_per_query=options.docs_per_query,
        epochs=options.epochs,
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        query_tokens=options.query_tokens,
        document_tokens=options.document_tokens,
        seed=seed,
    )


def per_query(report: Artifact) -> dict[str, np.ndarray[Any, Any]]:
    table = report.part("per_query.parquet")
    prefix = "ndcg@10 "
    names = [name for name in table.column_names if name.startswith(prefix)]
    return {name.removeprefix(prefix): table[name].to_numpy() for name in names}


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
    """Invented topics of three words; a document's grade is the words it shares with the query."""
    from dataclasses import replace

    from tests.encoders import WORDS, save_tiny_encoder

    out = Path(options.out) / "quick-data"
    draw = random.Random(0)
    topics = [draw.sample(WORDS, 3) for _ in range(60)]
    corpus, queries, rows = [], [], {"train": [], "test": []}
    preferences = ["query-id\tpreferred-id\tother-id"]
    for number, topic in enumerate(topics):
        query_id = f"q{number}"
        queries.append({"_id": query_id, "text": " ".join(topic)})
        for grade in (3, 2, 1, 0):
            doc_id = f"d{number}-{grade}"
            words = topic[:grade] + draw.choices(WORDS, k=8 - grade)
            draw.shuffle(words)
            corpus.append({"_id": doc_id, "title": "", "text": " ".join(words)})
            rows["train" if number % 3 else "test"].append(f"{query_id}\t{doc_id}\t{grade}")
            preferences += [f"{query_id}\t{doc_id}\td{number}-{low}" for low in range(grade)]
    (out / "topics" / "qrels").mkdir(parents=True, exist_ok=True)
    for name, records in (("corpus", corpus), ("queries", queries)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (out / "topics" / f"{name}.jsonl").write_text(lines)
    (out / "topics" / PREFERENCES).write_text("\n".join(preferences) + "\n")
    for split, lines in rows.items():
        text = "query-id\tcorpus-id\tscore\n" + "".join(f"{line}\n" for line in lines)
        (out / "topics" / "qrels" / f"{split}.tsv").write_text(text)
    encoder = out / "tiny" / "encoder"
    if not encoder.exists():
        save_tiny_encoder(out / "tiny")
    return replace(
        options, data=str(out), sets=("topics",), start=str(encoder), seeds=1,
        epochs=10, learning_rate=1e-2, batch_size=32,
    )  # fmt: skip


if __name__ == "__main__":
    main()
