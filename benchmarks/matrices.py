"""What FAISS's matrix products cost as it is installed, and as `retrieval/library.py` loads it.

    python -m benchmarks.matrices --rows 100000 --rounds 5
    python -m benchmarks.matrices --quick --json

Exact search of batches, and the training of an inverted file, each side in a process of its own,
taking turns; a ratio is the median of the rounds' ratios. One thread unless told.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import tyro

Side = Literal["installed", "ours"]
SIDES: tuple[Side, ...] = ("installed", "ours")


@dataclass(frozen=True)
class Options:
    """Sizes, and how often."""

    rows: int = 100_000
    """Made-up vectors."""
    dim: int = 384
    """Their dimension."""
    batches: tuple[int, ...] = (1, 4, 16, 32, 256, 1024)
    """Queries of a call."""
    nlist: int = 1024
    """Lists of the inverted file."""
    train_rows: int = 40_000
    """Vectors that it is trained on."""
    threads: int = 1
    """Threads of FAISS."""
    rounds: int = 5
    """Rounds each side takes, in turn."""
    quick: bool = False
    """Small and short: the mechanics only."""
    json: bool = False
    """One JSON object on standard output."""
    measure: Side | None = None
    """Measure one side in this process and print what it took."""


def main() -> None:
    options = tyro.cli(Options)
    if options.quick:
        options = replace(options, rows=4000, dim=64, nlist=16, train_rows=1000, rounds=3)
    if options.measure is not None:
        print(json.dumps(measure(options)))
        return
    rounds = []
    for number in range(options.rounds):
        order = SIDES if number % 2 == 0 else SIDES[::-1]
        took = {side: _in_a_process(options, side) for side in order}
        rounds.append([took[side] for side in SIDES])
    found = {
        name: {
            **{
                side: round(statistics.median(took[place][name] for took in rounds), 4)
                for place, side in enumerate(SIDES)
            },
            "ratio": round(statistics.median(was[name] / now[name] for was, now in rounds), 2),
        }
        for name in rounds[0][0]
    }
    if options.json:
        print(json.dumps(found))
        return
    for name, values in found.items():
        print(name, "  ".join(f"{key}={value}" for key, value in values.items()))


def measure(options: Options) -> dict[str, float]:
    """Milliseconds a query of each batch, and seconds of training and filling."""
    if options.measure == "ours":
        from bixse.retrieval.library import faiss, use_threads

        use_threads(options.threads)
    else:
        import faiss

        faiss.omp_set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    vectors_ND = rng.standard_normal((options.rows, options.dim), np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    flat = faiss.IndexFlatIP(options.dim)
    flat.add(vectors_ND)
    found = {}
    for batch in options.batches:
        queries_QD = vectors_ND[:batch]
        flat.search(queries_QD, 10)
        started, asked = time.perf_counter(), 0
        while asked == 0 or time.perf_counter() - started < 0.5:
            flat.search(queries_QD, 10)
            asked += batch
        found[f"exact_{batch}_ms"] = (time.perf_counter() - started) / asked * 1000
    lists = faiss.index_factory(options.dim, f"IVF{options.nlist},Flat", faiss.METRIC_INNER_PRODUCT)
    started = time.perf_counter()
    lists.train(vectors_ND[: options.train_rows])
    trained = time.perf_counter()
    lists.add(vectors_ND)
    return found | {"train_s": trained - started, "fill_s": time.perf_counter() - trained}


def _in_a_process(options: Options, side: Side) -> dict[str, float]:
    # OpenBLAS is told its kernels when it is loaded.
    given = asdict(replace(options, measure=side, json=False, quick=False))
    arguments = [sys.executable, "-m", "benchmarks.matrices"]
    for name, value in given.items():
        if isinstance(value, bool):
            continue
        values = value if isinstance(value, tuple) else (value,)
        arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(
        arguments, check=True, stdout=subprocess.PIPE, env={**os.environ, **threads}
    )
    took: dict[str, float] = json.loads(done.stdout)
    return took


if __name__ == "__main__":
    main()
