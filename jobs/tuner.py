"""A language model tuned on rows of (prompt, answer) by Ray Train: the artefact `language_model`.

It is a transformers directory that vLLM serves, with `training.jsonl` (one line a step) beside it.
What an interrupted run goes on from is in `<out>-checkpoints`.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bixse.artifacts import MANIFEST, REJECTED_DIR, Artifact, Draft, begin, parquet_bytes, part_name
from bixse.judging.settings import Pointwise
from bixse.models.language_model import load_language_model, save_language_model
from bixse.place import Place
from bixse.records import Rejection
from bixse.synthesis.settings import Generator
from bixse.training.seen import CURVE
from bixse.training.settings import Tuning
from jobs.following import Note, follow
from jobs.loading import pin
from jobs.parts import progress, rejected_table
from jobs.recipe import Placement
from jobs.workers import Job, Signals, alike, run_workers

if TYPE_CHECKING:
    from bixse.training.completions import Completions
    from bixse.training.tuning import Expected

Row = tuple[Sequence[int], Sequence[int]]
"""A prompt and its answer, as token ids."""

_TOKENISED = 256
"""Labels that are tokenised at a time."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A pair that people graded, or a query that was written at a grade and stayed."""

    query_id: str
    doc_id: str
    query: str
    document: str
    relevance: float


@dataclass(frozen=True)
class Lessons:
    """Labels, how each becomes rows, and what is measured on those that no model is tuned on."""

    known: Sequence[Labelled]
    held_out: Sequence[Labelled]
    rows_of: Callable[[Sequence[Labelled]], list[list[Row]]]
    """The rows of each label: as many of each."""
    measure: Callable[[Sequence[Labelled], "Expected"], dict[str, float | None]]
    """Of the held-out labels that fit, and what a model expects of their rows, in their order."""
    longest: int
    """Tokens of a row that the model reads."""
    label_ids: tuple[int, ...] = ()
    """Tokens of a scale's labels, where answers are such."""


def tune(
    lessons: Lessons,
    start: Pointwise | Generator,
    tuning: Tuning,
    placement: Placement,
    out: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> Artifact:
    """The finished language model at `out`, from its last checkpoint if there is one.

    `start` is pinned (`jobs.loading.pin`), its identity is the input `start`. Of what was measured
    on the held-out labels the manifest has `before` and `after`. Raises ValueError when `out` is no
    directory, and when fewer than two rows or no held-out one fit; otherwise as `jobs.train.train`.
    """
    from bixse.training import state
    from bixse.training.stepping import plan_of
    from bixse.training.tuning import TuningRun

    place = Place(out)
    if not place.is_local:
        raise ValueError(f"vLLM reads a tuned model from a directory that all nodes share: {out}")
    checkpoints = Place(f"{out}-checkpoints")
    if place.exists(MANIFEST):
        finished = begin(out, "language_model", config=config, inputs=inputs)
        assert isinstance(finished, Artifact)
        state.clear(checkpoints)
        return finished
    rejected: list[Rejection] = []
    rows, _ = _fitting(lessons, lessons.known, rejected)
    held_out, measured = _fitting(lessons, lessons.held_out, rejected)
    if not measured:
        raise ValueError(f"no held-out label fits the model: {rejected[-1].reason}")
    plan = plan_of(len(rows), tuning)
    under_way = state.saved(checkpoints)
    draft = begin(out, "language_model", config=config, inputs=inputs, under_way=under_way)
    assert isinstance(draft, Draft)
    checkpoints.tidy()
    identity = json.dumps([draft.config, draft.inputs], sort_keys=True).encode()
    fingerprint = hashlib.sha256(identity).hexdigest()
    run = TuningRun(tuning, rows, held_out, lessons.label_ids, checkpoints, fingerprint)
    a_step = plan.rows / plan.steps_per_epoch
    note = Note()
    with progress("tune", int(plan.steps * a_step), note) as advance:
        followed = partial(follow, advance=advance, rows=a_step, note=note)
        summary = run_workers(_work, run, start, placement, draft, followed)
    if rejected:
        data = parquet_bytes(rejected_table(rejected))
        draft.write_file(f"{REJECTED_DIR}/{part_name(0)}", data)
    before, after = summary.pop("before"), summary.pop("after")
    artifact = draft.finish(
        rows=len(lessons.known) + len(lessons.held_out) - len(rejected),
        device=summary.pop("device"),
        extra={
            **summary,
            "held_out": len(measured),
            "before": lessons.measure(measured, before),
            "after": lessons.measure(measured, after),
        },
    )
    state.clear(checkpoints)
    return artifact


def _fitting(
    lessons: Lessons, labels: Sequence[Labelled], rejected: list[Rejection]
) -> tuple["Completions", list[Labelled]]:
    """The rows of the labels that the model can read whole, and those labels; the others are
    rejected."""
    from bixse.training.completions import Completions

    rows: list[Row] = []
    fitting: list[Labelled] = []
    for start in range(0, len(labels), _TOKENISED):
        some = labels[start : start + _TOKENISED]
        for label, found in zip(some, lessons.rows_of(some), strict=True):
            longest = max(len(prompt) + len(answer) for prompt, answer in found)
            if longest <= lessons.longest:
                rows += found
                fitting.append(label)
            else:
                reason = f"the row has {longest} tokens, the model reads {lessons.longest}"
                rejected.append(Rejection(reason, query_id=label.query_id, doc_id=label.doc_id))
    return Completions.of(rows), fitting


def _work(job: Job) -> dict[str, Any] | None:
    """One Ray Train worker: the loop, and on the first rank the export."""
    import ray
    import ray.train
    import ray.train.torch

    from bixse.training.gather import World
    from bixse.training.loop import Stopped
    from bixse.training.tuning import tune_loop

    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    device = ray.train.torch.get_device()
    loaded, complaint = alike(world, partial(_load, job, str(device)))
    if loaded is None:
        return {"refused": complaint}
    (model, stored), start = loaded, job.start
    signals = Signals(job.count, world)
    try:
        tuned = tune_loop(ray.get(job.run), model, stored, world, signals.on_step, signals.notice)
    except ValueError as error:
        return {"refused": str(error)}
    except Stopped as stopped:
        return {"stopped": str(stopped)}
    if world.rank != 0:
        return None
    with tempfile.TemporaryDirectory() as aside:
        save_language_model(model, stored, start.model, start.revision, Path(aside))
        # Times differ between equal runs.
        lines = [{k: v for k, v in line.items() if k != "seconds"} for line in tuned.history]
        (Path(aside) / CURVE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        job.draft.add_directory(Path(aside))
    return {
        "device": device.type,
        "before": tuned.before,
        "after": tuned.after,
        "steps": len(lines),
        "first_loss": lines[0]["loss"],
        "final_loss": lines[-1]["loss"],
        "seconds_per_step": float(np.median([line["seconds"] for line in tuned.history])),
    }


def _load(job: Job, device: str) -> Any:
    """Raises ValueError as `load_language_model`, or when it is not the driver's."""
    _, found = pin(job.start)
    wanted = job.draft.inputs["start"]
    if found != wanted:
        raise ValueError(f"{job.start.model} is {found} on a worker, {wanted} on the driver")
    return load_language_model(job.start.model, job.start.revision, device)
