"""Which rows of which set a step takes, as a function of (seed, epoch, step); which of a batch a
rank encodes.

Nothing here knows how many workers there are until `share` cuts a batch that is already fixed: so a
run goes on, after any step, on another number of workers with the same batches.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """The steps of a run over `rows` rows an epoch.

    An epoch is cut into batches of nearly equal size, at most `batch_size` rows: there is no short
    last batch, whose few negatives would pull the bias, and every row is visited once. No batch has
    a single row: with `batch_size` 2 and an odd number of rows, one has 3.
    """

    rows: int
    batch_size: int
    epochs: int
    max_steps: int | None
    seed: int

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise ValueError(f"training needs 2 rows or more, found {self.rows}")

    @property
    def steps_per_epoch(self) -> int:
        return min(-(-self.rows // self.batch_size), self.rows // 2)

    @property
    def steps(self) -> int:
        whole = self.steps_per_epoch * self.epochs
        return whole if self.max_steps is None else min(whole, self.max_steps)

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def rows_of(self, step: int) -> Ints:
        """The rows of the epoch that step `step` (from 0, over all epochs) takes."""
        order = _permutation(self.rows, self.seed, self.epoch_of(step))
        part = share(self.rows, step % self.steps_per_epoch, self.steps_per_epoch)
        return order[part]


@dataclass(frozen=True)
class Turns:
    """The steps of a run over several sets of rows, each of the rows of one set.

    An epoch has the steps of all sets, in an order drawn from (seed, epoch): it visits every row of
    every set once. Each set has the batches that it would have by itself, in their order, so that
    one set's turns are its plan.
    """

    plans: tuple[Plan, ...]
    """One plan for each set; they differ in `rows` alone."""

    @property
    def rows(self) -> int:
        return sum(plan.rows for plan in self.plans)

    @property
    def steps_per_epoch(self) -> int:
        return sum(plan.steps_per_epoch for plan in self.plans)

    @property
    def steps(self) -> int:
        plan = self.plans[0]
        whole = self.steps_per_epoch * plan.epochs
        return whole if plan.max_steps is None else min(whole, plan.max_steps)

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def turn(self, step: int) -> tuple[int, int]:
        """The set whose turn step `step` is, and the step of its own plan that it is."""
        epoch, place = divmod(step, self.steps_per_epoch)
        sizes = tuple(plan.steps_per_epoch for plan in self.plans)
        set_S, own_S = _turns(sizes, self.plans[0].seed, epoch)
        number = int(set_S[place])
        return number, epoch * sizes[number] + int(own_S[place])


@lru_cache(maxsize=2)
def _turns(sizes: tuple[int, ...], seed: int, epoch: int) -> tuple[Ints, Ints]:
    """For each step of an epoch the set whose turn it is, and how many it has had before."""
    numbers = np.repeat(np.arange(len(sizes)), sizes)
    set_S: Ints = np.random.default_rng([seed, epoch, 3]).permutation(numbers)
    own_S: Ints = np.empty_like(set_S)
    for number, size in enumerate(sizes):
        own_S[set_S == number] = np.arange(size)
    set_S.flags.writeable = own_S.flags.writeable = False
    return set_S, own_S


# The cache holds one epoch's order of each set.
@lru_cache(maxsize=16)
def _permutation(rows: int, seed: int, epoch: int) -> Ints:
    order: Ints = np.random.default_rng([seed, epoch, 1]).permutation(rows)
    order.flags.writeable = False
    return order


def share(count: int, part: int, parts: int) -> slice:
    """The `part`-th of `parts` contiguous pieces of `count` things; sizes differ by at most one."""
    return slice(count * part // parts, count * (part + 1) // parts)


def shares(count: int, parts: int) -> list[int]:
    """How many of `count` things each of `parts` pieces has."""
    pieces = [share(count, part, parts) for part in range(parts)]
    return [piece.stop - piece.start for piece in pieces]


def rate_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at a step: linear up, then linear down to 0 after the last.

    Step s of warm-up w takes (s + 1) / (w + 1); afterwards (steps - s) / (steps - w).
    """
    warmup = int(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (steps - step) / (steps - warmup)
