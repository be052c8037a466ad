"""What judging will take, counted before anything is spent.

Every pair that has no verdict yet is read, looked up in the label store and, if it is new,
tokenised as the judge would; only then is there a number. The counts pass through a scratch
artefact beside `out`, which is removed again; the judgments themselves are not touched.
"""

from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bixse.artifacts import Artifact, Draft, part_name
from bixse.judging.asked import Cost
from bixse.judging.labels import Label, Labels, label_key
from bixse.judging.settings import Judging
from bixse.place import Place
from jobs.cluster import start_ray
from jobs.judges.budget import Budget, shared
from jobs.judges.seam import Judge
from jobs.judges.spending import devices
from jobs.judges.unit import JudgeUnit, asked_pairs
from jobs.parts import Made, Unit, begin_counted, row_units, run_units, usage
from jobs.recipe import Placement
from jobs.texts import DocumentTexts, QueryTexts

COSTS = pa.schema(
    [
        ("known", pa.bool_()),
        ("fits", pa.bool_()),
        ("head", pa.uint64()),
        ("prompt_tokens", pa.int64()),
        ("shared_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
        ("requests", pa.int64()),
        ("characters", pa.int64()),
    ]
)
"""What asking one pair costs; `head` is the beginning of its key, which equal texts share."""

PROBE_PAIRS = 128
"""New pairs that are judged to measure the rate, their labels kept (ours)."""


def plan(
    pairs: Artifact,
    queries: Sequence[Artifact],
    corpus: Artifact,
    judge: Judge,
    judging: Judging,
    placement: Placement,
    out: str,
    judged: Container[int] = (),
) -> dict[str, Any]:
    """pairs, known, new and what the judge knows beforehand (`Judge.planned`); with a price also
    GPU-hours and cost at the rate of a probe, where that is tokens. Units whose number is among
    `judged` are known.
    """
    units = [u for u in row_units(pairs, judging.unit_pairs) if u.number not in judged]
    scratch = _scratch(f"{out}-plan")
    try:
        run_units(
            scratch,
            units,
            PlanUnit,
            (list(queries), corpus, judge, judging.store),
            label="plan",
            actors=placement.judge_actors,
            cpus=placement.cpus_per_actor,
            gpus=0.0,
        )
        found, with_new = _summed(scratch, units, judge.planned)
    finally:
        scratch.place.clear()
    found["known"] += pairs.manifest.rows - sum(unit.rows for unit in units)
    summary: dict[str, Any] = {"pairs": pairs.manifest.rows, **found}
    counted = "prompt_tokens" in judge.planned
    if judging.price_per_gpu_hour is not None and counted and with_new:
        rate = _probe(with_new, queries, corpus, judge, judging, placement, f"{out}-probe")
        fresh = found["prompt_tokens"] - found.get("shared_tokens", 0)
        hours = fresh / rate / 3600 * (placement.gpus_per_actor or 1)
        summary["prefill_tokens_s"] = round(rate, 1)
        summary["gpu_hours"] = round(hours, 4)
        summary["hours"] = round(hours / devices(placement), 4)
        summary["cost"] = round(hours * judging.price_per_gpu_hour, 4)
    return summary


class PlanUnit:
    """Reads: query_id, doc_id. Adds: what asking the pair will take."""

    def __init__(
        self, queries: Sequence[Artifact], corpus: Artifact, judge: Judge, store: str | None
    ) -> None:
        self._queries, self._texts = QueryTexts(queries), DocumentTexts(corpus)
        self._signature = judge.signature or {}
        self._labels = None
        if store is not None and judge.signature is not None:
            self._labels = Labels(store, judge.signature)
        self._planner = judge.plan(*judge.arguments) if judge.plan else None

    def __call__(self, rows: pa.Table) -> Made:
        asked = asked_pairs(rows, self._queries, self._texts)
        # As `JudgeUnit` does: with a store, equal texts are asked once, known ones not at all.
        if self._labels is None:
            keys = [label_key({}, pair.query_id, pair.doc_id) for pair in asked]
            labels: list[Label | None] = [None] * len(keys)
        else:
            keys = [label_key(self._signature, pair.query, pair.passage) for pair in asked]
            labels = self._labels.find(keys)
        firsts: dict[bytes, int] = {}
        for at, (key, label) in enumerate(zip(keys, labels, strict=True)):
            if label is None:
                firsts.setdefault(key, at)
        new = [asked[at] for at in firsts.values()]
        costs = self._planner(new) if self._planner and new else []
        of_row: dict[int, Cost] = dict(zip(firsts.values(), costs, strict=False))
        nothing, asked_rows = Cost(), set(firsts.values())
        table = [
            {
                "known": at not in asked_rows,
                "head": int.from_bytes(key[:8], "big"),
                "fits": of_row.get(at, nothing).fits,
                **{name: getattr(of_row.get(at, nothing), name) for name in COSTS.names[3:]},
            }
            for at, key in enumerate(keys)
        ]
        return pa.Table.from_pylist(table, schema=COSTS), []


def _scratch(url: str) -> Draft:
    """An empty draft, whatever a killed run has left there."""
    Place(url).clear()
    draft = begin_counted(url, "plan", config={}, inputs={})
    assert isinstance(draft, Draft)
    return draft


def _summed(
    scratch: Draft, units: Sequence[Unit], planned: Sequence[str]
) -> tuple[dict[str, Any], list[Unit]]:
    """The totals, and the units that have something to ask."""
    total: dict[str, Any] = {"known": 0, "new": 0}
    if planned:
        total["too_long"] = 0
    counts = dict.fromkeys(planned, 0)
    seen = np.empty(0, np.uint64)
    with_new = []
    for unit in units:
        table = scratch.part(part_name(unit.number))
        new = table.filter(pc.invert(table["known"]))
        # Equal texts in two units are asked once: the second finds the label of the first.
        repeated = np.isin(new["head"].to_numpy(), seen)
        seen = np.union1d(seen, new["head"].to_numpy())
        new = new.filter(pa.array(~repeated))
        if new.num_rows:
            with_new.append(unit)
        total["known"] += table.num_rows - new.num_rows
        total["new"] += new.num_rows
        if planned:
            total["too_long"] += new.num_rows - (pc.sum(new["fits"]).as_py() or 0)
        for name in counts:
            counts[name] += pc.sum(new[name]).as_py() or 0
    found = {**total, **counts}
    if "shared_tokens" in counts:
        share = counts["shared_tokens"] / counts["prompt_tokens"] if counts["prompt_tokens"] else 0
        found["shared_share"] = round(share, 4)
    return found, with_new


def _probe(
    units: Sequence[Unit],
    queries: Sequence[Artifact],
    corpus: Artifact,
    judge: Judge,
    judging: Judging,
    placement: Placement,
    out: str,
) -> float:
    """Prompt tokens a second that one engine computes, those in its cache aside."""
    chosen = [
        Unit(number, unit.url, unit.name, unit.start, unit.rows)
        for number, unit in enumerate(units[: 1 + PROBE_PAIRS // judging.unit_pairs])
    ]
    scratch = _scratch(out)
    start_ray()
    try:
        run_units(
            scratch,
            chosen,
            JudgeUnit,
            (list(queries), corpus, judge, judging.store, shared(Budget(pairs=PROBE_PAIRS))),
            label="probe",
            actors=1,
            cpus=placement.cpus_per_actor,
            gpus=placement.gpus_per_actor,
        )
        took = usage(scratch)
    finally:
        scratch.place.clear()
        Place(f"{out}-usage").clear()
    if not took["engine_seconds"]:
        raise ValueError("the probe judged nothing: no pair fits the judge")
    return float((took["prompt_tokens"] - took["cached_tokens"]) / took["engine_seconds"])
