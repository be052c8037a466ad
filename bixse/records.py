"""The nouns: what one row of each artefact is, its Arrow schema, and the hash of a text.

Names are the contract: `query_id`, `doc_id`, `grade`, `relevance`, `score` and `rank` mean the same
in columns, arguments and JSON. `score` is higher-is-better and `rank` counts from 1.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Split = Literal["train", "dev", "test"]

Kind = Literal["text", "number", "boolean", "texts"]
"""What a field of metadata holds, in all documents alike; texts is a list of strings."""

Metadata = dict[str, str | int | float | bool | list[str]]
"""Fields of a document by name; one that it does not have is absent."""

EXACT_INTEGERS = 2**53
"""Whole numbers up to this are exact as float64, in which numbers of metadata are compared."""


@dataclass(frozen=True, slots=True)
class Document:
    """One passage of the corpus."""

    doc_id: str
    title: str
    text: str
    metadata: Metadata | None = None
    """What filters read; None where it was not asked for, or the document has none."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document, as a language model and an encoder read it."""

    doc_id: str
    text: str
    half: int
    """Characters of `text` that hold the first half of its tokens."""
    token_ids: npt.NDArray[np.int32]
    """Of the language model; what its tokenizer puts before every text comes first."""


@dataclass(frozen=True, slots=True)
class Query:
    """One information need; synthetic ones name the document they were made from."""

    query_id: str
    text: str
    origin: Literal["given", "synthetic"] = "given"
    seed_doc_id: str | None = None
    target_grade: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A candidate worth judging, and who proposed it at which rank."""

    query_id: str
    doc_id: str
    source: str
    rank: int
    score: float


@dataclass(frozen=True, slots=True)
class Judgment:
    """What a judge says of a pair: a distribution over the scale and its expected relevance."""

    query_id: str
    doc_id: str
    grade_probs: tuple[float, ...]
    relevance: float
    judge: str
    prompt: str
    origin: str
    disagreement: float | None = None
    """The largest change of a probability between presentation orders; None with one order."""


@dataclass(frozen=True, slots=True)
class Preference:
    """How probable it is that the first of two documents is the more relevant, and who says so."""

    query_id: str
    doc_id_a: str
    doc_id_b: str
    prob_a: float
    """Mean over both presentation orders, in [0, 1]."""
    judge: str
    prompt: str
    disagreement: float
    """Between the orders, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A row that did not become data: whose it was, why, and what was received."""

    reason: str
    response: str = ""
    source: str = ""
    line: int | None = None
    query_id: str | None = None
    doc_id: str | None = None
    other_doc_id: str | None = None
    """The second document, where it was about two."""


class Hit(NamedTuple):
    """One retrieved document; `score` is cosine. A tuple, since a query makes many."""

    doc_id: str
    score: float
    rank: int


CORPUS = pa.schema([("doc_id", pa.string()), ("title", pa.string()), ("text", pa.string())])

CHUNKS = pa.schema(
    [
        ("group", pa.int64()),
        ("doc_id", pa.string()),
        ("text", pa.string()),
        ("half", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
    ]
)
"""Chunks that are read together have one `group`, counted from 0 in each part, and follow each
other."""

METADATA = pa.schema([("doc_id", pa.string()), ("metadata", pa.string())])
"""Metadata of those documents of a part of the corpus that have any, as JSON with sorted keys. It
stands beside the rows, in `metadata/`, so that a corpus without any is what it was before there
was metadata; the manifest says the fields and their kinds."""

METADATA_DIR = "metadata"

QUERIES = pa.schema(
    [
        ("query_id", pa.string()),
        ("text", pa.string()),
        ("origin", pa.string()),
        ("seed_doc_id", pa.string()),
        ("target_grade", pa.float32()),
    ]
)

DOCUMENTS = pa.schema([*CORPUS, ("query_id", pa.string()), ("target_grade", pa.float32())])
"""Documents that were written for a query at a grade: rows of a corpus, and of what they are."""

PAIRS = pa.schema(
    [
        ("query_id", pa.string()),
        ("doc_id", pa.string()),
        ("source", pa.string()),
        ("rank", pa.int32()),
        ("score", pa.float32()),
    ]
)

JUDGMENTS = pa.schema(
    [
        ("query_id", pa.string()),
        ("doc_id", pa.string()),
        ("grade_probs", pa.list_(pa.float32())),
        ("relevance", pa.float32()),
        ("judge", pa.string()),
        ("prompt", pa.string()),
        ("origin", pa.string()),
        ("disagreement", pa.float32()),
    ]
)

PREFERENCES = pa.schema(
    [
        ("query_id", pa.string()),
        ("doc_id_a", pa.string()),
        ("doc_id_b", pa.string()),
        ("prob_a", pa.float32()),
    ]
)
"""`prob_a` in [0, 1]: how probably a is the more relevant of the two."""

QRELS = pa.schema([("split", pa.string()), *list(JUDGMENTS)[:-1]])
"""Given judgments before a split is chosen: judgments with the split that they came in, and without
the disagreement that only a judge asked in several orders has."""

PAIRINGS = pa.schema(
    [("query_id", pa.string()), ("doc_id_a", pa.string()), ("doc_id_b", pa.string())]
)
"""Two documents of a query that are worth comparing."""

JUDGED_PREFERENCES = pa.schema(
    [
        *PREFERENCES,
        ("judge", pa.string()),
        ("prompt", pa.string()),
        ("disagreement", pa.float32()),
    ]
)
"""Preferences of a judge of ours, who signs them."""

CLICKS = pa.schema(
    [
        ("query_id", pa.string()),
        ("doc_id", pa.string()),
        ("rank", pa.int32()),
        ("impressions", pa.int64()),
        ("clicks", pa.int64()),
        ("rank_bias", pa.float32()),
        ("weight", pa.float32()),
    ]
)
"""A document shown for a query at a rank, how often, and how often clicked; what the rank adds to
the log-odds of a click, and what an impression weighs."""

LINKS = pa.schema([("doc_id", pa.string()), ("other_doc_id", pa.string())])
"""Two documents that have to do with each other, in either direction."""

REJECTED = pa.schema(
    [
        ("reason", pa.string()),
        ("response", pa.string()),
        ("source", pa.string()),
        ("line", pa.int64()),
        ("query_id", pa.string()),
        ("doc_id", pa.string()),
        ("other_doc_id", pa.string()),
    ]
)


def embeddings_schema(dim: int) -> pa.Schema:
    """Unit vectors of `dim` float32 numbers, one a document."""
    return pa.schema([("doc_id", pa.string()), ("vector", pa.list_(pa.float32(), dim))])


def documents_at(corpus: pa.Table, rows: Iterable[int]) -> list[Document]:
    """The documents in these rows of a table of CORPUS.

    One value at a time: `Table.take` copies every chunk of a memory-mapped table first.
    """
    doc_ids, titles, texts = (corpus[name] for name in CORPUS.names)
    return [Document(doc_ids[row].as_py(), titles[row].as_py(), texts[row].as_py()) for row in rows]


def document_text(title: str, text: str) -> str:
    """What an encoder, BM25 or a judge reads of a document: title, space, text (BEIR's way)."""
    return f"{title} {text}".strip()


def text_hash(text: str) -> str:
    """128 bits that texts share when only case, white space or Unicode form differ."""
    encoded = folded(text).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def is_document(query: str, title: str, text: str) -> bool:
    """Whether a query reads as a document does, with its title or without: those of ArguAna do."""
    return text_hash(query) in (text_hash(text), text_hash(document_text(title, text)))


def ids_hash(ids: Iterable[str]) -> str:
    """128 bits of a set of ids, for what an artefact is made with or without."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:32]


def folded(text: str) -> str:
    """A text without what does not make it another: case, white space, Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """The words of a folded text, in order: letters, digits and the marks that go with them.

    Of a script that puts no space between words, every two characters that stand side by side.
    """
    return _NO_WORD.sub(_mark_or_space, _RUN.sub(_pairs, folded(text))).split()


def count_words(found: Iterable[str]) -> float:
    """How many words there are in what `words` found: a word of Chinese has about two characters,
    and begins two pairs."""
    return sum(0.5 if _RUN.match(word) else 1.0 for word in found)


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Shared words of two texts over all their words; two empty sets are equal."""
    return len(a & b) / len(a | b) if a | b else 1.0


UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese, for the set of a pattern."""

_RUN = re.compile(f"[{UNSPACED}]{{2,}}")
_NO_WORD = re.compile(r"[^\w\s]")


def _pairs(run: re.Match[str]) -> str:
    return f" {' '.join(a + b for a, b in pairwise(run[0]))} "


def _mark_or_space(found: re.Match[str]) -> str:
    """A vowel sign of Hindi or Thai and an accent of its own are no letters, and part no words."""
    return found[0] if unicodedata.category(found[0]).startswith("M") else " "


def split_of(key: str) -> Split:
    """The split a query lives in, for ever: 80/10/10 by a hash of `query_id`.

    A synthetic query passes its `seed_doc_id`, so that two questions about one passage never
    stand on both sides.
    """
    share = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") / 2**32
    if share < 0.8:
        return "train"
    return "dev" if share < 0.9 else "test"
