"""The training loop: plain torch, the same under Ray Train, torchrun or one process.

Dropout is off: then a step draws no random number, W ranks equal one and a resumed run equals an
uninterrupted one exactly. The encoders that we tune have a batch's other documents to keep them
from fitting single pairs.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bixse.artifacts import Place
from bixse.training import losses, state
from bixse.training.batches import Batch, Role, Side, batch_of, tokenise
from bixse.training.gather import (
    MAX_SCALE,
    GatheredObjective,
    World,
    cells_of,
    gather_rows,
)
from bixse.training.groups import Ints, Labels, count_rows, epoch_rows
from bixse.training.objective import Cells
from bixse.training.order import Plan, rate_factor, share
from bixse.training.settings import Training

if TYPE_CHECKING:
    import pyarrow as pa
    from sentence_transformers import SentenceTransformer

METRICS = (
    "step",
    "epoch",
    "loss",
    "excess",
    "scale",
    "bias",
    "learning_rate",
    "grad_norm",
    "pairs",
    "queries",
    "documents",
    "seconds",
)
"""One line of `training.jsonl`. `step` counts from 1, `loss` is of the batch before the step,
`excess` is above the entropy of its labels, `grad_norm` before clipping, `seconds` since the step
before."""

_COUNTS = ("step", "epoch", "pairs", "queries", "documents")


@dataclass(frozen=True)
class Run:
    """What every rank is told; `fingerprint` is of the settings, the start and the inputs."""

    settings: Training
    labels: Labels
    checkpoints: Place
    fingerprint: str


@dataclass(frozen=True)
class Trained:
    """What training leaves beside the encoder's own weights."""

    scale: float
    bias: float
    history: list[dict[str, float]]


def plan_of(labels: Labels, settings: Training) -> Plan:
    """The steps that settings ask for. Raises ValueError for fewer than two rows."""
    return Plan(
        rows=count_rows(labels, settings.docs_per_query),
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        seed=settings.seed,
    )


def train_loop(
    run: Run,
    model: "SentenceTransformer",
    world: World,
    on_step: Callable[[int], None] = lambda _: None,
) -> Trained:
    """Tune `model` in place, from its last checkpoint if there is one.

    With more than one rank the process group must stand. `on_step` is called with the number of
    steps done: once at the start, then after every step. Raises ValueError as `state.load`, and
    RuntimeError when a loss or gradient is not finite or the ranks read different checkpoints.
    """
    settings = run.settings
    plan = plan_of(run.labels, settings)
    model.eval()
    module = GatheredObjective(model, settings.objective, world, settings.precision)
    module = module.to(model.device)
    optimizer = _optimizer(module, settings)
    history = state.load(run.checkpoints, run.fingerprint, module, optimizer, METRICS)
    _refuse_unequal(len(history), world)
    on_step(len(history))
    if not history and settings.objective.learns_bias:
        first = next(_batches(run.labels, settings, plan, 0))
        _calibrate(module, _share(run, model, world, first))
    # Kept in a variable: calling an unwrapped module would train unsynchronised, in silence.
    # Parameters may be unused: under mean pooling, a BERT's pooler.
    trained: nn.Module = (
        DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)
        if world.size > 1
        else module
    )
    started = time.perf_counter()
    batches = _batches(run.labels, settings, plan, len(history))
    for step, batch in enumerate(batches, start=len(history)):
        factor = rate_factor(step, plan.steps, settings.warmup_ratio)
        mine = _share(run, model, world, batch)
        loss, floor, grad_norm = _step(trained, module, optimizer, settings, mine, factor)
        finished = time.perf_counter()
        history.append(
            [
                step + 1,
                plan.epoch_of(step),
                loss,
                loss - floor,
                module.scale,
                module.bias.item(),
                settings.learning_rate * factor,
                grad_norm,
                batch.own_K.sum(),
                len(batch.query_Q),
                len(batch.document_D),
                finished - started,
            ]
        )
        started = finished
        due = (step + 1) % settings.checkpoint_every == 0 or step + 1 == plan.steps
        if due and world.rank == 0:
            state.save(run.checkpoints, run.fingerprint, module, optimizer, METRICS, history)
        on_step(step + 1)
    return Trained(module.scale, module.bias.item(), [_named(line) for line in history])


def _named(line: list[float]) -> dict[str, float]:
    named = dict(zip(METRICS, line, strict=True))
    return {name: int(value) if name in _COUNTS else value for name, value in named.items()}


def _batches(labels: Labels, settings: Training, plan: Plan, first: int) -> Iterator[Batch]:
    """The global batches from step `first` to the last."""
    epoch, rows = -1, []
    for step in range(first, plan.steps):
        if plan.epoch_of(step) != epoch:
            epoch = plan.epoch_of(step)
            rows = epoch_rows(labels, settings.docs_per_query, settings.seed, epoch)
        yield batch_of(labels, np.concatenate([rows[row] for row in plan.rows_of(step)]))


@dataclass(frozen=True)
class _Mine:
    """A rank's share of a batch, ready for the encoder."""

    batch: Batch
    queries: Side
    documents: Side
    cells: Cells


def _share(run: Run, model: "SentenceTransformer", world: World, batch: Batch) -> _Mine:
    settings, labels = run.settings, run.labels

    def side(texts: "pa.Array", numbers: Ints, role: Role, tokens: int) -> Side:
        mine = numbers[share(len(numbers), world.rank, world.size)]
        # A rank without texts encodes one and uses none: every rank takes part in every collective.
        read = mine if len(mine) else numbers[:1]
        return tokenise(model, texts.take(read).to_pylist(), role, tokens, len(mine))

    return _Mine(
        batch,
        side(labels.query_text_Q, batch.query_Q, "query", settings.query_tokens),
        side(labels.document_text_D, batch.document_D, "document", settings.document_tokens),
        cells_of(batch, settings.objective, world, model.device),
    )


def _step(
    trained: nn.Module,
    module: GatheredObjective,
    optimizer: torch.optim.Optimizer,
    settings: Training,
    mine: _Mine,
    factor: float,
) -> tuple[float, float, float]:
    """One update. Returns the loss of the whole batch, its floor and the gradient's norm."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    optimizer.zero_grad(set_to_none=True)
    loss, shares = trained(mine.queries, mine.documents, mine.cells)
    loss.backward()
    if module.world.size > 1:
        dist.all_reduce(shares)
    batch_loss, floor = shares.tolist()
    norm = float(nn.utils.clip_grad_norm_(module.parameters(), settings.max_grad_norm))
    if not (math.isfinite(batch_loss) and math.isfinite(norm)):
        raise RuntimeError(
            f"loss {batch_loss} with gradient norm {norm}: lower the learning rate "
            f"(now {settings.learning_rate:g}) or start from another encoder"
        )
    optimizer.step()
    with torch.no_grad():
        module.log_scale.clamp_(max=math.log(MAX_SCALE))
    return batch_loss, floor, norm


def _optimizer(module: GatheredObjective, settings: Training) -> torch.optim.AdamW:
    """AdamW; no decay on vectors (norms, biases); scale and bias at their own, higher rate."""
    own = (module.log_scale, module.bias)
    encoder = [p for p in module.encoder.parameters() if p.requires_grad]
    factor = settings.objective.own_rate_factor
    groups = [
        ([p for p in encoder if p.ndim > 1], 1.0, settings.weight_decay),
        ([p for p in encoder if p.ndim <= 1], 1.0, 0.0),
        ([p for p in own if p.requires_grad], factor, 0.0),
    ]
    return torch.optim.AdamW(
        [
            {"params": params, "peak": settings.learning_rate * rate, "weight_decay": decay}
            for params, rate, decay in groups
            if params
        ],
        lr=settings.learning_rate,
        fused=True,
    )


@torch.no_grad()
def _calibrate(module: GatheredObjective, first: _Mine) -> None:
    """Set the bias on the first global batch; every rank bisects the same cells."""
    cosine_QD = module.cosines(first.queries, first.documents, first.cells.documents)
    size = module.world.size
    rows = len(first.batch.query_Q)
    if size > 1:
        parts = [share(rows, rank, size) for rank in range(size)]
        counts = [part.stop - part.start for part in parts]
        cosine_QD = gather_rows(cosine_QD, counts, module.world)
    target_QD = torch.from_numpy(first.batch.target_QD)
    weight_QD = torch.from_numpy(first.batch.weight_QD)
    bias = losses.calibrate_bias(cosine_QD.cpu(), target_QD, weight_QD, module.scale)
    module.bias.fill_(bias)


def _refuse_unequal(steps: int, world: World) -> None:
    if world.size == 1:
        return
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    extremes = torch.tensor([steps, -steps], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if extremes[0] != -extremes[1]:
        raise RuntimeError(
            "the workers read different checkpoints: --out must be storage that all nodes share"
        )
