"""What the benchmark of judging compares: three ways to the same answers, each run in a process of
its own.

A system is given the cases, the number of its round, and the batch limits of our engine.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.judge_cases import Case
from bixse.artifacts import Draft, begin
from bixse.judging.asked import Answers, Asked
from bixse.judging.settings import Pointwise
from jobs.recipe import Placement

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
    from jobs.judges.generative import generative
    from jobs.judges.order import ordered
    from jobs.judges.unit import JudgeUnit
    from jobs.loading import pin
    from jobs.parts import row_units, run_units, usage

    placement = Placement(gpus_per_actor=case.gpus)
    _, identity = pin(case.engine)
    note = f"{case.folder}/loaded"
    judge = generative(case.engine, placement)
    judge = replace(judge, build=Timed, arguments=(*judge.arguments, note))
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
    from jobs.cluster import start_ray

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
