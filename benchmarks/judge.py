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
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import tyro

from bixse.artifacts import Artifact, Draft, begin
from bixse.judging.asked import Answers, Asked
from bixse.judging.prompts import ORDERS
from bixse.judging.settings import Pointwise
from bixse.judging.tokens import PromptTokenizer
from bixse.records import CORPUS, PAIRS, QUERIES, document_text
from bixse.settings import Settings
from jobs.recipe import Placement

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrst"]


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


class Case(Settings):
    """One set of prompts, as all systems find it on disk."""

    name: str
    folder: str
    engine: Pointwise
    gpus: float

    def artifact(self, name: str) -> Artifact:
        return Artifact.open(f"{self.folder}/{name}")

    def prompts(self) -> tuple[list[list[int]], tuple[int, ...]]:
        """In file order, both orders of a pair together; and the grade tokens."""
        tokens = PromptTokenizer.load(self.engine)
        passages = {
            row["doc_id"]: document_text(row["title"], row["text"])
            for row in self.artifact("corpus").table().to_pylist()
        }
        queries = {
            row["query_id"]: row["text"] for row in self.artifact("queries").table().to_pylist()
        }
        keys = self.artifact("pairs").table(["query_id", "doc_id"]).to_pylist()
        asked = [queries[key["query_id"]] for key in keys]
        read = [passages[key["doc_id"]] for key in keys]
        by_order = [tokens.encode(asked, read, order) for order in ORDERS]
        return [ids for pair in zip(*by_order, strict=True) for ids in pair], tokens.label_ids


Took = dict[str, float | None]
"""Of one case: seconds, prefill_tokens, cached_tokens."""


def bare_vllm(cases: Sequence[Case], number: int, limits: Mapping[str, int]) -> dict[str, Took]:
    """`LLM.generate` on all prompts at once, in file order."""
    from vllm import SamplingParams

    from jobs.engine import Engine

    llm = Engine(cases[0].engine)._llm
    found: dict[str, Took] = {}
    for case in cases:
        prompts, label_ids = case.prompts()
        params = SamplingParams(
            max_tokens=1, temperature=0, logprob_token_ids=list(label_ids), detokenize=False
        )
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        llm.generate([{"prompt_token_ids": [1, 2, 3]}], params, use_tqdm=False)
        if not llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied")
        started = time.monotonic()
        replies = llm.generate(requests, params, use_tqdm=False)
        seconds = time.monotonic() - started
        cached = sum(reply.num_cached_tokens or 0 for reply in replies)
        found[case.name] = {
            "seconds": seconds, "cached_tokens": cached, "prefill_tokens": sum(map(len, prompts)),
        }  # fmt: skip
    return found


def batch_limits(case: Case) -> dict[str, int]:
    """What the engine of `jobs.engine` chose: for the one that is loaded otherwise."""
    from jobs.engine import Engine

    chosen = Engine(case.engine)._llm.llm_engine.vllm_config.scheduler_config
    return {name: getattr(chosen, name) for name in ("max_num_seqs", "max_num_batched_tokens")}


class Timed:
    """The judge, noting when it was loaded."""

    def __init__(self, settings: Pointwise, identity: str, note: str) -> None:
        from jobs.judges.generative import GenerativeJudge

        self._judge = GenerativeJudge(settings, identity)
        self._judge([Asked("warm", "up", "tea", "leaf")])
        Path(note).write_text(str(time.time()))

    def __call__(self, asked: Sequence[Asked]) -> Answers:
        return self._judge(asked)


def bixse(cases: Sequence[Case], number: int, limits: Mapping[str, int]) -> dict[str, Took]:
    """Our judge, from pairs on disk to judgments and labels on disk."""
    return {case.name: _judged(case, number) for case in cases}


def _judged(case: Case, number: int) -> Took:
    # By its module: what stands in __main__ is unknown to workers.
    from benchmarks.judge import Timed as Imported
    from jobs.judges.generative import generative
    from jobs.judges.order import ordered
    from jobs.judges.unit import JudgeUnit
    from jobs.loading import pin
    from jobs.parts import row_units, run_units, usage

    placement = Placement(gpus_per_actor=case.gpus)
    _, identity = pin(case.engine)
    note = f"{case.folder}/loaded"
    judge = generative(case.engine, placement)
    judge = replace(judge, build=Imported, arguments=(*judge.arguments, note))
    queries, corpus = [case.artifact("queries")], case.artifact("corpus")
    out = f"{case.folder}/judgments-{number}"
    pairs, _ = ordered(case.artifact("pairs"), queries, corpus, judge, f"{out}-order")
    draft = begin(out, "judgments", config={}, inputs={"judge": identity})
    assert isinstance(draft, Draft)
    run_units(
        draft,
        row_units(pairs, 128),
        JudgeUnit,
        (queries, corpus, judge, f"{out}-labels"),
        label="judge",
        actors=1,
        cpus=1,
        gpus=case.gpus,
        in_flight=judge.in_flight,
    )
    seconds = time.time() - float(Path(note).read_text())
    made = draft.finish()
    if made.manifest.rejected:
        raise RuntimeError(f"{made.manifest.rejected} pairs were rejected: nothing to compare")
    took = usage(draft)
    return {
        "seconds": seconds,
        "cached_tokens": took["cached_tokens"],
        "prefill_tokens": took["prompt_tokens"],
    }


def ray_data_llm(cases: Sequence[Case], number: int, limits: Mapping[str, int]) -> dict[str, Took]:
    """`ray.data.llm` with its default batches, on ready tokens and without detokenising."""
    return {case.name: _processed(case, limits) for case in cases}


def _processed(case: Case, limits: Mapping[str, int]) -> Took:
    from jobs.parts import start_ray

    start_ray()
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    prompts, label_ids = case.prompts()
    settings = case.engine
    config = vLLMEngineProcessorConfig(
        model_source=settings.model,
        engine_kwargs={
            "dtype": settings.dtype,
            "max_model_len": settings.max_model_len,
            "enable_prefix_caching": True,
            "enforce_eager": not case.gpus,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            **limits,
        },
        concurrency=(1, 1),
        chat_template_stage={"enabled": False},
        tokenize_stage={"enabled": False},
        detokenize_stage={"enabled": False},
        prepare_multimodal_stage={"enabled": False},
        # As many threads as the other two have: Ray would give it one.
        runtime_env={
            "env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(os.cpu_count())}
        },
        **({} if case.gpus else {"placement_group_config": {"bundles": [{"CPU": 1}]}}),
    )
    sampling = {"max_tokens": 1, "temperature": 0, "logprob_token_ids": list(label_ids)}
    processor = build_processor(
        config,
        preprocess=lambda row: {
            "prompt": "",
            "tokenized_prompt": row["ids"],
            "sampling_params": sampling,
        },
        postprocess=lambda row: {"took": row["time_taken_llm"], "ended": time.time()},
    )
    rows = ray.data.from_items([{"ids": prompt} for prompt in prompts])
    ended, first = [], float("inf")
    for row in processor(rows).iter_rows():
        ended.append(row["ended"])
        first = min(first, row["ended"] - row["took"])
    if len(ended) != len(prompts):
        raise RuntimeError(f"ray.data.llm answered {len(ended)} of {len(prompts)} prompts")
    prefill = sum(map(len, prompts))
    return {"seconds": max(ended) - first, "cached_tokens": None, "prefill_tokens": prefill}


SYSTEMS = {"bare_vllm": bare_vllm, "bixse": bixse, "ray_data_llm": ray_data_llm}


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


def make_case(options: Options, root: Path, name: str) -> Case:
    """Pairs grouped by query, as candidates come; each document stands in several groups.

    `shuffled` has them in random order; in `unshared` nothing stands twice.
    """
    draw, folder = random.Random(0), root / name
    each = 1 if name == "unshared" else options.queries_per_document
    documents = -(-options.pairs // each)
    per_query = 1 if name == "unshared" else max(1, documents // 4)
    corpus = [
        {"doc_id": f"d{n}", "title": "", "text": _words(draw, options.passage_words)}
        for n in range(documents)
    ]
    pairs, queries = [], []
    while len(pairs) < options.pairs:
        query_id = f"q{len(queries)}"
        queries.append({"query_id": query_id, "text": _words(draw, 8), "origin": "given"})
        for rank in range(1, min(per_query, options.pairs - len(pairs)) + 1):
            doc_id = f"d{len(pairs) % documents}"
            pairs.append({"query_id": query_id, "doc_id": doc_id, "source": "random",
                          "rank": rank, "score": 0.0})  # fmt: skip
    if name == "shuffled":
        draw.shuffle(pairs)
    for kind, rows, schema in (("corpus", corpus, CORPUS), ("queries", queries, QUERIES),
                               ("pairs", pairs, PAIRS)):  # fmt: skip
        draft = begin(str(folder / kind), kind, config={}, inputs={})
        if isinstance(draft, Draft):
            draft.write_part(0, pa.Table.from_pylist(rows, schema=schema))
            draft.finish()
    model = options.model or make_model(root / "model")
    # Random weights follow no prompt: whatever mass the grades get will do.
    engine = Pointwise(
        model=model, max_model_len=2048, min_grade_mass=1e-30, gpu_memory_utilization=0.8
    )
    return Case(name=name, folder=str(folder), engine=engine, gpus=options.gpus)


def _words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def make_model(folder: Path) -> str:
    """A Qwen3-shaped model of about 100 million random weights, its tokenizer trained here."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    if folder.exists():
        return str(folder)
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|start|>", "<|end|>"],
        show_progress=False,
    )
    tokens.train_from_iterator([" ".join(WORDS), *(f" {word}" for word in WORDS)] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "<|start|>assistant\n"
    )
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=2304, num_hidden_layers=14,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id, dtype="bfloat16",
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


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
