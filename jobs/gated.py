"""Chunks in groups -> an encoder, trained by Ray Train beside a language model that is not kept.

The artefact is that of `jobs.train`, a sentence-transformers directory with `training.jsonl` (one
line a step) beside it, but without scale and bias, which this training has not. What an interrupted
run goes on from is in `<out>-checkpoints`, with the texts that all workers map.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bixse.artifacts import MANIFEST, Artifact, Draft, begin, fingerprints
from bixse.models.encoder import encoder_fingerprint, load_model, refuse_no_model, resolve
from bixse.models.language_model import load_language_model
from bixse.place import Place
from bixse.training.seen import CURVE
from bixse.training.settings import Gated
from jobs.cluster import tokenise_on_cores
from jobs.following import Note, follow
from jobs.loading import pin_language_model
from jobs.parts import progress
from jobs.recipe import Placement
from jobs.trackers import tracked
from jobs.workers import Job, Signals, alike, run_workers

if TYPE_CHECKING:
    from bixse.training.gated import ChunkGroups


def train_gated(
    chunks: Artifact,
    settings: Gated,
    identity: str,
    start: str,
    placement: Placement,
    out: str,
    track: Sequence[str] = (),
) -> Artifact:
    """Tune the encoder `start` on chunks; finished at `out`, from the last checkpoint of an
    interrupted run if there is one.

    `settings` are pinned to the language model of this `identity`, whose tokens the chunks have
    (`jobs.loading`). Raises ValueError for fewer than two groups and as `refuse_no_model`;
    otherwise as `jobs.train`.
    """
    from bixse.training import state
    from bixse.training.gated import GatedRun
    from bixse.training.stepping import plan_of

    place = Place(out)
    checkpoints = Place(f"{out}-checkpoints")
    directory = resolve(start)
    refuse_no_model(directory, start)
    inputs = {
        **fingerprints(chunks=chunks),
        "start": encoder_fingerprint(directory),
        "language_model": identity,
    }
    # Where the language model stands does not shape what is made, nor how often it is saved.
    elsewhere = {"checkpoint_every", "language_model", "revision"}
    config = settings.model_dump(mode="json", exclude=elsewhere)
    if place.exists(MANIFEST):
        finished = begin(out, "encoder", config=config, inputs=inputs)
        assert isinstance(finished, Artifact)
        state.clear(checkpoints)
        return finished
    with tempfile.TemporaryDirectory() as aside:
        groups = read_groups(chunks, Path(aside))
        if len(groups) < 2:
            raise ValueError(
                f"the corpus makes {len(groups)} groups of chunks, and training needs 2 or more: "
                "bring more documents, or lower --gated.group-size or --gated.chunk-tokens"
            )
        under_way = state.saved(checkpoints)
        draft = begin(out, "encoder", config=config, inputs=inputs, under_way=under_way)
        assert isinstance(draft, Draft)
        checkpoints.tidy()
        groups = groups.put(checkpoints)
    plan = plan_of(len(groups), settings)
    identity_of_run = json.dumps([draft.config, inputs], sort_keys=True).encode()
    fingerprint = hashlib.sha256(identity_of_run).hexdigest()
    run = GatedRun(settings, groups, checkpoints, fingerprint)
    a_step, note = plan.rows / plan.steps_per_epoch, Note()
    told = {**draft.config, "inputs": inputs}
    with (
        progress("train", int(plan.steps * a_step), note) as advance,
        tracked(track, checkpoints, fingerprint, place.url, told) as tell,
    ):
        followed = partial(follow, advance=advance, rows=a_step, note=note, tell=tell)
        summary = run_workers(_work, run, start, placement, draft, followed)
    if not place.exists("modules.json"):
        raise RuntimeError(f"the encoder is not at {out}: it must be storage that all nodes share")
    artifact = draft.finish(
        rows=chunks.manifest.rows,
        device=summary.pop("device"),
        extra={
            "encoder": summary.pop("fingerprint"),
            **summary,
            "language_model": settings.language_model,
            "groups": len(groups),
        },
    )
    state.clear(checkpoints)
    return artifact


def read_groups(chunks: Artifact, aside: Path) -> "ChunkGroups":
    """The chunks of an artefact, their texts in a file in the directory `aside`."""
    from bixse.training.gated import ChunkGroups
    from bixse.training.texts import MappedTexts, store

    halves, tokens, lengths = ([np.zeros(0, np.int64)] for _ in range(3))
    starts: list[int] = []

    def texts() -> Iterator[str]:
        count = 0
        for name in chunks.parts():
            last = -1
            for batch in chunks.batches(["group", "text", "half", "token_ids"], parts=[name]):
                group_C = batch["group"].to_numpy()
                starts.extend(count + np.flatnonzero(np.diff(group_C, prepend=last)))
                last, count = int(group_C[-1]), count + len(group_C)
                halves.append(batch["half"].to_numpy().astype(np.int64))
                lengths.append(batch["token_ids"].value_lengths().to_numpy().astype(np.int64))
                tokens.append(batch["token_ids"].flatten().to_numpy())
                yield from batch["text"].to_pylist()

    file = store(texts(), aside)
    length_C = np.concatenate(lengths)
    return ChunkGroups(
        MappedTexts(file, np.arange(len(length_C))),
        np.concatenate(halves),
        np.concatenate(tokens).astype(np.int32),
        np.cumsum([0, *length_C], dtype=np.int64),
        np.array([*starts, len(length_C)], np.int64),
    )


def _work(job: Job) -> dict[str, Any] | None:
    """One Ray Train worker: the loop, and on the first rank the export."""
    import ray
    import ray.train
    import ray.train.torch

    from bixse.training.gated import gated_loop
    from bixse.training.gather import World
    from bixse.training.loop import Stopped

    tokenise_on_cores()
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    device = ray.train.torch.get_device()
    run = ray.get(job.run)
    models, complaint = alike(world, partial(_load, job, run.settings, str(device)))
    if models is None:
        return {"refused": complaint}
    encoder, language_model = models
    signals = Signals(job.count, world)
    try:
        history = gated_loop(run, encoder, language_model, world, signals.on_step, signals.notice)
    except ValueError as error:
        return {"refused": str(error)}
    except Stopped as stopped:
        return {"stopped": str(stopped)}
    finally:
        signals.wait()
    if world.rank != 0:
        return None
    with tempfile.TemporaryDirectory() as aside:
        encoder.save_pretrained(aside, create_model_card=False)
        # Times differ between equal runs.
        lines = [{k: v for k, v in line.items() if k != "seconds"} for line in history]
        (Path(aside) / CURVE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        job.draft.add_directory(Path(aside))
        fingerprint = encoder_fingerprint(Path(aside))
    return {
        "device": device.type,
        "fingerprint": fingerprint,
        "steps": len(lines),
        "first_loss": lines[0]["loss"],
        "final_loss": lines[-1]["loss"],
        "seconds_per_step": float(np.median([line["seconds"] for line in history])),
    }


def _load(job: Job, settings: Gated, device: str) -> tuple[Any, Any]:
    """Raises ValueError as `load_model` and `load_language_model`, or when another model stands
    there than on the driver."""
    directory = resolve(job.start)
    _, identity = pin_language_model(settings)
    found = {"start": encoder_fingerprint(directory), "language_model": identity}
    named = {"start": job.start, "language_model": settings.language_model}
    for model, value in found.items():
        wanted = job.draft.inputs[model]
        if value != wanted:
            raise ValueError(f"{named[model]} is {value} on a worker, {wanted} on the driver")
    assert settings.language_model is not None
    language_model, _ = load_language_model(settings.language_model, settings.revision, device)
    return load_model(str(directory), device, settings.seed), language_model
