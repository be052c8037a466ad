"""Train: judgments and the texts they name -> an encoder or a reranker, on any number of Ray Train
workers.

    python -m jobs.train <recipe> --data DIR --out DIR

The artefact is a sentence-transformers directory, with `training.jsonl` (one line a step) beside it
and, of an encoder, `scale_bias.json` (scale alpha and bias beta; ranking does not need them).
While it is being made, `<out>-checkpoints` holds what an interrupted run goes on from. Checkpoints
are our own file and not Ray's, so that the same loop resumes without Ray, and a restarted driver
resumes like a restarted worker.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bixse.artifacts import MANIFEST, Artifact, Draft, begin
from bixse.models.encoder import encoder_fingerprint, load_model, resolve
from bixse.models.reranker import load_reranker
from bixse.place import Place
from bixse.records import CORPUS, PREFERENCES, document_text
from bixse.training.settings import Training
from jobs.parts import progress
from jobs.recipe import Placement
from jobs.workers import Job, Signals, alike, run_workers

if TYPE_CHECKING:
    from bixse.training.groups import Labels
    from bixse.training.loop import Trained

SCALE_BIAS = "scale_bias.json"
CURVE = "training.jsonl"

_TIMED = ("seconds",)


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
) -> Artifact:
    """Tune `start` on judgments; the finished encoder, or reranker where the objective is for one,
    at `out`.

    The judgments are read through the map that `calibration` holds, if any, and stay as they are.
    `documents` are written ones (jobs.writing), which judgments may name beside the corpus's.
    Goes on from the last checkpoint of an interrupted run. Raises ValueError when there is nothing
    to learn from (no judgments, all of relevance 0, fewer than two rows), when a judgment names a
    query or document that is not there, when the objective reads preferences and there are none,
    or the reverse, and as `plan_of`, `begin` and `load_model` (of a reranker: `load_reranker`).
    Raises SystemExit on SIGTERM, with the steps so far saved.
    """
    if settings.objective.reads_preferences and preferences is None:
        raise ValueError(
            "this objective learns from preferences: set --judging.preferences FILE, or "
            "--preferring.train to ask --judging.vllm"
        )
    if preferences is not None and not settings.objective.reads_preferences:
        raise ValueError(
            f"objective {settings.objective.kind} does not read preferences: "
            "leave out --judging.preferences and --preferring.train, or take recipe pairdistill"
        )
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
    under_way = bool(checkpoints.names())
    draft = begin(place.url, kind, config=config, inputs=inputs, under_way=under_way)
    assert isinstance(draft, Draft)
    identity = json.dumps([draft.config, inputs], sort_keys=True).encode()
    run = Run(settings, labels, checkpoints, hashlib.sha256(identity).hexdigest())
    with progress("train", plan.steps * plan.rows // plan.steps_per_epoch) as advance:
        summary = run_workers(
            _work, run, start, placement, draft, advance, plan.rows / plan.steps_per_epoch
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


def read_labels(
    judgments: Artifact,
    queries: Sequence[Artifact],
    corpus: Artifact,
    calibration: Artifact | None = None,
    preferences: Artifact | None = None,
    documents: Artifact | None = None,
) -> "Labels":
    """The judgments with the texts that they name; of the corpus only judged documents are held.

    Preferences count where both their documents are judged; the others are left out.

    Raises ValueError when a judgment names a query or document that is not there (judgments are
    made from this corpus and these queries: other inputs are a mistake, not rows to skip), when one
    `query_id` has two texts, when a written document has the `doc_id` of one of the corpus, and as
    `group` and `calibration.relevance`.
    """
    from bixse.training.groups import Preferred, group

    table = judgments.table(["query_id", "doc_id", "relevance"])
    query_ids, doc_ids = table["query_id"].to_pylist(), table["doc_id"].to_pylist()
    query_texts: dict[str, str] = {}
    seeds: dict[str, str] = {}
    wanted = pa.array(sorted(set(query_ids)), pa.string())
    for part in queries:
        for row in _rows_where(part, "query_id", wanted, ["query_id", "text", "seed_doc_id"]):
            if query_texts.setdefault(row["query_id"], row["text"]) != row["text"]:
                raise ValueError(f"query {row['query_id']!r} stands twice, with different texts")
            if row["seed_doc_id"] is not None:
                seeds[row["query_id"]] = row["seed_doc_id"]
    wanted = pa.array(sorted(set(doc_ids)), pa.string())
    document_texts = {
        row["doc_id"]: document_text(row["title"], row["text"])
        for row in _rows_where(corpus, "doc_id", wanted, CORPUS.names)
    }
    for row in _rows_where(documents, "doc_id", wanted, CORPUS.names) if documents else ():
        if row["doc_id"] in document_texts:
            raise ValueError(f"a written document has the id of another: {row['doc_id']!r}")
        document_texts[row["doc_id"]] = document_text(row["title"], row["text"])
    _refuse_unknown("query", query_ids, query_texts, "the queries")
    _refuse_unknown("document", doc_ids, document_texts, "the corpus")
    relevance = _relevance(judgments, calibration, table)
    preferred = None
    if preferences is not None:
        table = preferences.table(PREFERENCES.names)
        asked, a, b = (table[name].to_pylist() for name in ("query_id", "doc_id_a", "doc_id_b"))
        preferred = Preferred(asked, a, b, table["prob_a"].to_numpy())
    return group(query_ids, doc_ids, relevance, query_texts, document_texts, seeds, preferred)


def _relevance(judgments: Artifact, calibration: Artifact | None, table: pa.Table) -> Any:
    """The stored relevance, or what the map makes of the stored distributions."""
    if calibration is None:
        return table["relevance"].to_numpy().astype(np.float32)
    # Brings scikit-learn along, which training itself has no use for.
    from bixse.judging.calibration import load, relevance

    signed = judgments.table(["grade_probs", "judge", "prompt"])
    scale = judgments.manifest.extra["scale"]["values"]
    return relevance(signed, scale, load(calibration)).astype(np.float32)


def _rows_where(
    artifact: Artifact, key: str, values: pa.Array, columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for batch in artifact.batches(columns):
        yield from batch.filter(pc.is_in(batch[key], value_set=values)).to_pylist()


def _refuse_unknown(noun: str, ids: Sequence[str], texts: dict[str, str], where: str) -> None:
    unknown = [name for name in ids if name not in texts]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(ids)} judgments name a {noun} that {where} lack, "
            f"first {unknown[0]!r}: train on the {noun} texts that were judged"
        )


def _work(job: Job) -> dict[str, Any] | None:
    """One Ray Train worker: the loop, and on the first rank the export."""
    import ray
    import ray.train
    import ray.train.torch

    from bixse.training.gather import World
    from bixse.training.loop import Stopped, train_loop

    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    device = ray.train.torch.get_device()
    run = ray.get(job.run)
    model, complaint = alike(world, partial(_load, job, run.settings, str(device)))
    if model is None:
        return {"refused": complaint}
    signals = Signals(job.count, world)
    try:
        trained = train_loop(run, model, world, signals.on_step, signals.notice)
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


def _load(job: Job, settings: Training, device: str) -> Any:
    """Raises ValueError as `load_model`, or when another model stands there than on the driver."""
    directory = resolve(job.start, job.draft.kind)
    found, wanted = encoder_fingerprint(directory), job.draft.inputs["start"]
    if found != wanted:
        raise ValueError(f"{job.start} is {found} on a worker, {wanted} on the driver")
    if settings.objective.scores_pairs:
        return load_reranker(str(directory), device, settings.seed)
    return load_model(str(directory), device)


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


def _summary(trained: "Trained") -> dict[str, Any]:
    curve = trained.history
    seconds = [line["seconds"] for line in curve]
    stride = -(-len(curve) // 500)
    return {
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


def _absolute(out: str) -> str:
    """Ray's workers run in directories of their own."""
    return out if "://" in out else os.path.abspath(out)


if __name__ == "__main__":
    from jobs.verbs import main

    main("train")
