"""Peak memory of a judging job's driver and actor, at N and at ten times N pairs.

    python -m benchmarks.judge_memory --pairs 20000
    python -m benchmarks.judge_memory --quick --json

The job is `jobs.judge` from pairs on disk to judgments and labels on disk, with corpus and queries
that grow as the pairs do. At the engine's seam stands a judge that grades by a hash: an engine's
own memory is set by its configuration, and what is asked here is what grows around it. Memory is a
process's anonymous pages (RssAnon): what it holds itself, without mapped files, which the kernel
may drop. Each size runs in a driver of its own; texts are made up.
"""

import hashlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import tyro

from bixse.artifacts import Artifact, Draft, begin
from bixse.judging.asked import Answers, Asked
from bixse.judging.settings import Judging
from bixse.records import CORPUS, PAIRS, QUERIES, Judgment
from bixse.retrieval.settings import Lexical
from bixse.scale import UMBRELA
from jobs.judges.seam import Judge
from jobs.recipe import Placement

PART = 10_000
PER_QUERY = 50


@dataclass(frozen=True)
class Options:
    """Sizes."""

    pairs: int = 20_000
    """N: pairs of the smaller job."""
    times: int = 10
    """How many times larger the larger job is."""
    quick: bool = False
    """Small: the mechanics only."""
    json: bool = False
    """One JSON object on standard output."""


class HashJudge:
    """Grades by a hash of the texts, and notes the memory of the process that it is in."""

    def __init__(self, note: str) -> None:
        self._watch = watched(Path(note))
        self._watch.__enter__()

    def __call__(self, asked: Sequence[Asked]) -> Answers:
        return Answers([self._judgment(pair) for pair in asked])

    def _judgment(self, pair: Asked) -> Judgment:
        share = hashlib.sha256(f"{pair.query}|{pair.passage}".encode()).digest()[0] / 255
        probs = (1 - share, 0.0, 0.0, share)
        return Judgment(pair.query_id, pair.doc_id, probs, share, "hash", "", "llm")


@contextmanager
def watched(note: Path, kinds: Sequence[str] = ("RssAnon",)) -> Iterator[None]:
    """Write this process's peak of some kinds of memory (kB) together, ten times a second."""
    over = threading.Event()

    def watch() -> None:
        peak = 0
        while not over.wait(0.1):
            if (now := held_kb(kinds)) > peak:
                peak = now
                note.write_text(str(peak))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    over.set()
    thread.join()


def held_kb(kinds: Sequence[str]) -> int:
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split(":")[0] in kinds)


def job(folder: str, pairs: int) -> dict[str, float]:
    """One job in this process; the peaks of driver and actor, in MB."""
    import benchmarks.judge_memory as here  # What stands in __main__ is unknown to workers.
    from jobs.judge import judge

    place = Path(folder)
    chosen = Judge(
        build=here.HashJudge,
        arguments=(str(place / "actor"),),
        scale=UMBRELA,
        origin="llm",
        signature={"judge": "hash"},
        in_flight=3,
        prefixes=("query", "document"),
    )
    corpus, queries, wanted = make(place, pairs)
    judging = Judging(judge="vllm", store=str(place / "labels"))
    with patch("jobs.judge.choose", lambda *_: chosen), watched(place / "driver"):
        out = str(place / "judgments")
        arguments = (None, judging, Lexical(), None, Placement(), out)
        made = judge(wanted, [queries], corpus, *arguments)
    if made.manifest.rows != pairs:
        raise RuntimeError(f"{made.manifest.rows} of {pairs} pairs were judged")
    return {name: int((place / name).read_text()) / 1024 for name in ("driver", "actor")}


def make(place: Path, pairs: int) -> tuple[Artifact, Artifact, Artifact]:
    """Every query with documents of its own; a text of about 600 characters each."""
    queries = -(-pairs // PER_QUERY)
    corpus = (
        {"doc_id": f"d{n}", "title": "", "text": f"document number {n} " * 30} for n in range(pairs)
    )
    asked = (
        {"query_id": f"q{n}", "text": f"query number {n}", "origin": "given"}
        for n in range(queries)
    )
    wanted = (
        {"query_id": f"q{n // PER_QUERY}", "doc_id": f"d{n}", "source": "bm25",
         "rank": 1 + n % PER_QUERY, "score": 0.0}
        for n in range(pairs)
    )  # fmt: skip
    return (
        written(place, "corpus", corpus, CORPUS),
        written(place, "queries", asked, QUERIES),
        written(place, "pairs", wanted, PAIRS),
    )


def written(place: Path, kind: str, rows: Iterator[dict[str, Any]], schema: pa.Schema) -> Artifact:
    draft = begin(str(place / kind), kind, config={}, inputs={})
    assert isinstance(draft, Draft)
    number = 0
    while some := list(islice(rows, PART)):
        draft.write_part(number, pa.Table.from_pylist(some, schema=schema))
        number += 1
    return draft.finish()


def compared(
    found: Mapping[str, Mapping[str, float]], processes: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Peaks in MB of each process by the size of its job, smaller first, and how they grew."""
    small, large = found.values()
    return {
        name: {
            "peak_mb": {size: round(peaks[name], 1) for size, peaks in found.items()},
            "ratio": round(large[name] / small[name], 3),
        }
        for name in processes
    }


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.judge_memory")
    if options.quick:
        options = replace(options, pairs=2000)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="bixse-bench-") as folder, redirect_stdout(sys.stderr):
        for pairs in (options.pairs, options.pairs * options.times):
            place = Path(folder) / str(pairs)
            place.mkdir()
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found[str(pairs)] = pool.submit(job, str(place), pairs).result()
            print(f"{pairs} pairs: {found[str(pairs)]}", file=sys.stderr)
    result = compared(found, ("driver", "actor"))
    print(json.dumps(result) if options.json else "\n".join(f"{k} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
