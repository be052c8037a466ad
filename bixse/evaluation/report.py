"""Per-query values of each system -> the numbers of a report.

`summarise` gives what `report.json` holds, apart from what the stage adds of its inputs:

    {"n_queries": 98, "ndcg@10": {"bm25": 0.41, "base": 0.47, "trained": 0.52}, "mrr@10": {...},
     "ci95": {"ndcg@10": {"bm25": [0.36, 0.46], ...}, ...},
     "differences": {"trained-base": {"ndcg@10": {"mean": 0.05, "ci95": [0.02, 0.08], "p": 0.001}}},
     "changes": {"trained-base": {"better": 41, "worse": 12, "same": 45, "best": [...],
                                  "worst": [...], "sorted": [...]}}, ...}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from bixse.evaluation.metrics import Values
from bixse.evaluation.settings import Evaluation
from bixse.evaluation.significance import interval, randomisation_p, resampled_means

MAIN = "ndcg@10"
RERANKED = "+reranker"
HYBRID = "+bm25"
FEEDBACK = "+feedback"
# What was trained comes first: the page begins with the first pair that there is.
COMPARED = (
    ("trained", "base"),
    ("trained", "bm25"),
    (f"base{RERANKED}", "base"),
    (f"bm25{RERANKED}", "bm25"),
    (f"trained{HYBRID}", "trained"),
    (f"base{HYBRID}", "base"),
    (f"trained{FEEDBACK}", "trained"),
    (f"base{FEEDBACK}", "base"),
    ("base", "bm25"),
)

_EXAMPLES = 10
_CURVE_POINTS = 201
# Two nDCGs that differ by less are the same ranking, added in another order.
_SAME = 1e-9


@dataclass(frozen=True)
class Measured:
    """Every system on the same queries: system -> measure -> one value a query."""

    queries: Mapping[str, str]
    """query_id -> text, in the order of the values."""
    values: Mapping[str, Mapping[str, Values]]

    @property
    def systems(self) -> list[str]:
        return list(self.values)

    @property
    def measures(self) -> list[str]:
        return list(next(iter(self.values.values())))

    def table(self) -> pa.Table:
        """One row a query: its text, and `<measure> <system>` columns."""
        columns: dict[str, Any] = {
            "query_id": list(self.queries),
            "text": list(self.queries.values()),
        }
        for measure in self.measures:
            for system in self.systems:
                columns[f"{measure} {system}"] = self.values[system][measure]
        return pa.table(columns)


def summarise(measured: Measured, settings: Evaluation) -> dict[str, Any]:
    """Means, intervals, paired differences and the queries that changed most."""
    systems, measures = measured.systems, measured.measures
    means: dict[str, dict[str, float]] = {}
    ci95: dict[str, dict[str, list[float]]] = {}
    pairs = [(a, b) for a, b in COMPARED if a in systems and b in systems]
    differences: dict[str, dict[str, Any]] = {f"{a}-{b}": {} for a, b in pairs}
    for measure in measures:
        values_QS = np.stack([measured.values[system][measure] for system in systems], axis=1)
        means_BS = resampled_means(values_QS, settings.bootstrap, settings.seed)
        means[measure] = {s: float(values_QS[:, n].mean()) for n, s in enumerate(systems)}
        ci95[measure] = {s: list(interval(means_BS[:, n])) for n, s in enumerate(systems)}
        for a, b in pairs:
            one, other = systems.index(a), systems.index(b)
            differences_Q1 = values_QS[:, [one]] - values_QS[:, [other]]
            p = randomisation_p(differences_Q1, settings.bootstrap, settings.seed)
            differences[f"{a}-{b}"][measure] = {
                "mean": float(differences_Q1.mean()),
                "ci95": list(interval(means_BS[:, one] - means_BS[:, other])),
                "p": float(p[0]),
            }
    return {
        "n_queries": len(measured.queries),
        **means,
        "ci95": ci95,
        "differences": differences,
        "changes": {f"{a}-{b}": _changes(measured, a, b) for a, b in pairs},
    }


def _changes(measured: Measured, system: str, against: str) -> dict[str, Any]:
    """Which queries one system answers better or worse than the other, by nDCG@10."""
    new, old = measured.values[system][MAIN], measured.values[against][MAIN]
    change = new - old
    order = np.argsort(change, kind="stable")
    queries = list(measured.queries.items())

    def shown(rows: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {
                "query_id": queries[row][0],
                "text": queries[row][1],
                system: float(new[row]),
                against: float(old[row]),
                "change": float(change[row]),
            }
            for row in rows
        ]

    worse = [int(row) for row in order if change[row] < -_SAME]
    better = [int(row) for row in order[::-1] if change[row] > _SAME]
    points = np.linspace(0, len(order) - 1, min(len(order), _CURVE_POINTS)).round().astype(int)
    return {
        "better": len(better),
        "worse": len(worse),
        "same": len(queries) - len(better) - len(worse),
        "worst": shown(worse[:_EXAMPLES]),
        "best": shown(better[:_EXAMPLES]),
        "sorted": [round(float(change[order[point]]), 4) for point in points],
    }
