"""Which structure, and how wide it searches: the cheapest that finds enough.

A `Point` is one way to search, measured on held-out queries against exact search. Recall grows with
`ef_search` and `nprobe`, so the smallest value that finds enough is bisected, for every
`refine_factor` side by side; a round of measurements is asked for as one batch:

    tuning = tune(grid(settings, rows, k), measure, Requirements(target_recall=0.95))

`work`, the bytes that a query reads, each by how it is read (`structures.work`), decides between
points that find enough: it is counted, not timed, so that the same corpus gives the same index.
Milliseconds decide only what is too slow.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bixse.retrieval.settings import Retrieval, Search

_REFINE = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
_EF_LARGEST = 4096


@dataclass(frozen=True)
class Point:
    """One way to search and what it gives, over all shards."""

    structure: str
    search: Search
    recall: float
    work: float
    """Of a query, as `structures.work` counts it."""
    latency_ms: float
    """Median of a query alone, in the slowest shard."""


@dataclass(frozen=True)
class Requirements:
    """What the index must reach, and may cost."""

    target_recall: float
    latency_ms: float | None = None
    memory_bytes: float | None = None

    @classmethod
    def of(cls, settings: Retrieval) -> "Requirements":
        megabytes = settings.memory_budget_mb
        return cls(
            settings.target_recall,
            settings.latency_budget_ms,
            None if megabytes is None else megabytes * 1e6,
        )

    def allow(self, point: Point) -> bool:
        fast = self.latency_ms is None or point.latency_ms <= self.latency_ms
        return fast and point.recall >= self.target_recall


@dataclass(frozen=True)
class Tuning:
    """The chosen point, and every point that was measured."""

    chosen: Point
    points: tuple[Point, ...]


def ladder(largest: int, smallest: int = 1) -> list[int]:
    """Whole numbers from `smallest` to `largest`, each at most a tenth more than the last."""
    steps, value = [], float(smallest)
    while value < largest:
        steps.append(int(value))
        value = max(value + 1, math.floor(value * 1.1))
    return [*steps, largest]


def grid(settings: Retrieval, rows: int, k: int) -> list[list[Search]]:
    """Ways to search, as columns in which recall grows; the settings' own values are fixed.

    `rows` is the number of documents of all shards, `k` the length of the measured rankings.
    """
    if settings.structure == "exact":
        return [[Search()]]
    search = Search(list_rows=rows / settings.nlist if settings.nlist else 0)
    if settings.structure == "hnsw":
        wanted = settings.ef_search
        efs = [wanted] if wanted else ladder(_EF_LARGEST, k)
        return [[search.replace(ef_search=ef) for ef in efs]]
    nprobes = [settings.nprobe] if settings.nprobe else ladder(settings.nlist or 1)
    factors: list[float] = [1]
    if settings.structure in ("ivf_pq", "ivf_rabitq"):
        factors = [settings.refine_factor] if settings.refine_factor else list(_REFINE)
    return [
        [search.replace(nprobe=nprobe, refine_factor=factor) for nprobe in nprobes]
        for factor in factors
    ]


def tune(
    columns: Sequence[Sequence[Search]],
    measure: Callable[[Sequence[Search]], Sequence[Point]],
    wanted: Requirements,
) -> Tuning:
    """The point of least work that finds enough in time, among the first such of each column.

    Where a column holds one value only, it was asked for and is taken whatever it finds.
    Raises ValueError that says the best that was measured when no point is good enough.
    """
    known: dict[Search, Point] = {}

    def look(searches: Sequence[Search]) -> None:
        todo = [search for search in dict.fromkeys(searches) if search not in known]
        known.update(zip(todo, measure(todo) if todo else (), strict=True))

    # The widest of every column says which can find enough at all.
    look([column[-1] for column in columns])
    given = len(columns) == 1 and len(columns[0]) == 1
    if given:
        wanted = replace(wanted, target_recall=0.0)
    bounds = [
        (column, 0, len(column) - 1)
        for column in columns
        if known[column[-1]].recall >= wanted.target_recall
    ]
    while open_ := [(column, low, high) for column, low, high in bounds if low < high]:
        look([column[(low + high) // 2] for column, low, high in open_])
        bounds = [_halved(known, bound, wanted.target_recall) for bound in bounds]
    points = tuple(sorted(known.values(), key=lambda point: point.work))
    return Tuning(choose(points, wanted), points)


def choose(points: Sequence[Point], wanted: Requirements) -> Point:
    """The point of least work that meets the requirements.

    Raises ValueError when none does.
    """
    good = [point for point in points if wanted.allow(point)]
    if good:
        return min(good, key=lambda point: (point.work, point.latency_ms))
    best = max(points, key=lambda point: point.recall)
    enough = [point for point in points if point.recall >= wanted.target_recall]
    if not enough:
        raise ValueError(
            f"no search of {_structures(points)} reaches recall {wanted.target_recall:g}, the best "
            f"is {best.recall:.3f}: lower --retrieval.target-recall or choose another structure"
        )
    fastest = min(enough, key=lambda point: point.latency_ms)
    raise ValueError(
        f"recall {wanted.target_recall:g} takes {fastest.latency_ms:.3g} ms in "
        f"{fastest.structure}, more than --retrieval.latency-budget-ms {wanted.latency_ms:g}: "
        "raise it, lower --retrieval.target-recall, or take more shards"
    )


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both recall and work, by rising work."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.work, -point.recall)):
        if not best or point.recall > best[-1].recall:
            best.append(point)
    return best


def table(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Points as rows of the manifest; `pareto` marks those that none beats."""
    best = set(map(id, pareto(points)))
    return [
        {
            **asdict(point),
            "search": relevant(point.structure, point.search),
            "recall": round(point.recall, 6),
            "work": round(point.work),
            "latency_ms": round(point.latency_ms, 3),
            "pareto": id(point) in best,
        }
        for point in points
    ]


def relevant(structure: str, search: Search) -> dict[str, Any]:
    """The parameters that a structure reads."""
    names = {
        "exact": (),
        "hnsw": ("ef_search",),
        "ivf_flat": ("nprobe",),
    }.get(structure, ("nprobe", "refine_factor"))
    return {name: getattr(search, name) for name in names}


def _halved(
    known: dict[Search, Point], bound: tuple[Sequence[Search], int, int], target: float
) -> tuple[Sequence[Search], int, int]:
    column, low, high = bound
    if low == high:
        return bound
    middle = (low + high) // 2
    if known[column[middle]].recall >= target:
        return column, low, middle
    return column, middle + 1, high


def _structures(points: Sequence[Point]) -> str:
    return " or ".join(sorted({point.structure for point in points}))
