"""What a training run shows. Whoever is told of it need not import torch."""

from dataclasses import dataclass

CURVE, DEV_CURVE = "training.jsonl", "dev.jsonl"
"""Files beside a trained model: one line a step, and one an evaluation on dev."""


@dataclass(frozen=True)
class Seen:
    """What there is to see of a run after some steps."""

    steps: int
    lines: list[dict[str, float]]
    """The `METRICS` (bixse.training.loop) of the steps since it was last shown, and of a run on
    several sets of labels the number of each step's `set`; of a run that goes on, first of all its
    steps so far."""
    dev: list[tuple[int, float]]
    """(step, score) of every evaluation so far."""
