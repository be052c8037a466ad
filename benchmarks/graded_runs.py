"""Wanted retrievers, each a file of its values: made by processes that share a device."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.graded_data import GradedSet, Sources, load, read_sources
from benchmarks.retrievers import Tokens, Workbench, share_machine, tokens_of
from benchmarks.wanted import Wanted
from bixse.models.encoder import encoder_fingerprint, load_model, resolve


@dataclass(frozen=True)
class Prepared:
    """Where a process finds what a set teaches and examines."""

    name: str
    sources: Sources
    split: str
    tokens: Path


class Preparation:
    """Sets as artefacts and tokens under `out`, for one base encoder and device."""

    def __init__(self, data: Path, out: Path, split: str, start: str, device: str) -> None:
        """Raises ValueError when there is no such encoder or device."""
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here")
        self._data, self._out, self._split = data, out, split
        self._start, self._device = start, device
        self._fingerprint = encoder_fingerprint(resolve(start))

    @cached_property
    def _model(self) -> Any:
        return load_model(self._start, self._device)

    def of(self, name: str) -> Prepared:
        """Raises ValueError as `read_sources` and `load`."""
        out = self._out / name
        sources = read_sources(name, self._data, out)
        tokens = out / f"tokens-{self._fingerprint[:12]}-{self._device}.pt"
        if not tokens.exists():
            tokens_of(self._model, load(sources, self._split).corpus).save(tokens)
        return Prepared(name, sources, self._split, tokens)


class Maker:
    """What one process holds: the models, and the sets that it has met."""

    def __init__(self, start: str, device: str) -> None:
        self._bench, self._device = Workbench(start, device), device
        self._sets: dict[str, tuple[GradedSet, Tokens]] = {}

    def make(self, wanted: Wanted, prepared: Prepared) -> str:
        """Write the values of one retriever. A line about it."""
        started = time.perf_counter()
        if prepared.name not in self._sets:
            tokens = Tokens.load(prepared.tokens, self._device)
            self._sets[prepared.name] = load(prepared.sources, prepared.split), tokens
        graded, tokens = self._sets[prepared.name]
        found: dict[str, Any] = {"device": self._device}
        if wanted.settings is None:
            self._bench.reset()
        else:
            reads = wanted.settings.objective.reads_preferences
            labels = graded.labels(wanted.noise, wanted.settings.seed, reads)
            history = self._bench.tune(labels, wanted.settings).history
            found |= {"steps": len(history), "loss": [history[0]["loss"], history[-1]["loss"]]}
            found["training_seconds"] = round(time.perf_counter() - started, 3)
        values = self._bench.ndcg(tokens, graded.asked, graded.qrels)
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
