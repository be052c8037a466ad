"""Labels without a model: the grades that people gave."""

import pyarrow as pa
import pyarrow.compute as pc

from bixse.records import JUDGMENTS, Split


def given(qrels: pa.Table, split: Split) -> pa.Table:
    """The judgments of one split, as they came (schema JUDGMENTS)."""
    chosen = qrels.filter(pc.equal(qrels["split"], split))
    unordered = pa.nulls(chosen.num_rows, pa.float32())
    return chosen.append_column("disagreement", unordered).select(JUDGMENTS.names).cast(JUDGMENTS)
