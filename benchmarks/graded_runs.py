"""Wanted retrievers, each a file of its values: made by processes that share a device."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from benchmarks.graded_data import GradedSet, Sources, load
from benchmarks.retrievers import Workbench, share_machine
from benchmarks.wanted import Wanted
from bixse.records import Split


@dataclass(frozen=True)
class Prepared:
    """Where a process finds what a set teaches and examines."""

    name: str
    sources: Sources
    split: Split


class Maker:
    """What one process holds: the models, and the sets that it has met."""

    def __init__(self, start: str, device: str) -> None:
        self._bench, self._device = Workbench(start, device), device
        self._sets: dict[str, GradedSet] = {}

    def make(self, wanted: Wanted, prepared: Prepared) -> str:
        """Write the values of one retriever. A line about it."""
        started = time.perf_counter()
        if prepared.name not in self._sets:
            self._sets[prepared.name] = load(prepared.sources, prepared.split)
        graded = self._sets[prepared.name]
        found: dict[str, Any] = {"device": self._device}
        if wanted.settings is None:
            self._bench.reset()
        else:
            reads = wanted.settings.objective.reads_preferences
            labels = graded.labels(wanted.noise, wanted.settings.seed, reads)
            history = self._bench.tune(labels, wanted.settings).history
            found |= {"steps": len(history), "loss": [history[0]["loss"], history[-1]["loss"]]}
            found["training_seconds"] = round(time.perf_counter() - started, 3)
        values = self._bench.ndcg(graded.corpus, graded.asked, graded.qrels)
        found["seconds"] = round(time.perf_counter() - started, 3)
        wanted.write(values, found)
        mean = sum(values.values()) / len(values)
        return f"{wanted.name}: nDCG@10 {mean:.4f} in {found['seconds']:.1f} s"


_maker: Maker | None = None
"""Of this process."""


def _enter(start: str, device: str, processes: int) -> None:
    global _maker
    share_machine(processes, device)
    _maker = Maker(start, device)


def _make(wanted: Wanted, prepared: Prepared) -> str:
    assert _maker is not None
    return _maker.make(wanted, prepared)


def make_all(
    wanted: Sequence[Wanted], preparation: Callable[[str], Prepared], start: str, device: str,
    processes: int,
) -> None:  # fmt: skip
    """Make retrievers in this order, a set prepared before its first.

    What fails is raised when all others are done: a retriever that diverges takes none along.
    """
    known: dict[str, Prepared] = {}
    with ProcessPoolExecutor(
        processes,
        mp_context=get_context("spawn"),
        initializer=_enter,
        initargs=(start, device, processes),
    ) as pool:
        coming = []
        for one in wanted:
            if one.set not in known:
                known[one.set] = preparation(one.set)
            coming.append(pool.submit(_make, one, known[one.set]))
        for number, done in enumerate(as_completed(coming), start=1):
            print(f"{number}/{len(coming)} {done.result()}", flush=True)
