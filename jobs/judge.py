"""pairs -> judgments: one seam, several judges (`jobs.judges`).

human copies the given grades of the train split. The others grade pairs in an actor pool: units of
pairs in, judgments or rejections out (`jobs.parts`).
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from bixse.artifacts import MANIFEST, Artifact, Draft, begin, fingerprints, part_name, parts_made
from bixse.judging.given import given
from bixse.judging.labels import Labels
from bixse.judging.settings import Judging, config
from bixse.place import Place
from bixse.retrieval.settings import Lexical
from jobs.cluster import start_ray
from jobs.endpoint import check_key
from jobs.grades import import_grades
from jobs.judges.budget import Budget, shared
from jobs.judges.chat import chat
from jobs.judges.cross_encoder import cross_encoder
from jobs.judges.embedded import embedded
from jobs.judges.generative import generative
from jobs.judges.order import ordered
from jobs.judges.plan import plan as plan_of
from jobs.judges.seam import Judge
from jobs.judges.spending import Spending, spending, tokens_of
from jobs.judges.trying import unblamed
from jobs.judges.unit import JudgeUnit
from jobs.parts import (
    Stopped,
    Unit,
    begin_counted,
    row_units,
    run_units,
    trying_place,
    usage,
)
from jobs.qrels import why_rejected
from jobs.recipe import Placement

TRAIN: Literal["train"] = "train"


def judge(
    pairs: Artifact | None,
    queries: Sequence[Artifact],
    corpus: Artifact,
    qrels: Artifact | None,
    judging: Judging,
    lexical: Lexical,
    embeddings: Artifact | None,
    placement: Placement,
    out: str,
) -> Artifact:
    """Judgments of `pairs`, or the train split of `qrels` when `judging.judge` is human.

    `embeddings` are the corpus under the packaged encoder, for features alone. Raises ValueError
    when what the chosen judge needs is missing, before anything is written.
    """
    if judging.judge == "human":
        return _judge_human(qrels, judging, out)
    if judging.judge == "given":
        return import_grades(queries, corpus, judging.given, config(judging), out)
    if pairs is None:
        raise ValueError(f"--judging.judge {judging.judge} needs pairs: run the pair stage first")
    finished = Place(out).exists(MANIFEST)
    chosen = choose(judging, corpus, embeddings, lexical, placement)
    if judging.judge == "openai" and not finished:
        check_key(judging.openai)
    inputs = _inputs(pairs, queries, corpus, chosen)
    if finished:
        # Keep the grouping that they were made with; those of other inputs are refused below.
        grouped = Artifact.open(out, verify=False).manifest.config.get("grouped", "query")
    else:
        pairs, grouped = ordered(pairs, queries, corpus, chosen, f"{out}-order")
    shaping = _shaping(judging, chosen, grouped)
    draft = begin_counted(out, "judgments", config=shaping, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    trying = trying_place(draft)
    with spending(draft, placement, judging) as spent, unblamed(trying):
        budget = _budget(judging, draft, spent)
        prices = None if judging.max_cost is None else judging.token_prices
        unfinished = run_units(
            draft,
            _from_anywhere(row_units(pairs, judging.unit_pairs)),
            JudgeUnit,
            (list(queries), corpus, chosen, judging.store, budget, trying.url, prices),
            label="judge",
            actors=placement.judge_actors,
            cpus=placement.cpus_per_actor,
            gpus=placement.gpus_per_actor,
            in_flight=chosen.in_flight,
            note=spent.note,
            count=spent.count,
        )
    took = summary(usage(draft), pairs.manifest.rows, judging)
    if unfinished:
        raise Stopped(_stopped(draft, pairs.manifest.rows, took, judging))
    trying.clear()
    if judging.store is not None and chosen.signature is not None:
        Labels(judging.store, chosen.signature, load=False).compact()
    extra = {
        "scale": chosen.scale.record,
        "origin": chosen.origin,
        "judges": _judges(draft),
        "pairs": pairs.manifest.rows,
        "usage": took,
        "store": judging.store if chosen.signature is not None else None,
    }
    made = draft.finish(device=placement.device, extra=extra)
    Place(f"{out}-order").clear()
    return made


def _inputs(
    pairs: Artifact, queries: Sequence[Artifact], corpus: Artifact, chosen: Judge
) -> dict[str, str]:
    return {**fingerprints(pairs=pairs, corpus=corpus, queries=queries), **chosen.inputs}


def _shaping(judging: Judging, chosen: Judge, grouped: str) -> dict[str, Any]:
    shaping = {**config(judging), **chosen.config, "unit_pairs": judging.unit_pairs}
    return shaping if grouped == "query" else {**shaping, "grouped": grouped}


def summary(counts: Counter[str], pairs: int, judging: Judging) -> dict[str, float]:
    """What judging took, of all its sessions: the `usage` of the manifest.

    `new` were asked; `known` were answered from the label store, or stood twice in a unit.
    `pairs_s` and `prefill_tokens_s` are per engine, of the time that it was at work; `peak_share`
    is how much of the arithmetic that its GPUs could have done then the prefill was, where known.
    `cost` is of tokens where the judge is paid by the token, else of the workers.
    """
    new, prompt_tokens = int(counts["new"]), int(counts["prompt_tokens"])
    took: dict[str, float] = {
        "new": new,
        "known": max(0, pairs - new),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": int(counts["cached_tokens"]),
        "output_tokens": int(counts["output_tokens"]),
        "device_seconds": round(counts["device_seconds"], 3),
    }
    if prompt_tokens:
        took["cached_share"] = round(counts["cached_tokens"] / prompt_tokens, 4)
    if seconds := counts["engine_seconds"]:
        took["pairs_s"] = round(new / seconds, 3)
        took["prefill_tokens_s"] = round((prompt_tokens - counts["cached_tokens"]) / seconds, 1)
    if counts["peak_flops"]:
        took["peak_share"] = round(counts["flops"] / counts["peak_flops"], 4)
    if judging.token_prices is not None:
        took["cost"] = round(tokens_of(counts).cost(judging.token_prices), 4)
    elif judging.price_per_gpu_hour is not None:
        took["cost"] = round(counts["device_seconds"] / 3600 * judging.price_per_gpu_hour, 4)
    return took


def _from_anywhere(units: list[Unit]) -> list[Unit]:
    """The units in their order, from one that chance chooses: two jobs that judge the same pairs at
    once find each other's labels, and do not walk side by side through all of them.
    """
    start = random.randrange(max(1, len(units)))
    return units[start:] + units[:start]


def _budget(judging: Judging, draft: Draft, spent: Spending) -> Any:
    """The actor that grants pairs, less what earlier sessions took; None without a limit."""
    if judging.max_pairs is None and judging.max_cost is None:
        return None
    pairs, seconds, money = None, None, None
    if judging.max_pairs is not None:
        pairs = judging.max_pairs - int(usage(draft)["new"])
    if judging.max_cost is not None and judging.token_prices is not None:
        money = judging.max_cost - spent.tokens.cost(judging.token_prices)
    elif judging.max_cost is not None and judging.price_per_gpu_hour:
        held = judging.max_cost / judging.price_per_gpu_hour * 3600 - spent.earlier
        seconds = held / spent.devices
    start_ray()
    return shared(Budget(pairs, seconds, money))


def _stopped(draft: Draft, pairs: int, took: dict[str, float], judging: Judging) -> str:
    """What a person reads when a budget is spent."""
    by_pairs = judging.max_pairs is not None and took["new"] >= judging.max_pairs
    flag = "--judging.max-pairs" if by_pairs else "--judging.max-cost"
    cost = f" for {took['cost']:,.2f}" if "cost" in took else ""
    return (
        f"stopped at {flag}: {took['new']:,.0f} pairs asked{cost}, {len(draft.parts_done())} parts "
        f"of {pairs:,} pairs finished; they stay, and the same command with a larger {flag} goes on"
    )


def plan(
    pairs: Artifact | None,
    queries: Sequence[Artifact],
    corpus: Artifact,
    judging: Judging,
    lexical: Lexical,
    embeddings: Artifact | None,
    placement: Placement,
    out: str,
) -> dict[str, Any]:
    """What judging would take (`jobs.judges.plan`), beside what stands at `out` finished or half
    done, where nothing is written.

    With `judging.price_per_gpu_hour` a few pairs are judged to measure the rate; their labels go
    to the store. Grades that are given (`pairs` is None) cost nothing: no pair is judged. Raises
    ValueError when what stands at `out` was made otherwise.
    """
    if pairs is None:
        return {"pairs": 0, "known": 0, "new": 0}
    chosen = choose(judging, corpus, embeddings, lexical, placement)
    inputs = _inputs(pairs, queries, corpus, chosen)
    pairs, grouped = ordered(pairs, queries, corpus, chosen, f"{out}-order")
    try:
        shaping = _shaping(judging, chosen, grouped)
        judged = parts_made(out, "judgments", config=shaping, inputs=inputs)
        return plan_of(pairs, queries, corpus, chosen, judging, placement, out, judged)
    finally:
        if Place(out).exists(MANIFEST):  # No judging comes after that would take it along.
            Place(f"{out}-order").clear()


def choose(
    judging: Judging,
    corpus: Artifact,
    embeddings: Artifact | None,
    lexical: Lexical,
    placement: Placement,
) -> Judge:
    """The judge that `judging.judge` names. Raises ValueError when it cannot judge."""
    if judging.judge == "vllm":
        return generative(judging.vllm, placement)
    if judging.judge == "openai":
        return chat(judging.openai)
    if judging.judge == "cross_encoder":
        return cross_encoder(judging.cross_encoder)
    return embedded(corpus, embeddings, lexical)


def _judge_human(qrels: Artifact | None, judging: Judging, out: str) -> Artifact:
    """Raises ValueError when nobody has graded a pair of the train split."""
    found = [] if qrels is None else [given(qrels.part(name), TRAIN) for name in qrels.parts()]
    if qrels is None or not sum(table.num_rows for table in found):
        raise ValueError(
            "no given grades to train on (qrels/train.tsv): set --judging.judge features or vllm"
            + ("" if qrels is None else why_rejected(qrels))
        )
    draft = begin(out, "judgments", config=config(judging), inputs=fingerprints(qrels=qrels))
    if isinstance(draft, Artifact):
        return draft
    for number, table in enumerate(found):
        draft.write_part(number, table)
    extra = {
        "scale": {"name": "given", "values": qrels.manifest.extra["scale"]},
        "origin": "human",
        "judges": _judges(draft),
        # Goes on to what is sampled of these, or set beside them.
        "qrels": qrels.fingerprint,
    }
    return draft.finish(extra=extra)


def _judges(draft: Draft) -> list[str]:
    """Everyone who signed a row; engines that chose another dtype are others."""
    found: set[str] = set()
    for number in draft.parts_done():
        found.update(draft.part(part_name(number), ["judge"])["judge"].to_pylist())
    return sorted(found)


if __name__ == "__main__":
    from jobs.verbs import program

    program("judge")
