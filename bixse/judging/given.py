"""Labels without a model: the grades that people gave."""

import pyarrow as pa
import pyarrow.compute as pc

from bixse.records import JUDGMENTS, Split


def given(qrels: pa.Table, split: Split) -> pa.Table:
    """The judgments of one split, as they came (schema JUDGMENTS)."""
    return qrels.filter(pc.equal(qrels["split"], split)).select(JUDGMENTS.names).cast(JUDGMENTS)
