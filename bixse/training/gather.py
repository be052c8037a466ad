"""The one gather across ranks, with gradient; and a rank's rows of a batch.

Shapes: N rows of this rank, D rows of all ranks, E dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bixse.training import objective as objectives
from bixse.training.batches import Batch
from bixse.training.objective import Cells
from bixse.training.objective_settings import Objective
from bixse.training.order import share, shares


@dataclass(frozen=True)
class World:
    """This rank among how many."""

    rank: int = 0
    size: int = 1


def cells_of(batch: Batch, objective: Objective, world: World, device: torch.device) -> Cells:
    """This rank's rows of a global batch."""
    queries = len(batch.query_Q)
    return objectives.cells_of(
        batch,
        share(queries, world.rank, world.size),
        shares(len(batch.document_D), world.size),
        objectives.divisors(objective, batch),
        partial(gather_rows, counts=shares(queries, world.size), world=world),
        device,
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
