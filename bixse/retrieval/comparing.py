"""Which structure: each tuned on the same sample, and the cheapest that finds enough taken.

Numbers of a sample are not those of the corpus: lists grow with its square root, a graph's search
with its logarithm. They are compared as they are; the chosen structure is tuned again in full.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa

from bixse.records import CORPUS
from bixse.retrieval.building import build_shard
from bixse.retrieval.device import Device
from bixse.retrieval.measuring import doc_ids_of, point, watch
from bixse.retrieval.scoring import Vectors
from bixse.retrieval.settings import Retrieval, Search, Structure
from bixse.retrieval.shard import Shard
from bixse.retrieval.structures import resident_bytes, resolve
from bixse.retrieval.tuning import Point, Requirements, choose, grid, relevant, tune


def compare(
    doc_ids: Sequence[str],
    vectors_ND: Vectors,
    vectors_QD: Vectors,
    settings: Retrieval,
    rows: int,
    k: int,
    device: Device | None = None,
) -> list[dict[str, Any]]:
    """A row a structure: its tuned search on the sample, or why it is out; one row is `chosen`.

    `rows` is the size of the corpus, whose memory is estimated. Values that `settings` ask for are
    kept. Raises ValueError when no structure reaches `target_recall` within the budgets.
    """
    wanted, dim = Requirements.of(settings), vectors_ND.shape[1]
    points: dict[str, Point] = {}
    out: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        _build(Path(folder), doc_ids, vectors_ND, Retrieval(structure="exact"), device)
        truth = doc_ids_of(Shard.load(Path(folder), device).search(vectors_QD, k))
    for structure in get_args(Structure):
        row: dict[str, Any] = {"structure": structure, "chosen": False}
        out.append(row)
        try:
            full = resolve(settings.replace(structure=structure), rows, dim)
            needed = resident_bytes(full, structure, rows, dim)
            row["memory_mb"] = round(needed / 1e6, 1)
            if wanted.memory_bytes and needed > wanted.memory_bytes:
                raise ValueError(f"{needed / 1e6:.0f} MB are more than the memory budget")
            asked = settings.replace(structure=structure, shards=1)
            on_sample = resolve(asked, *vectors_ND.shape)
            with tempfile.TemporaryDirectory() as folder:
                _build(Path(folder), doc_ids, vectors_ND, on_sample, device)
                # On the CPU: its work is what is compared.
                shard = Shard.load(Path(folder))
                found = _tuned(shard, on_sample, vectors_QD, truth, k, wanted)
        except ValueError as problem:
            row["out"] = str(problem)
            continue
        points[structure] = found
        row |= {
            "search": relevant(structure, found.search),
            "recall": round(found.recall, 6),
            "work": round(found.work),
            "latency_ms": round(found.latency_ms, 3),
        }
    if not points:
        reasons = "; ".join(f"{row['structure']}: {row['out']}" for row in out)
        raise ValueError(f"no structure meets what is asked for: {reasons}")
    best = choose(list(points.values()), wanted)
    next(row for row in out if row["structure"] == best.structure)["chosen"] = True
    return out


def _build(
    folder: Path,
    doc_ids: Sequence[str],
    vectors_ND: Vectors,
    settings: Retrieval,
    device: Device | None,
) -> None:
    empty = [""] * len(doc_ids)
    documents = pa.table({"doc_id": list(doc_ids), "title": empty, "text": empty}, schema=CORPUS)
    build_shard(folder, documents, vectors_ND, settings, device=device)


def _tuned(
    shard: Shard,
    settings: Retrieval,
    vectors_QD: Vectors,
    truth: Sequence[frozenset[str]],
    k: int,
    wanted: Requirements,
) -> Point:
    true = sum(map(len, truth))

    def measure(searches: Sequence[Search]) -> list[Point]:
        seen = watch(shard, settings, searches, vectors_QD, truth, k)
        return [
            point(settings.structure, search, [of_shard], true)
            for search, of_shard in zip(searches, seen, strict=True)
        ]

    return tune(grid(settings, shard.size, k), measure, wanted).chosen
