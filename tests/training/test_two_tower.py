"""The click objective with a small tower: what arXiv 2506.20501 found of logs and towers (methods
10). There theta is learned beside the tower, as in the paper."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bixse.judging.clicks import Shown, placement_weights, rank_bias
from bixse.training.losses import click_bce

QUERIES, DOCUMENTS, RANKS, LISTS, FEATURES = 400, 15, 8, 50, 6
THETA = -np.log(np.arange(1, RANKS + 1))


def simulated(seed: int, linear: bool, random_share: float) -> tuple[Tensor, Shown]:
    """Features of all pairs and a log of the expert's lists: the best first, but in a share of them
    at random."""
    draw = np.random.default_rng(seed)
    feature_PF = draw.standard_normal((QUERIES * DOCUMENTS, FEATURES))
    own = draw.standard_normal(FEATURES)
    bent = 0.0 if linear else 0.5 * (feature_PF**2 - 1) @ np.abs(own)
    gamma_P = feature_PF @ own / 2 + bent - 1.0
    gamma_QD = gamma_P.reshape(QUERIES, DOCUMENTS)
    best_QD = np.argsort(-gamma_QD, axis=1)
    key, clicks = [], []
    for _ in range(LISTS):
        order_QD = best_QD.copy()
        for query in np.flatnonzero(draw.random(QUERIES) < random_share):
            order_QD[query] = draw.permutation(DOCUMENTS)
        shown_QK = order_QD[:, :RANKS]
        logit_QK = np.take_along_axis(gamma_QD, shown_QK, axis=1) + THETA
        pair_QK = shown_QK + DOCUMENTS * np.arange(QUERIES)[:, None]
        key.append((pair_QK * RANKS + np.arange(RANKS)).ravel())
        clicks.append((draw.random(logit_QK.shape) < 1 / (1 + np.exp(-logit_QK))).ravel())
    key_O, inverse = np.unique(np.concatenate(key), return_inverse=True)
    counted = np.bincount(inverse, np.concatenate(clicks)).astype(np.int64)
    log = Shown(key_O // RANKS, key_O % RANKS + 1, np.bincount(inverse), counted)
    return torch.from_numpy(feature_PF), log


def learnt(feature_PF: Tensor, log: Shown, each: np.ndarray | None = None) -> np.ndarray:
    """theta beside a linear tower, at the minimum of the objective."""
    tower = nn.Linear(FEATURES, 1).double()
    theta = nn.Parameter(torch.zeros(RANKS - 1, dtype=torch.float64))
    weight = log.impressions_O * (1.0 if each is None else each)
    rate_O, weight_O = (
        torch.from_numpy(column) for column in (log.clicks_O / log.impressions_O, weight)
    )
    pair_O, rank_O = torch.from_numpy(log.pair_O), torch.from_numpy(log.rank_O)
    optimizer = torch.optim.LBFGS(
        [*tower.parameters(), theta], 1, 200, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        bias_O = torch.cat([theta.new_zeros(1), theta])[rank_O - 1]
        logit_O = tower(feature_PF[pair_O]).squeeze(1)
        loss = click_bce(logit_O, bias_O, rate_O, weight_O, float(weight_O.sum()))
        loss.backward()
        return loss

    optimizer.step(closure)
    return np.concatenate([[0.0], theta.detach().numpy()])


def wrong(theta_K: np.ndarray) -> float:
    return float(np.abs(theta_K - THETA)[1:].mean())


def weights(log: Shown) -> np.ndarray:
    return placement_weights(log.impressions_O, np.full(len(log.pair_O), LISTS), largest=100)


@pytest.mark.parametrize("random_share", [0.0, 0.33, 1.0])
def test_of_a_tower_that_fits_any_policy_is_right(random_share: float) -> None:
    """Also one that always shows the best first: features overlap between ranks."""
    assert wrong(learnt(*simulated(0, True, random_share))) < 0.1


def test_of_a_tower_that_does_not_fit_weights_take_the_policy_out() -> None:
    feature_PF, log = simulated(1, False, 0.33)
    plain = learnt(feature_PF, log)
    weighted = learnt(feature_PF, log, weights(log))
    assert wrong(weighted) < wrong(plain) / 2
    # What the judge does: a gamma of its own for every pair always fits.
    assert wrong(rank_bias(log, RANKS, 0.5).theta_K) < wrong(weighted)


def test_a_policy_that_never_changes_has_nothing_to_weigh() -> None:
    feature_PF, log = simulated(0, False, 0.0)
    assert (weights(log) == 1).all()
    assert wrong(learnt(feature_PF, log)) > 0.5


def test_without_swaps_what_ranks_do_cannot_be_told() -> None:
    """Any shift of theta, taken from the gamma of what stands there, leaves the likelihood as it
    is (finding 1)."""
    _, log = simulated(0, True, 0.0)
    draw = np.random.default_rng(1)
    gamma_P, shift_K = draw.standard_normal(QUERIES * DOCUMENTS), draw.standard_normal(RANKS)
    rank_of_P = np.zeros(QUERIES * DOCUMENTS, np.int64)
    rank_of_P[log.pair_O] = log.rank_O - 1

    def likelihood(gamma_P: np.ndarray, theta_K: np.ndarray) -> float:
        logit, bias, rate, weight = map(
            torch.from_numpy,
            (
                gamma_P[log.pair_O],
                theta_K[log.rank_O - 1],
                log.clicks_O / log.impressions_O,
                log.impressions_O.astype(np.float64),
            ),
        )
        return click_bce(logit, bias, rate, weight, float(log.impressions_O.sum())).item()

    shifted = likelihood(gamma_P - shift_K[rank_of_P], THETA + shift_K)
    assert shifted == pytest.approx(likelihood(gamma_P, THETA), rel=1e-14)
