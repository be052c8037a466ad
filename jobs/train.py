"""Train: judgments and the texts they name -> an encoder or a reranker, on any number of Ray Train
workers.

    python -m jobs.train <recipe> --data DIR --out DIR

The artefact is a sentence-transformers directory, with `training.jsonl` (one line a step) beside it
and, of an encoder, `scale_bias.json` (scale alpha and bias beta; ranking does not need them). With
`training.evaluate_every` it is the best encoder on the dev split, and `dev.jsonl` has one line an
evaluation.
While it is being made, `<out>-checkpoints` holds what an interrupted run goes on from. Checkpoints
are our own file and not Ray's, so that the same loop resumes without Ray, and a restarted driver
resumes like a restarted worker.
"""

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bixse.artifacts import MANIFEST, Artifact, Draft, begin
from bixse.models.encoder import Encoder, encoder_fingerprint, load_model, resolve
from bixse.models.reranker import load_reranker
from bixse.place import Place
from bixse.training.allocator import CPU_ALLOCATOR
from bixse.training.settings import Training
from jobs.following import Count, Note, follow, stop_on_sigterm
from jobs.measuring import DevSplit, dev_ndcg, refuse_trained
from jobs.parts import progress, start_ray
from jobs.recipe import Placement
from jobs.supervision import read_labels

if TYPE_CHECKING:
    from bixse.training.gather import World
    from bixse.training.loop import Run, Trained

SCALE_BIAS = "scale_bias.json"
CURVE = "training.jsonl"
DEV_CURVE = "dev.jsonl"

_TIMED = ("seconds",)
_TIMEOUT_S = 600
_PREEMPTION_EVERY = 10
"""Steps between two questions whether Ray knows of a machine that will be taken away."""


def train(
    judgments: Artifact,
    queries: Sequence[Artifact],
    corpus: Artifact,
    settings: Training,
    start: str,
    placement: Placement,
    out: str,
    calibration: Artifact | None = None,
    preferences: Artifact | None = None,
    documents: Artifact | None = None,
    dev: DevSplit | None = None,
) -> Artifact:
    """Tune `start` on judgments; the finished encoder, or reranker where the objective is for one,
    at `out`.

    The judgments are read through the map that `calibration` holds, if any, and stay as they are.
    `documents` are written ones (jobs.writing), which judgments may name beside the corpus's.
    `dev` is what `evaluate_every` measures on. Goes on from the last checkpoint of an interrupted
    run. Raises ValueError when `evaluate_every` is set and `dev` is not or the reverse, when
    training reads a query of it, when there is nothing
    to learn from (no judgments, all of relevance 0, fewer than two rows), when a judgment names a
    query or document that is not there, when the objective reads preferences and there are none,
    or the reverse, and as `plan_of`, `begin` and `load_model` (of a reranker: `load_reranker`).
    Raises SystemExit on SIGTERM, with the steps so far saved.
    """
    if settings.objective.reads_preferences and preferences is None:
        raise ValueError("this objective learns from preferences: set --judging.preferences")
    if preferences is not None and not settings.objective.reads_preferences:
        raise ValueError(
            f"objective {settings.objective.kind} does not read preferences: "
            "leave out --judging.preferences or take recipe pairdistill"
        )
    if (dev is None) != (settings.evaluate_every is None):
        raise ValueError("training.evaluate_every and a dev split go together: one is missing")
    kind = "reranker" if settings.objective.scores_pairs else "encoder"
    place = Place(_absolute(out))
    checkpoints = Place(f"{place.url}-checkpoints")
    inputs = {
        "judgments": judgments.fingerprint,
        **{f"queries-{number}": part.fingerprint for number, part in enumerate(queries)},
        "corpus": corpus.fingerprint,
        "start": encoder_fingerprint(resolve(start, kind)),
    }
    if calibration is not None:
        inputs["calibration"] = calibration.fingerprint
    if preferences is not None:
        inputs["preferences"] = preferences.fingerprint
    if documents is not None:
        inputs["documents"] = documents.fingerprint
    if dev is not None:
        inputs |= dev.inputs
    # How often it is saved does not change what is made, nor, but for rounding, how it is cut.
    config = settings.model_dump(mode="json", exclude={"checkpoint_every", "micro_batch_tokens"})
    from bixse.training import state
    from bixse.training.loop import Run, plan_of

    if place.exists(MANIFEST):
        finished = begin(place.url, kind, config=config, inputs=inputs)
        assert isinstance(finished, Artifact)
        state.clear(checkpoints)
        return finished
    # Before anything is written: what teaches nothing leaves nothing behind.
    labels = read_labels(judgments, queries, corpus, calibration, preferences, documents)
    plan = plan_of(labels, settings)
    if dev is not None:
        refuse_trained(dev, labels.query_text_Q.to_pylist())
    under_way = bool(checkpoints.names())
    draft = begin(place.url, kind, config=config, inputs=inputs, under_way=under_way)
    assert isinstance(draft, Draft)
    identity = json.dumps([draft.config, inputs], sort_keys=True).encode()
    run = Run(settings, labels, checkpoints, hashlib.sha256(identity).hexdigest())
    note, rows = Note(), plan.rows / plan.steps_per_epoch
    with progress("train", int(plan.steps * rows), note) as advance:
        summary = _fit(
            run,
            start,
            placement,
            draft,
            dev,
            partial(follow, advance=advance, rows=rows, note=note),
        )
    if not place.exists("modules.json"):
        raise RuntimeError(f"the {kind} is not at {out}: it must be storage that all nodes share")
    artifact = draft.finish(
        rows=labels.pairs,
        device=summary.pop("device"),
        extra={kind: summary.pop("fingerprint"), **summary, "judgments": labels.judgments},
    )
    state.clear(checkpoints)
    return artifact


@dataclass(frozen=True)
class _Job:
    """What a Ray Train worker is told."""

    run: Any
    """An object reference to the Run: its labels go to each node once."""
    start: str
    draft: Draft
    dev: DevSplit | None
    encode_batch: int
    count: Any
    """The actor that counts steps for the driver's progress bar."""


def _fit(
    run: "Run",
    start: str,
    placement: Placement,
    draft: Draft,
    dev: DevSplit | None,
    followed: Callable[[Any], AbstractContextManager[None]],
) -> dict[str, Any]:
    """Run the loop on Ray Train; the summary that its first worker returns.

    `followed` is the context in which the driver sees the counts of the actor it is given.
    """
    start_ray()
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    count = ray.remote(num_cpus=0)(Count).remote()
    job = _Job(ray.put(run), start, draft, dev, placement.encode_batch, count)
    gpus = placement.gpus_per_actor
    resources = {"CPU": _cpus(placement), **({"GPU": gpus} if gpus else {})}
    trainer = TorchTrainer(
        partial(_work, job),
        # A dead rank is noticed in minutes, not in torch's half hour.
        torch_config=TorchConfig(timeout_s=_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=placement.train_workers,
            use_gpu=gpus > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name="ray-train",
            storage_path=run.checkpoints.url,
            worker_runtime_env={} if gpus else {"env_vars": dict(CPU_ALLOCATOR)},
            failure_config=FailureConfig(max_failures=placement.train_retries),
        ),
    )
    with followed(count), stop_on_sigterm(count):
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            failures = getattr(error, "worker_failures", None)
            cause = next(iter(failures.values())) if failures else error
            raise RuntimeError(f"training failed: {_last_line(cause)}") from None
    summary: dict[str, Any] = result.return_value
    if "refused" in summary:
        raise ValueError(summary["refused"])
    if "stopped" in summary:
        raise SystemExit(f"{summary['stopped']}: the same command goes on from there")
    return {**summary, "workers": placement.train_workers}


def _cpus(placement: Placement) -> float:
    """CPUs of a training worker.

    On a machine of our own, training is alone: without GPUs its workers share all CPUs there are.
    """
    import ray

    if "RAY_ADDRESS" in os.environ or placement.gpus_per_actor:
        return placement.cpus_per_actor
    # Ray leaves it without types.
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return max(placement.cpus_per_actor, resources["CPU"] // placement.train_workers)


def _work(job: _Job) -> dict[str, Any] | None:
    """One Ray Train worker: the loop, and on the first rank the export."""
    import ray
    import ray.train
    import ray.train.torch

    from bixse.training.gather import World
    from bixse.training.loop import Notice, Seen, Stopped, train_loop

    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    device = ray.train.torch.get_device()
    run = ray.get(job.run)
    model, complaint = _load(job, run.settings, str(device), world)
    if model is None:
        return {"refused": complaint}

    asked = itertools.count()
    stop = job.count.put.remote(Seen(0, {}, []))
    measure = None
    if job.dev is not None:
        # Around the model that is being trained; nothing asks for its fingerprint.
        measure = partial(dev_ndcg, job.dev, Encoder(model, ""), world, job.encode_batch)

    def on_step(seen: Seen) -> None:
        nonlocal stop
        if world.rank == 0:
            stop = job.count.put.remote(seen)

    def notice() -> Notice:
        # Of a machine that will be taken away. Every rank must ask as often, and waits for it.
        asks = next(asked) % _PREEMPTION_EVERY == 0
        leaving = asks and ray.train.get_preemption_info() is not None
        # What the driver answered to the step before; nobody waits for it.
        if world.rank == 0 and ray.wait([stop], timeout=0)[0] and ray.get(stop):
            return Notice.STOP
        return Notice.SAVE if leaving else Notice.NONE

    try:
        trained = train_loop(run, model, world, on_step, notice, measure)
    except ValueError as error:
        # A checkpoint that is damaged or another run's: the same on every rank and every try.
        return {"refused": str(error)}
    except Stopped as stopped:
        return {"stopped": str(stopped)}
    if world.rank != 0:
        return None
    with tempfile.TemporaryDirectory() as aside:
        export(model, run.settings, trained, Path(aside))
        job.draft.add_directory(Path(aside))
        fingerprint = encoder_fingerprint(Path(aside))
    return {"device": device.type, "fingerprint": fingerprint, **_summary(trained)}


def _load(job: _Job, settings: Training, device: str, world: "World") -> tuple[Any, str]:
    """The model, or None and the first rank's complaint: either on all ranks or on none.

    A complaint is returned, not raised: a model that cannot be read is not worth a retry.
    """
    import torch.distributed as dist

    model: Any = None
    complaint = ""
    try:
        directory = resolve(job.start, job.draft.kind)
        found, wanted = encoder_fingerprint(directory), job.draft.inputs["start"]
        if found != wanted:
            raise ValueError(f"{job.start} is {found} on a worker, {wanted} on the driver")
        if settings.objective.scores_pairs:
            model = load_reranker(str(directory), device, settings.seed)
        else:
            model = load_model(str(directory), device)
    except ValueError as error:
        complaint = str(error)
    complaints = [complaint]
    if world.size > 1:
        complaints *= world.size
        dist.all_gather_object(complaints, complaint)
    first = next(filter(None, complaints), "")
    return (None if first else model), first


def export(model: Any, settings: Training, trained: "Trained", directory: Path) -> None:
    """Write a model: what sentence-transformers loads, and our files beside it."""
    if settings.objective.scores_pairs:
        from torch import nn

        # What `CrossEncoder.predict` ends with: a softmax's scores are no probabilities.
        model.activation_fn = nn.Identity() if settings.objective.grouped_from else nn.Sigmoid()
    model.save_pretrained(str(directory), create_model_card=False)
    if not settings.objective.scores_pairs:
        scale_bias = {"scale": trained.scale, "bias": trained.bias}
        (directory / SCALE_BIAS).write_text(json.dumps(scale_bias))
    # Times differ between equal runs: they go to the manifest, outside the fingerprint.
    lines = [{k: v for k, v in line.items() if k not in _TIMED} for line in trained.history]
    (directory / CURVE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if trained.dev:
        found = [
            {"step": step, "ndcg@10": score, "best": step == trained.best_step}
            for step, score in trained.dev
        ]
        (directory / DEV_CURVE).write_text("".join(json.dumps(line) + "\n" for line in found))


def _summary(trained: "Trained") -> dict[str, Any]:
    curve = trained.history
    seconds = [line["seconds"] for line in curve]
    stride = -(-len(curve) // 500)
    measured = [list(found) for found in trained.dev]
    dev = {"dev_ndcg@10": measured, "best_step": trained.best_step} if measured else {}
    return {
        **dev,
        "steps": len(curve),
        "first_loss": curve[0]["loss"],
        "final_loss": curve[-1]["loss"],
        "final_excess": curve[-1]["excess"],
        "seconds_per_step": float(np.median(seconds)),
        "pairs_per_second": sum(line["pairs"] for line in curve) / sum(seconds),
        "pairs_per_second_by_step": [
            [line["step"], round(line["pairs"] / line["seconds"], 1)] for line in curve[::stride]
        ],
    }


def _last_line(error: Any) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _absolute(out: str) -> str:
    """Ray's workers run in directories of their own."""
    return out if "://" in out else os.path.abspath(out)


if __name__ == "__main__":
    from jobs.verbs import main

    main("train")
