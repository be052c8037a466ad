"""Documents cut into chunks, and chunks put into groups that are read together.

Revela, arXiv 2506.16552: chunks of one document share a group, where they are each other's best
context and hardest distractors; documents shorter than a group share theirs with others.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from bixse.reading.chats import Plain
from bixse.records import Chunk, Rejection, text_hash

Item = TypeVar("Item")

_OPEN = 8
"""Groups that wait for more at a time: what is held does not follow the documents."""


class Chunker:
    """A language model's tokenizer, loaded once and called often: texts in, chunks out."""

    def __init__(self, tokenizer: Any, most: int) -> None:
        """Chunks of at most `most` tokens. Raises ValueError for a tokenizer that does not say
        where in a text its tokens stand."""
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path} does not say where its tokens stand: "
                "choose a language model with a fast one"
            )
        self._tokenizer = tokenizer
        self._plain = Plain(tokenizer)
        begin = tokenizer("")["input_ids"][:1]
        self._first = begin if begin == [tokenizer.bos_token_id] else []
        self._most = most - len(self._first)

    def __call__(self, documents: Sequence[tuple[str, str]]) -> Iterator[list[Chunk | Rejection]]:
        """Of each (doc_id, text) its chunks of nearly equal length, so that none is a scrap.

        A document without a text, and a chunk that has none or nothing on one side of its middle,
        is a rejection. Special tokens that stand in a text are broken up.
        """
        texts = [self._plain(text) for _, text in documents]
        found = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        spans = found["input_ids"], found["offset_mapping"]
        for (doc_id, _), text, ids, at in zip(documents, texts, *spans, strict=True):
            pieces = cut_evenly(len(ids), self._most)
            chunks = [self._chunk(doc_id, text, ids[piece], at[piece]) for piece in pieces]
            yield chunks or [Rejection("has no text", doc_id=doc_id)]

    def _chunk(
        self, doc_id: str, text: str, ids: Sequence[int], at: Sequence[tuple[int, int]]
    ) -> Chunk | Rejection:
        begin, middle, end = at[0][0], at[max(1, len(ids) // 2) - 1][1], at[-1][1]
        whole, half = text[begin:end].strip(), text[begin:middle].strip()
        if not half or len(half) == len(whole):
            return Rejection("has no two halves", response=whole, doc_id=doc_id)
        return Chunk(doc_id, whole, len(half), np.array([*self._first, *ids], np.int32))


def cut_evenly(count: int, most: int) -> list[slice]:
    """So many things in the fewest pieces of at most `most`, whose sizes differ by one at most."""
    pieces = -(-count // most)
    return [slice(count * n // pieces, count * (n + 1) // pieces) for n in range(pieces)]


def once(chunks: Iterable[Chunk | Rejection], known: set[str]) -> Iterator[Chunk | Rejection]:
    """The chunks, but of those with equal text (case, white space and Unicode form aside) only the
    first: a copy would hand a language model its answer. `known` are texts that have been met."""
    for chunk in chunks:
        if isinstance(chunk, Chunk):
            key = text_hash(chunk.text)
            if key in known:
                yield Rejection("equals another chunk", response=chunk.text, doc_id=chunk.doc_id)
                continue
            known.add(key)
        yield chunk


def grouped(documents: Iterable[Sequence[Item]], size: int) -> Iterator[list[Item]]:
    """The chunks of documents in groups of at most `size`, those of a document in one group, or in
    the fewest that hold them.

    They go to the first group that has room for them. Few groups wait for more at a time; of too
    many the fullest is given up short. Only the last group may have one chunk.
    """
    waiting: list[list[Item]] = []
    for chunks in documents:
        for part in cut_evenly(len(chunks), size):
            run = chunks[part]
            number = next(
                (n for n, group in enumerate(waiting) if len(group) + len(run) <= size),
                len(waiting),
            )
            if number == len(waiting):
                waiting.append([])
            waiting[number].extend(run)
            if len(waiting[number]) == size:
                yield waiting.pop(number)
            elif len(waiting) > _OPEN:
                fullest = max(range(len(waiting)), key=lambda n: len(waiting[n]))
                yield waiting.pop(fullest)
    yield from waiting
