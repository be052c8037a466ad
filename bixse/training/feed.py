"""What a step is fed: this rank's share of each batch, in parts that fit into memory."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from bixse.reading.chunks import Reading
from bixse.training.batches import Batch, batch_of
from bixse.training.gather import cells_of
from bixse.training.gradients import most
from bixse.training.groups import Ints, Labels, epoch_groups, epoch_rows
from bixse.training.objective import Cells
from bixse.training.order import Turns
from bixse.training.scoring import Scoring
from bixse.training.settings import Training

if TYPE_CHECKING:
    from sentence_transformers.base import BaseModel

_log = logging.getLogger(__name__)


def batches_from(
    sets: Sequence[Labels], settings: Training, turns: Turns, first: int
) -> Iterator[Batch]:
    """The global batches from step `first` to the last, each of one set."""
    epoch = -1
    rows: dict[int, list[Ints]] = {}
    for step in range(first, turns.steps):
        if turns.epoch_of(step) != epoch:
            epoch, rows = turns.epoch_of(step), {}
        number, own = turns.turn(step)
        if number not in rows:
            rows[number] = _rows(sets[number], settings, epoch)
        numbers = turns.plans[number].rows_of(own)
        pairs = np.concatenate([rows[number][row] for row in numbers])
        yield batch_of(sets[number], pairs, number)


def first_batches(sets: Sequence[Labels], settings: Training, turns: Turns) -> Iterator[Batch]:
    """The first global batch of each set."""
    for number, (labels, plan) in enumerate(zip(sets, turns.plans, strict=True)):
        rows = _rows(labels, settings, 0)
        pairs = np.concatenate([rows[row] for row in plan.rows_of(0)])
        yield batch_of(labels, pairs, number)


def _rows(labels: Labels, settings: Training, epoch: int) -> list[Ints]:
    """What the rows of an epoch are: the pairs of each."""
    docs, threshold = settings.docs_per_query, settings.objective.grouped_from
    if threshold is None:
        return epoch_rows(labels, docs, settings.seed, epoch)
    return epoch_groups(labels, docs, threshold, settings.seed, epoch)


@dataclass(frozen=True)
class Mine:
    """A rank's share of a batch, ready for the model."""

    batch: Batch
    reading: Reading
    cells: Cells


def share_of(
    sets: Sequence[Labels], settings: Training, model: "BaseModel", module: Scoring, batch: Batch
) -> Mine:
    reading = module.reading(model, sets[batch.set_number], batch, settings)
    cells = cells_of(batch, settings.objective, module.world, model.device)
    return Mine(batch, reading, cells)


Attempt = Callable[[Reading, bool], torch.Tensor | None]


def fitted(
    module: Scoring, mine: Mine, limit: int | None, attempt: Attempt
) -> tuple[torch.Tensor, int | None]:
    """What an attempt makes of a rank's texts and whether to recompute; and the limit it took.

    A micro-batch that does not fit is halved until it does. Raises RuntimeError when one text does
    not fit.
    """
    reading = mine.reading
    while True:
        if limit is not None:
            reading = reading.within(limit)
        made = attempt(reading, limit is not None)
        if made is not None:
            return made, limit
        if module.log_scale.device.type == "cuda":
            torch.cuda.empty_cache()
        widest = most(reading.widest, module.world)
        if not widest and limit is not None:
            raise RuntimeError(
                "memory does not suffice for one text at a time: lower document_tokens or take a "
                "smaller model"
            )
        # Setting it at all turns GradCache on.
        limit = max(1, widest // 2)
        _log.warning("out of memory: once more in micro-batches of %d tokens", limit)
