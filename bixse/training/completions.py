"""Rows of (prompt, answer) for a causal language model: their loss, its gradients, what it expects.

The loss is of the answers alone; a prompt is read and teaches nothing:

    L = -(1 / A) sum_r sum_t log p(answer_rt | prompt_r, answer_r1 ... answer_r,t-1)

with A the tokens of all answers of the batch, whatever rank has them. Rows are padded at the left,
so that answers end where the tensor ends: logits are computed of the last positions only.

Shapes: R rows, N tokens of the longest row, K of the longest answer, V tokens that the model knows,
L labels of a scale, T tokens of all rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from bixse.precision import autocast
from bixse.settings import Precision
from bixse.training.gather import World, gather_rows
from bixse.training.gradients import sum_gradients
from bixse.training.order import share, shares

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Completions:
    """Prompts and their answers as token ids, in two arrays however many there are."""

    token_T: npt.NDArray[np.int32]
    begin_R1: Ints
    """Where each row begins in `token_T`, and the end."""
    answer_R: Ints
    """Tokens at the end of each row that are its answer; one or more."""

    @classmethod
    def of(cls, rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> "Completions":
        """Rows of (prompt, answer). Raises ValueError where one of the two is empty."""
        tokens: list[npt.NDArray[np.int32]] = []
        answers: list[int] = []
        for prompt, answer in rows:
            if not prompt or not answer:
                raise ValueError("a row needs a prompt and an answer of one token or more")
            tokens.append(np.array([*prompt, *answer], np.int32))
            answers.append(len(answer))
        begin_R1 = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
        empty = np.empty(0, np.int32)
        return cls(np.concatenate(tokens or [empty]), begin_R1, np.array(answers, np.int64))

    def __len__(self) -> int:
        return len(self.answer_R)

    def chunks(self, rows: Ints, limit: int) -> Iterator[Ints]:
        """The rows in pieces of at most `limit` tokens, padding counted, or of one row; the
        longest first."""
        length = np.diff(self.begin_R1)[rows]
        by_length = rows[np.argsort(-length, kind="stable")]
        longest = np.sort(length)[::-1]
        start = 0
        while start < len(by_length):
            count = max(1, int(limit // longest[start]))
            yield by_length[start : start + count]
            start += count


class _Padded(NamedTuple):
    """Rows on the model's device, padded at the left."""

    id_RN: Tensor
    read_RN: Tensor
    answer_R: Tensor


def answer_losses(model: nn.Module, rows: Completions, chosen: Ints) -> Tensor:
    """Of each chosen row the negative log-probability of its whole answer, [R], with gradient."""
    padded = _pad(rows, chosen, model)
    target_RK, answered_RK = _answers(padded)
    logit_RKV = _logits(model, padded, target_RK.shape[1] + 1)[:, :-1].float()
    loss_RK = functional.cross_entropy(
        logit_RKV.flatten(0, 1), target_RK.flatten(), reduction="none"
    ).view_as(target_RK)
    return torch.where(answered_RK, loss_RK, 0.0).sum(1)


def completion_gradients(
    model: nn.Module,
    rows: Completions,
    batch: Ints,
    limit: int,
    world: World,
    precision: Precision,
) -> float:
    """Leave the gradients of a global batch in `.grad`, the same on every rank; its loss.

    No more than `limit` tokens (or one row) are in memory at a time.
    """
    model.zero_grad(set_to_none=True)
    answered = int(rows.answer_R[batch].sum())
    mine = batch[share(len(batch), world.rank, world.size)]
    device = _device(model)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for chunk in rows.chunks(mine, limit):
        with autocast(device, precision):
            loss = answer_losses(model, rows, chunk).sum() / answered
        # torch leaves `Tensor.backward` without types.
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach().double()
    sum_gradients(model, world)
    if world.size > 1:
        dist.all_reduce(total)
    return float(total)


@torch.no_grad()
def expectations(
    model: nn.Module,
    rows: Completions,
    label_ids: Sequence[int],
    limit: int,
    world: World,
    precision: Precision,
) -> tuple[Floats, Floats]:
    """What the model expects of every row, whatever rank reads it.

    Of each answer the log-probability a token, [R]; and of `label_ids` the log-probability of each
    as its first token, [R, L].
    """
    mine = np.arange(len(rows))[share(len(rows), world.rank, world.size)]
    device = _device(model)
    found_RL = torch.zeros(len(mine), 1 + len(label_ids), dtype=torch.float64, device=device)
    for chunk in rows.chunks(mine, limit):
        padded = _pad(rows, chunk, model)
        target_RK, answered_RK = _answers(padded)
        longest = target_RK.shape[1]
        with autocast(device, precision):
            logit_RKV = _logits(model, padded, longest + 1)[:, :-1]
        log_prob_RKV = logit_RKV.float().log_softmax(-1)
        of_target = log_prob_RKV.gather(2, target_RK[..., None])[..., 0]
        at = torch.from_numpy(chunk - mine[0]).to(device)
        sums = torch.where(answered_RK, of_target, 0.0).double().sum(1)
        found_RL[at, 0] = sums / padded.answer_R
        first_RV = log_prob_RKV[torch.arange(len(chunk), device=device), longest - padded.answer_R]
        found_RL[at, 1:] = first_RV[:, list(label_ids)].double()
    whole = gather_rows(found_RL, shares(len(rows), world.size), world).cpu().numpy()
    return whole[:, 0], whole[:, 1:]


def _pad(rows: Completions, chosen: Ints, model: nn.Module) -> _Padded:
    begin, end = rows.begin_R1[chosen], rows.begin_R1[chosen + 1]
    width = int((end - begin).max())
    id_RN = np.zeros((len(chosen), width), np.int64)
    read_RN = np.zeros((len(chosen), width), np.int64)
    for row, (first, last) in enumerate(zip(begin, end, strict=True)):
        id_RN[row, width - (last - first) :] = rows.token_T[first:last]
        read_RN[row, width - (last - first) :] = 1
    answer_R = rows.answer_R[chosen]
    arrays = (torch.from_numpy(array).to(_device(model)) for array in (id_RN, read_RN, answer_R))
    return _Padded(*arrays)


def _answers(padded: _Padded) -> tuple[Tensor, Tensor]:
    """The last tokens of each row, [R, K], and which of them are its answer."""
    longest = int(padded.answer_R.max())
    place_K = torch.arange(longest, 0, -1, device=padded.answer_R.device)
    return padded.id_RN[:, -longest:], place_K[None] <= padded.answer_R[:, None]


def _logits(model: Any, padded: _Padded, last: int) -> Tensor:
    """Logits of the last positions, [R, last, V]."""
    position_RN = (padded.read_RN.cumsum(1) - 1).clamp(min=0)
    found: Tensor = model(
        input_ids=padded.id_RN,
        attention_mask=padded.read_RN,
        position_ids=position_RN,
        logits_to_keep=last,
        use_cache=False,
    ).logits
    return found


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
