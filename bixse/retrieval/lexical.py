"""BM25 through bm25s: candidates, a feature of the embedded judge, and the baseline."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

import bm25s
import numpy as np
import numpy.typing as npt
import Stemmer

from bixse.records import UNSPACED, Hit
from bixse.retrieval.settings import Lexical

# Vowel signs and accents of their own belong to the word of their letter; for `\w` they end it.
_MARKS = "".join(c for c in map(chr, range(0x10000)) if unicodedata.category(c)[0] == "M")
_WORD = rf"[\w{_MARKS}]{{2,}}"
_UNSPACED = re.compile(f"[{UNSPACED}]")


class Words:
    """Texts -> stemmed words, or character bigrams; the same for documents and queries."""

    def __init__(self, language: str) -> None:
        self._language = language
        self._stemmer = _stemmer(language)

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        if self._language == "bigrams":
            return [_bigrams(text) for text in texts]
        stopwords = "en" if self._language == "english" else []
        tokens = bm25s.tokenize(
            list(texts),
            token_pattern=_WORD,
            stopwords=stopwords,
            stemmer=self._stemmer,
            return_ids=False,
            show_progress=False,
        )
        return [list(words) for words in tokens]


class LexicalIndex:
    """BM25 over texts, in memory. Not Anserini's BM25: bm25s tokenises unlike Lucene."""

    def __init__(self, doc_ids: Sequence[str], texts: Sequence[str], settings: Lexical) -> None:
        """Raises ValueError when there is no document or no document holds a word."""
        if not doc_ids:
            raise ValueError("the corpus is empty")
        # In the order of doc_id, so that the position breaks ties.
        order = sorted(range(len(doc_ids)), key=doc_ids.__getitem__)
        self.doc_ids = [doc_ids[i] for i in order]
        self._rows = {doc_id: row for row, doc_id in enumerate(self.doc_ids)}
        self.tokenize = Words(settings.language)
        tokens = self.tokenize([texts[i] for i in order])
        if not any(tokens):
            raise ValueError("no document of the corpus holds a word that BM25 can use")
        self._bm25 = bm25s.BM25(k1=settings.k1, b=settings.b)
        self._bm25.index(tokens, show_progress=False)

    def scores(self, query: str) -> npt.NDArray[np.float32]:
        """The BM25 score of every document, in the order of `self.doc_ids`."""
        known = [word for word in self.tokenize([query])[0] if word in self._bm25.vocab_dict]
        if not known:
            return np.zeros(len(self.doc_ids), np.float32)
        return np.asarray(self._bm25.get_scores(known), np.float32)

    def scores_of(self, query: str, doc_ids: Sequence[str]) -> npt.NDArray[np.float32]:
        """The BM25 scores of the named documents. Raises KeyError for an unknown one."""
        return self.scores(query)[[self._rows[doc_id] for doc_id in doc_ids]]

    def search(self, query: str, k: int) -> list[Hit]:
        """The best `k` documents that share a word with the query, ties by `doc_id`."""
        scores = self.scores(query)
        return [
            Hit(self.doc_ids[row], float(scores[row]), rank)
            for rank, row in enumerate(best_rows(scores, k).tolist(), start=1)
        ]


def unspaced_share(texts: Iterable[str]) -> float:
    """Share of the letters that belong to scripts without spaces between words; 0 of no letter.

    Where those are, a word of `Words` is a whole clause, and a query shares none with it.
    """
    letters, unspaced = 0, 0
    for text in texts:
        found = "".join(filter(str.isalpha, text))
        letters += len(found)
        unspaced += len(_UNSPACED.findall(found))
    return unspaced / letters if letters else 0.0


def best_rows(scores_N: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Rows of the best `k` scores above 0, best first, ties by row."""
    rows = np.flatnonzero(scores_N > 0)
    if len(rows) > k:
        worst = np.partition(scores_N[rows], len(rows) - k)[len(rows) - k]
        rows = rows[scores_N[rows] >= worst]
    best: npt.NDArray[np.int64] = rows[np.lexsort((rows, -scores_N[rows]))][:k]
    return best


def _stemmer(language: str) -> Stemmer.Stemmer | None:
    return None if language in ("none", "bigrams") else Stemmer.Stemmer(language)


def _bigrams(text: str) -> list[str]:
    folded = "".join(text.casefold().split())
    return [folded[i : i + 2] for i in range(len(folded) - 1)] or ([folded] if folded else [])
