"""The training loop: plain torch, the same under Ray Train, torchrun or one process.

Dropout is off: then a step draws no random number, W ranks equal one and a resumed run equals an
uninterrupted one exactly. The encoders that we tune have a batch's other documents to keep them
from fitting single pairs.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from bixse.ahead import ahead
from bixse.place import Place
from bixse.precision import in_bfloat16
from bixse.training import losses, state
from bixse.training.adapters import adapt, refuse_adapted
from bixse.training.attention import fast_attention
from bixse.training.compiling import compiled, compiles
from bixse.training.dev import Dev
from bixse.training.feed import Mine, batches_from, first_batches, fitted, share_of
from bixse.training.gather import World
from bixse.training.gradients import batch_gradients, batch_logits, most
from bixse.training.groups import Labels, count_groups, count_rows
from bixse.training.objective import refuse_idle
from bixse.training.order import Plan, Turns, rate_factor
from bixse.training.scoring import EncoderScoring, Scoring, scoring_of
from bixse.training.seen import Seen
from bixse.training.settings import Training
from bixse.training.sharding import Twin
from bixse.training.update import optimizer_of, update

if TYPE_CHECKING:
    from sentence_transformers.base import BaseModel

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
`excess` is above the entropy of its labels, `bias` that of whole vectors and of the batch's set,
`grad_norm` before clipping, `seconds` since the step before. With several sets of labels `set` says
whose the batch was; 0 is the run's own."""

_COUNTS = ("step", "epoch", "pairs", "queries", "documents")


@dataclass(frozen=True)
class Run:
    """What every rank is told; `fingerprint` is of the settings, the start and the inputs."""

    settings: Training
    labels: Labels
    checkpoints: Place
    fingerprint: str
    mix: tuple[Labels, ...] = ()
    """Other sets, whose batches take turns with those of `labels`."""

    @property
    def sets(self) -> tuple[Labels, ...]:
        return (self.labels, *self.mix)


@dataclass(frozen=True)
class Trained:
    """What training leaves beside the model's own weights."""

    scale: float
    bias: float
    mix_bias: tuple[float, ...]
    """The bias of each other set."""
    history: list[dict[str, float]]
    dev: list[tuple[int, float]]
    """(step, score) of every evaluation; empty without any."""
    best_step: int
    """Steps behind the weights: those of the best evaluation, or all."""


def plan_of(labels: Labels, settings: Training) -> Plan:
    """The steps that settings ask for.

    Raises ValueError for fewer than two rows, and as `count_groups` and `refuse_idle`.
    """
    refuse_idle(settings.objective, labels)
    docs, threshold = settings.docs_per_query, settings.objective.grouped_from
    return Plan(
        rows=count_rows(labels, docs) if threshold is None else count_groups(labels, threshold),
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        seed=settings.seed,
    )


def turns_of(sets: Sequence[Labels], settings: Training) -> Turns:
    """The steps over several sets. Raises as `plan_of`."""
    return Turns(tuple(plan_of(labels, settings) for labels in sets))


class Notice(IntEnum):
    """What a rank is told between two steps."""

    NONE = 0
    SAVE = 1
    """A machine will be taken away: save now, train on."""
    STOP = 2
    """Save and stop."""


class Stopped(Exception):
    """Training stopped as it was told to, with a checkpoint of all its steps."""

    def __init__(self, steps: int, of: int) -> None:
        super().__init__(f"training stopped after step {steps} of {of}, which is saved")
        self.steps = steps


def train_loop(
    run: Run,
    model: "BaseModel",
    world: World,
    on_step: Callable[[Seen], None] = lambda _: None,
    notice: Callable[[], Notice] = lambda: Notice.NONE,
    measure: Callable[[], float] | None = None,
) -> Trained:
    """Tune `model` in place and in float32, from its last checkpoint if there is one.

    With more than one rank the process group must stand. `on_step` is called once at the start,
    then after every step. `notice` is asked after every step, and what one rank hears holds for
    all. `measure` says how good the model is as it stands, higher is better; all ranks call it
    together and must get the same number; it draws no random number and changes no weight. It is
    called as `evaluate_every` says, and the model is left with the weights of the best call.
    With `settings.lora` adapters alone are tuned, and merged into the model in the end, whose
    weights keep their type.

    Raises ValueError as `state.load`, `refuse_adapted`, `adapt` and `Scoring.refuse_unread`, when
    `evaluate_every` is set without `measure`, or when a loss or gradient is not finite;
    RuntimeError when the ranks read different checkpoints or memory does not suffice for one text;
    Stopped when a notice says so.
    """
    settings = run.settings
    if settings.evaluate_every is not None and measure is None:
        raise ValueError("training.evaluate_every needs something to measure by")
    turns = turns_of(run.sets, settings)
    refuse_adapted(model)
    merge = None
    if settings.lora.rank is not None:
        merge = adapt(model, settings.lora, settings.seed)
    else:
        # AdamW's small steps vanish in a bfloat16.
        model.float()
    model.eval()
    module = scoring_of(model, settings, world, len(run.sets)).to(model.device)
    module.refuse_unread(model, settings)
    _same_weights(module, world)
    twin = None
    if settings.sharded and world.size > 1:
        twin = Twin(model, world.size, in_bfloat16(model.device, settings.precision))
        module.encoder, module.sharded = twin.model, True
        measure = None if measure is None else partial(twin.measured, measure)
    reader = model if twin is None else twin.model
    optimizer = optimizer_of(module, settings)
    dev = Dev()
    history = state.load(run.checkpoints, run.fingerprint, module, optimizer, METRICS, dev)
    refuse_unequal(len(history), world)
    on_step(_seen(history, dev, turns, 0))
    longest = module.longest(model, settings)
    longest = min(longest, model.max_seq_length or longest)
    compile_ = compiles(model, settings, turns.steps)
    with fast_attention(reader, settings.precision, longest), compiled(reader, compile_):
        if not history and isinstance(module, EncoderScoring) and settings.objective.learns_bias:
            for batch in first_batches(run.sets, settings, turns):
                first = share_of(run.sets, settings, reader, module, batch)
                _calibrate(module, first, settings.micro_batch_tokens)
        _steps(run, reader, module, optimizer, turns, history, dev, on_step, notice, measure)
    dev.restore(module)
    if twin is not None:
        twin.gather()
    if merge is not None:
        merge()
    best = len(history) if dev.best_step is None else dev.best_step
    bias, *mix_bias = (module.biases(number)[0].item() for number in range(len(run.sets)))
    return Trained(module.scale, bias, tuple(mix_bias), _lines(history, turns, 0), dev.scores, best)


def _steps(
    run: Run,
    model: "BaseModel",
    module: Scoring,
    optimizer: torch.optim.Optimizer,
    turns: Turns,
    history: list[list[float]],
    dev: Dev,
    on_step: Callable[[Seen], None],
    notice: Callable[[], Notice],
    measure: Callable[[], float] | None,
) -> None:
    """The steps from the end of `history`, each a line of it, with evaluations and checkpoints."""
    settings, world = run.settings, module.world
    limit = settings.micro_batch_tokens
    save = partial(state.save, run.checkpoints, run.fingerprint, module, optimizer, METRICS)
    told = Notice.NONE
    if _due(0, settings, turns) and measure is not None and not dev.scores:
        dev.add(0, measure(), module)
        on_step(_seen(history, dev, turns, len(history)))
    if dev.is_over(settings.patience):
        return
    started = time.perf_counter()
    batches = batches_from(run.sets, settings, turns, len(history))
    read = (share_of(run.sets, settings, model, module, batch) for batch in batches)
    # An evaluation tokenises too, and a tokeniser is not for two threads.
    for mine in ahead(read, alone=lambda: _due(len(history) + 1, settings, turns)):
        step = len(history)
        factor = rate_factor(step, turns.steps, settings.warmup_ratio)
        shares, limit = fitted(module, mine, limit, partial(batch_gradients, module, mine.cells))
        loss, floor = shares.tolist()
        grad_norm = update(module, optimizer, settings, loss, factor)
        finished = time.perf_counter()
        history.append(
            [
                step + 1,
                turns.epoch_of(step),
                loss,
                loss - floor,
                module.scale,
                module.biases(mine.batch.set_number)[0].item(),
                settings.learning_rate * factor,
                grad_norm,
                mine.batch.own_K.sum(),
                len(mine.batch.query_Q),
                len(mine.batch.document_D),
                finished - started,
            ]
        )
        started = finished
        if measure is not None and _due(len(history), settings, turns):
            dev.add(len(history), measure(), module)
            started = time.perf_counter()
        heard = Notice(most(notice(), world))
        last = len(history) == turns.steps or dev.is_over(settings.patience)
        due = last or len(history) % settings.checkpoint_every == 0 or heard > told
        if due and (world.rank == 0 or module.sharded):
            save(history, dev, world.rank)
        on_step(_seen(history, dev, turns, len(history) - 1))
        if last:
            return
        if heard is Notice.STOP:
            raise Stopped(len(history), turns.steps)
        told = heard


def _due(steps: int, settings: Training, turns: Turns) -> bool:
    """Whether there is an evaluation after so many steps: also of the base, and of the last."""
    every = settings.evaluate_every
    return every is not None and (steps % every == 0 or steps == turns.steps)


def _seen(history: list[list[float]], dev: Dev, turns: Turns, since: int) -> Seen:
    return Seen(len(history), _lines(history, turns, since), list(dev.scores))


def _lines(history: list[list[float]], turns: Turns, since: int) -> list[dict[str, float]]:
    """The steps after the first `since` by name; of several sets the number of each one's too."""
    lines = []
    for step, line in enumerate(history[since:], since):
        named = dict(zip(METRICS, line, strict=True))
        named = {name: int(value) if name in _COUNTS else value for name, value in named.items()}
        lines.append(named if len(turns.plans) == 1 else {**named, "set": turns.turn(step)[0]})
    return lines


@torch.no_grad()
def _calibrate(module: EncoderScoring, first: Mine, limit: int | None) -> None:
    """Set each bias of a set on its first global batch; every rank bisects the same counts."""
    counted, _ = fitted(module, first, limit, partial(batch_logits, module, first.cells))
    biases = module.biases(first.batch.set_number)
    for number, of_logits in enumerate(counted.cpu()):
        biases[number] = losses.bias_of(of_logits, first.batch.mean_target)


def refuse_unequal(steps: int, world: World) -> None:
    """Raises RuntimeError when the ranks have read checkpoints of different steps."""
    if most(steps, world) != -most(-steps, world):
        raise RuntimeError(
            "the workers read different checkpoints: --out must be storage that all nodes share"
        )


def _same_weights(module: nn.Module, world: World) -> None:
    """The first rank's: what a start leaves to chance (a pooler that it lacks) is one draw."""
    if world.size > 1:
        for parameter in module.parameters():
            dist.broadcast(parameter.data, 0)
