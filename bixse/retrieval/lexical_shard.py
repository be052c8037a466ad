"""BM25 of one shard, weighted by the statistics of the whole corpus: sharded equals whole.

How rare a word is and how long a document is are questions of the corpus: a shard that answered
them from its own documents would score otherwise than its neighbour. So all shards are counted
first (`Statistics.of`, added up by `total`), then each is built with the sums. A shard's part is a
directory `lexical/` of bm25s files and one of ours:

    data, indices, indptr .csc.index.npy    a word's scores and rows; memory-mapped
    vocab.index.json                        word -> column; read, since bm25s keeps a dict
    params.index.json                       what bm25s says of itself
    lexical.json                            settings, and the number of rows

Scores are bit for bit those of `LexicalIndex` over all documents: the same formula (Lucene's BM25
as Kamphuis et al., ECIR 2020, write it) in the same precision, added up in the order of the query's
words. Rows are those of the shard's other files, so that the row number breaks ties.

Shapes: N documents, P postings (a word in a document), V words.
"""

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import bm25s
import numpy as np
import pyarrow as pa

from bixse.records import document_text
from bixse.retrieval.lexical import Words, best_rows
from bixse.retrieval.metadata import Kept
from bixse.retrieval.settings import Lexical
from bixse.retrieval.shard import Ranking, Shard
from bixse.settings import Settings

LEXICAL_DIR = "lexical"
LEXICAL_FILE = "lexical.json"

_ROWS = 4096


@dataclass(frozen=True)
class Statistics:
    """What BM25 needs to know of a corpus; grows with its vocabulary only."""

    documents: int
    words: int
    """Of all documents together, so that the average length is exact."""
    frequency: Counter[str]
    """word -> documents that hold it."""

    @classmethod
    def of(cls, batches: Iterable[Sequence[str]], language: str) -> "Statistics":
        """Of the texts of some documents, a batch at a time."""
        tokenize, documents, words = Words(language), 0, 0
        frequency: Counter[str] = Counter()
        for texts in batches:
            for tokens in tokenize(texts):
                documents += 1
                words += len(tokens)
                frequency.update(set(tokens))
        return cls(documents, words, frequency)

    @classmethod
    def total(cls, parts: Iterable["Statistics"]) -> "Statistics":
        """Of all documents together. Raises ValueError when none of them holds a word."""
        documents, words = 0, 0
        frequency: Counter[str] = Counter()
        for part in parts:
            documents, words = documents + part.documents, words + part.words
            frequency.update(part.frequency)
        if not words:
            raise ValueError("no document of the corpus holds a word that BM25 can use")
        return cls(documents, words, frequency)

    def idf(self, word: str) -> float:
        df = self.frequency[word]
        return math.log(1 + (self.documents - df + 0.5) / (df + 0.5))


class _Says(Settings):
    """Of a shard's lexical part: how words were made, and the rows it must hold."""

    lexical: Lexical
    rows: int


def texts_of(documents: Path) -> Iterator[list[str]]:
    """What BM25 reads of the rows of a `documents.arrow`, a batch at a time, in order."""
    table = pa.ipc.open_file(pa.memory_map(str(documents))).read_all()
    for start in range(0, table.num_rows, _ROWS):
        part = table.slice(start, _ROWS)
        titles, texts = part["title"].to_pylist(), part["text"].to_pylist()
        yield [document_text(*both) for both in zip(titles, texts, strict=True)]


def build_lexical(
    directory: Path, batches: Iterable[Sequence[str]], corpus: Statistics, settings: Lexical
) -> None:
    """Write the lexical part of a shard, whose rows are the texts in order, into a directory.

    `corpus` must count these texts too. Memory is some 60 bytes a posting of
    this shard.
    """
    tokenize = Words(settings.language)
    columns: dict[str, int] = {}
    columns_P, counts_P, held_N, lengths_N = (array("i") for _ in range(4))
    for texts in batches:
        for tokens in tokenize(texts):
            counted = Counter(tokens)
            columns_P.extend(columns.setdefault(word, len(columns)) for word in counted)
            counts_P.extend(counted.values())
            held_N.append(len(counted))
            lengths_N.append(len(tokens))
    cols, held, lengths = (np.array(part, np.int32) for part in (columns_P, held_N, lengths_N))
    idf_V = np.array([corpus.idf(word) for word in columns], np.float32)
    tf_P = np.array(counts_P, np.float32)
    rows_P = np.repeat(np.arange(len(lengths), dtype=np.int32), held)
    average = corpus.words / corpus.documents
    norm_P = settings.k1 * ((1 - settings.b) + settings.b * np.repeat(lengths, held) / average)
    scores_P = (idf_V[cols] * (tf_P / (norm_P + tf_P))).astype(np.float32)
    order = np.lexsort((rows_P, cols))
    bm25 = bm25s.BM25(k1=settings.k1, b=settings.b)
    bm25.scores = {
        "data": scores_P[order],
        "indices": rows_P[order],
        "indptr": np.concatenate(([0], np.cumsum(np.bincount(cols, minlength=len(columns))))),
        "num_docs": len(lengths),
    }
    bm25.vocab_dict, bm25.nonoccurrence_array = columns, None
    bm25.save(directory, show_progress=False)
    says = _Says(lexical=settings, rows=len(lengths))
    (directory / LEXICAL_FILE).write_text(says.model_dump_json())


class LexicalShard:
    """The loaded lexical part of a shard; safe for one search at a time."""

    def __init__(self, bm25: bm25s.BM25, settings: Lexical, rows: int) -> None:
        self._bm25 = bm25
        self._tokenize = Words(settings.language)
        self.size = rows

    @classmethod
    def load(cls, directory: Path, shard: Shard) -> "LexicalShard":
        """Map what `build_lexical` has written; its files must have been verified.

        Raises ValueError when it is not of the documents of `shard`.
        """
        says = _Says.model_validate_json((directory / LEXICAL_FILE).read_bytes())
        if says.rows != shard.size:
            raise ValueError(f"{directory} is of {says.rows} documents, its shard of {shard.size}")
        bm25 = bm25s.BM25.load(directory, mmap=True, show_progress=False)
        return cls(bm25, says.lexical, says.rows)

    def rankings(
        self, queries: Sequence[str], ks: Sequence[int], shard: Shard, kept: Kept | None = None
    ) -> list[Ranking]:
        """The best `ks[i]` documents that share a word with query `i`, ties by `doc_id`.

        `shard` is the shard that this is a part of. With `kept`, the best among those rows; their
        scores are as without, by the words of the whole corpus.
        """
        found = []
        out_N = None if kept is None else ~kept.mask
        for tokens, k in zip(self._tokenize(queries), ks, strict=True):
            scores_N = self._scores(tokens)
            if out_N is not None:
                scores_N[out_N] = 0
            rows = best_rows(scores_N, k)
            found.append(Ranking(rows, shard.doc_ids(rows), scores_N[rows].tolist()))
        return found

    def _scores(self, tokens: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        known = [word for word in tokens if word in self._bm25.vocab_dict]
        if not known:
            return np.zeros(self.size, np.float32)
        return np.asarray(self._bm25.get_scores(known), np.float32)
