"""Texts as a model reads them: tokenised, in chunks.

Training and inference read alike: a text costs what its tokens cost, and padding nearly nothing.
Chunks hold texts of like length, padded to the longest; or, where the model's attention is
`reading/packing.py`, texts end to end without any padding. Texts of several sides share chunks when
the model makes no difference between them: one forward pass for both.

Shapes: N texts, T tokens of all of them, L of the longest.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from bixse.reading.packing import is_packed, packed_features, packed_rows, reads_packed
from bixse.reading.ragged import Features, Ragged, padded_rows
from bixse.reading.spans import round_up
from bixse.reading.tokenising import Role, tokenised

if TYPE_CHECKING:
    from sentence_transformers.base import BaseModel

# What a padded chunk costs beside its tokens, in tokens: weights rounded and gradients added up on
# a CPU (measured on MiniLM), kernels started on a GPU (an estimate: there one chunk is best until
# it is large).
_CHUNK_COST = {"cpu": 128, "cuda": 8192}

_GRAIN = 16
"""Texts in chunks of few shapes are this many tokens long, or a multiple: 8 were as good, 32 no
better (MiniLM, two threads)."""


@dataclass(frozen=True)
class Texts:
    """Texts of one role that a model is to read."""

    texts: Sequence[str] | Sequence[tuple[str, str]]
    role: Role
    max_tokens: int | None = None
    """Where they are cut, if the model's own limit is not lower."""
    count: int | None = None
    """The first so many are used, or all."""


@dataclass(frozen=True)
class Side:
    """Where the texts of one role stand among all that are read."""

    role: Role
    place: torch.Tensor
    """Of each text, in what the model makes of all chunks, one after the other."""
    count: int
    """Texts that count: 0 on a rank without any, which then reads one and uses none."""


@dataclass(frozen=True)
class Reading:
    """Texts of one side or more, tokenised, in chunks."""

    chunks: Sequence[tuple[Role, Features]]
    """Features of sentence-transformers: `input_ids` [chunk, L], `attention_mask`, ...; packed:
    `input_ids` [1, T], `cu_seq_lens_q` [chunk + 1], ... The model is called with the role."""
    sides: tuple[Side, ...]

    @property
    def widest(self) -> int:
        """Tokens of its largest chunk that can be halved, padding included; 0 if none can."""
        return max((_tokens(c) for _, c in self.chunks if _texts(c) > 1), default=0)

    def within(self, tokens: int) -> "Reading":
        """The same texts in the same order, larger chunks halved until they are within `tokens`."""
        chunks = [(role, half) for role, chunk in self.chunks for half in _halves(chunk, tokens)]
        return replace(self, chunks=chunks)

    def filled(self, most: Callable[[int], int]) -> "Reading":
        """The same texts in as many chunks of each role as `most` makes of their number; those that
        are added are read and not used."""
        chunks: list[tuple[Role, Features]] = []
        before: list[tuple[int, int]] = []
        texts = 0
        for _, members in groupby(self.chunks, key=lambda chunk: chunk[0]):
            group = list(members)
            added = [group[0]] * (most(len(group)) - len(group))
            chunks += group + added
            texts += sum(_texts(chunk) for _, chunk in group)
            before.append((texts, sum(_texts(chunk) for _, chunk in added)))

        def moved(side: Side) -> Side:
            first = int(side.place.min())
            return replace(side, place=side.place + sum(n for end, n in before if end <= first))

        return Reading(chunks, tuple(map(moved, self.sides)))


def _texts(chunk: Features) -> int:
    """Texts that it can be cut between: 1 of a bag of words, which has no row a text."""
    if is_packed(chunk):
        return len(chunk["cu_seq_lens_q"]) - 1
    return len(chunk["attention_mask"]) if "attention_mask" in chunk else 1


def _tokens(chunk: Features) -> int:
    if is_packed(chunk):
        return int(chunk["input_ids"].numel())
    return int(chunk["attention_mask"].numel()) if "attention_mask" in chunk else 0


def _halves(chunk: Features, tokens: int) -> Iterator[Features]:
    texts = _texts(chunk)
    if texts == 1 or _tokens(chunk) <= tokens:
        yield chunk
        return
    for rows in (slice(0, texts // 2), slice(texts // 2, texts)):
        half = packed_rows(chunk, rows) if is_packed(chunk) else padded_rows(chunk, rows)
        yield from _halves(half, tokens)


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


def even(lengths: npt.NDArray[np.int64], limit: int | None) -> npt.NDArray[np.int64]:
    """Lengths rounded up to one of few, but not above `limit`, where the model has no positions."""
    rounded = -(-np.maximum(lengths, 1) // _GRAIN) * _GRAIN
    return rounded if limit is None else np.maximum(lengths, np.minimum(rounded, limit))


def evenly(lengths: npt.NDArray[np.int64], most: int) -> list[slice]:
    """Texts of falling length into chunks of as many as `most` tokens hold of the longest: of even
    lengths, chunks of few sizes."""
    starts, texts = [0], len(lengths)
    while (start := starts[-1]) < texts:
        starts.append(min(texts, start + max(1, most // int(lengths[start]))))
    return [slice(*bounds) for bounds in pairwise(starts)]


def fill(lengths: npt.NDArray[np.int64], most: int | None = None) -> list[slice]:
    """Texts into chunks of at most `most` tokens, or one text: of packed texts the fewest."""
    starts, tokens = [0], 0
    for text, length in enumerate(lengths.tolist()):
        if most is not None and tokens + length > most and text > starts[-1]:
            starts.append(text)
            tokens = 0
        tokens += length
    return [slice(*bounds) for bounds in pairwise([*starts, len(lengths)])]


def prompt_of(model: "BaseModel", role: Role) -> str | None:
    """The prompt that `encode_query`, `encode_document` or, of a pair, `predict` of
    sentence-transformers puts first.
    """
    names = {"query": ("query",), "document": ("document", "passage", "corpus"), "pair": ()}
    found = (name for name in (*names[role], model.default_prompt_name) if name in model.prompts)
    name = next(found, None)
    return None if name is None else str(model.prompts[name])


def first_module(model: "BaseModel", role: Role) -> Any:
    """Of a model the module that reads texts of a role; a router has one a route."""
    from sentence_transformers.sentence_transformer.modules import Router

    first = model[0]
    if isinstance(first, Router):
        routes: Any = first.sub_modules
        return routes[first._resolve_route(task=role, modality="text")][0]
    return first


def longest_of(model: "BaseModel", role: Role) -> int | None:
    """Tokens at which the model cuts a text of a role, if it does."""
    found = getattr(first_module(model, role), "max_seq_length", None)
    # A static embedding has no limit, and calls that infinite.
    return None if found is None or found == float("inf") else int(found)


def tokenise(
    model: "BaseModel", asked: Sequence[Texts], most: int | None = None, alike: bool = False
) -> Reading:
    """One or more texts of each of some sides as `encode_query`, `encode_document` or, of pairs,
    `predict` of sentence-transformers would read them.

    Chunks hold at most `most` tokens, padding included, or one text. With `alike` they hold nearly
    that and have few shapes, for which more is padded: where kernels are compiled for each shape.
    """
    made = [_tokens_of(model, one) for one in asked]
    roles = [one.role for one in asked]
    together = [list(range(len(asked)))] if _alike(model, made) else [[n] for n in range(len(made))]
    chunks: list[tuple[Role, Features]] = []
    places: list[torch.Tensor] = []
    rows = 0
    for members in together:
        role, parts = roles[members[0]], [made[number] for number in members]
        tokens = [part for part in parts if isinstance(part, Ragged)]
        if not tokens:
            # A bag of words has no padding to save.
            chunks += [
                (role, _moved(part, model.device)) for part in parts if isinstance(part, dict)
            ]
            places.append(rows + torch.arange(len(asked[members[0]].texts)))
            rows += len(places[-1])
            continue
        joined = Ragged.joined(tokens)
        order = torch.argsort(joined.length_N, descending=True, stable=True)
        at = []
        for chunk, texts in _chunks(model, role, joined.taken(order), most, alike):
            chunks.append((role, _moved(chunk, model.device)))
            at.append(rows + torch.arange(texts))
            rows += _texts(chunk)
        place = torch.empty(len(order), dtype=torch.int64)
        place[order] = torch.cat(at)
        for number in members:
            texts = len(asked[number].texts)
            places.append(place[:texts])
            place = place[texts:]
    counts = [len(one.texts) if one.count is None else one.count for one in asked]
    sides = zip(roles, places, counts, strict=True)
    return Reading(chunks, tuple(Side(role, at.to(model.device), n) for role, at, n in sides))


def lengths_of(model: "BaseModel", asked: Texts) -> npt.NDArray[np.int64]:
    """Tokens of each text as the model reads it: what its chat template adds and what is cut
    counted in. Of a model that reads tokens."""
    found = _tokens_of(model, asked)
    if isinstance(found, Ragged):
        return found.length_N.numpy()
    return np.diff(found["cu_seq_lens_q"])


def template_tokens(model: "BaseModel") -> int:
    """Tokens that a chat template puts around every pair, about; 0 where the model has none. What
    a tokenizer adds by itself ([CLS], [SEP]) is none of them."""
    if "message" not in getattr(model[0], "modality_config", {}):
        return 0
    return int(lengths_of(model, Texts([("", "")], "pair"))[0])


def _tokens_of(model: "BaseModel", asked: Texts) -> Ragged | Features:
    own, limit = longest_of(model, asked.role), asked.max_tokens
    if limit is not None and own is not None:
        limit = min(limit, own)
    found = tokenised(model, asked.texts, asked.role, prompt_of(model, asked.role), limit)
    reads_length = any(not getattr(module, "include_prompt", True) for module in model)
    if isinstance(found, Ragged) and not reads_length:
        # It differs from side to side, and nobody asks.
        of_all = {k: v for k, v in found.of_all.items() if k != "prompt_length"}
        return replace(found, of_all=of_all)
    return found


def _alike(model: "BaseModel", made: Sequence[Ragged | Features]) -> bool:
    """Whether the model makes of a text the same whichever side it is of."""
    from sentence_transformers.sentence_transformer.modules import Router

    tokens = [one for one in made if isinstance(one, Ragged)]
    reads_task = "task" in getattr(model[0], "_declared_forward_params", ())
    return (
        1 < len(tokens) == len(made)
        and not reads_task
        and not any(isinstance(module, Router) for module in model.modules())
        and all(one.of_tokens.keys() == tokens[0].of_tokens.keys() for one in tokens)
        and all(one.of_all == tokens[0].of_all for one in tokens)
    )


def _chunks(
    model: "BaseModel", role: Role, tokens: Ragged, most: int | None, alike: bool
) -> Iterator[tuple[Features, int]]:
    """Texts of falling length in chunks, in their order; how many of a chunk's first texts they
    are."""
    lengths = tokens.length_N.numpy()
    if reads_packed(model) and lengths[-1] > 0:
        for part in fill(lengths, most):
            texts = tokens.taken(part)
            whole = _rounded(texts, most) if model.device.type == "cpu" else texts
            yield packed_features(model, whole), len(texts.length_N)
        return
    tokenizer = getattr(first_module(model, role), "tokenizer", None)
    left = getattr(tokenizer, "padding_side", "right") == "left"
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    if alike and most is not None:
        widths = even(lengths, longest_of(model, role))
        parts = evenly(widths, most)
    else:
        widths = lengths
        parts = cut(lengths, _CHUNK_COST.get(model.device.type, 0), most)
    for part in parts:
        padded = tokens.taken(part).padded(left, pad, int(widths[part.start]))
        yield padded, part.stop - part.start


def _rounded(texts: Ragged, most: int | None) -> Ragged:
    """With texts that nobody has asked for, up to a number of tokens that recurs."""
    tokens, longest = int(texts.length_N.sum()), int(texts.length_N.max())
    wanted = round_up(tokens)
    if most is not None:
        wanted = max(tokens, min(wanted, most))
    lengths = [min(longest, wanted - at) for at in range(tokens, wanted, longest)]
    if not lengths:
        return texts
    more = Ragged(
        {
            name: value.new_zeros(wanted - tokens, *value.shape[1:])
            for name, value in texts.of_tokens.items()
        },
        {
            name: value[:1].expand(len(lengths), *value.shape[1:])
            for name, value in texts.of_texts.items()
        },
        texts.of_all,
        torch.tensor(lengths),
    )
    return Ragged.joined([texts, more])


def _moved(features: Mapping[str, Any], device: torch.device) -> Features:
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in features.items()
    }
