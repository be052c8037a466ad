"""A cross-encoder trained on human grades, as a judge: its agreement, and what its labels teach.

    python -m benchmarks.trained_judge --data DATA --sets cranfield mediqa2019-qa --out runs/judges

Of each set (BEIR layout, human grades): a cross-encoder is trained on the human grades of the train
split by recipe `bce_reranker`'s objective, then judges through vLLM's pooling what nobody has
judged: the candidates of BM25, the base encoder and chance for each training query. Its agreement
with people is measured on the judged pairs of the test split, whose queries it has never seen,
beside that of the features judge. Then, for each seed, one retriever a kind of label, all else
equal, measured on the test split over the full corpus:

    human       what people judged
    features    the candidates, judged by the embedded judge
    scorer      the same candidates, judged by the cross-encoder
    both        what people judged, and the cross-encoder on candidates that they did not

Every stage is an artefact under `--out`: an interrupted run goes on. It needs vLLM.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro

from benchmarks.graded_data import GRADES_FROM
from benchmarks.graded_losses import show, summary
from benchmarks.retrievers import shortened
from bixse.artifacts import Artifact, begin
from bixse.candidates.settings import Pools
from bixse.evaluation.settings import Evaluation
from bixse.judging.agreement import intervals, measures
from bixse.judging.audit import align
from bixse.judging.calibration import load, relevance
from bixse.judging.settings import CrossEncoder, Judging
from bixse.models.settings import PACKAGED
from bixse.records import JUDGMENTS, PAIRS
from bixse.retrieval.settings import Lexical
from bixse.training.objective_settings import GradedBCE, PairBCE
from bixse.training.settings import Training
from jobs.calibration import fit
from jobs.embed import embed
from jobs.evaluate import evaluate
from jobs.ingest import Ingested, ingest
from jobs.judge import judge
from jobs.pair import pair
from jobs.recipe import Ingest, Placement
from jobs.train import train

LABELS = ("human", "features", "scorer", "both")
SHOWN = ("kappa", "kappa_quadratic", "kendall", "over_rating", "squared_error", "ece")
LEXICAL = Lexical()
BINS, RESAMPLES = 10, 1000


@dataclass(frozen=True)
class Options:
    """What is compared, and on what."""

    data: str = "../shared/data"
    """Directory of sets in BEIR layout."""
    sets: tuple[str, ...] = ("cranfield", "mediqa2019-qa")
    """Which of them."""
    seeds: int = 3
    """Retrievers of each kind of label."""
    scorer_epochs: int = 4
    """Passes of the cross-encoder over the human grades."""
    scorer_rate: float = 1e-4
    """Its peak learning rate: the head is new."""
    scorer_tokens: int = 192
    """Longest document that it is trained on."""
    candidates: int = 5
    """Best documents of BM25, and of the base encoder, for each query."""
    epochs: int = 1
    """Passes of a retriever over its labels."""
    max_steps: int | None = 80
    """Stop training a retriever after this many steps, if sooner."""
    learning_rate: float = 5e-5
    """Peak rate of the retrievers."""
    batch_size: int = 32
    """Rows a step of the retrievers."""
    document_tokens: int = 64
    """Longest document of the retrievers, in training and evaluation."""
    start: str = PACKAGED
    """What all of them begin as."""
    out: str = "runs/trained-judge"
    """Where the artefacts go."""
    gpus: float = 0
    """GPUs of each worker."""
    json: bool = False
    """End with one JSON object on standard output."""


def main() -> None:
    options = tyro.cli(Options)
    with redirect_stdout(sys.stderr):
        results = {name: compare(name, options) for name in options.sets}
        for name, result in results.items():
            show_agreement(name, result["agreement"])
            show(name, result["retrievers"])
    if options.json:
        print(json.dumps(results))


def compare(name: str, options: Options) -> dict[str, Any]:
    """Agreement of the judges with people on one set, and the retrievers of their labels."""
    out = f"{Path(options.out).resolve()}/{name}"
    placement = Placement(gpus_per_actor=options.gpus)
    grades_from = Ingest(grade_min=GRADES_FROM.get(name, 0.0))
    data = ingest(str(Path(options.data) / name), grades_from, f"{out}/data")
    human = judge(
        None, [data.queries], data.corpus, data.qrels, Judging(), LEXICAL, None, placement,
        f"{out}/human",
    )  # fmt: skip
    vectors = embed(data.corpus, PACKAGED, placement, f"{out}/embeddings-judge")
    scorer = train(
        human, [data.queries], data.corpus, scoring(options), options.start, placement,
        f"{out}/scorer-model",
    )  # fmt: skip
    judges = {
        "features": Judging(judge="features"),
        "scorer": Judging(
            judge="cross_encoder", cross_encoder=CrossEncoder(model=scorer.url, max_model_len=512)
        ),
    }

    def judged(who: str, pairs: Artifact, folder: str) -> Artifact:
        settings = judges[who].replace(store=f"{out}/labels")
        return judge(
            pairs, [data.queries], data.corpus, data.qrels, settings, LEXICAL, vectors, placement,
            f"{out}/{folder}-{who}",
        )  # fmt: skip

    test = human_pairs(data.qrels, "test", f"{out}/pairs-test")
    trained_on = human_pairs(data.qrels, "train", f"{out}/pairs-train")
    agreement = {
        who: agreement_of(
            judged(who, test, "test"), judged(who, trained_on, "train"), data, f"{out}/map-{who}"
        )
        for who in judges
    }
    pools = Pools(bm25=options.candidates, dense=options.candidates, random=2)
    held_out = not_of(data.qrels, data.queries, "train")
    pairs = pair(
        [data.queries], data.corpus, vectors, PACKAGED, pools, LEXICAL, f"{out}/pairs", held_out
    )
    labels = {"human": human} | {who: judged(who, pairs, "judged") for who in judges}
    labels["both"] = together(human, labels["scorer"], f"{out}/judged-both")
    return {
        "agreement": agreement,
        "labels": {who: made.manifest.rows for who, made in labels.items()},
        "retrievers": retrievers(data, labels, options, placement, out, name),
    }


def scoring(options: Options) -> Training:
    return Training(
        objective=PairBCE(), batch_size=16, docs_per_query=8, epochs=options.scorer_epochs,
        learning_rate=options.scorer_rate, query_tokens=64, document_tokens=options.scorer_tokens,
        pair_head="first_token",
    )  # fmt: skip


def retrievers(
    data: Ingested,
    labels: Mapping[str, Artifact],
    options: Options,
    placement: Placement,
    out: str,
    name: str,
) -> dict[str, Any]:
    """nDCG@10 on the test split of the base and of one retriever a kind of label."""
    start = shortened(options.start, options.document_tokens, Path(out) / "base")
    base = embed(data.corpus, start, placement, f"{out}/embeddings-base")
    values: dict[str, list[np.ndarray[Any, Any]]] = {}
    for seed in range(options.seeds):
        settings = Training(
            objective=GradedBCE(), batch_size=options.batch_size, epochs=options.epochs,
            max_steps=options.max_steps, learning_rate=options.learning_rate, query_tokens=32,
            document_tokens=options.document_tokens, seed=seed,
        )  # fmt: skip
        systems = {"base": (start, base)}
        for who, given in labels.items():
            here = f"{out}/{who}-{seed}"
            made = train(
                given, [data.queries], data.corpus, settings, start, placement, f"{here}/encoder"
            )
            vectors = embed(data.corpus, made.url, placement, f"{here}/embeddings")
            systems[who] = (made.url, vectors)
        report = evaluate(
            data.corpus, data.queries, data.qrels, "test", systems, LEXICAL, Evaluation(),
            [data.queries, *labels.values()], name, {}, f"{out}/report-{seed}",
        )  # fmt: skip
        for system, column in per_query(report).items():
            values.setdefault(system, []).append(column)
    means = {system: np.mean(runs, axis=0) for system, runs in values.items()}
    compared = [(who, "base") for who in LABELS] + [
        ("scorer", "features"), ("human", "scorer"), ("both", "human"),
    ]  # fmt: skip
    return summary(means, values, compared)


def per_query(report: Artifact) -> dict[str, np.ndarray[Any, Any]]:
    table = report.part("per_query.parquet")
    prefix = "ndcg@10 "
    names = [name for name in table.column_names if name.startswith(prefix)]
    return {name.removeprefix(prefix): table[name].to_numpy() for name in names}


def human_pairs(qrels: Artifact, split: str, out: str) -> Artifact:
    """The pairs that people judged in a split, to be judged again."""
    draft = begin(out, "pairs", config={"split": split}, inputs={"qrels": qrels.fingerprint})
    if isinstance(draft, Artifact):
        return draft
    table = qrels.table(["query_id", "doc_id", "split"])
    table = table.filter(pc.equal(table["split"], split)).sort_by(
        [("query_id", "ascending"), ("doc_id", "ascending")]
    )
    rows = table.num_rows
    columns = {
        "query_id": table["query_id"],
        "doc_id": table["doc_id"],
        "source": pa.array(["judged"] * rows),
        "rank": pa.array(range(1, rows + 1), pa.int32()),
        "score": pa.array(np.zeros(rows, np.float32)),
    }
    draft.write_part(0, pa.table(columns).cast(PAIRS))
    return draft.finish()


def not_of(qrels: Artifact, queries: Artifact, split: str) -> frozenset[str]:
    """Queries without a judgment in a split."""
    of = {query_id for query_id, home in qrels.rows("query_id", "split") if home == split}
    return frozenset(queries.column("query_id")) - of


def together(human: Artifact, scorer: Artifact, out: str) -> Artifact:
    """What people judged, and what the scorer did of the pairs that they left."""
    inputs = {"human": human.fingerprint, "scorer": scorer.fingerprint}
    draft = begin(out, "judgments", config={"judge": "both"}, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    rows = human.table(JUDGMENTS.names).to_pylist()
    known = {(row["query_id"], row["doc_id"]) for row in rows}
    rows += [
        row
        for row in scorer.table(JUDGMENTS.names).to_pylist()
        if (row["query_id"], row["doc_id"]) not in known
    ]
    draft.write_part(0, pa.Table.from_pylist(rows, schema=JUDGMENTS))
    # Of distributions on two scales only the relevance can be compared.
    return draft.finish(extra={"scale": {"name": "mixed", "values": []}})


def agreement_of(
    test: Artifact, training: Artifact, data: Ingested, out: str
) -> dict[str, dict[str, Any]]:
    """Against people on the test split: as judged, and through a map fitted on the train split."""
    map_ = fit([(training, data.qrels)], "isotonic", "train", out)
    table = test.table(JUDGMENTS.names)
    human = data.qrels.table(["query_id", "doc_id", "relevance", "split"])
    human = human.filter(pc.equal(human["split"], "test"))
    scale = test.manifest.extra["scale"]["values"]
    found: dict[str, dict[str, Any]] = {}
    for how, calibration in (("judged", None), ("calibrated", load(map_))):
        read_N = relevance(table, scale, calibration)
        pairs = align(table, read_N, human, data.qrels.manifest.extra["scale"])
        values, ci95 = measures(pairs, BINS), intervals(pairs, BINS, RESAMPLES, 0)
        found[how] = {n: {"value": values[n], "ci95": list(ci95[n])} for n in SHOWN}
        found[how]["pairs"] = len(pairs)
    return found


def show_agreement(name: str, agreement: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"\n{name}: agreement with people on the test split [95 % interval]")
    for who, found in agreement.items():
        for how, values in found.items():
            cells = (
                f"{measure} {values[measure]['value']:.3f} "
                f"[{values[measure]['ci95'][0]:.3f}, {values[measure]['ci95'][1]:.3f}]"
                for measure in SHOWN
            )
            print(f"  {who} {how} ({values['pairs']} pairs): {', '.join(cells)}")


if __name__ == "__main__":
    main()
