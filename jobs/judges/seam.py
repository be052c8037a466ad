"""What `jobs.judge` must know of a judge before it is loaded anywhere."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bixse.judging.asked import PairJudge, Planner
from bixse.scale import Scale


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A judge by its identity, and how a worker builds it: `build(*arguments)`.

    `signature` is everything but the two texts that an answer depends on (model and revision,
    prompt, scale, orders, cuts): it enters the key of every label, so that two judges with equal
    signatures share their labels. None keeps a judge's grades out of the label store, where they
    depend on more than the two texts, or cost nothing.
    """

    build: Callable[..., PairJudge]
    arguments: tuple[Any, ...]
    scale: Scale
    origin: str
    """The `origin` of its judgments: llm, features, ..."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What else shapes the judgments: part of the artefact's identity."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of what it was made from: weights, coefficients, vectors."""
    signature: Mapping[str, Any] | None = None
    in_flight: int = 1
    """Units that one worker has in hand at a time, each in a thread of its own."""
    prefixes: tuple[Literal["query", "document"], ...] = ("query",)
    """What stands first in its prompts, in some order or other: where sharing can be found."""
    plan: Callable[..., Planner] | None = None
    """Builds, from the same arguments, what counts for `--plan`; None counts pairs only."""
    planned: tuple[str, ...] = ()
    """The counts (fields of `Cost`) that `plan` knows exactly: no other is shown."""
