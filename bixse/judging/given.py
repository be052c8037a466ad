"""Labels without a judge: the grades that people gave, the grades that texts were written at."""

import pyarrow as pa
import pyarrow.compute as pc

from bixse.records import JUDGMENTS, Judgment, Split
from bixse.scale import Scale

ASSUMED = "unjudged candidate"
"""Signs candidates that nobody judged and that training takes as irrelevant."""


def given(qrels: pa.Table, split: Split) -> pa.Table:
    """The judgments of one split, as they came (schema JUDGMENTS)."""
    chosen = qrels.filter(pc.equal(qrels["split"], split))
    unordered = pa.nulls(chosen.num_rows, pa.float32())
    return chosen.append_column("disagreement", unordered).select(JUDGMENTS.names).cast(JUDGMENTS)


def written(
    query_id: str, doc_id: str, grade: float | None, scale: Scale, judge: str, prompt: str
) -> Judgment:
    """The judgment of a pair of which one side was written for the other.

    At `grade` of `scale`; without one (a query that its document answers) at the top of the scale.
    Raises ValueError for a grade outside the scale.
    """
    probs = scale.grade_probs(scale.values[-1] if grade is None else grade)
    return Judgment(query_id, doc_id, probs, scale.relevance(probs), judge, prompt, "synthetic")
