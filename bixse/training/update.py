"""AdamW, and one update by the gradients of a batch."""

import math

import torch
from torch import nn

from bixse.training.scoring import MAX_SCALE, Scoring
from bixse.training.settings import Training
from bixse.training.sharding import clip


def optimizer_of(module: Scoring, settings: Training) -> torch.optim.AdamW:
    """AdamW; no decay on vectors (norms, biases); scale and bias at their own, higher rate."""
    own = (module.log_scale, module.bias)
    encoder = [p for p in module.encoder.parameters() if p.requires_grad]
    factor = settings.objective.own_rate_factor
    groups = [
        ([p for p in encoder if p.ndim > 1], 1.0, settings.weight_decay),
        ([p for p in encoder if p.ndim <= 1], 1.0, 0.0),
        ([p for p in own if p.requires_grad], factor, 0.0),
    ]
    return torch.optim.AdamW(
        [
            {"params": params, "peak": settings.learning_rate * rate, "weight_decay": decay}
            for params, rate, decay in groups
            if params
        ],
        lr=settings.learning_rate,
        fused=True,
    )


def update(
    module: Scoring,
    optimizer: torch.optim.Optimizer,
    settings: Training,
    loss: float,
    factor: float,
) -> float:
    """One update by the gradients at hand. Returns their norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    if module.sharded:
        norm = clip(module, settings.max_grad_norm)
    else:
        norm = float(nn.utils.clip_grad_norm_(module.parameters(), settings.max_grad_norm))
    refuse_infinite(loss, norm, settings.learning_rate)
    optimizer.step()
    with torch.no_grad():
        module.log_scale.clamp_(max=math.log(MAX_SCALE))
    return norm


def refuse_infinite(loss: float, norm: float, learning_rate: float) -> None:
    """Raises ValueError when a loss or the norm of its gradients is not finite."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise ValueError(
            f"loss {loss} with gradient norm {norm}: lower the learning rate "
            f"(now {learning_rate:g}) or start from another model"
        )
