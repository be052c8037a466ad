"""The objectives: functions of tensors, with their papers. Reductions are in float32 or better.

Shapes: Q queries, D documents, P positives. `logit_QD` is scale * cosine (+ bias for the BCE),
`target_QD` relevance in [0, 1], `weight_QD` 1 or, where a cell is masked, 0.

Every function returns the share of some rows of a batch in the loss of the whole batch: the divisor
is the batch's, passed in, so that the shares of all ranks add up to the loss of one process.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

Positives = Literal["all", "threshold", "weighted"]


def graded_bce(logit_QD: Tensor, target_QD: Tensor, weight_QD: Tensor, queries: float) -> Tensor:
    """sum_ij w_ij (softplus(s_ij) - t_ij s_ij) / queries: BiXSE, arXiv 2508.06781 (methods 1.1).

    Equal to -sum [t log sigma(s) + (1 - t) log(1 - sigma(s))] / queries, finite for any s.
    """
    s, t, w = _reduced(logit_QD, target_QD, weight_QD)
    return (w * (softplus(s) - t * s)).sum() / queries


def label_entropy(target_QD: Tensor, weight_QD: Tensor, queries: float) -> Tensor:
    """sum_ij w_ij H(t_ij) / queries, in nats: the least that `graded_bce` can be (methods 1.6, 4).

    H(t) = -t log t - (1 - t) log(1 - t), and 0 at 0 and 1.
    """
    t, w = _reduced(target_QD, weight_QD)
    return -(w * (torch.xlogy(t, t) + torch.xlogy(1 - t, 1 - t))).sum() / queries


def positive_weights(
    target_QD: Tensor, own_QD: Tensor, positives: Positives, threshold: float
) -> Tensor:
    """What each own cell weighs as a positive of InfoNCE; 0 in every other cell.

    all: 1. threshold: 1 where t >= threshold, else 0. weighted: t. Their sum over the batch is the
    divisor of `infonce`.
    """
    (t,) = _reduced(target_QD)
    match positives:
        case "all":
            weight = torch.ones_like(t)
        case "threshold":
            weight = (t >= threshold).to(t.dtype)
        case "weighted":
            weight = t
    return weight * own_QD


def infonce(
    logit_QD: Tensor,
    target_QD: Tensor,
    weight_QD: Tensor,
    known_QD: Tensor,
    positive_QD: Tensor,
    divisor: float,
) -> Tensor:
    """sum_p w_p (log sum_{k in N_p} exp(s_ik) - s_ij) / divisor, over positives p = (i, j).

    InfoNCE, arXiv 1807.03748, in the three forms of methods 1.3: w_p is `positive_QD`, of
    `positive_weights`, and `divisor` their sum over the whole batch, which makes the loss the
    weighted mean of its rows' cross-entropies. N_p is j and every column of row i but those that
    are masked and those known to be as good or better (t_ik >= t_ij): a known better document is no
    negative of a worse one. A row whose positives all weigh 0 contributes nothing.
    """
    s, t, positive = _reduced(logit_QD, target_QD, positive_QD)
    row_P, column_P = positive.nonzero(as_tuple=True)
    s_PD, t_PD = s[row_P], t[row_P]
    as_good_PD = known_QD[row_P] & (t_PD >= t[row_P, column_P].unsqueeze(1))
    out_PD = as_good_PD | (weight_QD[row_P] == 0)
    itself_PD = torch.arange(s.shape[1], device=s.device) == column_P.unsqueeze(1)
    s_PD = s_PD.masked_fill(out_PD & ~itself_PD, -torch.inf)
    loss_P = torch.logsumexp(s_PD, dim=1) - s[row_P, column_P]
    return (positive[row_P, column_P] * loss_P).sum() / divisor


def calibrate_bias(cosine_QD: Tensor, target_QD: Tensor, weight_QD: Tensor, scale: float) -> float:
    """beta_0 with mean sigma(scale * c + beta_0) = mean t over the cells (methods 1.3), bisected.

    A mean target of 0 or 1 has no finite answer: it is taken as half a cell away from it.
    """
    seen = weight_QD.bool()
    logits = scale * cosine_QD[seen].double()
    half = 0.5 / len(logits)
    mean = min(max(float(target_QD[seen].double().mean()), half), 1 - half)
    low, high = -2 * scale - 40.0, 2 * scale + 40.0
    for _ in range(100):
        middle = (low + high) / 2
        if float(torch.sigmoid(logits + middle).mean()) < mean:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _reduced(*tensors: Tensor) -> tuple[Tensor, ...]:
    """float32 where the precision is lower; float64 stays."""
    precision = max(
        (t.dtype for t in tensors if t.is_floating_point()),
        key=lambda d: torch.finfo(d).bits,
    )
    precision = torch.promote_types(precision, torch.float32)
    return tuple(t.to(precision) for t in tensors)
