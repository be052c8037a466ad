"""Which queries are made, and from what."""

from typing import Literal

from pydantic import Field

from bixse.settings import Settings


class Cloze(Settings):
    """Queries cut out of documents: the inverse cloze task, Lee et al. 2019, arXiv 1906.00300."""

    kind: Literal["cloze"] = "cloze"
    queries: int = Field(default=2000, ge=1)
    """Queries to make, drawn over the corpus by a hash of `doc_id`."""
    min_words: int = Field(default=4, ge=1)
    """Shortest sentence that can stand as a query."""
    max_words: int = Field(default=24, ge=1)
    """Longer sentences are cut to this."""
    seed: int = 0
    """Of the draw."""
