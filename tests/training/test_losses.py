"""Every objective: a hand-worked value, a finite difference, its extremes."""

import math

import pytest
import torch

from bixse.training.losses import (
    Positives,
    bias_of,
    calibrate_bias,
    count_logits,
    graded_bce,
    infonce,
    label_entropy,
    positive_weights,
)


def batch(queries: int = 5, documents: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random cells in double precision: a third known, the diagonal own, one masked."""
    draw = torch.Generator().manual_seed(seed)
    own = torch.eye(queries, documents).bool()
    known = own | (torch.rand(queries, documents, generator=draw) < 0.3)
    target = torch.rand(queries, documents, generator=draw, dtype=torch.float64) * known
    weight = torch.ones(queries, documents, dtype=torch.float64)
    weight[0, -1] = 0
    logit = 4 * torch.randn(queries, documents, generator=draw, dtype=torch.float64) - 2
    return {"logit": logit, "target": target, "weight": weight, "own": own, "known": known}


def test_graded_bce_by_hand() -> None:
    logit = torch.tensor([[0.0, math.log(3)]])
    target = torch.tensor([[1.0, 0.25]])
    # -log 1/2 and -(1/4 log 3/4 + 3/4 log 1/4), over two queries.
    expected = (math.log(2) - 0.25 * math.log(0.75) - 0.75 * math.log(0.25)) / 2
    loss = graded_bce(logit, target, torch.ones(1, 2), queries=2)
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_graded_bce_equals_the_naive_form_and_siglip() -> None:
    cells = batch()
    p, z = torch.sigmoid(cells["logit"]), cells["target"]
    naive = -(cells["weight"] * (z * p.log() + (1 - z) * (1 - p).log())).sum() / 5
    loss = graded_bce(cells["logit"], z, cells["weight"], queries=5)
    assert float(loss) == pytest.approx(float(naive), abs=1e-12)
    binary = cells["own"].double()
    signs = 2 * binary - 1
    siglip = -torch.nn.functional.logsigmoid(signs * cells["logit"]).sum() / 5
    loss = graded_bce(cells["logit"], binary, torch.ones_like(binary), queries=5)
    assert float(loss) == pytest.approx(float(siglip), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_scores_stay_finite(dtype: torch.dtype) -> None:
    logit = torch.tensor([[1e4, -1e4, 1e4, -1e4]], dtype=dtype, requires_grad=True)
    target = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    ones = torch.ones(1, 4)
    loss = graded_bce(logit, target, ones, queries=1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2e4, rel=5e-3)
    loss.backward()
    assert logit.grad is not None
    assert logit.grad.tolist() == [[0, 0, 1, -1]]
    known = target > 0
    positive = positive_weights(target, known, "all", 0.5)
    assert torch.isfinite(infonce(logit, target, ones, known, positive, 2.0))


def test_gradients_of_the_bce_for_logit_scale_and_bias() -> None:
    cells = batch()
    cosine = (cells["logit"] / 20).requires_grad_()
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)

    def loss(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return graded_bce(a * c + b, cells["target"], cells["weight"], queries=5)

    assert torch.autograd.gradcheck(loss, (cosine, scale, bias), atol=1e-5)
    loss(cosine, scale, bias).backward()
    logit = scale * cosine + bias
    expected = cells["weight"] * (torch.sigmoid(logit) - cells["target"]) / 5
    torch.testing.assert_close(cosine.grad, scale * expected)
    torch.testing.assert_close(scale.grad, (expected * cosine).sum())
    torch.testing.assert_close(bias.grad, expected.sum())


def test_free_logits_reach_the_label_and_the_floor() -> None:
    target = torch.tensor([[0.0, 0.1, 0.5, 0.9, 1.0]])
    ones = torch.ones_like(target)
    logit = torch.logit(target, eps=1e-7)
    floor = label_entropy(target, ones, queries=1)
    assert float(floor) == pytest.approx(2 * 0.3250830 + math.log(2), abs=1e-6)
    excess = graded_bce(logit, target, ones, queries=1) - floor
    assert 0 <= float(excess) < 1e-4
    free = torch.zeros_like(target, requires_grad=True)
    descent = torch.optim.LBFGS([free], max_iter=200, tolerance_change=1e-12)

    def closure() -> torch.Tensor:
        descent.zero_grad()
        loss = graded_bce(free, target, ones, queries=1)
        loss.backward()
        return loss

    descent.step(closure)
    torch.testing.assert_close(torch.sigmoid(free), target, atol=2e-3, rtol=0)
    excess = graded_bce(free.detach(), target, ones, queries=1) - floor
    assert 0 <= float(excess) < 1e-4


def test_shares_of_the_rows_add_up() -> None:
    cells = batch()
    positive = positive_weights(cells["target"], cells["own"], "weighted", 0.5)
    whole = positive.sum().item()

    def shares(rows: slice) -> torch.Tensor:
        logit, target, weight = (cells[name][rows] for name in ("logit", "target", "weight"))
        return torch.stack(
            [
                graded_bce(logit, target, weight, queries=5),
                infonce(logit, target, weight, cells["known"][rows], positive[rows], whole),
            ]
        )

    parts = sum(shares(slice(row, row + 1)) for row in range(5))
    torch.testing.assert_close(parts, shares(slice(None)), atol=1e-12, rtol=0)


def test_infonce_by_hand() -> None:
    # Document 0 has grade 1, document 1 grade 0.4, document 2 is unknown; both graded are own.
    logit = torch.tensor([[math.log(4), math.log(2), 0.0]])
    target = torch.tensor([[1.0, 0.4, 0.0]])
    own = torch.tensor([[True, True, False]])
    ones = torch.ones(1, 3)
    best = math.log((4 + 2 + 1) / 4)
    # The better document is no negative of the worse one.
    worse = math.log((2 + 1) / 2)

    def loss(form: Positives, weight: torch.Tensor = ones) -> float:
        positive = positive_weights(target, own, form, 0.5)
        return float(infonce(logit, target, weight, own, positive, float(positive.sum())))

    assert loss("all") == pytest.approx((best + worse) / 2, abs=1e-6)
    assert loss("threshold") == pytest.approx(best, abs=1e-6)
    assert loss("weighted") == pytest.approx((best + 0.4 * worse) / 1.4, abs=1e-6)
    masked = torch.tensor([[1.0, 1.0, 0.0]])
    assert loss("all", masked) == pytest.approx(math.log(6 / 4) / 2, abs=1e-6)


def test_documents_of_one_grade_are_no_negatives_of_each_other() -> None:
    logit = torch.tensor([[math.log(4), math.log(2), 0.0]])
    target, own = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[True, True, False]])
    positive = positive_weights(target, own, "threshold", 0.5)
    loss = infonce(logit, target, torch.ones(1, 3), own, positive, 2.0)
    assert float(loss) == pytest.approx((math.log(5 / 4) + math.log(3 / 2)) / 2, abs=1e-6)


def test_infonce_is_plain_cross_entropy_when_nothing_else_is_known() -> None:
    cells = batch()
    own = cells["own"]
    positive = positive_weights(cells["target"], own, "all", 0.5)
    ones = torch.ones_like(cells["target"])
    loss = infonce(cells["logit"], cells["target"] * own, ones, own, positive, 5.0)
    plain = torch.nn.functional.cross_entropy(cells["logit"], torch.arange(5))
    assert float(loss) == pytest.approx(float(plain), abs=1e-12)


@pytest.mark.parametrize("grade", [0.2, 1.0])
def test_weighted_infonce_is_the_plain_one_where_all_grades_are_equal(grade: float) -> None:
    """SSRA, methods 4: the weights are normalised, so that they do not shift the rate."""
    cells = batch()
    target, ones = grade * cells["own"].double(), torch.ones_like(cells["target"])
    losses = []
    for form in ("all", "weighted"):
        positive = positive_weights(target, cells["own"], form, 0.5)
        divisor = float(positive.sum())
        losses.append(float(infonce(cells["logit"], target, ones, cells["own"], positive, divisor)))
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


@pytest.mark.parametrize("form", ["all", "threshold", "weighted"])
def test_gradient_of_infonce(form: Positives) -> None:
    cells = batch()
    positive = positive_weights(cells["target"], cells["own"], form, 0.5)
    logit = cells["logit"].requires_grad_()

    def loss(s: torch.Tensor) -> torch.Tensor:
        return infonce(s, cells["target"], cells["weight"], cells["known"], positive, 2.5)

    assert torch.autograd.gradcheck(loss, (logit,), atol=1e-5)


def test_a_batch_without_positives_moves_nothing() -> None:
    cells = batch()
    logit = cells["logit"].requires_grad_()
    none = torch.zeros_like(cells["target"])
    loss = infonce(logit, none, cells["weight"], cells["known"], none, 1.0)
    loss.backward()
    assert loss.item() == 0
    assert logit.grad is not None
    assert not logit.grad.any()


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.2])
def test_calibrated_bias_gives_the_mean_target(spread: float) -> None:
    draw = torch.Generator().manual_seed(1)
    size = 256
    cosine = 0.2 + spread * torch.randn(size, size, generator=draw, dtype=torch.float64)
    target = 0.6 * torch.eye(size)
    weight = torch.ones(size, size)
    bias = calibrate_bias(cosine, target, weight, scale=20.0)
    mean = torch.sigmoid(20 * cosine + bias).mean()
    assert float(mean) == pytest.approx(0.6 / size, rel=1e-6)
    if spread == 0:
        # methods 1.3: -alpha mu + logit(z / M).
        assert bias == pytest.approx(-4 + math.log(0.6 / size / (1 - 0.6 / size)), abs=1e-6)
        assert bias == pytest.approx(-10.05, abs=0.01)
    mean_target = 0.6 / size
    entropy = -mean_target * math.log(mean_target)
    entropy -= (1 - mean_target) * math.log(1 - mean_target)
    first = float(graded_bce(20 * cosine + bias, target, weight, size))
    assert first <= 3 * size * entropy
    assert float(graded_bce(20 * cosine, target, weight, size)) >= 10 * first


def test_logits_are_counted_in_parts_and_their_bins_are_fine_enough() -> None:
    draw = torch.Generator().manual_seed(1)
    cosine = torch.rand(300, 200, generator=draw, dtype=torch.float64) * 2 - 1
    weight = (torch.rand(300, 200, generator=draw) < 0.9).double()
    seen = cosine[weight > 0]
    for scale in (0.5, 20.0, 100.0):
        parts = [count_logits(cosine[r], weight[r], scale) for r in (slice(0, 7), slice(7, None))]
        counted = torch.stack(parts).sum(dim=0)
        assert float(counted[0].sum()) == len(seen)
        assert float(counted[1].sum()) == pytest.approx(float(scale * seen.sum()), abs=1e-6)
        for mean in (1e-4, 0.01, 0.6):
            bias = bias_of(counted, mean)
            assert float(torch.sigmoid(scale * seen + bias).mean()) == pytest.approx(mean, rel=1e-6)
    # Rounding may put a cosine beyond 1.
    edges = torch.tensor([[1 + 1e-6, -1 - 1e-6]])
    assert float(count_logits(edges, torch.ones(1, 2), 20.0)[0].sum()) == 2


def test_calibration_ignores_masked_cells_and_survives_a_batch_of_zeros() -> None:
    cosine = torch.tensor([[0.1, 0.9]])
    weight = torch.tensor([[1.0, 0.0]])
    bias = calibrate_bias(cosine, torch.tensor([[0.5, 0.0]]), weight, scale=10.0)
    assert bias == pytest.approx(-1.0, abs=1e-6)
    bias = calibrate_bias(cosine, torch.zeros(1, 2), torch.ones(1, 2), scale=10.0)
    assert float(torch.sigmoid(10 * cosine + bias).mean()) == pytest.approx(0.25, abs=1e-6)
