"""One update: who is trained at which rate, what decays, what is clipped (methods 1.3)."""

import math

import pytest
import torch
from torch import nn

from bixse.training.gather import World
from bixse.training.objective_settings import GradedBCE, InfoNCE
from bixse.training.scoring import MAX_SCALE, Scoring
from bixse.training.settings import Training, Tuning
from bixse.training.stepping import _optimizer as tuning_optimizer
from bixse.training.update import optimizer_of, update
from tests.training import ranks

OBJECTIVE = GradedBCE(scale=99.9, learn_scale=True, bias_learning_rate_factor=7)
SETTINGS = Training(objective=OBJECTIVE, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5)


def learning() -> Scoring:
    return ranks.scoring(OBJECTIVE, World())


def test_scale_and_bias_have_their_own_rate_and_vectors_do_not_decay() -> None:
    module = learning()
    groups = optimizer_of(module, SETTINGS).param_groups
    found = {
        id(p): (group["peak"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    for name, parameter in module.named_parameters():
        rate, decay = found[id(parameter)]
        assert rate == pytest.approx(7e-3 if name in ("log_scale", "bias") else 1e-3), name
        assert decay == (0.1 if name.endswith("weight") else 0.0), name
    fixed = ranks.scoring(InfoNCE(), World())
    groups = optimizer_of(fixed, SETTINGS).param_groups
    trained = {id(p) for group in groups for p in group["params"]}
    assert not trained & {id(fixed.log_scale), id(fixed.bias)}


def test_a_step_takes_its_share_of_the_rate_and_clips_all_gradients_as_one() -> None:
    module = learning()
    optimizer = optimizer_of(module, SETTINGS)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    count = sum(parameter.numel() for parameter in module.parameters())
    norm = update(module, optimizer, SETTINGS, loss=1.0, factor=0.25)
    assert norm == pytest.approx(3 * math.sqrt(count))
    clipped = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    assert float(clipped.norm()) == pytest.approx(0.5, rel=1e-4)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([2.5e-4, 2.5e-4, 1.75e-3])


def test_the_scale_ends_at_its_most() -> None:
    module = learning()
    optimizer = optimizer_of(module, SETTINGS)
    for _ in range(3):
        module.log_scale.grad = torch.full_like(module.log_scale, -1.0)
        update(module, optimizer, SETTINGS, loss=1.0, factor=1.0)
    assert module.scale == pytest.approx(MAX_SCALE)


def test_matrices_of_a_language_model_decay_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    groups = tuning_optimizer(model, Tuning(weight_decay=0.1)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert found == {"0.weight": 0.1, "0.bias": 0, "1.weight": 0, "1.bias": 0}
