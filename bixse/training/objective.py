"""The seam between objectives and everything else: settings -> divisors and shares of the loss.

Whoever trains asks three things of an objective and knows none by name: which of scale and bias it
learns (its settings say so), what the loss of a batch is divided by (`divisors`, from the whole
batch, equal on every rank), and the share of some rows in that loss (`share`). The shares of all
rows add up to the loss of the batch, so that W ranks equal one and rows may be taken in chunks.

Shapes: Q queries (rows at hand), D documents of the batch, K known cells, M masked ones,
R preferences, O observations of clicks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from bixse.training import losses
from bixse.training.batches import Batch
from bixse.training.groups import Ints, Labels
from bixse.training.objective_settings import (
    LCE,
    ClickBCE,
    Combined,
    GradedBCE,
    InfoNCE,
    LambdaLoss,
    ListKL,
    MarginMSE,
    Objective,
    PairBCE,
    PreferenceKL,
    RankNet,
    Triplet,
    Wasserstein,
)

Divisors = tuple[float, ...]
"""One for each part of an objective."""

Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Grid:
    """All cells of some rows."""

    target_QD: Tensor
    weight_QD: Tensor
    known_QD: Tensor
    own_QD: Tensor
    row_R: Tensor
    a_R: Tensor
    b_R: Tensor
    prob_a_R: Tensor
    row_O: Tensor
    column_O: Tensor
    click_rate_O: Tensor
    rank_bias_O: Tensor
    click_weight_O: Tensor
    divisors: Divisors
    gather: Gather

    def competing(self, in_batch: bool) -> Tensor:
        """Which cells of a row stand in its list, [Q, D]."""
        return self.weight_QD > 0 if in_batch else self.known_QD


@dataclass(frozen=True)
class Cells:
    """A rank's rows of a batch: its cells that are not plain zeros, counted from its first row."""

    rows: int
    row_K: Tensor
    column_K: Tensor
    relevance_K: Tensor
    own_K: Tensor
    row_M: Tensor
    column_M: Tensor
    row_R: Tensor
    a_R: Tensor
    b_R: Tensor
    prob_a_R: Tensor
    row_O: Tensor
    column_O: Tensor
    click_rate_O: Tensor
    rank_bias_O: Tensor
    click_weight_O: Tensor
    set_number: int
    documents: Sequence[int]
    """Documents that each rank encodes."""
    row_cells: int
    """Cells that an objective makes of a row at most: each known one against each document."""
    divisors: Divisors
    gather: Gather
    """Rows of this rank -> the rows of all ranks, with gradient."""

    def grid(self, part: slice) -> Grid:
        """All cells of some of these rows."""
        shape = (part.stop - part.start, sum(self.documents))
        device = self.row_K.device
        k, m, r, o = (
            (row >= part.start) & (row < part.stop)
            for row in (self.row_K, self.row_M, self.row_R, self.row_O)
        )
        known = (self.row_K[k] - part.start, self.column_K[k])
        target_QD = torch.zeros(shape, device=device).index_put(known, self.relevance_K[k])
        false_QD = torch.zeros(shape, dtype=torch.bool, device=device)
        masked = (self.row_M[m] - part.start, self.column_M[m])
        return Grid(
            target_QD=target_QD,
            weight_QD=torch.ones(shape, device=device).index_put(
                masked, torch.zeros((), device=device)
            ),
            known_QD=false_QD.index_put(known, torch.ones_like(self.own_K[k])),
            own_QD=false_QD.index_put(known, self.own_K[k]),
            row_R=self.row_R[r] - part.start,
            a_R=self.a_R[r],
            b_R=self.b_R[r],
            prob_a_R=self.prob_a_R[r],
            row_O=self.row_O[o] - part.start,
            column_O=self.column_O[o],
            click_rate_O=self.click_rate_O[o],
            rank_bias_O=self.rank_bias_O[o],
            click_weight_O=self.click_weight_O[o],
            divisors=self.divisors,
            gather=self.gather,
        )


def cells_of(
    batch: Batch,
    part: slice,
    documents: Sequence[int],
    divisors: Divisors,
    gather: Gather,
    device: torch.device,
) -> Cells:
    """Some rows of a batch, on a device."""
    k, m, r = (
        slice(*np.searchsorted(row, (part.start, part.stop)))
        for row in (batch.row_K, batch.row_M, batch.row_R)
    )

    o = slice(*np.searchsorted(batch.cell_O, (k.start, k.stop)))
    cell_O = batch.cell_O[o]

    def on(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    widest = int(np.bincount(batch.row_K).max()) if len(batch.row_K) else 1
    return Cells(
        rows=part.stop - part.start,
        row_K=on(batch.row_K[k] - part.start),
        column_K=on(batch.column_K[k]),
        relevance_K=on(batch.relevance_K[k]),
        own_K=on(batch.own_K[k]),
        row_M=on(batch.row_M[m] - part.start),
        column_M=on(batch.column_M[m]),
        row_R=on(batch.row_R[r] - part.start),
        a_R=on(batch.a_R[r]),
        b_R=on(batch.b_R[r]),
        prob_a_R=on(batch.prob_a_R[r]),
        row_O=on(batch.row_K[cell_O] - part.start),
        column_O=on(batch.column_K[cell_O]),
        click_rate_O=on(batch.click_rate_O[o]),
        rank_bias_O=on(batch.rank_bias_O[o]),
        click_weight_O=on(batch.click_weight_O[o]),
        set_number=batch.set_number,
        documents=documents,
        row_cells=len(batch.document_D) * widest,
        divisors=divisors,
        gather=gather,
    )


def divisors(objective: Objective, batch: Batch) -> Divisors:
    """What the loss of a global batch is divided by: a function of the batch alone.

    Queries, the weights of positives, ordered pairs, triplets, preferences, groups or judged pairs.
    Where there is none every share is 0, whatever it is divided by.
    """
    match objective:
        case GradedBCE() | ClickBCE() | ListKL() | LambdaLoss() | Wasserstein():
            return (float(len(batch.query_Q)),)
        case InfoNCE():
            weight_K = losses.positive_weights(
                torch.from_numpy(batch.relevance_K),
                torch.from_numpy(batch.own_K),
                objective.positives,
                objective.threshold,
            )
            return (float(weight_K.double().sum()) or 1.0,)
        case RankNet() | MarginMSE():
            return (float(_worse(batch, objective.in_batch).sum()) or 1.0,)
        case Triplet():
            positive_K = batch.relevance_K >= objective.threshold
            positives_Q, known_Q, masked_Q = (
                np.bincount(row, minlength=len(batch.query_Q))
                for row in (batch.row_K[positive_K], batch.row_K, batch.row_M)
            )
            listed_Q = len(batch.document_D) - masked_Q if objective.in_batch else known_Q
            return (float((positives_Q * (listed_Q - positives_Q)).sum()) or 1.0,)
        case PreferenceKL():
            return (float(len(batch.row_R)) or 1.0,)
        case LCE():
            positive_K = batch.own_K & (batch.relevance_K >= objective.threshold)
            positives_Q, own_Q = (
                np.bincount(batch.row_K[cells], minlength=len(batch.query_Q))
                for cells in (positive_K, batch.own_K)
            )
            return (float(positives_Q[own_Q > positives_Q].sum()) or 1.0,)
        case PairBCE():
            return (float(batch.own_K.sum()),)
        case Combined():
            return tuple(d for part in objective.parts for d in divisors(part, batch))
        case _:
            assert_never(objective)


def refuse_idle(objective: Objective, labels: Labels) -> None:
    """Raises ValueError where no batch of these labels has a gradient, and decay alone would move
    the model."""
    if reason := _idle(objective, labels):
        raise ValueError(f"{reason}: there is nothing to learn from")


def _idle(objective: Objective, labels: Labels) -> str:
    """Why an objective learns nothing; empty where it does."""
    relevance_P, from_Q1 = labels.relevance_P, labels.pairs_from_Q1
    least_Q, most_Q = (f.reduceat(relevance_P, from_Q1[:-1]) for f in (np.minimum, np.maximum))
    match objective:
        case InfoNCE(positives="threshold", threshold=least) | Triplet(threshold=least) if (
            most_Q < least
        ).all():
            return f"no document is judged {least:g} or better"
        case Triplet(in_batch=False, threshold=least):
            if not ((most_Q >= least) & (least_Q < least)).any():
                return f"no query has both a document judged {least:g} or better and one below"
        case RankNet(in_batch=False) | LambdaLoss(in_batch=False) | MarginMSE(in_batch=False):
            if (least_Q == most_Q).all():
                return "no query has documents of different grades"
        case ListKL(in_batch=False):
            if (np.diff(from_Q1) < 2).all():
                return "no query has two judged documents"
        case PairBCE():
            if least_Q.min() == most_Q.max():
                return f"all {labels.pairs} judged pairs have relevance {most_Q[0]:g}"
        case Combined():
            reasons = [_idle(part, labels) for part in objective.parts]
            return reasons[0] if all(reasons) else ""
    return ""


def _worse(batch: Batch, in_batch: bool) -> Ints:
    """For each known cell the cells in its row's list that have less relevance."""
    queries = len(batch.query_Q)
    order = np.lexsort((batch.relevance_K, batch.row_K))
    row, relevance = batch.row_K[order], batch.relevance_K[order]
    from_Q1 = np.searchsorted(row, np.arange(queries + 1))
    begins = np.ones(len(row), np.bool_)
    begins[1:] = (row[1:] != row[:-1]) | (relevance[1:] != relevance[:-1])
    equal_from = np.maximum.accumulate(np.where(begins, np.arange(len(row)), 0))
    worse: Ints = equal_from - from_Q1[row]
    if in_batch:
        masked_Q = np.bincount(batch.row_M, minlength=queries)
        unknown_Q = len(batch.document_D) - masked_Q - np.diff(from_Q1)
        worse = worse + (relevance > 0) * unknown_Q[row]
    return worse


def share(
    objective: Objective, cosine_QD: Tensor, grid: Grid, scale: Tensor | float, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The share of these rows in the batch's loss, and in the least that the loss could be.

    `scale` and `bias` are those that the objective learns; a part that learns neither has its own.
    For an objective of pairs, `cosine_QD` are the model's scores, of which own cells alone count.
    """
    if isinstance(objective, Combined):
        return _combined(objective, cosine_QD, grid, scale, bias)
    if isinstance(objective, GradedBCE):
        logit_QD = scale * cosine_QD + bias
        target_QD, weight_QD, (queries,) = grid.target_QD, grid.weight_QD, grid.divisors
        loss = losses.graded_bce(logit_QD, target_QD, weight_QD, queries)
        return loss, losses.label_entropy(target_QD, weight_QD, queries)
    if isinstance(objective, ClickBCE):
        return _of_clicks(scale * cosine_QD + bias, grid)
    if isinstance(objective, PairBCE):
        weight_QD, (pairs,) = grid.own_QD.to(grid.weight_QD.dtype), grid.divisors
        loss = losses.graded_bce(cosine_QD, grid.target_QD, weight_QD, pairs)
        return loss, losses.label_entropy(grid.target_QD, weight_QD, pairs)
    loss = _loss(objective, cosine_QD, grid)
    return loss, torch.zeros_like(loss)


def _of_clicks(logit_QD: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Clicks on what was shown; every other document of the batch is irrelevant, as in BiXSE."""
    (queries,) = grid.divisors
    logit_O = logit_QD[grid.row_O, grid.column_O]
    clicks = grid.click_rate_O, grid.click_weight_O
    loss = losses.click_bce(logit_O, grid.rank_bias_O, *clicks, queries)
    other_QD = grid.weight_QD.masked_fill(grid.known_QD, 0.0)
    zeros = losses.graded_bce(logit_QD, torch.zeros_like(logit_QD), other_QD, queries)
    return loss + zeros, losses.label_entropy(*clicks, queries)


def _combined(
    objective: Combined, cosine_QD: Tensor, grid: Grid, scale: Tensor | float, bias: Tensor
) -> tuple[Tensor, Tensor]:
    loss, floor = cosine_QD.new_zeros(()), cosine_QD.new_zeros(())
    for weight, part, divisor in zip(
        objective.weights, objective.parts, grid.divisors, strict=True
    ):
        more = share(part, cosine_QD, replace(grid, divisors=(divisor,)), scale, bias)
        loss, floor = loss + weight * more[0], floor + weight * more[1]
    return loss, floor


def _loss(
    objective: InfoNCE
    | ListKL
    | RankNet
    | LambdaLoss
    | MarginMSE
    | Wasserstein
    | Triplet
    | PreferenceKL
    | LCE,
    cosine_QD: Tensor,
    grid: Grid,
) -> Tensor:
    """The share in an objective that learns the model alone; the least of each is 0."""
    (divisor,) = grid.divisors
    logit_QD = objective.scale * cosine_QD
    target_QD, known_QD = grid.target_QD, grid.known_QD
    match objective:
        case InfoNCE():
            positive_QD = losses.positive_weights(
                target_QD, grid.own_QD, objective.positives, objective.threshold
            )
            cells = (target_QD, grid.weight_QD, known_QD, positive_QD)
            return losses.infonce(logit_QD, *cells, divisor)
        case ListKL():
            list_QD = grid.competing(objective.in_batch)
            teacher_QD = objective.target_scale * target_QD
            return losses.list_kl(logit_QD, teacher_QD, known_QD, list_QD, divisor)
        case RankNet():
            list_QD = grid.competing(objective.in_batch)
            return losses.ranknet(logit_QD, target_QD, known_QD, list_QD, divisor)
        case LambdaLoss():
            list_QD = grid.competing(objective.in_batch)
            weighting = objective.weighting
            return losses.lambda_loss(logit_QD, target_QD, known_QD, list_QD, weighting, divisor)
        case MarginMSE():
            list_QD = grid.competing(objective.in_batch)
            teacher_QD = objective.target_scale * target_QD
            return losses.margin_mse(logit_QD, teacher_QD, known_QD, list_QD, divisor)
        case Wasserstein():
            # No sum over rows: every rank takes the whole, and counts its rows' part of it.
            label_QD = objective.target_scale * target_QD
            rows = (grid.gather(x) for x in (logit_QD, label_QD, grid.weight_QD))
            return losses.wasserstein(*rows) * (len(cosine_QD) / divisor)
        case Triplet():
            positive_QD = known_QD & (target_QD >= objective.threshold)
            negative_QD = grid.competing(objective.in_batch) & ~positive_QD
            margin = objective.margin
            return losses.triplet(cosine_QD, positive_QD, negative_QD, margin, divisor)
        case PreferenceKL():
            a_R, b_R = logit_QD[grid.row_R, grid.a_R], logit_QD[grid.row_R, grid.b_R]
            return losses.preference_kl(a_R, b_R, grid.prob_a_R, divisor)
        case LCE():
            positive_QD = grid.own_QD & (target_QD >= objective.threshold)
            groups = losses.local_groups(cosine_QD, positive_QD, grid.own_QD & ~positive_QD)
            return losses.lce(groups, divisor, objective.temperature)
        case _:
            assert_never(objective)
