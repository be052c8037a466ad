"""What stands in a set of judgments: copies, contradictions, grades by whom, second answers.

Pure functions over tables and columns; `jobs.audit` reads the artefacts and writes the report.

Shape suffixes: N rows of judgments, K grades.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bixse.judging.agreement import Aligned, Floats, Ints, confusion, grade, kappa, steps
from bixse.judging.calibration import expected_relevance, grade_probs
from bixse.scale import reaches

KEYS = ["query_id", "doc_id"]


def matched(left: pa.Table, right: pa.Table) -> tuple[Ints, Ints]:
    """Row numbers, in both tables, of every pair that both hold; in the order of `left`."""
    numbered = [
        table.select(KEYS).append_column(name, pa.array(np.arange(table.num_rows)))
        for name, table in (("left", left), ("right", right))
    ]
    both = numbered[0].join(numbered[1], keys=KEYS, join_type="inner")
    both = both.sort_by([("left", "ascending"), ("right", "ascending")])
    return both["left"].to_numpy(), both["right"].to_numpy()


def align(
    judgments: pa.Table,
    relevance_N: Floats,
    human: pa.Table,
    human_scale: Sequence[float],
    lengths: Mapping[str, int] | None = None,
) -> Aligned:
    """The pairs of `judgments`, read as `relevance_N`, that `human` (query_id, doc_id, relevance)
    has too; `lengths` are characters by `doc_id`.
    """
    rows, others = matched(judgments, human)
    query_ids = judgments["query_id"].take(pa.array(rows)).combine_chunks().dictionary_encode()
    doc_ids = judgments["doc_id"].take(pa.array(rows)).to_pylist()
    return Aligned(
        query_N=query_ids.indices.to_numpy(zero_copy_only=False).astype(np.int64),
        judged_N=relevance_N[rows],
        human_N=human["relevance"].to_numpy().astype(np.float64)[others],
        steps_K=steps(human_scale),
        length_N=None if lengths is None else np.array([lengths[d] for d in doc_ids], np.float64),
    )


def copies(hashes: pa.Table) -> dict[str, list[str]]:
    """hash -> its ids, sorted, of a table (id, hash): only texts that stand more than once."""
    key, value = hashes.column_names
    counts = pc.value_counts(hashes[value].combine_chunks())
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    found: dict[str, list[str]] = defaultdict(list)
    for row in hashes.filter(pc.is_in(hashes[value], value_set=repeated)).to_pylist():
        found[row[value]].append(row[key])
    return {name: sorted(ids) for name, ids in sorted(found.items())}


@dataclass(frozen=True, slots=True)
class Hidden:
    """A text that is relevant to a query under one id and counts as irrelevant under another."""

    query_id: str
    doc_id: str
    relevance: float
    copy_doc_id: str
    copy_relevance: float | None
    """What the copy was judged; None where nobody judged it, so that it serves as a negative."""


def positives_among_negatives(
    judged: Iterable[tuple[str, str, float]],
    query_key: Mapping[str, str],
    copies_of: Mapping[str, Sequence[str]],
    relevant_from: float,
) -> list[Hidden]:
    """Of every relevant (query_id, doc_id, relevance) the copies that are judged below
    `relevant_from` or not at all.

    `query_key` gives equal keys to queries of equal text, `copies_of` the other ids of a document's
    text. A text counts once for a query text: from its best judgment to each id that lacks one.
    """
    # Several judges of one pair disagree, which is no copy: their mean stands for the pair.
    pairs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for query_id, doc_id, relevance in judged:
        pairs[query_id, doc_id].append(relevance)
    by_text: dict[tuple[str, str], list[tuple[str, str, float]]] = defaultdict(list)
    for (query_id, doc_id), values in pairs.items():
        relevance = sum(values) / len(values)
        first = min([doc_id, *copies_of.get(doc_id, ())])
        by_text[query_key[query_id], first].append((query_id, doc_id, relevance))
    found = []
    for rows in by_text.values():
        query_id, doc_id, best = max(rows, key=lambda row: row[2])
        if not reaches(best, relevant_from):
            continue
        low = {row[1]: row[2] for row in rows if not reaches(row[2], relevant_from)}
        found += [Hidden(query_id, doc_id, best, other, value) for other, value in low.items()]
        known = {row[1] for row in rows}
        unjudged = [other for other in copies_of.get(doc_id, ()) if other not in known]
        found += [Hidden(query_id, doc_id, best, other, None) for other in unjudged]
    return found


def histogram(
    relevance_N: Floats, scale: Sequence[float], names_N: npt.NDArray[np.object_]
) -> dict[str, list[int]]:
    """Judgments of each grade of `scale` (the nearest), for each name among `names_N`."""
    grade_N = grade(relevance_N, steps(scale))
    return {
        str(name): np.bincount(grade_N[names_N == name], minlength=len(scale)).tolist()
        for name in sorted({*names_N.tolist()})
    }


@dataclass(frozen=True, slots=True)
class Changes:
    """How one set of judgments differs from another of the same pairs, on the same scale."""

    pairs: int
    flips: int
    """Pairs whose nearest grade changed."""
    largest_change: float
    """The largest change of any grade's probability."""
    mean_change: float
    """The mean absolute change of relevance."""
    kappa_quadratic: float

    @property
    def flip_rate(self) -> float:
        return self.flips / self.pairs


def changes(first: pa.Table, second: pa.Table, scale: Sequence[float]) -> Changes:
    """Of two tables of JUDGMENTS. Raises ValueError when they share no pair or differ in scale."""
    rows, others = matched(first, second)
    if not len(rows):
        raise ValueError("the two sets of judgments share no pair")
    before_NK = grade_probs(first, scale)[rows]
    after_NK = grade_probs(second, scale)[others]
    before_N, after_N = expected_relevance(before_NK, scale), expected_relevance(after_NK, scale)
    pairs = Aligned(np.zeros(len(rows), np.int64), before_N, after_N, steps(scale))
    counts_KK = confusion(pairs)
    return Changes(
        pairs=len(rows),
        flips=int(counts_KK.sum() - np.trace(counts_KK)),
        largest_change=float(np.abs(before_NK - after_NK).max()),
        mean_change=float(np.abs(before_N - after_N).mean()),
        kappa_quadratic=kappa(counts_KK, "quadratic"),
    )
