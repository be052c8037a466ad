"""Pairs a second: bare vLLM, our judge, and Ray Data's own LLM processor, on the same prompts.

    python -m benchmarks.judge --quick --json          # under five minutes on two quiet cores
    python -m benchmarks.judge --model DIR --pairs 20000 --gpus 1 --out runs/judge

Without `--model` a Qwen3-shaped model of about 100 million random weights is made on the spot: big
enough that computing dominates, and of no use as a judge. Queries and passages are invented words;
each document is judged for several queries, as a small corpus is. Every system runs in a process of
its own and answers the same prompts, in both presentation orders, with the log-probabilities of the
grade tokens. Seconds count from a loaded engine to the last answer; ours include reading,
tokenising and writing. `cached_tokens` are those that our engine found in its prefix cache.
"""

import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
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
    out: str | None = None
    """Where the artefacts and the model stay; unset is a temporary directory."""
    quick: bool = False
    """24 pairs: what the mechanics take, not a measurement."""
    json: bool = False
    """Print the result as one JSON object on standard output; logs go to standard error."""


class Case(Settings):
    """One set of prompts, as all systems find it on disk."""

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


def bare_vllm(case: Case) -> dict[str, float]:
    """`LLM.generate` on all prompts at once, in file order."""
    from vllm import SamplingParams

    from jobs.engine import Engine

    prompts, label_ids = case.prompts()
    engine = Engine(case.engine)
    params = SamplingParams(
        max_tokens=1, temperature=0, logprob_token_ids=list(label_ids), detokenize=False
    )
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    engine._llm.generate([{"prompt_token_ids": [1, 2, 3]}], params, use_tqdm=False)
    started = time.monotonic()
    replies = engine._llm.generate(requests, params, use_tqdm=False)
    seconds = time.monotonic() - started
    cached = sum(reply.num_cached_tokens or 0 for reply in replies)
    return {"seconds": seconds, "cached_tokens": cached, "prefill_tokens": sum(map(len, prompts))}


class Timed:
    """The judge, noting when it was loaded."""

    def __init__(self, settings: Pointwise, identity: str, note: str) -> None:
        from jobs.judges.generative import GenerativeJudge

        self._judge = GenerativeJudge(settings, identity)
        self._judge([Asked("warm", "up", "tea", "leaf")])
        Path(note).write_text(str(time.time()))

    def __call__(self, asked: Sequence[Asked]) -> Answers:
        return self._judge(asked)


def bixse(case: Case) -> dict[str, float]:
    """Our judge, from pairs on disk to judgments and labels on disk."""
    from dataclasses import replace

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
    out = f"{case.folder}/judgments"
    pairs, _ = ordered(case.artifact("pairs"), queries, corpus, judge, f"{out}-order")
    draft = begin(out, "judgments", config={}, inputs={"judge": identity})
    assert isinstance(draft, Draft)
    run_units(
        draft,
        row_units(pairs, 128),
        JudgeUnit,
        (queries, corpus, judge, f"{case.folder}/labels"),
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


def ray_data_llm(case: Case) -> dict[str, float]:
    """`ray.data.llm` with its default batches, on ready tokens and without detokenising."""
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
        },
        concurrency=(1, 1),
        chat_template_stage={"enabled": False},
        tokenize_stage={"enabled": False},
        detokenize_stage={"enabled": False},
        prepare_multimodal_stage={"enabled": False},
        runtime_env={"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1"}},
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
    return {"seconds": max(ended) - first}


SYSTEMS = {"bare_vllm": bare_vllm, "bixse": bixse, "ray_data_llm": ray_data_llm}


def compare(options: Options, folder: Path) -> dict[str, Any]:
    """pairs/s of each system, and the tokens of ours."""
    case = make_case(options, folder)
    result: dict[str, Any] = {"pairs": options.pairs}
    for name in options.systems:
        # One process holds one engine.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found = pool.submit(SYSTEMS[name], case).result()
        result[f"{name}_pairs_s"] = round(options.pairs / found["seconds"], 3)
        if name == "bixse":
            result["prefill_tokens"] = int(found["prefill_tokens"])
            result["cached_tokens"] = int(found["cached_tokens"])
        elif "cached_tokens" in found:
            result[f"{name}_cached_tokens"] = int(found["cached_tokens"])
        print(f"{name}: {result[f'{name}_pairs_s']} pairs/s", file=sys.stderr)
    return result


def make_case(options: Options, folder: Path) -> Case:
    """Pairs grouped by query, as candidates come; each document stands in several groups."""
    draw = random.Random(0)
    documents = -(-options.pairs // options.queries_per_document)
    per_query = max(1, documents // 4)
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
    for kind, rows, schema in (("corpus", corpus, CORPUS), ("queries", queries, QUERIES),
                               ("pairs", pairs, PAIRS)):  # fmt: skip
        draft = begin(str(folder / kind), kind, config={}, inputs={})
        if isinstance(draft, Draft):
            draft.write_part(0, pa.Table.from_pylist(rows, schema=schema))
            draft.finish()
    model = options.model or make_model(folder / "model")
    # Random weights follow no prompt: whatever mass the grades get will do.
    engine = Pointwise(
        model=model, max_model_len=2048, min_grade_mass=1e-30, gpu_memory_utilization=0.8
    )
    return Case(folder=str(folder), engine=engine, gpus=options.gpus)


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
        options = Options(
            model=options.model, pairs=24, passage_words=60, gpus=options.gpus,
            systems=options.systems, out=options.out, quick=True, json=options.json,
        )  # fmt: skip
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
