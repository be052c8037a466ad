"""Pairs a second and peak memory of training: bixse against sentence-transformers, turn by turn.

    python -m benchmarks.train --quick --json
    python -m benchmarks.train --data ../shared/data/cranfield --start DIR --device cuda

One run is the same model, rows, batches, precision and optimiser for both: InfoNCE over (query,
document) pairs in batches of `batch_size`, AdamW fused, gradients clipped, dropout off, bfloat16
where the device has instructions for it. bixse runs `train_loop`, all of it. sentence-transformers
runs the step of its trainer (its collator, its loss, prefetched by a worker thread) without the
trainer around it: MultipleNegativesRankingLoss, and its cached form with mini-batches by a token
budget; the faster of the two is what bixse is compared with. `--even` gives it, beyond what it
comes with, our choice of attention and our allocator settings, to tell the sources of a gain apart.

On a GPU the work of a step is counted too (`benchmarks/flops.py`), and set beside the most that the
card does, measured by one large matrix product: `peak_share`. There bixse compiles its layers; the
steps of a turn that do not count are those in which it does.

Each turn is a process of its own, so that its peak memory is its own. With `--data` (a directory
with `corpus.jsonl`) a pair is a document's title, or opening words without one, and its text;
otherwise spans of Python's own documentation, of log-normal length. Only lengths matter here.

It needs neither Ray nor vLLM nor FAISS.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import tyro

from benchmarks.made_encoder import Shape, make_encoder
from benchmarks.text_pairs import Pairs, pairs_of
from bixse.models.settings import PACKAGED
from bixse.training.allocator import CPU_ALLOCATOR
from bixse.training.objective_settings import InfoNCE
from bixse.training.settings import Training

System = Literal["bixse", "plain", "cached"]
RIVALS: tuple[System, ...] = ("plain", "cached")
WARM_UP = 2
"""Steps of a turn that do not count."""


@dataclass(frozen=True)
class Options:
    """What is measured, and on what."""

    start: str = PACKAGED
    """The encoder: a directory, a hub id, or the packaged one."""
    made: Shape | None = None
    """An untrained encoder of this shape, made on the spot, instead of `start`."""
    data: str | None = None
    """A directory with `corpus.jsonl`; unset: spans of Python's documentation."""
    batch_size: int = 64
    """Pairs a step."""
    steps: int = 12
    """Steps a turn, the first two of which do not count."""
    rounds: int = 3
    """Turns of each system."""
    query_tokens: int = 64
    """Longest query."""
    document_tokens: int = 256
    """Longest document."""
    micro_batch_tokens: int | None = None
    """bixse's GradCache, and the token budget of sentence-transformers' cached loss (else 4096)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products."""
    device: str = "cpu"
    """Where both run."""
    threads: int | None = None
    """Threads of torch; unset: as torch decides."""
    even: bool = False
    """Give sentence-transformers our attention and allocator settings too."""
    quick: bool = False
    """Two rounds of five steps of 32 pairs: under five minutes on two cores."""
    json: bool = False
    """End with one JSON object on standard output."""
    turn: System | None = None
    """Take one turn and print it (what this program starts itself with)."""


def main() -> None:
    options = tyro.cli(Options)
    if options.quick:
        options = replace(options, quick=False, steps=5, rounds=2, batch_size=32)
    if options.turn is not None:
        print(json.dumps(take_turn(options, options.turn)))
        return
    with TemporaryDirectory() as aside:
        if options.made is not None:
            start = str(make_encoder(options.made, Path(aside)))
            options = replace(options, start=start, made=None)
        result = summary(compared(options))
    print(
        f"bixse {result['bixse_pairs_s']:.1f}, sentence-transformers "
        f"({result['sentence_transformers_loss']}) {result['sentence_transformers_pairs_s']:.1f} "
        f"pairs/s: ratio {result['ratio']:.2f}",
        file=sys.stderr,
    )
    if options.json:
        print(json.dumps(result))


def compared(options: Options) -> dict[str, list[dict[str, float]]]:
    """The turns of every system, a round after the other."""
    turns: dict[str, list[dict[str, float]]] = {}
    for number in range(options.rounds):
        for system in ("bixse", *RIVALS):
            found = in_process(options, system)
            turns.setdefault(system, []).append(found)
            share = f", {found['peak_share']:.1%} of the peak" if "peak_share" in found else ""
            print(
                f"round {number + 1}: {system:<7} {found['pairs_s']:8.1f} pairs/s, "
                f"peak {found['rss_mb']:.0f} MB{share}",
                file=sys.stderr,
            )
    return turns


def summary(turns: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over rounds; the ratio is the median of the rounds' own ratios."""

    def median(system: str, key: str) -> float:
        return statistics.median(turn[key] for turn in turns[system])

    rival = max(RIVALS, key=lambda system: median(system, "pairs_s"))
    ratios = [
        ours["pairs_s"] / theirs["pairs_s"]
        for ours, theirs in zip(turns["bixse"], turns[rival], strict=True)
    ]
    result: dict[str, Any] = {
        "sentence_transformers_loss": rival,
        "sentence_transformers_rss_mb": median(rival, "rss_mb"),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
    if "gpu_mb" in turns["bixse"][0]:
        result["peak_gpu_mb"] = median("bixse", "gpu_mb")
        result["sentence_transformers_gpu_mb"] = median(rival, "gpu_mb")
        for name in ("tflops", "peak_tflops", "peak_share"):
            result[name] = median("bixse", name)
        result["sentence_transformers_peak_share"] = median(rival, "peak_share")
    return result | {
        "bixse_pairs_s": median("bixse", "pairs_s"),
        "sentence_transformers_pairs_s": median(rival, "pairs_s"),
        "ratio": statistics.median(ratios),
        "peak_rss_mb": median("bixse", "rss_mb"),
    }


def in_process(options: Options, system: System) -> dict[str, float]:
    """A turn in a process of its own, bixse's with the allocator that `jobs.train` sets."""
    ours = system == "bixse" or options.even
    environment = CPU_ALLOCATOR if ours and options.device == "cpu" else {}
    return turn_of("benchmarks.train", replace(options, turn=system), environment)


def turn_of(module: str, options: Any, environment: Mapping[str, str]) -> dict[str, float]:
    """What `python -m module` prints last, run with these options."""
    flags: list[str] = []
    for name, value in vars(options).items():
        if isinstance(value, bool):
            flags += [f"--{name.replace('_', '-')}"] if value else []
        elif value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(
        [sys.executable, "-m", module, *flags],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def take_turn(options: Options, system: System) -> dict[str, float]:
    import torch

    from bixse.models.encoder import load_model

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = load_model(options.start, options.device)
    pairs = pairs_of(options.data, options.steps * options.batch_size)
    seconds = (
        with_bixse(options, model, pairs)
        if system == "bixse"
        else with_sentence_transformers(options, model, pairs, system)
    )
    found = {
        "pairs_s": options.batch_size * len(seconds[WARM_UP:]) / sum(seconds[WARM_UP:]),
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if model.device.type == "cuda":
        from benchmarks.flops import flops_of, peak_tflops

        tflops = flops_of(model, counted_texts(options, pairs)) / sum(seconds[WARM_UP:]) / 1e12
        peak = peak_tflops()
        found |= {"tflops": tflops, "peak_tflops": peak, "peak_share": tflops / peak}
        found["gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def counted_texts(options: Options, pairs: Pairs) -> list[tuple[list[str], int]]:
    """Queries and documents of the steps that count, and where they are cut."""
    from bixse.training.groups import epoch_rows
    from bixse.training.loop import plan_of

    settings, labels = settings_of(options), labels_of(pairs)
    plan = plan_of(labels, settings)
    rows = epoch_rows(labels, settings.docs_per_query, settings.seed, 0)
    steps = range(WARM_UP, plan.steps)
    numbers = np.concatenate([rows[row] for step in steps for row in plan.rows_of(step)]).tolist()
    limits = (settings.query_tokens, settings.document_tokens)
    return [([pairs[n][place] for n in numbers], limit) for place, limit in enumerate(limits)]


def settings_of(options: Options) -> Training:
    return Training(
        objective=InfoNCE(),
        batch_size=options.batch_size,
        epochs=1,
        query_tokens=options.query_tokens,
        document_tokens=options.document_tokens,
        micro_batch_tokens=options.micro_batch_tokens,
        precision=options.precision,
        checkpoint_every=10**9,
        # A run of any length would.
        compiled=options.device == "cuda",
    )


def with_bixse(options: Options, model: Any, pairs: Pairs) -> list[float]:
    """Seconds of each step of `train_loop`."""
    from bixse.place import Place
    from bixse.training.gather import World
    from bixse.training.loop import Run, train_loop

    with TemporaryDirectory() as aside:
        run = Run(settings_of(options), labels_of(pairs), Place(aside), "benchmark")
        return [line["seconds"] for line in train_loop(run, model, World()).history]


def labels_of(pairs: Pairs) -> Any:
    from bixse.training.groups import group

    names = [str(number) for number in range(len(pairs))]
    return group(
        names,
        names,
        np.ones(len(pairs), np.float32),
        dict(zip(names, (query for query, _ in pairs), strict=True)),
        dict(zip(names, (document for _, document in pairs), strict=True)),
        {},
    )


def with_sentence_transformers(
    options: Options, model: Any, pairs: Pairs, system: System
) -> list[float]:
    """Seconds of each step, in the same batches of the same rows."""
    import torch
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    from bixse.precision import autocast
    from bixse.training.attention import fast_attention
    from bixse.training.order import rate_factor

    settings = settings_of(options)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    budget = options.micro_batch_tokens or 4096
    loss_of = (
        MultipleNegativesRankingLoss(model)
        if system == "plain"
        else CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=budget)
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=0.01, fused=True
    )
    even = options.even and options.device == "cpu"
    seconds = []
    with (
        fast_attention(model, options.precision, settings.document_tokens)
        if even
        else nullcontext()
    ):
        started = time.perf_counter()
        for step, columns in enumerate(collated(options, model, pairs)):
            optimizer.zero_grad()
            for part in optimizer.param_groups:
                part["lr"] = settings.learning_rate * rate_factor(step, options.steps, 0.1)
            with autocast(model.device, options.precision):
                loss = loss_of(columns, torch.empty(0))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            # As our history and the trainer's log: every step's loss is read.
            loss.item()
            finished = time.perf_counter()
            seconds.append(finished - started)
            started = finished
    return seconds


def collated(options: Options, model: Any, pairs: Pairs) -> Iterator[list[dict[str, Any]]]:
    """The columns of each batch, the next one read while this one is trained on."""
    from sentence_transformers.sentence_transformer.data_collator import (
        SentenceTransformerDataCollator,
    )

    from bixse.training.groups import epoch_rows
    from bixse.training.loop import plan_of

    settings, labels = settings_of(options), labels_of(pairs)
    plan = plan_of(labels, settings)
    rows = epoch_rows(labels, settings.docs_per_query, settings.seed, 0)
    limits = {"query": settings.query_tokens, "document": settings.document_tokens}
    collate = {
        side: SentenceTransformerDataCollator(preprocess_fn=model.preprocess, max_length=limit)
        for side, limit in limits.items()
    }

    def columns(step: int) -> list[dict[str, Any]]:
        numbers = np.concatenate([rows[row] for row in plan.rows_of(step)])
        found = []
        for place, side in enumerate(limits):
            texts = [{side: pairs[number][place]} for number in numbers.tolist()]
            batch = collate[side](texts)
            found.append(
                {
                    name.removeprefix(f"{side}_"): getattr(value, "to", lambda _, v=value: v)(
                        model.device
                    )
                    for name, value in batch.items()
                }
            )
        return found

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(columns, 0)
        for step in range(plan.steps):
            now = coming.result()
            if step + 1 < plan.steps:
                coming = thread.submit(columns, step + 1)
            yield now


if __name__ == "__main__":
    main()
