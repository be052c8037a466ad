"""Relevance scales as data: the grades, what each means and who says so; grade to relevance.

A judge's answer is kept as a distribution over the grades of a scale (`grade_probs`). Relevance is
the expected grade, mapped linearly to [0, 1]:

    relevance = (sum_k p_k g_k - g_min) / (g_max - g_min)

which for LightBlue's five digits is z = (mean_exp_val - 1) / 4 (lightblue-tech/lb-reranker).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pydantic import field_validator

from bixse.settings import Settings


class Grade(Settings):
    """One step of a scale."""

    value: float
    """What human files write."""
    meaning: str
    """What a judge is told it means."""


class Scale(Settings):
    """Grades in rising order; at least two."""

    name: str
    source: str
    grades: tuple[Grade, ...]

    @field_validator("grades")
    @classmethod
    def _rising(cls, grades: tuple[Grade, ...]) -> tuple[Grade, ...]:
        values = [grade.value for grade in grades]
        if len(values) < 2 or any(a >= b for a, b in pairwise(values)):
            raise ValueError(f"a scale needs two or more rising grades, found {values}")
        return grades

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(grade.value for grade in self.grades)

    @property
    def labels(self) -> tuple[str, ...]:
        """What a judge model is asked to print for each grade: `2`, not `2.0`."""
        return tuple(f"{value:g}" for value in self.values)

    @property
    def record(self) -> dict[str, Any]:
        """What a manifest and a judge's signature say of it."""
        return {"name": self.name, "values": list(self.values)}

    def relevance(self, grade_probs: Sequence[float]) -> float:
        """Expected relevance in [0, 1] of a distribution over the grades.

        Raises ValueError when the distribution has another length or does not sum to 1 (±0.001).
        """
        if len(grade_probs) != len(self.grades):
            raise ValueError(
                f"scale {self.name} has {len(self.grades)} grades, "
                f"the distribution has {len(grade_probs)}"
            )
        total = sum(grade_probs)
        if not abs(total - 1) <= 1e-3 or min(grade_probs) < 0:
            raise ValueError(f"not a distribution over scale {self.name}: {list(grade_probs)}")
        low, high = self.values[0], self.values[-1]
        expected = sum(p * v for p, v in zip(grade_probs, self.values, strict=True)) / total
        return min(1.0, max(0.0, (expected - low) / (high - low)))

    def nearest(self, relevance: float) -> int:
        """The number, from 0, of the grade nearest to a relevance in [0, 1]; half-way goes up."""
        low, high = self.values[0], self.values[-1]
        wanted = low + relevance * (high - low)
        # float32 columns: a half-way that rounding has moved is one still.
        distances = [round(abs(value - wanted), 6) for value in self.values]
        return max(range(len(distances)), key=lambda k: (-distances[k], k))

    def grade_probs(self, grade: float) -> tuple[float, ...]:
        """The narrowest distribution whose mean is `grade`: one grade, or its two neighbours.

        Raises ValueError for a grade outside the scale.
        """
        values = self.values
        if not values[0] <= grade <= values[-1]:
            raise ValueError(
                f"grade {grade:g} is outside scale {self.name} ({values[0]:g} to {values[-1]:g})"
            )
        above = next(k for k, value in enumerate(values) if value >= grade)
        probs = [0.0] * len(values)
        if values[above] == grade:
            probs[above] = 1.0
        else:
            step = values[above] - values[above - 1]
            probs[above] = (grade - values[above - 1]) / step
            probs[above - 1] = 1.0 - probs[above]
        return tuple(probs)


def reaches(relevance: float, least: float) -> bool:
    """Whether a relevance is `least` or more; stored as float32, 0.7 is a little less than 0.7."""
    return round(relevance - least, 6) >= 0


def linear(minimum: float, maximum: float) -> Scale:
    """A scale without words, for given judgments: whole steps, or its two ends if they are not
    whole or more than 100 apart.

    Raises ValueError when `maximum` does not exceed `minimum`.
    """
    whole = float(minimum).is_integer() and float(maximum).is_integer()
    whole = whole and maximum - minimum <= 100
    values: Sequence[float] = (
        [float(v) for v in range(int(minimum), int(maximum) + 1)] if whole else [minimum, maximum]
    )
    return Scale(
        name=f"linear-{minimum:g}-{maximum:g}",
        source="the grades of the data itself",
        grades=tuple(Grade(value=value, meaning="") for value in values),
    )


UMBRELA = Scale(
    name="umbrela",
    source="UMBRELA, arXiv 2406.06519; the 0-3 rubric of TREC Deep Learning",
    grades=(
        Grade(value=0, meaning="the passage has nothing to do with the query"),
        Grade(value=1, meaning="the passage seems related to the query but does not answer it"),
        Grade(
            value=2,
            meaning="the passage has some answer to the query, but it is unclear, "
            "or hidden among other information",
        ),
        Grade(
            value=3, meaning="the passage is dedicated to the query and contains the exact answer"
        ),
    ),
)

LIGHTBLUE = Scale(
    name="lightblue",
    source="lightblue-tech/lb-reranker, five digits of relatedness",
    grades=(
        Grade(value=1, meaning="completely unrelated"),
        Grade(value=2, meaning="mostly unrelated"),
        Grade(value=3, meaning="unsure whether related"),
        Grade(value=4, meaning="mostly related"),
        Grade(value=5, meaning="completely related"),
    ),
)

SCALES = {scale.name: scale for scale in (UMBRELA, LIGHTBLUE)}
