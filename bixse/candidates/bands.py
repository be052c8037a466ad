"""Triplets from bands of a node's neighbour list in its graph's vectors: SciNCL, arXiv 2202.06671.

A link is a hard cut; the neighbours of a node in the embedding of its graph are not. Positives come
from near ranks, hard negatives from far ones, and the gap between is left out (the paper's
sampling-induced margin).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bands:
    """Ranks of a node's list, from 0, the end excluded (SciNCL: 20 to 25 and 3998 to 4000)."""

    positive: tuple[int, int]
    hard: tuple[int, int]

    def __post_init__(self) -> None:
        for name, (start, end) in (("positive", self.positive), ("hard", self.hard)):
            if not 0 <= start < end:
                raise ValueError(f"the {name} band [{start}, {end}) holds no rank")
        if self.positive[1] > self.hard[0]:
            raise ValueError(
                f"positives end at rank {self.positive[1]} and hard negatives begin at "
                f"{self.hard[0]}: the bands must not overlap"
            )


def bands_of(corpus: int, positive: tuple[float, float], hard: tuple[float, float]) -> Bands:
    """Bands as fractions of the corpus: rank 4,000 of millions is not rank 4,000 of 20,000.

    Each holds at least one rank. Raises ValueError as `Bands`.
    """

    def ranks(start: float, end: float) -> tuple[int, int]:
        first = int(start * corpus)
        return first, max(first + 1, int(end * corpus))

    return Bands(ranks(*positive), ranks(*hard))


@dataclass(frozen=True)
class Drawn:
    """What one node is trained with."""

    positives: tuple[str, ...]
    hard: tuple[str, ...]
    easy: tuple[str, ...]


def triplet_sources(
    node: str,
    neighbours: Sequence[str],
    nodes: Sequence[str],
    bands: Bands,
    *,
    positives: int = 5,
    hard: int = 2,
    easy: int = 3,
    seed: int = 0,
) -> Drawn:
    """Documents for a node's triplets: so many from each band, the easy ones from all `nodes`.

    `neighbours` is the node's list, nearest first, without itself. Easy negatives are drawn at
    random and are neither the node nor in the list up to the end of the last band. A function of
    seed and node alone. Raises ValueError when the list ends before the bands do, a band holds
    fewer than are asked of it, or no other node is left to draw.
    """
    if len(neighbours) < bands.hard[1]:
        raise ValueError(
            f"node {node!r} has {len(neighbours)} neighbours, the bands reach to {bands.hard[1]}"
        )
    rng = random.Random(f"{seed}:{node}")
    near = _draw(rng, neighbours[slice(*bands.positive)], positives, "positive")
    far = _draw(rng, neighbours[slice(*bands.hard)], hard, "hard")
    listed = {node, *neighbours[: bands.hard[1]]}
    # However large the graph: of so many nodes drawn enough are outside, if there are enough.
    some = rng.sample(range(len(nodes)), min(len(nodes), easy + len(listed)))
    outside = [nodes[row] for row in some if nodes[row] not in listed]
    return Drawn(near, far, _draw(rng, outside, easy, "easy"))


def _draw(rng: random.Random, band: Sequence[str], count: int, name: str) -> tuple[str, ...]:
    if len(band) < count:
        raise ValueError(f"the {name} band holds {len(band)} documents, {count} are asked of it")
    return tuple(rng.sample(list(band), count))
