"""The objectives: functions of tensors, with their papers. Reductions are in float32 or better.

Shapes: Q queries, D documents, P positives (or the better ends of ordered pairs), R preferences,
O observations of clicks, G groups of K documents. `logit_QD` is scale * cosine (+ bias for the
BCE), `target_QD` relevance in [0, 1], `weight_QD` 1 or, where a cell is masked, 0; `known_QD` the
judged cells and `list_QD` the cells that compete in a row: the judged ones, or every one that is
not masked.

Every function returns the share of some rows of a batch in the loss of the whole batch: the divisor
is the batch's, passed in, so that the shares of all ranks add up to the loss of one process.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softplus

Positives = Literal["all", "threshold", "weighted"]
Weighting = Literal["lambdarank", "ndcg_loss2", "ndcg_loss2pp"]

_BINS = 2**17
"""Of logits that a bias is calibrated on: 2 MB, whatever the batch."""


def graded_bce(logit_QD: Tensor, target_QD: Tensor, weight_QD: Tensor, queries: float) -> Tensor:
    """sum_ij w_ij (softplus(s_ij) - t_ij s_ij) / queries: BiXSE, arXiv 2508.06781 (methods 1.1).

    Equal to -sum [t log sigma(s) + (1 - t) log(1 - sigma(s))] / queries, finite for any s.
    """
    s, t, w = _reduced(logit_QD, target_QD, weight_QD)
    return (w * (softplus(s) - t * s)).sum() / queries


def click_bce(
    logit_O: Tensor, rank_bias_O: Tensor, rate_O: Tensor, weight_O: Tensor, queries: float
) -> Tensor:
    """sum_o w_o BCE(c_o, sigma(theta_o + s_o)) / queries: two-tower click model, arXiv 2506.20501.

    Of observations o, a document shown for a query at a rank: s what the encoder says of the two,
    theta what the rank does, c the clicks an impression.
    """
    return graded_bce(logit_O + rank_bias_O, rate_O, weight_O, queries)


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


def list_kl(
    logit_QD: Tensor, teacher_QD: Tensor, known_QD: Tensor, list_QD: Tensor, queries: float
) -> Tensor:
    """sum_i KL(T_i || X_i) / queries: distillation of a pointwise teacher (methods 2, L_KD).

    T_i = softmax of the teacher's scores over the judged documents of row i, 0 elsewhere; X_i =
    softmax(s_i) over the row's list. Where the list is the judged documents it is the form of
    PairDistill's ColBERT, arXiv 2410.01383, and a query with one of them contributes 0. Where it is
    the whole row it is that of its DPR, and such a query contributes InfoNCE's log(1 / X_ij).
    """
    s, teacher = _reduced(logit_QD, teacher_QD)
    seen = known_QD.any(dim=1)
    s, teacher, known, compete = (x[seen] for x in (s, teacher, known_QD, list_QD))
    log_x = log_softmax(s.masked_fill(~compete, -torch.inf), dim=1)
    log_t = log_softmax(teacher.masked_fill(~known, -torch.inf), dim=1)
    # 0 log 0 is 0, and its gradient too.
    log_x, log_t = (log.masked_fill(~known, 0.0) for log in (log_x, log_t))
    t = log_t.exp().masked_fill(~known, 0.0)
    return (t * (log_t - log_x)).sum() / queries


def ordered(target_QD: Tensor, known_QD: Tensor, list_QD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (j, k) of a row with t_j > t_k: j judged, k in the list.

    The row and column of each j, [P], and [P, D] which columns are a k of it.
    """
    row_P, column_P = (known_QD & (target_QD > 0)).nonzero(as_tuple=True)
    lower_PD = target_QD[row_P] < target_QD[row_P, column_P].unsqueeze(1)
    return row_P, column_P, lower_PD & list_QD[row_P]


def ranknet(
    logit_QD: Tensor, target_QD: Tensor, known_QD: Tensor, list_QD: Tensor, pairs: float
) -> Tensor:
    """sum_{t_j > t_k} log(1 + exp(-(s_j - s_k))) / pairs: RankNet, Burges et al., ICML 2005.

    Over the pairs of `ordered`; `pairs` is their number in the whole batch.
    """
    s, t = _reduced(logit_QD, target_QD)
    row_P, column_P, worse_PD = ordered(t, known_QD, list_QD)
    lead_PD = s[row_P, column_P].unsqueeze(1) - s[row_P]
    return (softplus(-lead_PD) * worse_PD).sum() / pairs


def margin_mse(
    logit_QD: Tensor, teacher_QD: Tensor, known_QD: Tensor, list_QD: Tensor, pairs: float
) -> Tensor:
    """sum_{y_j > y_k} ((s_j - s_k) - (y_j - y_k))^2 / pairs: MarginMSE, arXiv 2010.02666.

    y is the teacher's score, 0 for a document that nobody judged; pairs as in `ranknet`.
    """
    s, y = _reduced(logit_QD, teacher_QD)
    row_P, column_P, worse_PD = ordered(y, known_QD, list_QD)
    lead_PD = s[row_P, column_P].unsqueeze(1) - s[row_P]
    wanted_PD = y[row_P, column_P].unsqueeze(1) - y[row_P]
    return ((lead_PD - wanted_PD).square() * worse_PD).sum() / pairs


def lambda_loss(
    logit_QD: Tensor,
    target_QD: Tensor,
    known_QD: Tensor,
    list_QD: Tensor,
    weighting: Weighting,
    queries: float,
) -> Tensor:
    """sum_{t_j > t_k} w_jk (G_j - G_k) log2(1 + exp(-(s_j - s_k))) / queries: LambdaLoss.

    Wang et al., CIKM 2018, doi 10.1145/3269206.3271784. G = t / (DCG of the best order of the
    row's list), the linear gain of our nDCG; r are the ranks of the list by s, and with 1 / D_r =
    1 / log2(1 + r)

        lambdarank     w = |1 / D_rj - 1 / D_rk|
        ndcg_loss2     w = 1 / D_m - 1 / D_{m+1},  m = |rj - rk|
        ndcg_loss2pp   w = lambdarank's + 10 * ndcg_loss2's

    w and G are constants to the gradient. Pairs as in `ranknet`.
    """
    s, t = _reduced(logit_QD, target_QD)
    row_P, column_P, worse_PD = ordered(t, known_QD, list_QD)
    listed_QD = s.detach().masked_fill(~list_QD, -torch.inf)
    order_QD = listed_QD.argsort(stable=True, dim=1, descending=True)
    rank_QD = order_QD.argsort(dim=1) + 1
    places_D = torch.arange(1, s.shape[1] + 1, device=s.device)
    best_QD = t.masked_fill(~list_QD, 0.0).sort(dim=1, descending=True).values
    best_Q = (best_QD * _discount(places_D, s)).sum(dim=1)
    rank_P1, rank_PD = rank_QD[row_P, column_P].unsqueeze(1), rank_QD[row_P]
    swap_PD = (_discount(rank_P1, s) - _discount(rank_PD, s)).abs()
    apart_PD = (rank_P1 - rank_PD).abs().clamp(min=1)
    near_PD = _discount(apart_PD, s) - _discount(apart_PD + 1, s)
    match weighting:
        case "lambdarank":
            weight_PD = swap_PD
        case "ndcg_loss2":
            weight_PD = near_PD
        case "ndcg_loss2pp":
            weight_PD = swap_PD + 10 * near_PD
    gain_PD = (t[row_P, column_P].unsqueeze(1) - t[row_P]) / best_Q[row_P].unsqueeze(1)
    lead_PD = s[row_P, column_P].unsqueeze(1) - s[row_P]
    loss_PD = weight_PD * gain_PD * softplus(-lead_PD) / math.log(2)
    return loss_PD[worse_PD].sum() / queries


def _discount(rank: Tensor, like: Tensor) -> Tensor:
    return 1 / torch.log2(rank.to(like.dtype) + 1)


def wasserstein(logit_QD: Tensor, label_QD: Tensor, weight_QD: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of two Gaussians: SyCL, arXiv 2503.23239 (methods 3).

    X = softmax(s, rows) and T = softmax(label, rows), masked cells left out of both; mu and Sigma
    are mean and covariance (over Q - 1) of their rows, C their centred rows / sqrt(Q - 1):

        ||mu_X - mu_T||^2 + Tr(Sigma_X + Sigma_T - 2 (Sigma_X^1/2 Sigma_T Sigma_X^1/2)^1/2)
        = ||mu_X - mu_T||^2 + ||C_X||^2 + ||C_T||^2 - 2 * (sum of the singular values of C_X C_T')

    It needs all rows of a batch at once, and does not change when the rows of X change places: a
    companion such as `list_kl` has to say which list is whose query's. One row: ||X - T||^2. In
    double precision, for its terms all but cancel. O(Q^3).
    """
    out = weight_QD == 0
    x, t = (
        torch.softmax(scores.double().masked_fill(out, -torch.inf), dim=1)
        for scores in (logit_QD, label_QD)
    )
    apart = (x.mean(dim=0) - t.mean(dim=0)).square().sum()
    root = math.sqrt(max(1, len(x) - 1))
    c_x, c_t = ((rows - rows.mean(dim=0)) / root for rows in (x, t))
    shared: Tensor = torch.linalg.svdvals(c_x @ c_t.T).sum()
    return apart + c_x.square().sum() + c_t.square().sum() - 2 * shared


def triplet(
    cosine_QD: Tensor, positive_QD: Tensor, negative_QD: Tensor, margin: float, triplets: float
) -> Tensor:
    """sum_{p,n} max(0, ||a - p|| - ||a - n|| + margin) / triplets: SciNCL, arXiv 2202.06671.

    Over every positive p and negative n of a row a, Euclidean between unit vectors: ||a - b|| =
    sqrt(2 - 2 cos), so that its order is that of cosine (the paper: vectors of any length).
    """
    (c,) = _reduced(cosine_QD)
    distance_QD = (2 - 2 * c).clamp(min=1e-12).sqrt()
    row_P, column_P = positive_QD.nonzero(as_tuple=True)
    excess_PD = distance_QD[row_P, column_P].unsqueeze(1) - distance_QD[row_P] + margin
    return (excess_PD.clamp(min=0) * negative_QD[row_P]).sum() / triplets


def preference_kl(logit_a_R: Tensor, logit_b_R: Tensor, prob_a_R: Tensor, pairs: float) -> Tensor:
    """sum_r KL([p, 1 - p] || softmax([s_a, s_b])) / pairs: PairDistill, arXiv 2410.01383, L_pair.

    p is how probably the pairwise teacher prefers a to b. The gradient for s_a - s_b is
    (sigma(s_a - s_b) - p) / pairs; no pair gives 0.
    """
    a, b, p = _reduced(logit_a_R, logit_b_R, prob_a_R)
    entropy_R = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
    return (softplus(a - b) - p * (a - b) - entropy_R).sum() / pairs


def local_groups(score_QD: Tensor, positive_QD: Tensor, negative_QD: Tensor) -> Tensor:
    """Groups for `lce`, [G, 1 + D]: each positive of a row before the row's negatives.

    What is no negative of the row is -inf; a positive in a row without negatives makes no group.
    """
    row_G, column_G = (positive_QD & negative_QD.any(dim=1, keepdim=True)).nonzero(as_tuple=True)
    negative_GD = score_QD[row_G].masked_fill(~negative_QD[row_G], -torch.inf)
    return torch.cat([score_QD[row_G, column_G].unsqueeze(1), negative_GD], dim=1)


def lce(logit_GK: Tensor, groups: float, temperature: float = 1.0) -> Tensor:
    """-sum_g log(exp(s_g0 / T) / sum_k exp(s_gk / T)) / groups: LCE, arXiv 2101.08751.

    A group is one query's positive, at index 0, with K - 1 negatives from the head of the retriever
    that the reranker will follow; -inf stands where a smaller group has none.
    """
    (s,) = _reduced(logit_GK)
    label_G = torch.zeros(len(s), dtype=torch.int64, device=s.device)
    return cross_entropy(s / temperature, label_G, reduction="sum") / groups


def calibrate_bias(cosine_QD: Tensor, target_QD: Tensor, weight_QD: Tensor, scale: float) -> float:
    """beta_0 with mean sigma(scale * c + beta_0) = mean t over the cells (methods 1.3), bisected.

    A mean target of 0 or 1 has no finite answer: it is taken as half a cell away from it.
    """
    mean = float(target_QD[weight_QD > 0].double().mean())
    return bias_of(count_logits(cosine_QD, weight_QD, scale), mean)


def count_logits(cosine_QD: Tensor, weight_QD: Tensor, scale: float) -> Tensor:
    """How many of the logits scale * c lie in each of equal bins from -scale to scale, and the sum
    of those, [2, bins]; masked cells are none.

    Counts of some rows add up, over ranks too: what `bias_of` asks of a batch, whose cells need
    never exist at once.
    """
    logits = scale * cosine_QD[weight_QD > 0].double()
    bins = ((logits / scale + 1) * (_BINS / 2)).long().clamp_(0, _BINS - 1)
    sums = torch.bincount(bins, weights=logits, minlength=_BINS)
    return torch.stack([torch.bincount(bins, minlength=_BINS).double(), sums])


def bias_of(counted: Tensor, mean_target: float) -> float:
    """`calibrate_bias` of the cells that `count_logits` has counted, each taken as its bin's mean.

    At scale 100 that changes the mean of sigma by a part in 10 million.
    """
    count, sums = counted[:, counted[0] > 0]
    logits, cells = sums / count, float(count.sum())
    half = 0.5 / cells
    mean = min(max(mean_target, half), 1 - half)
    high = 2 * float(logits.abs().max()) + 40.0
    low = -high
    for _ in range(100):
        middle = (low + high) / 2
        if float((count * torch.sigmoid(logits + middle)).sum()) < mean * cells:
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
