"""The one gather across ranks, and the objective it serves: W ranks equal one.

Each rank encodes its share of the batch's queries and of its documents. The documents' vectors are
gathered with gradient, and each rank takes the loss of its own queries against all documents,
divided by the divisor of the whole batch (form 3 of methods 1.4). DDP averages gradients over the W
ranks, so the share is multiplied by W. Encoder, scale and bias all sit inside the wrapped module,
and their gradients are those of one process on the whole batch.

Shapes: Q queries of this rank, D documents of the batch, N documents of this rank, E dimensions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from bixse.precision import autocast
from bixse.settings import Precision
from bixse.training import losses
from bixse.training.batches import Batch, Side
from bixse.training.order import share
from bixse.training.settings import GradedBCE, Objective

MAX_SCALE = 100.0


@dataclass(frozen=True)
class World:
    """This rank among how many."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Cells:
    """The batch's cells in the rows of one rank, and what the whole batch's loss is divided by."""

    target_QD: Tensor
    weight_QD: Tensor
    known_QD: Tensor
    own_QD: Tensor
    documents: Sequence[int]
    """Documents that each rank encodes."""
    divisor: float


def cells_of(batch: Batch, objective: Objective, world: World, device: torch.device) -> Cells:
    """This rank's rows of a global batch."""
    rows = share(len(batch.query_Q), world.rank, world.size)
    columns = [share(len(batch.document_D), rank, world.size) for rank in range(world.size)]
    if isinstance(objective, GradedBCE):
        divisor = float(len(batch.query_Q))
    else:
        whole = losses.positive_weights(
            torch.from_numpy(batch.target_QD),
            torch.from_numpy(batch.own_QD),
            objective.positives,
            objective.threshold,
        )
        # Without any positive every share is 0, whatever it is divided by.
        divisor = float(whole.double().sum()) or 1.0
    return Cells(
        target_QD=torch.from_numpy(batch.target_QD[rows]).to(device),
        weight_QD=torch.from_numpy(batch.weight_QD[rows]).to(device),
        known_QD=torch.from_numpy(batch.known_QD[rows]).to(device),
        own_QD=torch.from_numpy(batch.own_QD[rows]).to(device),
        documents=[column.stop - column.start for column in columns],
        divisor=divisor,
    )


class _GatherRows(torch.autograd.Function):
    """Forward: every rank's rows, in rank order. Backward: the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, rows_NE: Tensor, counts: Sequence[int], rank: int) -> Tensor:
        ctx.counts, ctx.rank = counts, rank
        padded = rows_NE.new_zeros(max(counts), rows_NE.shape[1])
        padded[: len(rows_NE)] = rows_NE
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_DE = grads[0].contiguous()
        dist.all_reduce(grad_DE)
        start = sum(ctx.counts[: ctx.rank])
        return grad_DE[start : start + ctx.counts[ctx.rank]], None, None


def gather_rows(rows_NE: Tensor, counts: Sequence[int], world: World) -> Tensor:
    """All ranks' rows, with gradient; `counts` says how many each rank has, and may hold zeros."""
    if world.size == 1:
        return rows_NE
    # torch leaves `Function.apply` without types.
    gathered: Tensor = _GatherRows.apply(rows_NE, counts, world.rank)  # type: ignore[no-untyped-call]
    return gathered


class GatheredObjective(nn.Module):
    """Encoder, scale and bias, and the loss of a batch of which each rank holds a share.

    `encoder(features, task=role)` returns a mapping with `sentence_embedding` [texts, E].
    """

    def __init__(
        self,
        encoder: nn.Module,
        objective: Objective,
        world: World,
        precision: Precision = "auto",
    ) -> None:
        super().__init__()
        self.precision = precision
        self.encoder = encoder
        self.objective = objective
        self.world = world
        self.learns_scale = isinstance(objective, GradedBCE) and objective.learn_scale
        log_scale = torch.tensor(math.log(objective.scale))
        self.log_scale = nn.Parameter(log_scale, requires_grad=self.learns_scale)
        self.bias = nn.Parameter(torch.zeros(()), requires_grad=isinstance(objective, GradedBCE))

    @property
    def scale(self) -> float:
        return self.log_scale.exp().item() if self.learns_scale else self.objective.scale

    def encode(self, side: Side) -> Tensor:
        """Unit vectors [side.count, E] in the order of the texts."""
        with autocast(side.place.device, self.precision):
            chunks = [self.encoder(c, task=side.role)["sentence_embedding"] for c in side.chunks]
        vectors_NE = torch.cat(chunks)
        precision = torch.promote_types(vectors_NE.dtype, torch.float32)
        return normalize(vectors_NE.to(precision), dim=1)[side.place][: side.count]

    def cosines(self, queries: Side, documents: Side, counts: Sequence[int]) -> Tensor:
        """Cosines of this rank's queries with the documents of all ranks, [Q, D]."""
        document_DE = gather_rows(self.encode(documents), counts, self.world)
        return self.encode(queries) @ document_DE.T

    def forward(self, queries: Side, documents: Side, cells: Cells) -> tuple[Tensor, Tensor]:
        """W times this rank's share of the loss, to go backward from; and its shares to report.

        The second is [loss, floor], detached: added up over the ranks they are the batch's loss
        and the least it could be.
        """
        cosine_QD = self.cosines(queries, documents, cells.documents)
        scale = self.log_scale.exp() if self.learns_scale else self.objective.scale
        logit_QD = scale * cosine_QD
        target_QD, weight_QD = cells.target_QD, cells.weight_QD
        if isinstance(self.objective, GradedBCE):
            loss = losses.graded_bce(logit_QD + self.bias, target_QD, weight_QD, cells.divisor)
            floor = losses.label_entropy(target_QD, weight_QD, cells.divisor)
        else:
            positive_QD = losses.positive_weights(
                target_QD, cells.own_QD, self.objective.positives, self.objective.threshold
            )
            loss = losses.infonce(
                logit_QD, target_QD, weight_QD, cells.known_QD, positive_QD, cells.divisor
            )
            floor = torch.zeros_like(loss)
        shares = torch.stack([loss.detach().double(), floor.detach().double()])
        return loss * self.world.size, shares
