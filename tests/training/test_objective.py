"""What the seam promises of every objective, known to it by settings alone."""

import pytest
import torch
from pydantic import ValidationError

from bixse.training.gather import World, cells_of
from bixse.training.objective import share
from bixse.training.settings import Combined, GradedBCE, InfoNCE, Objective
from tests.training import ranks

CPU = torch.device("cpu")
BIAS = torch.tensor(-0.5, dtype=torch.float64)


def whole(objective: Objective, kind: str = "even") -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and floor of a batch, at cosines drawn once."""
    batch = ranks.batches()[kind]
    cells = cells_of(batch, objective, World(), CPU)
    return share(objective, cosines(batch.own_QD.shape), cells, objective.scale, BIAS)


def cosines(shape: tuple[int, ...]) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.rand(shape, generator=draw, dtype=torch.float64) * 1.6 - 0.8


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
