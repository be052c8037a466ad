"""The seam between objectives and everything else: settings -> divisors and shares of the loss.

Whoever trains asks three things of an objective and knows none by name: which of scale and bias it
learns (its settings say so), what the loss of a batch is divided by (`divisors`, from the whole
batch, equal on every rank), and the share of some rows in that loss (`share`). The shares of all
rows add up to the loss of the batch, so that W ranks equal one and rows may be taken in chunks.

Shapes: Q queries (rows at hand), D documents of the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

import torch
from torch import Tensor

from bixse.training import losses
from bixse.training.batches import Batch
from bixse.training.settings import Combined, GradedBCE, InfoNCE, Objective

Divisors = tuple[float, ...]
"""One for each part of an objective."""


@dataclass(frozen=True)
class Cells:
    """The batch's cells in some rows, and what the whole batch's loss is divided by."""

    target_QD: Tensor
    weight_QD: Tensor
    known_QD: Tensor
    own_QD: Tensor
    documents: Sequence[int]
    """Documents that each rank encodes."""
    divisors: Divisors
    gather: Callable[[Tensor], Tensor]
    """Rows of this rank -> the rows of all ranks, with gradient; for an objective that is no sum
    over rows."""

    def rows(self, part: slice) -> "Cells":
        """Some of the rows."""
        return replace(
            self,
            target_QD=self.target_QD[part],
            weight_QD=self.weight_QD[part],
            known_QD=self.known_QD[part],
            own_QD=self.own_QD[part],
        )


def divisors(objective: Objective, batch: Batch) -> Divisors:
    """What the loss of a global batch is divided by: a function of the batch alone."""
    match objective:
        case GradedBCE():
            return (float(len(batch.query_Q)),)
        case InfoNCE():
            weight_QD = losses.positive_weights(
                torch.from_numpy(batch.target_QD),
                torch.from_numpy(batch.own_QD),
                objective.positives,
                objective.threshold,
            )
            # Without any positive every share is 0, whatever it is divided by.
            return (float(weight_QD.double().sum()) or 1.0,)
        case Combined():
            return tuple(d for part in objective.parts for d in divisors(part, batch))
        case _:
            assert_never(objective)


def share(
    objective: Objective, cosine_QD: Tensor, cells: Cells, scale: Tensor | float, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The share of these rows in the batch's loss, and in the least that the loss could be.

    `scale` and `bias` are those that the objective learns; a part that learns neither has its own.
    """
    target_QD, weight_QD = cells.target_QD, cells.weight_QD
    match objective:
        case GradedBCE():
            (queries,) = cells.divisors
            loss = losses.graded_bce(scale * cosine_QD + bias, target_QD, weight_QD, queries)
            return loss, losses.label_entropy(target_QD, weight_QD, queries)
        case InfoNCE():
            positive_QD = losses.positive_weights(
                target_QD, cells.own_QD, objective.positives, objective.threshold
            )
            loss = losses.infonce(
                objective.scale * cosine_QD,
                target_QD,
                weight_QD,
                cells.known_QD,
                positive_QD,
                *cells.divisors,
            )
            return loss, torch.zeros_like(loss)
        case Combined():
            shares = []
            for weight, part, divisor in zip(
                objective.weights, objective.parts, cells.divisors, strict=True
            ):
                own_scale = scale if part.learns_bias else part.scale
                own = replace(cells, divisors=(divisor,))
                loss, floor = share(part, cosine_QD, own, own_scale, bias)
                shares.append((weight * loss, weight * floor))
            whole_loss, whole_floor = (
                torch.stack(column).sum() for column in zip(*shares, strict=True)
            )
            return whole_loss, whole_floor
        case _:
            assert_never(objective)
