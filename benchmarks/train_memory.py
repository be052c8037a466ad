"""Peak memory of a training job's driver and worker, at N and at ten times N judged documents.

    python -m benchmarks.train_memory --documents 20000
    python -m benchmarks.train_memory --quick --json

The job is `jobs.train` from judgments, queries and corpus on disk to a trained encoder, a few steps
long, since memory is what is asked here. Memory is a process's anonymous pages and those of the
object store that it has touched (RssAnon, RssShmem), without mapped files, which the kernel may
drop. Each size runs in a driver of its own; texts are made up.
"""

import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tyro

from benchmarks.judge_memory import PER_QUERY, compared, make, watched, written
from benchmarks.made_encoder import make_encoder
from bixse.records import JUDGMENTS
from bixse.training.settings import Training
from jobs.recipe import Placement

HELD = ("RssAnon", "RssShmem")


@dataclass(frozen=True)
class Options:
    """Sizes."""

    documents: int = 20_000
    """N: judged documents of the smaller job, fifty a query."""
    times: int = 10
    """How many times larger the larger job is."""
    steps: int = 3
    """Steps of training."""
    quick: bool = False
    """Small: the mechanics only."""
    json: bool = False
    """One JSON object on standard output."""


def job(folder: str, documents: int, start: str, steps: int) -> dict[str, float]:
    """One job in this process; the peaks of driver and worker, in MB."""
    import benchmarks.train_memory as here  # What stands in __main__ is unknown to workers.
    from jobs.train import train

    place = Path(folder)
    corpus, queries, _ = make(place, documents)
    rows = (
        {"query_id": f"q{n // PER_QUERY}", "doc_id": f"d{n}", "grade_probs": [0.5, 0.5],
         "relevance": 0.5, "judge": "made", "prompt": "", "origin": "given"}
        for n in range(documents)
    )  # fmt: skip
    judgments = written(place, "judgments", rows, JUDGMENTS)
    settings = Training(max_steps=steps, batch_size=8, document_tokens=64)
    work = partial(here.work, str(place / "worker"))
    with patch("jobs.train._work", work), watched(place / "driver", HELD):
        out = str(place / "encoder")
        train(judgments, [queries], corpus, settings, start, Placement(), out)
    return {name: int((place / name).read_text()) / 1024 for name in ("driver", "worker")}


def work(note: str, dev: Any, encode_tokens: Any, job: Any) -> Any:
    """A worker that notes its memory; of named arguments, for Ray adds one to any others."""
    from jobs.train import _work

    with watched(Path(note), HELD):
        return _work(dev, encode_tokens, job)


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.train_memory")
    if options.quick:
        options = replace(options, documents=2000)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="bixse-bench-") as folder, redirect_stdout(sys.stderr):
        start = str(make_encoder("minilm-l6", Path(folder)))
        for documents in (options.documents, options.documents * options.times):
            place = Path(folder) / str(documents)
            place.mkdir()
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                asked = pool.submit(job, str(place), documents, start, options.steps)
                found[str(documents)] = asked.result()
            print(f"{documents} documents: {found[str(documents)]}", file=sys.stderr)
    result = compared(found, ("driver", "worker"))
    print(json.dumps(result) if options.json else "\n".join(f"{k} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
