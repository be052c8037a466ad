"""Gradients of one batch over all ranks, in as little memory as asked for, in one all-reduce.

The loss sees texts only through what the model makes of them: vectors, or scores of pairs
(`scoring.py`). So a step is three parts: what is made of this rank's texts; the loss and its
gradient at that, which needs all ranks; from there to the weights.
Only the middle talks to other ranks, and it is small: a rank that runs out of memory in the first
or last says so before anybody waits for it.

GradCache (arXiv 2101.06983): with `recompute` the first part keeps nothing but vectors and the last
encodes again, chunk after chunk, so that no more than one chunk's activations exist at a time. As
dropout is off, the second encoding equals the first and the gradients are the same.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bixse.reading.chunks import Reading
from bixse.training.gather import World, gather_rows
from bixse.training.objective import Cells
from bixse.training.scoring import EncoderScoring, Scoring
from bixse.training.sharding import is_spread


def batch_gradients(
    module: Scoring, cells: Cells, reading: Reading, recompute: bool = False
) -> Tensor | None:
    """Leave the batch's gradients in `.grad`, the same on every rank; its [loss, floor].

    Gradients and loss are summed over the ranks. None, on every rank, when the memory of one did
    not suffice: then there are no gradients, and the call may be repeated with smaller chunks.
    """
    module.zero_grad(set_to_none=True)
    reading = _alike(module, reading)
    made_NE = _made(module, reading, recompute)
    if most(made_NE is None, module.world) or made_NE is None:
        return None
    # Gradient flows from the loss to these and stops.
    leaf_NE = made_NE.detach().requires_grad_()
    loss, floor = module.share(leaf_NE, reading, cells)
    # torch leaves `Tensor.backward` without types.
    loss.backward()  # type: ignore[no-untyped-call]
    shares = torch.stack([loss.detach().double(), floor.detach().double()])
    grad_NE = leaf_NE.grad if leaf_NE.grad is not None else torch.zeros_like(leaf_NE)
    through = _backward(module, reading, None if recompute else made_NE, grad_NE)
    del made_NE
    if most(not through, module.world):
        module.zero_grad(set_to_none=True)
        return None
    sum_gradients(module, module.world)
    if module.world.size > 1:
        dist.all_reduce(shares)
    return shares


@torch.no_grad()
def batch_logits(
    module: EncoderScoring, cells: Cells, reading: Reading, _: bool = True
) -> Tensor | None:
    """The logits of a batch, without bias, counted by size (`losses.count_logits`) over all ranks:
    those of whole vectors, then of each number of leading components, [K, 2, bins].

    None, on every rank, when the memory of one did not suffice.
    """
    reading = _alike(module, reading)
    made_NE = _made(module, reading, recompute=True)
    if most(made_NE is None, module.world) or made_NE is None:
        return None
    query_QE, own_NE = (module.vectors(made_NE, side) for side in reading.sides)
    document_DE = gather_rows(own_NE, cells.documents, module.world)
    counted = module.count_logits(query_QE, document_DE, cells)
    if module.world.size > 1:
        dist.all_reduce(counted)
    return counted


def _alike(module: Scoring, reading: Reading) -> Reading:
    """The texts; of a sharded model in as many chunks on every rank."""
    if not module.sharded:
        return reading
    return reading.filled(partial(most, world=module.world))


def _refuse_sharded(module: Scoring, error: torch.OutOfMemoryError) -> None:
    """Raises RuntimeError for a sharded model: other ranks already wait for this one's part."""
    if module.sharded:
        raise RuntimeError(
            "memory does not suffice on a rank of a sharded model: set "
            "training.micro_batch_tokens, or lower it"
        ) from error


def _made(module: Scoring, reading: Reading, recompute: bool) -> Tensor | None:
    """What the model makes of the texts, [N, E]; None when memory does not suffice."""
    try:
        # Around all chunks: a weight is rounded once a step, not once a chunk.
        with torch.set_grad_enabled(not recompute), module.autocast():
            return torch.cat(list(module.made(reading)))
    except torch.OutOfMemoryError as error:
        _refuse_sharded(module, error)
        return None


def _backward(module: Scoring, reading: Reading, made_NE: Tensor | None, grad_NE: Tensor) -> bool:
    """From what was made to the weights, on this rank; whether memory sufficed."""
    try:
        if made_NE is not None:
            torch.autograd.backward([made_NE], [grad_NE])
            return True
        for chunk, grad in _beside(module.made(reading), grad_NE):
            # torch leaves it without types.
            chunk.backward(grad)  # type: ignore[no-untyped-call]
        return True
    except torch.OutOfMemoryError as error:
        _refuse_sharded(module, error)
        return False


def _beside(chunks: Iterator[Tensor], rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each chunk with its rows."""
    start = 0
    for chunk in chunks:
        yield chunk, rows[start : start + len(chunk)]
        start += len(chunk)


def most(value: int, world: World) -> int:
    """The largest of all ranks' values; every rank must ask."""
    if world.size == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def sum_gradients(module: nn.Module, world: World) -> None:
    """Sum every gradient over the ranks, all of them in one all-reduce a data type.

    A parameter without a gradient on every rank (under mean pooling, a BERT's pooler) keeps none,
    so that the optimiser leaves it alone. Those of which each rank holds a part are summed already.
    """
    parameters = [p for p in module.parameters() if p.requires_grad and not is_spread(p)]
    if world.size == 1 or not parameters:
        return
    has = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device).int()
    dist.all_reduce(has, dist.ReduceOp.MAX)
    used = [p for p, any_rank in zip(parameters, has.tolist(), strict=True) if any_rank]
    for dtype in sorted({p.dtype for p in used}, key=str):
        mine = [p for p in used if p.dtype == dtype]
        flat = torch.cat([_grad(p).flatten() for p in mine])
        dist.all_reduce(flat)
        parts = torch.split(flat, [p.numel() for p in mine])
        for parameter, part in zip(mine, parts, strict=True):
            parameter.grad = part.view_as(parameter)


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
