"""Fit the embedded judge on public human grades and measure it on queries that it has not seen.

    python -m benchmarks.fit_features --data DIR --out bixse/judging/features.json

`--data` holds one directory a set in BEIR layout, see `graded_sets.py` for which and how they are
read. About twenty minutes on two busy cores, nearly all of it encoding; `--cache DIR` keeps the
vectors between runs.
"""

import argparse
import json
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binned_statistic, spearmanr
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from benchmarks.graded_sets import SOURCES, UNUSED, Collection, Rows
from bixse.judging.features import FEATURES, FeaturesJudge, Floats
from bixse.judging.features_fit import fit_ordinal
from bixse.models.encoder import Encoder
from bixse.models.settings import PACKAGED
from bixse.retrieval.settings import Lexical
from bixse.scale import UMBRELA

L2 = 1e-3
RECHECK = ("cranfield", "test", 12)
"""What the test suite measures again: set, split, queries."""
LEGEND = {
    "spearman": "rank correlation of expected and human grade over all pairs",
    "kappa": "quadratic, of grades 0 to 3, fractions rounded half up",
    "auc": "separates human relevance >= 0.5 from the rest",
    "ece": "gap of mean expected and mean human relevance over ten equal bins, weighted by pairs",
    "alone": "each feature by itself",
    "held_out_queries": "test queries of the sets fitted on",
    "left_out_sets": "the same, judged by a fit without the set; noveleval is in no fit",
    "graded_by_people": "without the pairs that are taken as grade 0",
}
VERSIONS = (
    "numpy",
    "scipy",
    "scikit-learn",
    "bm25s",
    "PyStemmer",
    "torch",
    "sentence-transformers",
)


def fit(rows: Sequence[Rows], encoder: str) -> FeaturesJudge:
    """The judge of these rows, every set weighing the same."""
    grades = np.concatenate([r.grades for r in rows])
    weights_F, thresholds_T = fit_ordinal(
        np.concatenate([r.features for r in rows]),
        np.array([UMBRELA.grade_probs(grade) for grade in grades]),
        np.concatenate([np.full(len(r.grades), 1 / len(r.grades)) for r in rows]),
        L2,
    )
    return FeaturesJudge(UMBRELA, tuple(weights_F.tolist()), tuple(thresholds_T.tolist()), encoder)


def agreement(judge: FeaturesJudge, rows: Rows) -> dict[str, Any]:
    """How far the judge and single features agree with the grades of `rows`.

    See `LEGEND` for the measures.
    """
    expected_N = judge.grade_probs(rows.features) @ np.array(UMBRELA.values)
    return {
        "queries": rows.queries,
        "pairs": len(rows.grades),
        "mean_relevance": _round(rows.grades.mean() / 3),
        "spearman": _spearman(expected_N, rows.grades),
        "kappa": _round(
            cohen_kappa_score(
                np.floor(expected_N + 0.5).astype(int),
                np.floor(rows.grades + 0.5).astype(int),
                labels=[0, 1, 2, 3],
                weights="quadratic",
            )
        ),
        "auc": _auc(expected_N, rows.grades),
        "ece": _ece(expected_N / 3, rows.grades / 3),
        "alone": {
            name: {"spearman": _spearman(x_N, rows.grades), "auc": _auc(x_N, rows.grades)}
            for name, x_N in zip(FEATURES, rows.features.T, strict=True)
            if np.ptp(x_N) > 0
        },
    }


def _spearman(score_N: Floats, grade_N: Floats) -> float:
    return _round(spearmanr(score_N, grade_N).statistic)


def _auc(score_N: Floats, grade_N: Floats) -> float:
    return _round(roc_auc_score(grade_N >= 1.5, score_N))


def _ece(expected_N: Floats, human_N: Floats) -> float:
    gaps, _, _ = binned_statistic(expected_N, expected_N - human_N, "sum", bins=10, range=(0, 1))
    return _round(np.abs(gaps).sum() / len(expected_N))


def _round(value: float) -> float:
    return round(float(value), 4)


def report(data: Path, cache: Path | None) -> dict[str, Any]:
    """All of `features.json`: coefficients, what they were fitted on, agreement."""
    encoder = Encoder.load(PACKAGED)
    train: dict[str, Rows] = {}
    test: dict[str, Rows] = {}
    sets = {}
    for source in SOURCES:
        collection = Collection(source, data, encoder, cache)
        found = {split: collection.rows(split) for split in source.splits}
        test[source.name] = found["test"]
        if "train" in found:
            train[source.name] = found["train"]
        sets[source.name] = _described(collection, found)
        print(source.name, {split: len(rows.grades) for split, rows in found.items()}, flush=True)
        if source.name == RECHECK[0]:
            recheck = collection.rows(RECHECK[1], RECHECK[2])
    judge = fit(list(train.values()), encoder.fingerprint)
    without = {
        name: fit([rows for other, rows in train.items() if other != name], encoder.fingerprint)
        for name in train
    }
    return {
        "scale": judge.scale.name,
        "weights": dict(zip(FEATURES, judge.weights, strict=True)),
        "thresholds": judge.thresholds,
        "encoder": {"start": PACKAGED, "fingerprint": encoder.fingerprint, "max_tokens": 256},
        "lexical": Lexical().model_dump(),
        "fitted": {
            "on": list(train),
            "model": f"proportional odds, weights >= 0, l2 {L2}, every set weighing the same",
            "date": date.today().isoformat(),
            "versions": {name: metadata.version(name) for name in VERSIONS},
            "sets": sets,
            "unused": UNUSED,
        },
        "agreement": {
            "legend": LEGEND,
            "held_out_queries": {name: _both(judge, test[name]) for name in train},
            "left_out_sets": {
                name: _both(without.get(name, judge), rows) for name, rows in test.items()
            },
            "recheck": dict(zip(("set", "split", "queries"), RECHECK, strict=True))
            | {"agreement": agreement(judge, recheck)},
        },
    }


def _described(collection: Collection, found: dict[str, Rows]) -> dict[str, Any]:
    source = collection.source
    return {
        "class": source.klass,
        "licence": collection.info["licence"],
        "source": collection.info["source"],
        "grades": f"{source.grade_min:g} to {source.grade_max:g}, linearly on 0 to 3",
        "unjudged": "grade 0, chosen by BM25 rank and chance" if source.exhaustive else "not used",
        "random_a_query": source.random,
        "splits": {
            split: {
                "queries": rows.queries,
                "pairs": len(rows.grades),
                "graded_by_people": int(rows.human.sum()),
            }
            for split, rows in found.items()
        },
    }


def _both(judge: FeaturesJudge, rows: Rows) -> dict[str, Any]:
    """Agreement on all rows and, where people gave grade 0 too, on those that people graded."""
    found = {"all": agreement(judge, rows)}
    graded = rows.graded()
    if len(graded.grades) < len(rows.grades) and len({*(graded.grades >= 1.5)}) == 2:
        found["graded_by_people"] = agreement(judge, graded)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of the sets")
    parser.add_argument("--out", type=Path, required=True, help="features.json to write")
    parser.add_argument("--cache", type=Path, help="directory that keeps vectors between runs")
    args = parser.parse_args()
    if args.cache is not None:
        args.cache.mkdir(parents=True, exist_ok=True)
    found = report(args.data, args.cache)
    args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
