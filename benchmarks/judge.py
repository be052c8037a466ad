"""Pairs a second: bare vLLM, our judge, and Ray Data's own LLM processor, on the same prompts.

    python -m benchmarks.judge --quick --json          # under five minutes on two quiet cores
    python -m benchmarks.judge --model DIR --pairs 20000 --gpus 1 --out runs/judge

Without `--model` a Qwen3-shaped model of about 100 million random weights is made on the spot: big
enough that computing dominates, and of no use as a judge. Queries and passages are invented words.
Every system answers the same prompts, in both presentation orders, with the log-probabilities of
the grade tokens, and begins each case with an empty prefix cache. Rounds go through the systems in
turn, and a figure is the median of its rounds. Seconds count from a loaded engine to the last
answer; ours include reading, tokenising and writing. Bare vLLM and ours load the engine through the
same function; Ray Data's is given the batch limits that this engine chose (`limits`), and keeps its
own defaults for the rows that it hands over at a time.

Three cases:

    shared     pairs grouped by query as candidates come, each document judged for several queries
    shuffled   the same pairs in random order
    unshared   no query and no document twice: only the instructions are a common prefix

What explains a difference. All three engines have a prefix cache, so bare vLLM finds what ours
finds as long as the cache holds every prefix between its two uses: on few pairs it does, and cached
tokens are about equal. Ours asks pairs of one document, or of one query, side by side, which pays
once the cache is smaller than the distance in the file. `computed_tokens` are those that no cache
had: as far as pairs a second differ in proportion to them, prefix sharing is the reason; what is
left is in `computed_tokens_s`, the rate of the engine itself (batches, scheduling, what is done
between steps) and the noise between rounds (`spread`, largest over smallest rate). Ray Data's
processor does not report cached tokens: they are null.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import tyro

from benchmarks.judge_cases import make_case
from benchmarks.judge_systems import SYSTEMS, Took, batch_limits


@dataclass(frozen=True)
class Options:
    """How much, and on what."""

    model: str | None = None
    """Directory of a causal language model; unset makes one of about 100 million weights."""
    pairs: int = 400
    """Pairs that each system judges, both orders each."""
    queries_per_document: int = 4
    """For how many queries each document is judged."""
    passage_words: int = 100
    """Words of a passage."""
    gpus: float = 0.0
    """GPUs of the engine; 0 runs on CPUs."""
    systems: tuple[str, ...] = ("bare_vllm", "bixse", "ray_data_llm")
    """Which are measured."""
    cases: tuple[str, ...] = ("shared", "shuffled", "unshared")
    """On which prompts."""
    rounds: int = 3
    """Times that each system runs each case."""
    out: str | None = None
    """Where the artefacts and the model stay; unset is a temporary directory."""
    quick: bool = False
    """One round of the first case on 160 pairs: loading three engines takes half of the time."""
    json: bool = False
    """Print the result as one JSON object on standard output; logs go to standard error."""


def compare(options: Options, folder: Path) -> dict[str, Any]:
    """Medians by case and system; those of `shared` under the names that scripts read."""
    cases = [make_case(options, folder, name) for name in options.cases]
    limits = _apart(batch_limits, cases[0])
    runs: dict[str, list[dict[str, Took]]] = {name: [] for name in options.systems}
    for number in range(options.rounds):
        for name in options.systems:
            runs[name].append(_apart(SYSTEMS[name], cases, number, limits))
            rates = {case: round(options.pairs / took["seconds"], 2)
                     for case, took in runs[name][-1].items()}  # fmt: skip
            print(f"round {number + 1}, {name}: pairs/s {rates}", file=sys.stderr)
    found = {
        case.name: {
            name: summary([run[case.name] for run in runs[name]], options.pairs)
            for name in options.systems
        }
        for case in cases
    }
    first = found[cases[0].name]
    flat: dict[str, Any] = {f"{name}_pairs_s": of["pairs_s"] for name, of in first.items()}
    if "bixse" in first:
        flat |= {name: first["bixse"][name] for name in ("prefill_tokens", "cached_tokens")}
    return {**flat, "pairs": options.pairs, "rounds": options.rounds, "limits": limits,
            "cases": found}  # fmt: skip


def summary(rounds: Sequence[Mapping[str, Any]], pairs: int) -> dict[str, Any]:
    """The medians of one system on one case; tokens that it does not report are None."""
    rates = [pairs / took["seconds"] for took in rounds]
    prefill, cached = rounds[0]["prefill_tokens"], rounds[0]["cached_tokens"]
    made: dict[str, Any] = {
        "pairs_s": round(median(rates), 3),
        "spread": round(max(rates) / min(rates), 3),
        "prefill_tokens": int(prefill),
        "cached_tokens": None,
    }
    if cached is not None:
        computed = [took["prefill_tokens"] - took["cached_tokens"] for took in rounds]
        made["cached_tokens"] = int(median(took["cached_tokens"] for took in rounds))
        made["computed_tokens"] = int(median(computed))
        made["computed_tokens_s"] = round(
            median(n / took["seconds"] for n, took in zip(computed, rounds, strict=True)), 1
        )
    return made


def _apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns, from a process of its own: one holds one engine."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.judge")
    if options.quick:
        options = replace(options, pairs=160, rounds=1, cases=options.cases[:1])
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with TemporaryDirectory(prefix="bixse-bench-") as temporary:
        folder = Path(options.out or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        # Engines write on standard output.
        with redirect_stdout(sys.stderr):
            result: Mapping[str, Any] = compare(options, folder)
    print(json.dumps(result) if options.json else "\n".join(f"{k} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
