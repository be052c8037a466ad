"""The steps of a loop over rows that are known by their numbers, whatever a row is to the model:
order, updates, checkpoints, notices.

W ranks equal one and a resumed run equals an uninterrupted one, on any number of workers, where the
gradients of a batch do.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bixse.place import Place
from bixse.training import state
from bixse.training.dev import Dev
from bixse.training.gather import World
from bixse.training.gradients import most
from bixse.training.loop import Notice, Stopped, refuse_unequal
from bixse.training.order import Ints, Plan, rate_factor
from bixse.training.seen import Seen
from bixse.training.settings import Gated, Tuning
from bixse.training.update import refuse_infinite

METRICS = ("step", "epoch", "loss", "learning_rate", "grad_norm", "rows", "seconds")
"""One line of `training.jsonl`. `step` counts from 1, `loss` is of the batch before the step;
`grad_norm` before clipping, `seconds` since the step before."""

_COUNTS = ("step", "epoch", "rows")


@dataclass(frozen=True)
class Steps:
    """Which steps are taken; `fingerprint` is of the settings, the starts and the inputs."""

    settings: Tuning | Gated
    rows: int
    checkpoints: Place
    fingerprint: str
    more: tuple[str, ...] = ()
    """Names of what is told of a batch beside its loss."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*METRICS, *self.more)

    def named(self, line: Sequence[float]) -> dict[str, float]:
        named = dict(zip(self.metrics, line, strict=True))
        return {name: int(value) if name in _COUNTS else value for name, value in named.items()}


def plan_of(rows: int, settings: Tuning | Gated) -> Plan:
    """The steps that settings ask for. Raises ValueError for fewer than two rows."""
    return Plan(
        rows=rows,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        seed=settings.seed,
    )


def take(
    steps: Steps,
    module: nn.Module,
    gradients: Callable[[Ints], Sequence[float]],
    world: World,
    on_step: Callable[[Seen], None],
    notice: Callable[[], Notice],
) -> list[dict[str, float]]:
    """Train `module` in place, from its last checkpoint if there is one; a line for each step.

    `gradients` leaves those of a global batch in `.grad`, the same on every rank, and returns its
    loss and what else is told of it. `on_step` and `notice` are as `train_loop` has them. Raises as
    `train_loop`.
    """
    settings, plan = steps.settings, plan_of(steps.rows, steps.settings)
    optimizer = _optimizer(module, settings)
    # Nothing is measured in between.
    checkpoints, fingerprint, metrics, dev = (
        steps.checkpoints,
        steps.fingerprint,
        steps.metrics,
        Dev(),
    )
    history = state.load(checkpoints, fingerprint, module, optimizer, metrics, dev)
    refuse_unequal(len(history), world)

    def seen(since: int) -> Seen:
        return Seen(len(history), [steps.named(line) for line in history[since:]], [])

    on_step(seen(0))
    told, started = Notice.NONE, time.perf_counter()
    while (step := len(history)) < plan.steps:
        batch, factor = plan.rows_of(step), rate_factor(step, plan.steps, settings.warmup_ratio)
        loss, *more = gradients(batch)
        norm = _update(module, optimizer, settings, loss, factor)
        finished = time.perf_counter()
        rate = settings.learning_rate * factor
        seconds, started = finished - started, finished
        line = [step + 1, plan.epoch_of(step), loss, rate, norm, len(batch), seconds, *more]
        history.append(line)
        heard = Notice(most(notice(), world))
        last = len(history) == plan.steps
        due = last or len(history) % settings.checkpoint_every == 0 or heard > told
        if due and world.rank == 0:
            state.save(checkpoints, fingerprint, module, optimizer, metrics, history, dev)
        on_step(seen(step))
        if heard is Notice.STOP and not last:
            raise Stopped(len(history), plan.steps)
        told = heard
    return [steps.named(line) for line in history]


def _optimizer(module: nn.Module, settings: Tuning | Gated) -> torch.optim.AdamW:
    """AdamW; no decay on vectors (norms, biases)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [(matrices, settings.weight_decay), (vectors, 0.0)]
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for params, decay in groups if params],
        lr=settings.learning_rate,
        fused=True,
    )


def _update(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Tuning | Gated,
    loss: float,
    factor: float,
) -> float:
    """One update by the gradients at hand. Returns their norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * factor
    norm = float(nn.utils.clip_grad_norm_(module.parameters(), settings.max_grad_norm))
    refuse_infinite(loss, norm, settings.learning_rate)
    optimizer.step()
    return norm
