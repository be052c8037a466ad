"""Losses over a query's list: hand-worked values, loops, references, finite differences."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import kendalltau

from bixse.training.losses import (
    Weighting,
    lambda_loss,
    lce,
    list_kl,
    local_groups,
    margin_mse,
    preference_kl,
    ranknet,
    triplet,
    wasserstein,
)

LOG3 = math.log(3)


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def cells(queries: int = 4, documents: int = 6) -> tuple[torch.Tensor, ...]:
    """Random logits and grades, two cells in three judged, one of the others out of the list."""
    draw = torch.Generator().manual_seed(0)
    logit = torch.randn(queries, documents, generator=draw, dtype=torch.float64)
    known = torch.rand(queries, documents, generator=draw) < 0.66
    levels = torch.randint(0, 4, (queries, documents), generator=draw)
    in_list = known | (torch.rand(queries, documents, generator=draw) < 0.8)
    return logit, levels / 3 * known, known, in_list


def test_list_kl_by_hand() -> None:
    logit, teacher = rows([0, 0, 0]), rows([math.log(4), 0, 0])
    known, whole = torch.tensor([[True, True, False]]), torch.ones(1, 3, dtype=torch.bool)
    # The teacher says .8 and .2; the student halves over the list, or thirds over the row.
    halves = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    thirds = 0.8 * math.log(0.8 * 3) + 0.2 * math.log(0.2 * 3)
    assert float(list_kl(logit, teacher, known, known, 1)) == pytest.approx(halves, abs=1e-12)
    assert float(list_kl(logit, teacher, known, whole, 1)) == pytest.approx(thirds, abs=1e-12)
    assert float(list_kl(teacher, teacher, known, known, 1)) == pytest.approx(0, abs=1e-12)


def test_ranknet_and_margin_mse_by_hand() -> None:
    # Grades 1, .5, 0 and one that nobody judged; the best stands log 3 below the second.
    logit, target = rows([0, LOG3, 0, 0]), rows([1, 0.5, 0, 0])
    known = torch.tensor([[True, True, True, False]])
    whole = torch.ones(1, 4, dtype=torch.bool)
    # Three pairs: log(1 + 3), log(1 + 1), log(1 + 1/3); with the unjudged, the last two again.
    judged = math.log(4) + math.log(2) + math.log(4 / 3)
    everyone = judged + math.log(2) + math.log(4 / 3)
    assert float(ranknet(logit, target, known, known, 3)) == pytest.approx(judged / 3, abs=1e-7)
    assert float(ranknet(logit, target, known, whole, 5)) == pytest.approx(everyone / 5, abs=1e-7)
    teacher = 2 * target
    squares = (-LOG3 - 1) ** 2 + (0 - 2) ** 2 + (LOG3 - 1) ** 2
    assert float(margin_mse(logit, teacher, known, known, 3)) == pytest.approx(squares / 3)
    assert float(margin_mse(2 * target, teacher, known, whole, 5)) == 0


def test_lambda_loss_by_hand() -> None:
    # The better document stands second: s_j - s_k = -log 3, so log2(1 + 3) = 2 bits.
    logit, target = rows([0, LOG3]), rows([1, 0.5])
    known = torch.ones(1, 2, dtype=torch.bool)
    second = 1 / math.log2(3)
    gain = 0.5 / (1 + 0.5 * second)
    swap = 1 - second

    def loss(weighting: Weighting, s: torch.Tensor = logit) -> float:
        return float(lambda_loss(s, target, known, known, weighting, 1))

    assert loss("lambdarank") == pytest.approx(swap * gain * 2, abs=1e-7)
    # Ranks one apart: 1 / D_1 - 1 / D_2 is the same number.
    assert loss("ndcg_loss2") == pytest.approx(swap * gain * 2, abs=1e-7)
    assert loss("ndcg_loss2pp") == pytest.approx(11 * swap * gain * 2, abs=1e-6)
    # What it weighs is exactly what the exchange moves nDCG by.
    assert swap * gain == pytest.approx(1 - (second + 0.5) / (1 + 0.5 * second))


@pytest.mark.parametrize("weighting", ["lambdarank", "ndcg_loss2", "ndcg_loss2pp"])
def test_lambda_loss_is_its_formula(weighting: Weighting) -> None:
    logit, target, known, in_list = cells()
    expected = 0.0
    for s, t, judged, listed in zip(logit, target, known, in_list, strict=True):
        members = [k for k in range(len(s)) if listed[k]]
        rank = {k: 1 + sum(bool(s[m] > s[k]) for m in members) for k in members}
        best = sum(
            g / math.log2(r + 2)
            for r, g in enumerate(sorted((float(t[k]) for k in members), reverse=True))
        )
        for j in members:
            for k in members:
                if not (judged[j] and t[j] > t[k]):
                    continue
                swap = abs(1 / math.log2(1 + rank[j]) - 1 / math.log2(1 + rank[k]))
                m = abs(rank[j] - rank[k])
                near = 1 / math.log2(1 + m) - 1 / math.log2(2 + m)
                weight = {
                    "lambdarank": swap,
                    "ndcg_loss2": near,
                    "ndcg_loss2pp": swap + 10 * near,
                }[weighting]
                bits = math.log2(1 + math.exp(float(s[k] - s[j])))
                expected += weight * float(t[j] - t[k]) / best * bits
    found = float(lambda_loss(logit, target, known, in_list, weighting, 4))
    assert expected > 1
    assert found == pytest.approx(expected / 4, rel=1e-6)


def test_gradients_of_the_list_losses() -> None:
    logit, target, known, in_list = cells()
    target = target.double()
    losses = {
        "list_kl": lambda s: list_kl(s, 3 * target, known, in_list, 4),
        "list_kl of the judged": lambda s: list_kl(s, 3 * target, known, known, 4),
        "ranknet": lambda s: ranknet(s, target, known, in_list, 7),
        "margin_mse": lambda s: margin_mse(s, 10 * target, known, in_list, 7),
        "lambda_loss": lambda s: lambda_loss(s, target, known, in_list, "ndcg_loss2pp", 4),
        "wasserstein": lambda s: wasserstein(s, 3 * target, in_list.double()),
        "triplet": lambda s: triplet(s.tanh(), known & (target > 0.5), in_list, 0.5, 7),
        "lce": lambda s: lce(s, 4, temperature=0.5),
        "preference_kl": lambda s: preference_kl(s[:, 0], s[:, 1], target[:, 2], 4),
    }
    for name, loss in losses.items():
        s = logit.clone().requires_grad_()
        assert torch.autograd.gradcheck(loss, (s,), atol=1e-5), name
        (gradient,) = torch.autograd.grad(loss(s), s)
        assert gradient.abs().sum() > 1e-3, name


def test_reductions_are_in_float32() -> None:
    logit, target, known, in_list = cells()
    logit = logit.bfloat16()
    losses = [
        list_kl(logit, target, known, in_list, 4),
        ranknet(logit, target, known, in_list, 7),
        margin_mse(logit, target, known, in_list, 7),
        lambda_loss(logit, target, known, in_list, "lambdarank", 4),
        triplet(logit.tanh(), known, in_list, 0.5, 7),
        lce(logit, 4),
        preference_kl(logit[:, 0], logit[:, 1], target[:, 2], 4),
    ]
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert torch.stack(losses).isfinite().all()


def levels(queries: int, documents: int = 4) -> torch.Tensor:
    """Levels 3, 2, 1, 0 of each query's own documents, 0 for the others'."""
    label = torch.zeros(queries, queries * documents, dtype=torch.float64)
    for query in range(queries):
        label[query, query * documents : (query + 1) * documents] = torch.tensor([3, 2, 1, 0])
    return label


def test_wasserstein_matches_the_matrix_square_root() -> None:
    logit = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 24)))
    label = levels(6)
    x, t = (torch.softmax(scores, dim=1).numpy() for scores in (logit, label))
    sigma_x, sigma_t = np.cov(x.T), np.cov(t.T)
    root = sqrtm(sigma_x + 1e-15 * np.eye(24))
    cross = np.trace(sqrtm(root @ sigma_t @ root)).real
    apart = ((x.mean(axis=0) - t.mean(axis=0)) ** 2).sum()
    reference = apart + np.trace(sigma_x) + np.trace(sigma_t) - 2 * cross
    found = float(wasserstein(logit, label, torch.ones(6, 24)))
    assert found == pytest.approx(reference, abs=1e-6)
    # methods 3.
    assert found == pytest.approx(0.167792, abs=1e-6)


def test_wasserstein_at_equality_reversed_and_of_one_row() -> None:
    label, ones = levels(6), torch.ones(6, 24)
    s = label.clone().requires_grad_()
    loss = wasserstein(s, label, ones)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert s.grad is not None
    assert s.grad.isfinite().all()
    reversed_lists = label.reshape(6, 6, 4).flip(2).reshape(6, 24)
    # methods 3: .344.
    assert float(wasserstein(reversed_lists, label, ones)) == pytest.approx(0.344, abs=5e-4)
    one = wasserstein(rows([1, 0]), rows([0, 0]), torch.ones(1, 2))
    high = math.e / (1 + math.e)
    assert float(one) == pytest.approx(2 * (high - 0.5) ** 2, abs=1e-12)
    masked = wasserstein(rows([1, 0, 9]), rows([0, 0, 0]), rows([1, 1, 0]))
    assert float(masked) == pytest.approx(float(one), abs=1e-12)


def test_wasserstein_cannot_tell_whose_list_it_is_and_its_companion_can() -> None:
    label, ones = levels(6), torch.ones(6, 24)
    others = label.roll(1, dims=0)
    assert abs(float(wasserstein(others, label, ones))) < 1e-6
    known = label.new_zeros(6, 24, dtype=torch.bool)
    for query in range(6):
        known[query, 4 * query : 4 * query + 4] = True
    whole = torch.ones(6, 24, dtype=torch.bool)
    assert float(list_kl(others, label, known, whole, 6)) > 1
    assert float(list_kl(label, label, known, known, 6)) == pytest.approx(0, abs=1e-12)


def test_wasserstein_with_kl_orders_levels_that_a_softmax_does_not() -> None:
    label, ones = levels(8), torch.ones(8, 32)
    known = torch.block_diag(*[torch.ones(1, 4)] * 8).bool()
    draw = torch.Generator().manual_seed(1)
    # A warm start: one's own documents ahead of all others, in no order.
    start = 3 * known + torch.randn(8, 32, generator=draw, dtype=torch.float64)

    def order_accuracy(loss: Any) -> float:
        s = start.clone().requires_grad_()
        descent = torch.optim.Adam([s], lr=0.05)
        for _ in range(300):
            descent.zero_grad()
            loss(s).backward()
            descent.step()
        lists = s.detach()[known].reshape(8, 4)
        pairs = [(lists[:, i] > lists[:, j]) for i in range(4) for j in range(i + 1, 4)]
        return float(torch.stack(pairs).double().mean())

    binary = order_accuracy(
        lambda s: torch.nn.functional.cross_entropy(s, torch.arange(8) * 4, reduction="mean")
    )
    listwise = order_accuracy(
        lambda s: wasserstein(s, label, ones) + list_kl(s, label, known, known, 8)
    )
    assert listwise > 0.98
    assert listwise > binary + 0.1


def test_triplet_by_hand() -> None:
    # Distances sqrt(2 - 2 c): 1 of the positive, sqrt 2 and 0.5 of the negatives.
    cosine = rows([0.5, 0.0, 0.875])
    positive, negative = torch.tensor([[True, False, False]]), torch.tensor([[False, True, True]])
    expected = (1 - math.sqrt(2) + 0.5) + (1 - 0.5 + 0.5)
    found = float(triplet(cosine, positive, negative, margin=0.5, triplets=2))
    assert found == pytest.approx(expected / 2, abs=1e-12)
    apart = triplet(rows([1.0, -1.0]), positive[:, :2], negative[:, :2], margin=1.5, triplets=1)
    assert float(apart) == 0
    same = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    triplet(same, positive[:, :2], negative[:, :2], margin=1.0, triplets=1).backward()
    assert same.grad is not None
    assert same.grad.isfinite().all()


def test_preference_kl_by_hand_and_its_gradient() -> None:
    a = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    b, p = torch.zeros(1, dtype=torch.float64), torch.tensor([0.9], dtype=torch.float64)
    loss = preference_kl(a, b, p, 1)
    # methods 2: KL(.9 || .5).
    assert loss.item() == pytest.approx(0.36806, abs=1e-5)
    loss.backward()
    assert a.grad is not None
    assert float(a.grad) == pytest.approx(0.5 - 0.9, abs=1e-12)
    certain = preference_kl(torch.tensor([1e4]), torch.zeros(1), torch.ones(1), 1)
    assert float(certain) == 0


def test_preferences_order_what_pointwise_scores_tie() -> None:
    known = torch.ones(1, 3, dtype=torch.bool)
    teacher = torch.zeros(1, 3, dtype=torch.float64)
    pairs, prob = torch.tensor([[0, 1], [1, 2], [0, 2]]), rows([0.9, 0.9, 0.95])[0]

    def fitted(preferring: float) -> list[int]:
        s = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64, requires_grad=True)
        descent = torch.optim.Adam([s], lr=0.05)
        for _ in range(500):
            descent.zero_grad()
            loss = list_kl(s, teacher, known, known, 1)
            a, b = s[0, pairs[:, 0]], s[0, pairs[:, 1]]
            (loss + preferring * preference_kl(a, b, prob, 3)).backward()
            descent.step()
        return (s.detach()[0] * 20).round().int().tolist()

    tied = fitted(0.0)
    assert len(set(tied)) == 1
    first, second, third = fitted(3.0)
    assert first > second > third


def test_noisy_transitive_preferences_are_recovered() -> None:
    draw = np.random.default_rng(0)
    quality = draw.permutation(30) / 5.0
    a, b = np.triu_indices(30, 1)
    logits = quality[a] - quality[b] + draw.normal(0, 0.3, len(a))
    prob = torch.from_numpy(1 / (1 + np.exp(-logits)))
    s = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.Adam([s], lr=0.1)
    for _ in range(300):
        descent.zero_grad()
        preference_kl(s[a], s[b], prob, len(a)).backward()
        descent.step()
    assert kendalltau(s.detach().numpy(), quality).statistic > 0.95


def test_local_groups_put_each_positive_before_the_negatives_of_its_row() -> None:
    score = rows([1, 2, 3], [4, 5, 6])
    positive = torch.tensor([[True, False, False], [True, True, False]])
    negative = torch.tensor([[False, False, True], [False, False, False]])
    none = -math.inf
    assert local_groups(score, positive, negative).tolist() == [[1, none, none, 3]]
    both = torch.stack([negative[0], negative[0]])
    assert local_groups(score, positive, both)[:, 0].tolist() == [1, 4, 5]


def test_lce_is_cross_entropy_of_the_first_and_ignores_the_order_of_the_rest() -> None:
    logit = rows([LOG3, 0, 0], [0, LOG3, 0])
    expected = (math.log(5 / 3) + math.log(5)) / 2
    assert float(lce(logit, 2)) == pytest.approx(expected, abs=1e-12)
    label = torch.zeros(2, dtype=torch.int64)
    plain = torch.nn.functional.cross_entropy(logit / 0.25, label)
    assert float(lce(logit, 2, temperature=0.25)) == pytest.approx(float(plain), abs=1e-12)
    assert float(lce(logit[:, [0, 2, 1]], 2)) == pytest.approx(expected, abs=1e-12)
    halves = lce(logit[:1], 2) + lce(logit[1:], 2)
    assert float(halves) == pytest.approx(expected, abs=1e-12)


def test_lce_with_cached_gradients_is_the_direct_step() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(6, 8, 5, generator=draw, dtype=torch.float64)
    weights = torch.randn(5, generator=draw, dtype=torch.float64)

    def scored(w: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        return torch.tanh(part @ w)

    direct = weights.clone().requires_grad_()
    lce(scored(direct, features), 6).backward()
    cached = weights.clone().requires_grad_()
    with torch.no_grad():
        logit = torch.cat([scored(cached, part) for part in features.split(2, dim=1)], dim=1)
    logit.requires_grad_()
    lce(logit, 6).backward()
    assert logit.grad is not None
    for part, grad in zip(features.split(2, dim=1), logit.grad.split(2, dim=1), strict=True):
        (scored(cached, part) * grad).sum().backward()
    torch.testing.assert_close(cached.grad, direct.grad, atol=1e-12, rtol=1e-9)
