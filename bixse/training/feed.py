"""What a step is fed: this rank's share of each batch, in parts that fit into memory."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from bixse.reading.chunks import Reading
from bixse.training.batches import Batch, batch_of
from bixse.training.gather import cells_of
from bixse.training.gradients import most
from bixse.training.groups import Labels, epoch_groups, epoch_rows
from bixse.training.objective import Cells
from bixse.training.order import Plan
from bixse.training.scoring import Scoring
from bixse.training.settings import Training

if TYPE_CHECKING:
    from sentence_transformers.base import BaseModel

_log = logging.getLogger(__name__)


def batches_from(labels: Labels, settings: Training, plan: Plan, first: int) -> Iterator[Batch]:
    """The global batches from step `first` to the last."""
    docs, threshold = settings.docs_per_query, settings.objective.grouped_from
    epoch, rows = -1, []
    for step in range(first, plan.steps):
        if plan.epoch_of(step) != epoch:
            epoch = plan.epoch_of(step)
            if threshold is None:
                rows = epoch_rows(labels, docs, settings.seed, epoch)
            else:
                rows = epoch_groups(labels, docs, threshold, settings.seed, epoch)
        yield batch_of(labels, np.concatenate([rows[row] for row in plan.rows_of(step)]))


@dataclass(frozen=True)
class Mine:
    """A rank's share of a batch, ready for the model."""

    batch: Batch
    reading: Reading
    cells: Cells


def share_of(
    labels: Labels, settings: Training, model: "BaseModel", module: Scoring, batch: Batch
) -> Mine:
    reading = module.reading(model, labels, batch, settings)
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
