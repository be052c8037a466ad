"""How vectors become an index, and words a lexical one."""

from typing import Literal

from pydantic import Field

from bixse.settings import Settings

Structure = Literal["exact", "hnsw", "ivf_flat", "ivf_pq", "ivf_rabitq"]
"""How a shard is searched; `retrieval/structures.py` says what each is."""

ON_GPU: frozenset[Structure] = frozenset({"exact", "ivf_flat"})
"""Structures that are searched on a GPU; `retrieval/device.py` says why no other."""

EXACT_BELOW = 50_000
"""Up to so many documents `auto` is exact: a scan takes milliseconds and nothing can be missed."""


class Search(Settings):
    """How wide an approximate structure searches; a structure reads only what concerns it."""

    ef_search: int = Field(default=128, ge=1)
    """hnsw: width of the search that answers."""
    nprobe: int = Field(default=16, ge=1)
    """ivf_*: lists that are scanned, those of the nearest centroids."""
    refine_factor: float = Field(default=4, ge=1)
    """ivf_pq, ivf_rabitq: candidates of a shard for each hit that are scored again from the stored
    vectors."""
    list_rows: float = Field(default=0.0, ge=0)
    """ivf_*: mean documents a list over the whole index, so that every shard widens alike for a
    large k; 0 never widens."""


class Retrieval(Settings):
    """The `index` stage: the structure, its shards, and how wide it searches."""

    structure: Literal["auto", "exact", "hnsw", "ivf_flat", "ivf_pq", "ivf_rabitq"] = "auto"
    """exact: every vector is compared. hnsw: a graph (Malkov & Yashunin, arXiv 1603.09320).
    ivf_*: the lists of the nearest centroids, with whole vectors (flat), 4-bit product codes
    (FAISS FastScan, arXiv 1704.07355) or RaBitQ codes (arXiv 2405.12497), the last two scored again
    from the stored vectors. auto: exact up to 50,000 documents, beyond that the structure that
    has least to read a query at `target_recall` within the budgets, on a sample."""
    target_recall: float = Field(default=0.95, gt=0, le=1)
    """Recall@10 against exact search that unset search parameters are tuned to."""
    memory_budget_mb: float | None = Field(default=None, gt=0)
    """Megabytes (10^6 bytes) of index files that may stay in memory, all shards together; vectors
    that only serve scoring again are read from the memory-mapped file and do not count."""
    latency_budget_ms: float | None = Field(default=None, gt=0)
    """Median milliseconds a query may take in the slowest shard, measured while building."""
    shards: int | None = Field(default=None, ge=1, le=4096)
    """Pieces of the index: `--topology shard` serves each from replicas of its own, `replicate` all
    from each. Unset: as few as `shard_rows` allows."""
    shard_rows: int = Field(default=1_000_000, ge=1)
    """Documents a shard, about, where `shards` is unset: bounds the memory of a worker."""
    hnsw_m: int = Field(default=32, ge=4, le=128)
    """Links a node; memory is 4 d + 8 M bytes a vector."""
    ef_construction: int = Field(default=200, ge=8)
    """Width of the search that places a new node."""
    nlist: int | None = Field(default=None, ge=1)
    """Centroids of ivf_*, trained once for all shards. Unset: about 4 sqrt(documents), no more than
    `train_rows` can train."""
    pq_m: int | None = Field(default=None, ge=1)
    """Sub-vectors of ivf_pq, 4 bits each; must divide the dimension. Unset: half the dimension."""
    rabitq_bits: int = Field(default=1, ge=1, le=9)
    """Bits a dimension of ivf_rabitq."""
    stored: Literal["float32", "float16", "int8"] = "float32"
    """Vectors that ivf_pq and ivf_rabitq keep for scoring again. Scores are cosines of these."""
    train_rows: int = Field(default=100_000, ge=1)
    """Vectors that centroids and codes are trained on: those with the smallest hash of `doc_id`."""
    tune_rows: int = Field(default=50_000, ge=100)
    """Vectors on which `auto` compares the structures, likewise sampled."""
    ef_search: int | None = Field(default=None, ge=8)
    """As in the manifest's `search`; unset is tuned to `target_recall`."""
    nprobe: int | None = Field(default=None, ge=1)
    """As in the manifest's `search`; unset is tuned to `target_recall`."""
    refine_factor: float | None = Field(default=None, ge=1)
    """As in the manifest's `search`; unset is tuned to `target_recall`."""
    truth_queries: int = Field(default=200, ge=1)
    """Queries on which recall against exact search and latency are measured."""
    bm25: bool = False
    """Index the words of the documents beside their vectors, by the recipe's `lexical` settings, so
    that `/search` can answer by words and by both. A new generation has what its base has."""


class Lexical(Settings):
    """BM25, for candidates, for the features judge, as a baseline and for search by words."""

    k1: float = Field(default=1.2, gt=0)
    """Term saturation (Anserini's default is 0.9, Lucene's 1.2)."""
    b: float = Field(default=0.75, ge=0, le=1)
    """Length normalisation."""
    language: Literal[
        "english", "french", "german", "italian", "spanish", "portuguese", "dutch", "russian",
        "swedish", "none", "bigrams",
    ] = "english"  # fmt: skip
    """Snowball stemmer; `none` splits words only, `bigrams` pairs characters, for scripts without
    spaces between words (Chinese, Japanese, Thai)."""
