"""A causal language model tuned on prompts and their answers, beside the encoder's loop.

The same order, checkpoints, notices and all-reduce (`order`, `state`, `gradients`, by way of
`stepping`), so that here too W ranks equal one and a resumed run equals an uninterrupted one, on
any number of workers. Of a step's line `loss` is a token of the answers.
Trainers that exist (TRL's, transformers') resume on as many workers as they began with and keep
checkpoints of their own. Dropout is off. Weights and moments are float32 on every rank, 16 bytes a
parameter: some three billion parameters on a GPU of 80 GB.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bixse.place import Place
from bixse.training.completions import Completions, completion_gradients, expectations
from bixse.training.gather import World
from bixse.training.loop import Notice
from bixse.training.order import Ints
from bixse.training.seen import Seen
from bixse.training.settings import Tuning
from bixse.training.stepping import Steps, take


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
    model.eval()
    before = _expected(run, model, world)

    def gradients(batch: Ints) -> tuple[float]:
        limit, precision = settings.micro_batch_tokens, settings.precision
        return (completion_gradients(model, run.rows, batch, limit, world, precision),)

    steps = Steps(settings, len(run.rows), run.checkpoints, run.fingerprint)
    history = take(steps, model, gradients, world, on_step, notice)
    _round(model, stored)
    return Tuned(before, _expected(run, model, world), history)


@torch.no_grad()
def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Each weight as `dtype` holds it, kept in its own type."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def _expected(run: TuningRun, model: nn.Module, world: World) -> Expected:
    limit, precision = run.settings.micro_batch_tokens, run.settings.precision
    return Expected(*expectations(model, run.held_out, run.label_ids, limit, world, precision))
