"""Documents a second and peak memory of encoding: bixse against sentence-transformers, in turn.

    python -m benchmarks.encode --quick --json
    python -m benchmarks.encode --data ../shared/data/cranfield --start DIR --device cuda

The same model and texts for both, in bfloat16 where the device has instructions for it. bixse is
`Encoder.encode`; sentence-transformers its `encode_document`, which sorts by length, at the fastest
of several settings: the batch size, and on a CPU weights in float32 (`batch-…`) or, as ours are and
less exact, in bfloat16 (`half-…`). Each turn is a process of its own; loading and the first batch
do not count. Texts are those of `benchmarks.train`.

It needs neither Ray nor vLLM nor FAISS.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import tyro

from benchmarks.made_encoder import Shape, make_encoder
from benchmarks.text_pairs import from_corpus, from_documentation
from benchmarks.train import turn_of
from bixse.models.settings import PACKAGED

System = Literal[
    "bixse", "batch-8", "batch-16", "batch-32", "batch-64", "half-16", "half-32",
    "batch-128", "batch-256", "batch-512",
]  # fmt: skip
RIVALS: dict[str, tuple[System, ...]] = {
    "cpu": ("batch-8", "batch-16", "batch-32", "batch-64", "half-16", "half-32"),
    "cuda": ("batch-64", "batch-128", "batch-256", "batch-512"),
}


@dataclass(frozen=True)
class Options:
    """What is measured, and on what."""

    start: str = PACKAGED
    """The encoder: a directory, a hub id, or the packaged one."""
    made: Shape | None = None
    """An untrained encoder of this shape, made on the spot, instead of `start`."""
    data: str | None = None
    """A directory with `corpus.jsonl`; unset: spans of Python's documentation."""
    documents: int = 2000
    """Documents a turn."""
    rounds: int = 3
    """Turns of each system."""
    device: str = "cpu"
    """Where both run."""
    threads: int | None = None
    """Threads of torch; unset: as torch decides."""
    quick: bool = False
    """Two rounds of 200 documents: under five minutes on two cores."""
    json: bool = False
    """End with one JSON object on standard output."""
    turn: System | None = None
    """Take one turn and print it (what this program starts itself with)."""


def main() -> None:
    options = tyro.cli(Options)
    if options.quick:
        options = replace(options, quick=False, rounds=2, documents=200)
    if options.turn is not None:
        print(json.dumps(take_turn(options, options.turn)))
        return
    with TemporaryDirectory() as aside:
        if options.made is not None:
            start = str(make_encoder(options.made, Path(aside)))
            options = replace(options, start=start, made=None)
        result = summary(compared(options))
    print(
        f"bixse {result['bixse_docs_s']:.1f}, sentence-transformers "
        f"{result['sentence_transformers_docs_s']:.1f} docs/s: ratio {result['ratio']:.2f}",
        file=sys.stderr,
    )
    if options.json:
        print(json.dumps(result))


def compared(options: Options) -> dict[str, list[dict[str, float]]]:
    """The turns of every system, a round after the other."""
    turns: dict[str, list[dict[str, float]]] = {}
    for number in range(options.rounds):
        for system in ("bixse", *RIVALS[options.device]):
            found = turn_of("benchmarks.encode", replace(options, turn=system, json=False), {})
            turns.setdefault(system, []).append(found)
            print(
                f"round {number + 1}: {system:<8} {found['docs_s']:8.1f} docs/s, "
                f"peak {found['rss_mb']:.0f} MB",
                file=sys.stderr,
            )
    return turns


def summary(turns: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over rounds; the ratio is the median of the rounds' own ratios."""

    def median(system: str, key: str) -> float:
        return statistics.median(turn[key] for turn in turns[system])

    rivals = [system for system in turns if system != "bixse"]
    rival = max(rivals, key=lambda system: median(system, "docs_s"))
    ratios = [
        ours["docs_s"] / theirs["docs_s"]
        for ours, theirs in zip(turns["bixse"], turns[rival], strict=True)
    ]
    return {
        "sentence_transformers_best": rival,
        "sentence_transformers_rss_mb": median(rival, "rss_mb"),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "bixse_docs_s": median("bixse", "docs_s"),
        "sentence_transformers_docs_s": median(rival, "docs_s"),
        "ratio": statistics.median(ratios),
        "peak_rss_mb": median("bixse", "rss_mb"),
    }


def take_turn(options: Options, system: System) -> dict[str, float]:
    import torch

    from bixse.models.encoder import Encoder, load_model
    from bixse.precision import autocast

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    texts = documents_of(options)
    if system == "bixse":
        encoder = Encoder.load(options.start, options.device)
    else:
        # As `Encoder.load` has it, without what it changes for speed.
        model = load_model(options.start, options.device)
        half = options.device == "cuda" or system.startswith("half")
        model = model.bfloat16() if half else model.float()

    def encode(some: Sequence[str]) -> np.ndarray[Any, Any]:
        if system == "bixse":
            return encoder.encode(some, "document")
        with nullcontext() if half else autocast(model.device):
            return model.encode_document(
                list(some),
                batch_size=int(system.split("-")[1]),
                normalize_embeddings=True,
                show_progress_bar=False,
            )

    encode(texts[:64])
    # Kernels are chosen by shape: one pass before the one that counts.
    if options.device == "cuda":
        encode(texts)
    started = time.perf_counter()
    assert len(encode(texts)) == len(texts)
    seconds = time.perf_counter() - started
    rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"docs_s": len(texts) / seconds, "rss_mb": rss_mb}


def documents_of(options: Options) -> Sequence[str]:
    """Different documents of different lengths. Raises ValueError when there are too few."""
    if options.data is None:
        return [text for _, text in from_documentation(options.documents)]
    found = [text for _, text in from_corpus(Path(options.data))]
    if len(found) < options.documents:
        raise ValueError(f"{options.data} has {len(found)} documents: take fewer --documents")
    return found[: options.documents]


if __name__ == "__main__":
    main()
