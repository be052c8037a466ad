"""What the seam promises of every objective, known to it by settings alone."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import normalize

from bixse.training import losses
from bixse.training.batches import batch_of
from bixse.training.gather import World, cells_of
from bixse.training.gradients import batch_gradients, batch_logits
from bixse.training.groups import Clicked, Labels, group
from bixse.training.loop import plan_of
from bixse.training.objective import Grid, share
from bixse.training.objective_settings import (
    ClickBCE,
    Combined,
    GradedBCE,
    InfoNCE,
    LambdaLoss,
    ListKL,
    MarginMSE,
    Objective,
    PairBCE,
    PreferenceKL,
    RankNet,
    Triplet,
    Wasserstein,
)
from bixse.training.scoring import EncoderScoring
from bixse.training.settings import Training
from tests.training import ranks

CPU = torch.device("cpu")
BIAS = torch.tensor(-0.5, dtype=torch.float64)


def whole(objective: Objective, kind: str = "even") -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and floor of a batch, at cosines drawn once."""
    batch = ranks.batches()[kind]
    draw = torch.Generator().manual_seed(3)
    cosine = torch.rand(batch.own_QD.shape, generator=draw, dtype=torch.float64) * 1.6 - 0.8
    return share(objective, cosine, grid(objective, kind), objective.scale, BIAS)


def grid(objective: Objective, kind: str) -> Grid:
    batch = ranks.batches()[kind]
    return cells_of(batch, objective, World(), CPU).grid(slice(0, len(batch.query_Q)))


def test_every_setting_reaches_the_formula() -> None:
    """Values that are no defaults, so that none of them can be forgotten on the way."""
    batch = ranks.batches()["even"]
    draw = torch.Generator().manual_seed(3)
    cosine = torch.rand(batch.own_QD.shape, generator=draw, dtype=torch.float64) * 1.6 - 0.8
    s = 7 * cosine
    z, weight = torch.from_numpy(batch.target_QD), torch.from_numpy(batch.weight_QD)
    known, own = torch.from_numpy(batch.known_QD), torch.from_numpy(batch.own_QD)
    rows, whole = len(batch.query_Q), weight > 0
    positive, better = losses.positive_weights(z, own, "threshold", 0.8), known & (z >= 0.8)
    row, a, b = (torch.from_numpy(x) for x in (batch.row_R, batch.a_R, batch.b_R))
    prob_a = torch.from_numpy(batch.prob_a_R)
    assert len(row)
    formulae: dict[Objective, torch.Tensor] = {
        InfoNCE(positives="threshold", threshold=0.8, scale=7): losses.infonce(
            s, z, weight, known, positive, float(positive.sum())
        ),
        ListKL(scale=7, target_scale=2): losses.list_kl(s, 2 * z, known, whole, rows),
        ListKL(scale=7, target_scale=2, in_batch=False): losses.list_kl(
            s, 2 * z, known, known, rows
        ),
        Wasserstein(scale=7, target_scale=2): losses.wasserstein(s, 2 * z, weight),
        PreferenceKL(scale=7): losses.preference_kl(s[row, a], s[row, b], prob_a, len(row)),
        Triplet(margin=0.3, threshold=0.8, in_batch=False): losses.triplet(
            cosine, better, known & ~better, 0.3, triplets(better, known)
        ),
        **{
            LambdaLoss(scale=7, weighting=weighting): losses.lambda_loss(
                s, z, known, whole, weighting, rows
            )
            for weighting in get_args(losses.Weighting)
        },
        **{
            made: form(s, y, known, whole, len(ordered_by_hand(grid(made, "even"), True)))
            for made, form, y in (
                (RankNet(scale=7), losses.ranknet, z),
                (MarginMSE(scale=7, target_scale=2), losses.margin_mse, 2 * z),
            )
        },
    }
    for objective, wanted in formulae.items():
        found, _ = share(objective, cosine, grid(objective, "even"), 1.0, BIAS)
        torch.testing.assert_close(found, wanted.double(), atol=1e-9, rtol=1e-6, msg=str(objective))
    assert len({round(float(wanted), 6) for wanted in formulae.values()}) == len(formulae)


def triplets(positive: torch.Tensor, known: torch.Tensor) -> float:
    return float((positive.sum(dim=1) * (known & ~positive).sum(dim=1)).sum())


def test_a_combination_is_the_weighted_sum_of_its_parts() -> None:
    parts = (GradedBCE(scale=3.0, learn_scale=True), InfoNCE(positives="weighted", scale=7.0))
    combined = Combined(parts=parts[::-1], weights=(0.5, 2.0))
    assert (combined.scale, combined.learns_scale, combined.learns_bias) == (3.0, True, True)
    loss, floor = whole(combined)
    graded, entropy = whole(parts[0])
    softmax, _ = whole(parts[1])
    torch.testing.assert_close(loss, 0.5 * softmax + 2 * graded)
    torch.testing.assert_close(floor, 2.0 * entropy.double())


def test_a_combination_has_a_weight_a_part_and_one_bias() -> None:
    with pytest.raises(ValidationError, match="2 objectives with 1 weights"):
        Combined(parts=(GradedBCE(), InfoNCE()), weights=(1.0,))
    with pytest.raises(ValidationError, match="one bias to learn"):
        Combined(parts=(GradedBCE(), GradedBCE()), weights=(1.0, 1.0))


@pytest.mark.parametrize("kind", ["even", "uneven"])
@pytest.mark.parametrize("in_batch", [True, False])
def test_means_are_over_what_is_compared(in_batch: bool, kind: str) -> None:
    def at_equal_cosines(objective: Objective) -> float:
        cells = grid(objective, kind)
        equal = torch.zeros_like(cells.target_QD, dtype=torch.float64)
        return float(share(objective, equal, cells, objective.scale, BIAS)[0])

    # log 2 a pair, the margin a triplet: exact only if the divisor counts what the sum runs over.
    assert at_equal_cosines(RankNet(in_batch=in_batch)) == pytest.approx(0.6931472, abs=1e-6)
    triplet = Triplet(in_batch=in_batch, margin=0.25)
    assert at_equal_cosines(triplet) == pytest.approx(0.25, abs=1e-9)
    cells = grid(RankNet(in_batch=in_batch), kind)
    apart = [
        100 * float(cells.target_QD[i, j] - cells.target_QD[i, k]) ** 2
        for i, j, k in ordered_by_hand(cells, in_batch)
    ]
    mean = sum(apart) / len(apart)
    assert at_equal_cosines(MarginMSE(in_batch=in_batch)) == pytest.approx(mean, rel=1e-6)


def ordered_by_hand(cells: Grid, in_batch: bool) -> list[tuple[int, int, int]]:
    target, known, weight = cells.target_QD, cells.known_QD, cells.weight_QD
    rows, columns = target.shape
    return [
        (i, j, k)
        for i in range(rows)
        for j in range(columns)
        for k in range(columns)
        if known[i, j] and target[i, j] > target[i, k]
        if (weight[i, k] if in_batch else known[i, k])
    ]


def test_a_query_with_one_judged_document_is_infonce_in_the_batch_and_nothing_alone() -> None:
    names = {name: name for name in ("q0", "q1", "a", "b")}
    graded = np.asarray([0.7, 0.4], np.float32)
    batch = batch_of(group(["q0", "q1"], ["a", "b"], graded, names, names, {}), np.arange(2))

    def row(objective: Objective) -> torch.Tensor:
        cells = cells_of(batch, objective, World(), CPU).grid(slice(0, 2))
        cosine = torch.tensor([[0.3, 0.2], [-0.4, 0.1]], dtype=torch.float64)
        return share(objective, cosine, cells, objective.scale, BIAS)[0]

    torch.testing.assert_close(row(ListKL()), row(InfoNCE()))
    assert float(row(ListKL())) > 0.01
    for objective in (ListKL, RankNet, MarginMSE):
        assert float(row(objective(in_batch=False))) == 0


@pytest.mark.parametrize(
    "name", [name for name, made in ranks.OBJECTIVES.items() if not made.scores_pairs]
)
def test_chunks_of_rows_equal_the_whole(name: str) -> None:
    objective, batch = ranks.OBJECTIVES[name], ranks.batches()["even"]
    found = []
    for chunk_cells in (10**9, 200, 1):
        module = ranks.scoring(objective, World())
        assert isinstance(module, EncoderScoring)
        module.chunk_cells = chunk_cells
        cells, sides = cells_of(batch, objective, World(), CPU), ranks.reading(module, batch)
        shares = batch_gradients(module, cells, sides)
        gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        assert any(grad.abs().sum() > 1e-3 for grad in gradients.values())
        found.append({"shares": shares, **gradients})
    for chunked in found[1:]:
        torch.testing.assert_close(chunked, found[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["graded_bce", "matryoshka"])
def test_the_bias_is_calibrated_on_a_few_rows_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took the whole matrix, of a batch that is trained on in chunks."""
    objective, batch = ranks.OBJECTIVES[name], ranks.batches()["even"]
    module = ranks.scoring(objective, World(), name)
    assert isinstance(module, EncoderScoring)
    sizes: list[int] = []
    plain = EncoderScoring.cosines

    def noted(self: EncoderScoring, query: torch.Tensor, document: torch.Tensor) -> Any:
        sizes.append(len(query) * len(document))
        return plain(self, query, document)

    monkeypatch.setattr(EncoderScoring, "cosines", noted)
    module.chunk_cells = 400
    cells = cells_of(batch, objective, World(), CPU)
    counted = batch_logits(module, cells, ranks.reading(module, batch))
    assert counted is not None
    assert len(sizes) > 2
    assert max(sizes) <= 400 / 8
    target, weight = torch.from_numpy(batch.target_QD), torch.from_numpy(batch.weight_QD)
    assert batch.mean_target == pytest.approx(float(target[weight > 0].mean()), rel=1e-6)
    query, document = (side.detach() for side in ranks.vectors(module.encoder, batch))
    for leading, of_logits in zip((6, 4, 2), counted, strict=False):
        cosine = normalize(query[:, :leading]) @ normalize(document[:, :leading]).T
        wanted = losses.calibrate_bias(cosine, target, weight, 5.0)
        assert losses.bias_of(of_logits, batch.mean_target) == pytest.approx(wanted, abs=1e-6)


def test_clicks_at_rank_one_alone_are_grades() -> None:
    """Where ranks do nothing the objective is BiXSE's, with clicks an impression as relevance."""
    query_ids, doc_ids = ["q0", "q0", "q1", "q2"], ["d0", "d1", "d1", "d2"]
    shown, clicks = np.array([8, 8, 4, 2]), np.array([6, 2, 1, 2])
    names = {name: f"text {name}" for name in (*query_ids, *doc_ids)}
    rate = (clicks / shown).astype(np.float32)
    clicked = Clicked(query_ids, doc_ids, shown, clicks, np.zeros(4), np.ones(4))
    labels = group(query_ids, doc_ids, rate, names, names, {}, clicked=clicked)
    batch = batch_of(labels, np.arange(labels.pairs))
    cosine = torch.rand((3, 3), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for objective in (ClickBCE(), GradedBCE()):
        cells = cells_of(batch, objective, World(), CPU).grid(slice(0, 3))
        found.append(share(objective, cosine, cells, objective.scale, BIAS))
    torch.testing.assert_close(found[0], found[1], atol=1e-9, rtol=1e-9)


def test_clicks_are_those_of_their_ranks_cell_by_cell() -> None:
    """Written out from the columns: copies of a text are one, every query weighs as its pairs."""
    query_ids, doc_ids = ["q0", "q0", "q0", "q1", "q1"], ["d0", "d0", "d1", "d0", "copy"]
    impressions, clicks = np.array([4, 2, 10, 3, 5]), np.array([2, 1, 0, 3, 1])
    bias, weight = np.array([0.0, -0.7, 0.0, -0.7, -0.7]), np.array([1.0, 3.0, 1.0, 2.0, 2.0])
    names = {"q0": "who", "q1": "what", "d0": "this", "d1": "that", "copy": "This "}
    clicked = Clicked(query_ids, doc_ids, impressions, clicks, bias, weight)
    asked, judged = ["q0", "q0", "q1", "q1"], ["d0", "d1", "d0", "copy"]
    relevance = np.full(4, 0.5, np.float32)
    labels = group(asked, judged, relevance, names, names, {}, clicked=clicked)
    batch = batch_of(labels, np.arange(labels.pairs))
    objective = ClickBCE(scale=2.0)
    cells = cells_of(batch, objective, World(), CPU).grid(slice(0, 2))
    cosine = torch.tensor([[0.5, -0.25], [0.125, 0.75]], dtype=torch.float64)
    loss, floor = share(objective, cosine, cells, 2.0, BIAS)

    def bce(rate: float, logit: float) -> float:
        return float(np.log1p(np.exp(logit)) - rate * logit)

    s = 2 * cosine.numpy() + BIAS.item()
    of_q0 = 2 / (4 + 6 + 10)
    wanted = of_q0 * (4 * bce(0.5, s[0, 0]) + 6 * bce(0.5, s[0, 0] - 0.7) + 10 * bce(0, s[0, 1]))
    wanted += bce(0.5, s[1, 0] - 0.7) + bce(0, s[1, 1])
    assert loss.item() == pytest.approx(wanted / 2, rel=1e-6)
    assert floor.item() == pytest.approx((of_q0 * 10 + 1) * np.log(2) / 2, rel=1e-6)


def test_a_judged_document_that_was_never_shown_is_refused() -> None:
    names = {"q": "who", "d": "this", "e": "that"}
    clicked = Clicked(["q"], ["d"], np.array([1]), np.array([1]), np.zeros(1), np.ones(1))
    with pytest.raises(ValueError, match="never shown"):
        group(["q", "q"], ["d", "e"], np.ones(2, np.float32), names, names, {}, clicked=clicked)


def test_no_preference_in_the_batch_moves_nothing() -> None:
    batch = ranks.batches()["one document"]
    assert not len(batch.row_R)
    cells = cells_of(batch, PreferenceKL(), World(), CPU).grid(slice(0, len(batch.query_Q)))
    cosine = torch.zeros(batch.own_QD.shape, dtype=torch.float64, requires_grad=True)
    loss, _ = share(PreferenceKL(), cosine, cells, 1.0, BIAS)
    loss.backward()
    assert loss.item() == 0
    assert cosine.grad is not None
    assert not cosine.grad.any()


def labelled(*grades_of_a_query: tuple[float, ...]) -> Labels:
    rows = [(q, d, g) for q, grades in enumerate(grades_of_a_query) for d, g in enumerate(grades)]
    query_ids, doc_ids = [f"q{q}" for q, _, _ in rows], [f"{q} {d}" for q, d, _ in rows]
    relevance = np.array([grade for _, _, grade in rows], np.float32)
    texts = {name: name for name in (*query_ids, *doc_ids)}
    return group(query_ids, doc_ids, relevance, texts, texts, {})


@pytest.mark.parametrize(
    ("objective", "idle", "teaching", "sentence"),
    [
        (InfoNCE(positives="threshold"), [(0.4, 0.2)], [(0.5,), (0.2,)], "judged 0.5 or better"),
        (Triplet(threshold=0.7), [(0.6,)], [(0.7,), (0.7,)], "judged 0.7 or better"),
        (Triplet(in_batch=False), [(1.0, 0.5), (0.1,)], [(1.0, 0.1)], "both a document judged 0.5"),
        (RankNet(in_batch=False), [(1.0, 1.0), (0.5,)], [(1.0, 0.5)], "of different grades"),
        (LambdaLoss(in_batch=False), [(1.0,), (0.5,)], [(1.0, 0.5)], "of different grades"),
        (MarginMSE(in_batch=False), [(1.0,), (0.5,)], [(1.0, 0.5)], "of different grades"),
        (ListKL(in_batch=False), [(1.0,), (0.5,)], [(1.0, 1.0)], "two judged documents"),
        (PairBCE(), [(0.25, 0.25), (0.25,)], [(0.25,), (0.5,)], "all 6 judged pairs have"),
        (
            Combined(parts=(RankNet(in_batch=False), ListKL(in_batch=False)), weights=(1.0, 1.0)),
            [(1.0,), (0.5,)],
            [(0.5, 0.5)],
            "of different grades",
        ),
    ],
)
def test_labels_that_give_no_gradient_are_refused(
    objective: Objective,
    idle: list[tuple[float, ...]],
    teaching: list[tuple[float, ...]],
    sentence: str,
) -> None:
    settings = Training(objective=objective, batch_size=8)
    with pytest.raises(ValueError, match=f"{sentence}.*: there is nothing to learn from"):
        plan_of(labelled(*idle, *idle), settings)
    assert plan_of(labelled(*teaching, *teaching, *idle), settings).steps > 0


@pytest.mark.parametrize("objective", [GradedBCE(), InfoNCE(), RankNet(), ListKL(), LambdaLoss()])
def test_of_other_documents_of_the_batch_one_grade_teaches(objective: Objective) -> None:
    assert plan_of(labelled((1.0,), (1.0,)), Training(objective=objective)).steps > 0
