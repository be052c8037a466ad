"""Train: judgments and the texts they name -> an encoder or a reranker, on any number of Ray Train
workers.

    python -m jobs.train <recipe> --data DIR --out DIR

The artefact is a sentence-transformers directory, with `training.jsonl` (one line a step) beside it
and, of an encoder, `scale_bias.json` (scale alpha and bias beta; ranking does not need them). Its
weights are float32, whatever type `start` is stored in: what was trained, and on dev measured.
Rounded to bfloat16 a short training's small steps would be lost again. Only under adapters do
weights keep their type (but float16 on a CPU). With `training.evaluate_every` it is the best
encoder on the dev split, and `dev.jsonl` has one line an evaluation. With `training.mix` each step
is of one run's judgments, which its line names by number.

While it is being made, `<out>-checkpoints` holds what an interrupted run goes on from, and the
texts that all workers map (`bixse.training.texts`). Checkpoints are our own file and not Ray's, so
that the same loop resumes without Ray, and a restarted driver resumes like a restarted worker.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bixse.artifacts import MANIFEST, Artifact, Draft, begin, fingerprints
from bixse.models.encoder import (
    Encoder,
    encoder_fingerprint,
    load_model,
    refuse_no_model,
    resolve,
)
from bixse.models.reranker import load_reranker
from bixse.place import Place
from bixse.training.seen import CURVE, DEV_CURVE
from bixse.training.settings import Gated, Training
from jobs.cluster import tokenise_on_cores
from jobs.command import absolute
from jobs.following import Note, follow
from jobs.measuring import DevSplit, dev_ndcg, refuse_trained
from jobs.mix import Supervision, labels_of, refuse_repeated
from jobs.parts import progress
from jobs.recipe import Placement
from jobs.supervision import read_labels
from jobs.trackers import refuse_missing, tracked
from jobs.workers import Job, Signals, alike, run_workers

if TYPE_CHECKING:
    from bixse.training.loop import Trained

SCALE_BIAS = "scale_bias.json"

_TIMED = ("seconds",)


def check_preferences(settings: Training, given: bool) -> None:
    """Raises ValueError when the objective reads preferences and none are given, or the reverse."""
    if settings.objective.reads_preferences and not given:
        raise ValueError(
            "this objective learns from preferences: set --judging.preferences FILE, or "
            "--preferring.train to ask --judging.vllm"
        )
    if given and not settings.objective.reads_preferences:
        raise ValueError(
            f"objective {settings.objective.kind} does not read preferences: "
            "leave out --judging.preferences and --preferring.train, or take recipe pairdistill"
        )


def check_clicks(settings: Training, given: bool) -> None:
    """Raises ValueError when the objective reads clicks and none are given. They may be given to
    one that reads the judgments made of them."""
    if settings.objective.reads_clicks and not given:
        raise ValueError(
            "this objective learns from clicks: set --judging.judge clicks and "
            "--judging.clicks.shown, or take recipe two_tower"
        )


def refuse_uninstalled(settings: Training | Gated, track: Sequence[str], out: str) -> None:
    """Raises ValueError when a tracker, or what adapters need, is not installed, or a tracker
    cannot write beside `out`; a model that stands there finished needs neither."""
    from bixse.training import adapters

    place = Place(absolute(out))
    if not place.exists(MANIFEST):
        refuse_missing(track, place.url)
        adapters.refuse_missing(settings.lora)


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
    clicks: Artifact | None = None,
    dev: DevSplit | None = None,
    track: Sequence[str] = (),
    mix: Sequence[Supervision] = (),
) -> Artifact:
    """Tune `start` on judgments; the finished encoder, or reranker where the objective is for one,
    at `out`.

    The judgments are read through the map that `calibration` holds, if any, and stay as they are.
    `documents` are written ones (jobs.writing), which judgments may name beside the corpus's;
    `clicks` are those that the judgments were made of, where the objective reads them.
    `dev` is what `evaluate_every` measures on, `track` names the trackers that are told of it
    (`jobs.trackers`), `mix` has other runs' judgments to train on too. Goes on from the last
    checkpoint of an interrupted run.

    Raises ValueError when `evaluate_every` is set and `dev` is not or the reverse, when training
    reads a query of it, when a tracker, or what adapters need, is not installed, when there is
    nothing to learn from (no judgments, all of relevance 0, fewer than two rows), when a judgment
    names a query or document that is not there, when the objective reads preferences and there are
    none, or the reverse, when it reads clicks and there are none, and as `refuse_repeated`,
    `labels_of`, `plan_of`, `begin`, `refuse_no_model` and `load_model` (of a reranker:
    `load_reranker`).
    Raises Ended on SIGTERM or Ctrl-C, with the steps so far saved.
    """
    check_preferences(settings, preferences is not None)
    check_clicks(settings, clicks is not None)
    if (dev is None) != (settings.evaluate_every is None):
        raise ValueError("training.evaluate_every and a dev split go together: one is missing")
    refuse_repeated(judgments, mix)
    kind = "reranker" if settings.objective.scores_pairs else "encoder"
    place = Place(absolute(out))
    checkpoints = Place(f"{place.url}-checkpoints")
    directory = resolve(start, kind)
    refuse_no_model(directory, start)
    inputs = {
        **fingerprints(judgments=judgments, queries=queries, corpus=corpus),
        "start": encoder_fingerprint(directory),
        **fingerprints(calibration=calibration, preferences=preferences, documents=documents),
        **fingerprints(clicks=clicks),
    }
    for number, other in enumerate(mix):
        inputs |= other.inputs(f"mix-{number}")
    if dev is not None:
        inputs |= dev.inputs
    config = _shaping(settings)
    from bixse.training import state
    from bixse.training.loop import Run, turns_of

    if place.exists(MANIFEST):
        finished = begin(place.url, kind, config=config, inputs=inputs)
        assert isinstance(finished, Artifact)
        state.clear(checkpoints)
        return finished
    refuse_uninstalled(settings, track, out)
    # Before anything is written: what teaches nothing leaves nothing behind.
    with tempfile.TemporaryDirectory() as aside:
        read = (judgments, queries, corpus, calibration, preferences, documents, clicks)
        labels = read_labels(*read, aside=Path(aside))
        sets = [labels, *(labels_of(other, settings, Path(aside)) for other in mix)]
        turns = turns_of(sets, settings)
        if dev is not None:
            for known in sets:
                refuse_trained(dev, known.query_text_Q.to_pylist())
        under_way = state.saved(checkpoints)
        draft = begin(place.url, kind, config=config, inputs=inputs, under_way=under_way)
        assert isinstance(draft, Draft)
        checkpoints.tidy()
        labels, *others = (known.put(checkpoints) for known in sets)
    identity = json.dumps([draft.config, inputs], sort_keys=True).encode()
    fingerprint = hashlib.sha256(identity).hexdigest()
    run = Run(settings, labels, checkpoints, fingerprint, tuple(others))
    note, rows = Note(), turns.rows / turns.steps_per_epoch
    told = {**draft.config, "inputs": inputs}
    if mix:
        whose = [judgments.url, *(other.judgments.url for other in mix)]
        told["sets"] = {str(number): url for number, url in enumerate(whose)}
    with (
        progress("train", int(turns.steps * rows), note) as advance,
        tracked(track, checkpoints, run.fingerprint, place.url, told) as tell,
    ):
        summary = run_workers(
            partial(_work, dev, placement.encode_tokens),
            run,
            start,
            placement,
            draft,
            partial(follow, advance=advance, rows=rows, note=note, tell=tell),
        )
    if not place.exists("modules.json"):
        raise RuntimeError(f"the {kind} is not at {out}: it must be storage that all nodes share")
    artifact = draft.finish(
        rows=sum(known.pairs for known in run.sets),
        device=summary.pop("device"),
        extra={
            kind: summary.pop("fingerprint"),
            **summary,
            "judgments": sum(known.judgments for known in run.sets),
        },
    )
    state.clear(checkpoints)
    return artifact


def _shaping(settings: Training) -> dict[str, Any]:
    """What shapes the model. How often it is saved does not, nor, but for rounding, how it is cut,
    nor where other runs stand: their fingerprints are inputs.
    """
    elsewhere = {"checkpoint_every", "micro_batch_tokens", "sharded", "mix"}
    if not settings.objective.scores_pairs:
        elsewhere.add("pair_head")
    return settings.model_dump(mode="json", exclude=elsewhere)


def _work(dev: DevSplit | None, encode_tokens: int | None, job: Job) -> dict[str, Any] | None:
    """One Ray Train worker: the loop, and on the first rank the export."""
    import ray
    import ray.train
    import ray.train.torch

    from bixse.training.gather import World
    from bixse.training.loop import Stopped, train_loop

    tokenise_on_cores()
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    device = ray.train.torch.get_device()
    run = ray.get(job.run)
    model, complaint = alike(world, partial(_load, job, run.settings, str(device)))
    if model is None:
        return {"refused": complaint}
    signals, measure = Signals(job.count, world), None
    if dev is not None:
        # Around the model that is being trained; nothing asks for its fingerprint.
        measure = partial(dev_ndcg, dev, Encoder(model, ""), world, encode_tokens)
    try:
        trained = train_loop(run, model, world, signals.on_step, signals.notice, measure)
    except ValueError as error:
        # A checkpoint that is damaged or another run's: the same on every rank and every try.
        return {"refused": str(error)}
    except Stopped as stopped:
        return {"stopped": str(stopped)}
    finally:
        signals.wait()
    if world.rank != 0:
        return None
    with tempfile.TemporaryDirectory() as aside:
        export(model, run.settings, trained, Path(aside))
        job.draft.add_directory(Path(aside))
        fingerprint = encoder_fingerprint(Path(aside))
    return {"device": device.type, "fingerprint": fingerprint, **_summary(trained)}


def _load(job: Job, settings: Training, device: str) -> Any:
    """Raises ValueError as `load_model`, or when another model stands there than on the driver."""
    directory = resolve(job.start, job.draft.kind)
    found, wanted = encoder_fingerprint(directory), job.draft.inputs["start"]
    if found != wanted:
        raise ValueError(f"{job.start} is {found} on a worker, {wanted} on the driver")
    if settings.objective.scores_pairs:
        pooled = settings.pair_head == "pooled"
        return load_reranker(str(directory), device, settings.seed, pooled)
    return load_model(str(directory), device, settings.seed)


def export(model: Any, settings: Training, trained: "Trained", directory: Path) -> None:
    """Write a model: what sentence-transformers loads, and our files beside it."""
    if settings.objective.scores_pairs:
        from torch import nn

        from bixse.training.scoring import RerankerScoring

        # It reads no more of a pair than it has learnt to.
        longest = RerankerScoring.longest(model, settings)
        model.max_seq_length = min(longest, model.max_seq_length or longest)
        # What `CrossEncoder.predict` ends with: a softmax's scores are no probabilities.
        model.activation_fn = nn.Identity() if settings.objective.grouped_from else nn.Sigmoid()
    model.save_pretrained(str(directory), create_model_card=False)
    if not settings.objective.scores_pairs:
        scale_bias: dict[str, Any] = {"scale": trained.scale, "bias": trained.bias}
        if trained.mix_bias:
            scale_bias["mix_bias"] = list(trained.mix_bias)
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
    sets = 1 + len(trained.mix_bias)
    return {
        **dev,
        **({"sets": [_of_set(curve, n) for n in range(sets)]} if sets > 1 else {}),
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


def _of_set(curve: list[dict[str, float]], number: int) -> dict[str, float]:
    """Of the steps of one set their number, pairs, and mean excess over the first and last tenth.

    A single step's says little: the next batch of the set is another.
    """
    lines = [line for line in curve if line["set"] == number]
    tenth = -(-len(lines) // 10)
    parts = {"first_excess": lines[:tenth], "last_excess": lines[len(lines) - tenth :]}
    return {
        "steps": len(lines),
        "pairs": sum(line["pairs"] for line in lines),
        **{
            name: float(np.mean([line["excess"] for line in part]))
            for name, part in parts.items()
            if part
        },
    }


if __name__ == "__main__":
    from jobs.verbs import program

    program("train")
