"""What training has measured on the dev split so far, and the weights that did best.

What is measured, and how, is the caller's (`train_loop`'s `measure`): here it is a number, the same
on every rank, higher is better. So every rank keeps the same weights and stops at the same step.
"""

import torch
from torch import Tensor, nn

from bixse.training.sharding import as_parts, whole


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a step may move, by name."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


class Dev:
    """(step, score) of every evaluation, and a copy of the module's weights at the best.

    The copy is held in the memory of the host, once a rank. Of equal scores the first is best.
    """

    def __init__(self) -> None:
        self.scores: list[tuple[int, float]] = []
        self.weights: dict[str, Tensor] = {}

    @property
    def best_step(self) -> int | None:
        """None before the first evaluation."""
        return max(self.scores, key=lambda found: (found[1], -found[0]))[0] if self.scores else None

    def add(self, step: int, score: float, module: nn.Module) -> None:
        self.scores.append((step, score))
        if self.best_step == step:
            named = trained(module).items()
            self.weights = {name: whole(value.detach()).cpu().clone() for name, value in named}

    def is_over(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations did not improve on what was best before them."""
        if patience is None or not self.scores:
            return False
        steps = [step for step, _ in self.scores]
        return len(steps) - 1 - steps.index(self.best_step or 0) >= patience

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        """Give the module the best weights; without an evaluation it keeps its own."""
        for name, parameter in module.named_parameters():
            if name in self.weights:
                parameter.copy_(as_parts(self.weights[name], parameter))
