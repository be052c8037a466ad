"""How vectors become an index, and words a lexical one."""

from typing import Literal

from pydantic import Field

from bixse.settings import Settings


class Retrieval(Settings):
    """The `index` stage."""

    structure: Literal["exact", "hnsw"] = "exact"
    """exact: every vector is compared. hnsw: a graph (Malkov & Yashunin, arXiv 1603.09320)."""
    shards: int = Field(default=1, ge=1, le=4096)
    """Pieces of the index; one serving replica holds one."""
    hnsw_m: int = Field(default=32, ge=4, le=128)
    """Links a node; memory is 4 d + 8 M bytes a vector."""
    ef_construction: int = Field(default=200, ge=8)
    """Width of the search that places a new node."""
    ef_search: int = Field(default=128, ge=8)
    """Width of the search that answers."""
    truth_queries: int = Field(default=200, ge=1)
    """Queries on which recall against exact search and latency are measured."""


class Lexical(Settings):
    """BM25, for candidates, for the features judge and as a baseline."""

    k1: float = Field(default=1.2, gt=0)
    """Term saturation (Anserini's default is 0.9, Lucene's 1.2)."""
    b: float = Field(default=0.75, ge=0, le=1)
    """Length normalisation."""
    language: Literal[
        "english", "french", "german", "italian", "spanish", "portuguese", "dutch", "russian",
        "swedish", "none", "bigrams",
    ] = "english"  # fmt: skip
    """Snowball stemmer; `none` splits words only, `bigrams` pairs characters (Chinese)."""
