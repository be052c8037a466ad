"""Judgments of which a share carries another grade: what a worse judge would have said."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bixse.records import JUDGMENTS

Ints = npt.NDArray[np.int64]


def flip(steps: Ints, count: int, share: float, seed: int) -> Ints:
    """Steps of a scale of `count` grades, a share of which became another step, drawn uniformly.

    Exactly round(share * len(steps)) differ. What a smaller share flips a larger one does too.
    Raises ValueError for a share outside [0, 1] or a scale of one grade.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share of noise is in [0, 1], not {share:g}")
    if count < 2:
        raise ValueError("a scale of one grade has no other")
    draw = np.random.default_rng([seed, 2])
    order = draw.permutation(len(steps))
    away = draw.integers(1, count, len(steps))
    flipped = order[: round(share * len(steps))]
    noisy: Ints = steps.copy()
    noisy[flipped] = (steps[flipped] + away[flipped]) % count
    return noisy


def with_noise(judgments: pa.Table, grades: Sequence[float], share: float, seed: int) -> pa.Table:
    """The same rows (JUDGMENTS), in the order of their ids; `judge` says what was done to them.

    Grades off a step of the scale are rounded to one where they are flipped, and stay as they are
    elsewhere. Raises ValueError as `flip`.
    """
    values = np.asarray(grades, np.float64)
    relevance_K = (values - values[0]) / (values[-1] - values[0])
    # A judgment keeps its draw whatever order the rows were written in.
    rows = judgments.sort_by([("query_id", "ascending"), ("doc_id", "ascending")])
    relevance = rows["relevance"].to_numpy().astype(np.float64)
    steps = np.abs(relevance[:, None] - relevance_K).argmin(axis=1)
    noisy = flip(steps, len(values), share, seed)
    changed = noisy != steps
    probs = np.stack(rows["grade_probs"].to_numpy(zero_copy_only=False))
    probs[changed] = np.eye(len(values), dtype=np.float32)[noisy[changed]]
    columns = {
        **{name: rows[name] for name in JUDGMENTS.names},
        "grade_probs": list(probs.astype(np.float32)),
        "relevance": np.where(changed, relevance_K[noisy], relevance).astype(np.float32),
        "judge": [f"{judge} with {share:g} flipped" for judge in rows["judge"].to_pylist()],
    }
    return pa.table(columns, schema=JUDGMENTS)
