"""The one gather across ranks, and the objective it serves: W ranks equal one.

Each rank encodes its share of the batch's queries and of its documents. The documents' vectors are
gathered with gradient, and each rank takes the loss of its own queries against all documents,
divided by the divisor of the whole batch (form 3 of methods 1.4). The shares add up to the loss of
one process, so their gradients are summed over the ranks, encoder, scale and bias alike
(`gradients.py`).

Shapes: Q queries of this rank, D documents of the batch, N documents of this rank, E dimensions.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from bixse.precision import autocast
from bixse.settings import Precision
from bixse.training import objective as objectives
from bixse.training.batches import Batch, Side
from bixse.training.objective import Cells
from bixse.training.order import share
from bixse.training.settings import Objective

MAX_SCALE = 100.0

# 64 MiB for each float32 that an objective keeps of a cell.
_CHUNK_CELLS = 2**24


@dataclass(frozen=True)
class World:
    """This rank among how many."""

    rank: int = 0
    size: int = 1


def cells_of(batch: Batch, objective: Objective, world: World, device: torch.device) -> Cells:
    """This rank's rows of a global batch."""
    parts = [share(len(batch.query_Q), rank, world.size) for rank in range(world.size)]
    columns = [share(len(batch.document_D), rank, world.size) for rank in range(world.size)]
    counts = [part.stop - part.start for part in parts]
    return objectives.cells_of(
        batch,
        parts[world.rank],
        [column.stop - column.start for column in columns],
        objectives.divisors(objective, batch),
        partial(gather_rows, counts=counts, world=world),
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
        self.chunk_cells = _CHUNK_CELLS
        self.learns_scale = objective.learns_scale
        log_scale = torch.tensor(math.log(objective.scale))
        self.log_scale = nn.Parameter(log_scale, requires_grad=self.learns_scale)
        self.bias = nn.Parameter(torch.zeros(()), requires_grad=objective.learns_bias)

    @property
    def scale(self) -> float:
        return self.log_scale.exp().item() if self.learns_scale else self.objective.scale

    def encode(self, side: Side) -> Tensor:
        """Unit vectors [side.count, E] in the order of the texts."""
        with self.autocast():
            return self.ordered(torch.cat(list(self.chunks(side))), side)

    def autocast(self) -> torch.autocast:
        return autocast(self.log_scale.device, self.precision)

    def chunks(self, side: Side) -> Iterator[Tensor]:
        """What the encoder makes of each chunk, [texts, E], when it is asked for."""
        for chunk in side.chunks:
            with self.autocast():
                # A copy: sentence-transformers adds its outputs to the features.
                vectors: Tensor = self.encoder(dict(chunk), task=side.role)["sentence_embedding"]
            yield vectors

    @staticmethod
    def ordered(vectors_NE: Tensor, side: Side) -> Tensor:
        """Unit vectors [side.count, E] in the order of the texts, of those of all chunks."""
        precision = torch.promote_types(vectors_NE.dtype, torch.float32)
        return normalize(vectors_NE.to(precision), dim=1)[side.place][: side.count]

    def share(self, query_QE: Tensor, document_DE: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
        """This rank's share of the batch's loss and of its floor, from the vectors alone.

        Of its own queries and of the documents of all ranks, in chunks of rows: what an objective
        makes of its cells never takes more than about `chunk_cells` numbers at a time.
        """
        scale = self.log_scale.exp() if self.learns_scale else self.objective.scale

        def of_rows(query_CE: Tensor, document_DE: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            cosine_CD = query_CE @ document_DE.T
            grid = cells.grid(part)
            return objectives.share(self.objective, cosine_CD, grid, scale, self.bias)

        rows = len(query_QE)
        size = rows if self.objective.whole_batch else self.chunk_cells // cells.row_cells
        if rows <= size:
            return of_rows(query_QE, document_DE, slice(0, rows))
        loss, floor = query_QE.new_zeros(()), query_QE.new_zeros(())
        for start in range(0, rows, max(1, size)):
            part = slice(start, min(rows, start + max(1, size)))
            # What a chunk makes is made again on the way back, not kept.
            more = checkpoint(of_rows, query_QE[part], document_DE, part, use_reentrant=False)
            loss, floor = loss + more[0], floor + more[1]
        return loss, floor
