"""A causal language model tuned on prompts and their answers, beside the encoder's loop.

The same order, checkpoints, notices and all-reduce (`order`, `state`, `gradients`), so that here
too W ranks equal one and a resumed run equals an uninterrupted one, on any number of workers.
Trainers that exist (TRL's, transformers') resume on as many workers as they began with and keep
checkpoints of their own. Dropout is off. Weights and moments are float32 on every rank, 16 bytes a
parameter: some three billion parameters on a GPU of 80 GB.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bixse.place import Place
from bixse.training import state
from bixse.training.completions import Completions, completion_gradients, expectations
from bixse.training.dev import Dev
from bixse.training.gather import World
from bixse.training.gradients import most
from bixse.training.loop import Notice, Stopped, refuse_unequal
from bixse.training.order import Plan, rate_factor
from bixse.training.seen import Seen
from bixse.training.settings import Tuning
from bixse.training.update import refuse_infinite

METRICS = ("step", "epoch", "loss", "learning_rate", "grad_norm", "rows", "seconds")
"""One line of `training.jsonl`. `step` counts from 1, `loss` is of the batch before the step, a
token of the answers; `grad_norm` before clipping, `seconds` since the step before."""

_COUNTS = ("step", "epoch", "rows")


@dataclass(frozen=True)
class TuningRun:
    """What every rank is told; `fingerprint` is of the settings, the start and the inputs."""

    settings: Tuning
    rows: Completions
    held_out: Completions
    """Measured before and after, never tuned on."""
    label_ids: tuple[int, ...]
    """Tokens of a scale's labels, where answers are such."""
    checkpoints: Place
    fingerprint: str


@dataclass(frozen=True)
class Expected:
    """What a model expects of the held-out rows (`completions.expectations`)."""

    answer_R: Any
    label_RL: Any


@dataclass(frozen=True)
class Tuned:
    """What tuning leaves beside the model's own weights."""

    before: Expected
    after: Expected
    history: list[dict[str, float]]


def tuning_plan(rows: Completions, settings: Tuning) -> Plan:
    """The steps that settings ask for. Raises ValueError for fewer than two rows."""
    return Plan(
        rows=len(rows),
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        seed=settings.seed,
    )


def tune_loop(
    run: TuningRun,
    model: nn.Module,
    stored: torch.dtype,
    world: World,
    on_step: Callable[[Seen], None] = lambda _: None,
    notice: Callable[[], Notice] = lambda: Notice.NONE,
) -> Tuned:
    """Tune `model`, of float32, in place, from its last checkpoint if there is one.

    With more than one rank the process group must stand, and all have loaded the same weights.
    `on_step` and `notice` are as `train_loop` has them. Afterwards each weight is what `stored`
    can hold, and `after` is measured on those. Raises as `train_loop`.
    """
    settings = run.settings
    plan = tuning_plan(run.rows, settings)
    model.eval()
    before = _expected(run, model, world)
    optimizer = _optimizer(model, settings)
    # Answers are measured before and after, and not in between.
    dev = Dev()
    history = state.load(run.checkpoints, run.fingerprint, model, optimizer, METRICS, dev)
    refuse_unequal(len(history), world)
    on_step(_seen(history, 0))
    told, started = Notice.NONE, time.perf_counter()
    while (step := len(history)) < plan.steps:
        batch, factor = plan.rows_of(step), rate_factor(step, plan.steps, settings.warmup_ratio)
        limit, precision = settings.micro_batch_tokens, settings.precision
        loss = completion_gradients(model, run.rows, batch, limit, world, precision)
        norm = _update(model, optimizer, settings, loss, factor)
        finished = time.perf_counter()
        rate = settings.learning_rate * factor
        seconds, started = finished - started, finished
        history.append([step + 1, plan.epoch_of(step), loss, rate, norm, len(batch), seconds])
        heard = Notice(most(notice(), world))
        last = len(history) == plan.steps
        due = last or len(history) % settings.checkpoint_every == 0 or heard > told
        if due and world.rank == 0:
            state.save(run.checkpoints, run.fingerprint, model, optimizer, METRICS, history, dev)
        on_step(_seen(history, step))
        if heard is Notice.STOP and not last:
            raise Stopped(len(history), plan.steps)
        told = heard
    _round(model, stored)
    return Tuned(before, _expected(run, model, world), [_named(line) for line in history])


@torch.no_grad()
def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Each weight as `dtype` holds it, kept in its own type."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def _expected(run: TuningRun, model: nn.Module, world: World) -> Expected:
    limit, precision = run.settings.micro_batch_tokens, run.settings.precision
    return Expected(*expectations(model, run.held_out, run.label_ids, limit, world, precision))


def _optimizer(model: nn.Module, settings: Tuning) -> torch.optim.AdamW:
    """AdamW; no decay on vectors (norms, biases)."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [(matrices, settings.weight_decay), (vectors, 0.0)]
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for params, decay in groups if params],
        lr=settings.learning_rate,
        fused=True,
    )


def _update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Tuning,
    loss: float,
    factor: float,
) -> float:
    """One update by the gradients at hand. Returns their norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * factor
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm))
    refuse_infinite(loss, norm, settings.learning_rate)
    optimizer.step()
    return norm


def _seen(history: list[list[float]], since: int) -> Seen:
    return Seen(len(history), [_named(line) for line in history[since:]], [])


def _named(line: list[float]) -> dict[str, float]:
    named = dict(zip(METRICS, line, strict=True))
    return {name: int(value) if name in _COUNTS else value for name, value in named.items()}
