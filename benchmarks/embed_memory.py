"""Peak memory of encoding and indexing, at N and at ten times N documents.

    python -m benchmarks.embed_memory --documents 100000
    python -m benchmarks.embed_memory --quick --json

The job is `jobs.embed` and `jobs.index` over a corpus on disk, with an encoder of one layer, since
memory is what is asked here: that of their driver and that of the actor which encodes. What a task
holds that builds a shard is measured by `benchmarks.index_memory`. `shard_rows` is N in both runs,
so that the larger corpus has ten shards. Memory is a process's anonymous pages and those of the
object store that it has touched (RssAnon, RssShmem), without mapped files, which the kernel may
drop. Each size runs in a driver of its own; texts are made up.
"""

import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import tyro

from benchmarks.judge_memory import compared, watched, written
from benchmarks.made_encoder import make_encoder
from bixse.records import CORPUS
from bixse.retrieval.settings import Retrieval
from jobs.embed import EmbedUnit
from jobs.recipe import Placement

HELD = ("RssAnon", "RssShmem")


@dataclass(frozen=True)
class Options:
    """Sizes."""

    documents: int = 100_000
    """N: documents of the smaller corpus, and of a shard."""
    times: int = 10
    """How many times larger the larger corpus is."""
    quick: bool = False
    """Small: the mechanics only."""
    json: bool = False
    """One JSON object on standard output."""


class WatchedUnit(EmbedUnit):
    """Encodes, and notes the memory of the process that it is in."""

    def __init__(self, encoder: str, fingerprint: str, placement: Placement) -> None:
        super().__init__(encoder, fingerprint, placement)
        # Beside the encoder, which the actor reads from there.
        self._watch = watched(Path(encoder).parent / "actor", HELD)
        self._watch.__enter__()


def job(folder: str, documents: int, shard_rows: int) -> dict[str, float]:
    """One job in this process; the peaks of driver and actor, in MB, and seconds."""
    import benchmarks.embed_memory as here  # What stands in __main__ is unknown to workers.
    from jobs.embed import embed
    from jobs.index import index

    place = Path(folder)
    encoder = str(make_encoder("tiny", place))
    rows = (
        {"doc_id": f"d{n:09d}", "title": "", "text": f"document number {n} of many others"}
        for n in range(documents)
    )
    corpus = written(place, "corpus", rows, CORPUS)
    settings = Retrieval(structure="ivf_flat", shard_rows=shard_rows)
    started = time.perf_counter()
    with patch("jobs.embed.EmbedUnit", here.WatchedUnit), watched(place / "driver", HELD):
        vectors = embed(corpus, encoder, Placement(), f"{place}/embeddings")
        made = index(vectors, corpus, [], encoder, settings, Placement(), f"{place}/index")
    if made.manifest.rows != documents:
        raise RuntimeError(f"{made.manifest.rows} of {documents} documents were indexed")
    peaks = {name: int((place / name).read_text()) / 1024 for name in ("driver", "actor")}
    return {**peaks, "seconds": time.perf_counter() - started}


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.embed_memory")
    if options.quick:
        options = replace(options, documents=5000)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="bixse-bench-") as folder, redirect_stdout(sys.stderr):
        for documents in (options.documents, options.documents * options.times):
            place = Path(folder) / str(documents)
            place.mkdir()
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                asked = pool.submit(job, str(place), documents, options.documents)
                found[str(documents)] = asked.result()
            print(f"{documents} documents: {found[str(documents)]}", file=sys.stderr)
    result = compared(found, ("driver", "actor"))
    print(json.dumps(result) if options.json else "\n".join(f"{k} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
