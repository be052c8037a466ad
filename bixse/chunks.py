"""Texts as a model reads them: tokenised, in chunks of like length.

Training and inference read alike: a text costs what its tokens cost, and padding nearly nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from sentence_transformers.base import BaseModel

Role = Literal["query", "document", "pair"]
"""A pair is a query and a document that a reranker reads together."""

# What a chunk costs beside its tokens, in tokens: weights rounded and gradients added up on a CPU
# (measured on MiniLM), kernels started on a GPU (an estimate: there one chunk is best until it is
# large).
_CHUNK_COST = {"cpu": 128, "cuda": 8192}


@dataclass(frozen=True)
class Side:
    """Texts of one role, tokenised in chunks of like length."""

    role: Role
    chunks: Sequence[dict[str, Any]]
    """Features of sentence-transformers: `input_ids` [chunk, L], `attention_mask`, ..."""
    place: torch.Tensor
    """Where in the concatenated chunks each text stands."""
    count: int
    """Texts that count: 0 on a rank without any, which then encodes one and uses none."""

    @property
    def widest(self) -> int:
        """Tokens of its largest chunk that can be halved, padding included; 0 if none can."""
        return max((_tokens(c) for c in self.chunks if _texts(c) > 1), default=0)

    def within(self, tokens: int) -> "Side":
        """The same texts in the same order, larger chunks halved until they are within `tokens`."""
        chunks = [part for chunk in self.chunks for part in _halves(chunk, tokens)]
        return replace(self, chunks=chunks)

    def filled(self, chunks: int) -> "Side":
        """The same texts in so many chunks, of which the last are read and not used."""
        return replace(self, chunks=[*self.chunks, *[self.chunks[0]] * (chunks - len(self.chunks))])


def _texts(chunk: Mapping[str, Any]) -> int:
    """Texts that it can be cut between: 1 of a bag of words, which has no row a text."""
    return len(chunk["attention_mask"]) if "attention_mask" in chunk else 1


def _tokens(chunk: Mapping[str, Any]) -> int:
    return int(chunk["attention_mask"].numel()) if "attention_mask" in chunk else 0


def _halves(chunk: dict[str, Any], tokens: int) -> Iterator[dict[str, Any]]:
    texts = _texts(chunk)
    if texts == 1 or _tokens(chunk) <= tokens:
        yield chunk
        return
    for rows in (slice(texts // 2), slice(texts // 2, texts)):
        yield from _halves(_trimmed(_rows(chunk, rows, texts)), tokens)


def _rows(features: Mapping[str, Any], rows: "slice | torch.Tensor", texts: int) -> dict[str, Any]:
    """Some texts of features; what is not one value a text stays as it is."""

    def of(value: Any) -> Any:
        split = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == texts
        return value[rows] if split else value

    return {name: of(value) for name, value in features.items()}


def cut(lengths: npt.NDArray[np.int64], cost: int, most: int | None = None) -> list[slice]:
    """Texts of falling length into chunks, such that padded tokens plus `cost` a chunk are fewest.

    No chunk of two texts or more has more than `most` tokens, padding included. Exact, by dynamic
    programming over where the last chunk starts.
    """
    texts = len(lengths)
    least = np.zeros(texts + 1, np.int64)
    start_of = np.zeros(texts + 1, np.int64)
    for end in range(1, texts + 1):
        starts = np.arange(end)
        tokens = lengths[:end] * (end - starts)
        if most is not None:
            allowed = (tokens <= most) | (starts == end - 1)
            starts, tokens = starts[allowed], tokens[allowed]
        total = least[starts] + tokens + cost
        best = int(total.argmin())
        least[end], start_of[end] = total[best], starts[best]
    chunks: list[slice] = []
    end = texts
    while end:
        chunks.append(slice(int(start_of[end]), end))
        end = int(start_of[end])
    return chunks[::-1]


def prompt_of(model: "BaseModel", role: Role) -> str | None:
    """The prompt that `encode_query`, `encode_document` or, of a pair, `predict` of
    sentence-transformers puts first.
    """
    names = {"query": ("query",), "document": ("document", "passage", "corpus"), "pair": ()}
    found = (name for name in (*names[role], model.default_prompt_name) if name in model.prompts)
    name = next(found, None)
    return None if name is None else str(model.prompts[name])


def tokenise(
    model: "BaseModel",
    texts: Sequence[str] | Sequence[tuple[str, str]],
    role: Role,
    max_tokens: int | None = None,
    count: int | None = None,
    most: int | None = None,
) -> Side:
    """One or more texts as `encode_query`, `encode_document` or, of pairs, `predict` of
    sentence-transformers would read them, cut at `max_tokens`.

    The model's own limit holds where it is lower. Of the texts the first `count` are used, or all.
    Chunks hold at most `most` tokens, padding included, or one text.
    """
    limit = {} if max_tokens is None else {"max_length": _limit(model, max_tokens)}
    count = len(texts) if count is None else count
    prompt = prompt_of(model, role)
    features = model.preprocess(list(texts), prompt=prompt, task=role, **limit)
    mask = features.get("attention_mask")
    if mask is None:
        # A bag of words has no padding to save.
        return Side(role, [_moved(features, model.device)], torch.arange(len(texts)), count)
    length = mask.sum(dim=1)
    order = torch.argsort(length, descending=True, stable=True)
    falling = length[order].numpy()
    chunks = []
    for part in cut(falling, _CHUNK_COST.get(model.device.type, 0), most):
        chunk = _rows(features, order[part], len(texts))
        chunks.append(_moved(_trimmed(chunk), model.device))
    place = torch.empty(len(texts), dtype=torch.int64)
    place[order] = torch.arange(len(texts))
    return Side(role, chunks, place.to(model.device), count)


def _limit(model: "BaseModel", max_tokens: int) -> int:
    own = model.max_seq_length
    return max_tokens if own is None else min(max_tokens, own)


def _trimmed(chunk: dict[str, Any]) -> dict[str, Any]:
    """Without the columns that are padding in every text, on either side."""
    width = chunk["attention_mask"].shape[1]
    used = chunk["attention_mask"].any(dim=0).nonzero()
    if not len(used):
        # Texts of no token at all: what the model makes of them is for it to say.
        return chunk
    columns = slice(int(used[0]), int(used[-1]) + 1)

    def of(value: Any) -> Any:
        split = isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[1] == width
        return value[:, columns] if split else value

    return {name: of(value) for name, value in chunk.items()}


def _moved(features: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in features.items()
    }
