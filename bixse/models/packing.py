"""Texts end to end in one row, and an attention in which each sees itself alone.

Padding is nothing but cost: of documents of log-normal length, padded to the longest of a batch,
it is more than half of all tokens. FlashAttention's kernels for sequences of different lengths,
which come with torch, read such a row as it is (arXiv 2205.14135). transformers and the pooling of
sentence-transformers know the layout, by the names of FlashAttention's arguments; only the
attention itself is ours, because theirs needs a package that has to be compiled.

Its kernels go through blocks of 128 tokens, which for a query of ten is mostly waste: short texts
are padded after all, for the length of the attention alone.

Shapes: N texts, T tokens of all of them, H heads, E dimensions of one, S short texts and W the
width that they are padded to.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bixse.ragged import Features, Ragged

if TYPE_CHECKING:
    from sentence_transformers.base import BaseModel

_NAME = "bixse_packed"
_KEYS = (
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
    "short_from", "short_place", "short_mask",
)  # fmt: skip
_SHORT = 32
"""Tokens of the longest short text: the width of queries, and of a warp."""


def packed_features(model: "BaseModel", texts: Ragged) -> Features:
    """Features of texts of falling length, none of them empty, packed: `input_ids` [1, T], the
    bounds `cu_seq_lens_q` [N + 1], the number `seq_idx` [1, T] of each token's text; and of short
    ones, which stand last, `short_place` in their grid [S, W] and that grid's `short_mask`."""
    bounds = torch.zeros(len(texts.length_N) + 1, dtype=torch.int32)
    bounds[1:] = texts.length_N.cumsum(0)
    longest = int(texts.length_N[0])
    number_N = torch.arange(len(texts.length_N), dtype=torch.int32)
    number_T = torch.repeat_interleave(number_N, texts.length_N)
    place_T = texts.positions()
    tokens = {name: value[None] for name, value in texts.of_tokens.items()}
    # Every token is one.
    del tokens["attention_mask"]
    features = {
        **tokens,
        **texts.of_texts,
        **texts.of_all,
        "position_ids": place_T[None] + _first_position(model),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": number_T[None],
    }
    return features | _short_features(texts.length_N, number_T, place_T)


def _short_features(length_N: Tensor, number_T: Tensor, place_T: Tensor) -> Features:
    first = int((length_N > _SHORT).sum())
    if first == len(length_N):
        return {}
    start = int(length_N[:first].sum())
    mask_SW = torch.arange(_SHORT) < length_N[first:, None]
    return {
        "short_from": start,
        "short_place": (number_T[start:].long() - first) * _SHORT + place_T[start:],
        "short_mask": mask_SW,
    }


def is_packed(features: Features) -> bool:
    return "cu_seq_lens_q" in features


def packed_rows(features: Features, rows: slice) -> Features:
    """Some of the texts of packed features, that follow each other."""
    bounds = features["cu_seq_lens_q"]
    start, stop = int(bounds[rows.start]), int(bounds[rows.stop])
    total, texts = int(bounds[-1]), len(bounds) - 1

    def of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.ndim > 1 and value.shape[:2] == (1, total):
            return value[:, start:stop]
        return value[rows] if value.ndim and len(value) == texts else value

    part = {name: of(value) for name, value in features.items() if not name.startswith("short")}
    part_bounds = bounds[rows.start : rows.stop + 1] - bounds[rows.start]
    length_N = part_bounds.diff()
    longest = int(length_N[0])
    lengths = {"max_length_q": longest, "max_length_k": longest}
    part |= {"cu_seq_lens_q": part_bounds, "cu_seq_lens_k": part_bounds, **lengths}
    part["seq_idx"] = part["seq_idx"] - rows.start
    place_T = torch.arange(stop - start) - torch.repeat_interleave(part_bounds[:-1], length_N).cpu()
    short = _short_features(length_N.cpu(), part["seq_idx"][0].cpu(), place_T)
    moved = {k: v.to(bounds.device) if isinstance(v, Tensor) else v for k, v in short.items()}
    return part | moved


def reads_packed(model: "BaseModel") -> bool:
    """Whether the model is within `packed`."""
    config = getattr(getattr(model[0], "model", None), "config", None)
    return getattr(config, "_attn_implementation", None) == _NAME


@contextmanager
def packed(model: "BaseModel") -> Iterator[None]:
    """While it lasts the model reads packed texts, and no others."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)
    module: Any = model[0]
    if module.model_forward_params is not None:
        module.model_forward_params |= set(_KEYS)
    now = module.model.config._attn_implementation
    module.model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        module.model.set_attn_implementation(now)


def may_pack(model: "BaseModel") -> bool:
    """Whether a model may read packed texts: on a GPU, all of its modules know them, and it makes
    of a few texts what it makes of them padded.
    """
    from sentence_transformers.sentence_transformer.modules import (
        Dense,
        Dropout,
        Normalize,
        Pooling,
        Transformer,
    )

    first, *rest = model
    if (
        model.device.type != "cuda"
        or not isinstance(first, Transformer)
        or first.transformer_task != "feature-extraction"
        or not isinstance(first.model, torch.nn.Module)
        or not getattr(first.model, "is_backend_compatible", lambda: False)()
        or first.model.config._attn_implementation != "sdpa"
        or not all(isinstance(module, Pooling | Dense | Dropout | Normalize) for module in rest)
    ):
        return False
    return agreement(model) > 0.99


@torch.no_grad()
def agreement(model: "BaseModel") -> float:
    """The lowest cosine of a few texts' vectors, packed, with the same padded; in bfloat16 on a
    GPU, where rounding alone keeps it below 1."""
    from bixse.chunks import Texts, tokenise

    long = "one two three four five six seven eight nine ten " * 5
    asked = [Texts(["one", long, "one two three", "ten nine eight seven"], "document")]
    bfloat16 = torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda")

    def vectors() -> Tensor:
        read = tokenise(model, asked)
        with bfloat16:
            made = [model(dict(c), task=role)["sentence_embedding"] for role, c in read.chunks]
        return torch.nn.functional.normalize(torch.cat(made)[read.sides[0].place].float(), dim=1)

    one_by_one = vectors()
    with packed(model):
        end_to_end = vectors()
    return float((one_by_one * end_to_end).sum(dim=1).min())


def _first_position(model: "BaseModel") -> int:
    """RoBERTa and its kin count positions from behind that of padding."""
    for module in model[0].modules():
        padding = getattr(module, "padding_idx", None)
        learned = getattr(module, "position_embeddings", None)
        if isinstance(padding, int) and isinstance(learned, torch.nn.Embedding):
            return padding + 1
    return 0


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    short_from: int | None = None,
    short_place: Tensor | None = None,
    short_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention, of [1, H, T, E] to [1, T, H, E]; dropout is off.

    A window counts the token itself, on either side where attention is not causal, as transformers
    has it of FlashAttention.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise RuntimeError("a model within `packed` was given texts that are not packed")
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    back = -1 if sliding_window is None else sliding_window - 1
    sight = (back, 0 if causal else back)
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    groups = rows[0].shape[1] // rows[1].shape[1]
    if groups > 1:
        rows[1:] = [x.repeat_interleave(groups, dim=1) for x in rows[1:]]
    attend = _flash if query.is_cuda else _one_by_one
    if short_from is None or short_place is None or short_mask is None:
        return attend(rows, cu_seq_lens_q, max_length_q, scaling, sight)[None], None
    made = [_padded([x[short_from:] for x in rows], short_place, short_mask, scaling, sight)]
    if short_from:
        bounds = cu_seq_lens_q[: len(cu_seq_lens_q) - len(short_mask)]
        long = attend([x[:short_from] for x in rows], bounds, max_length_q, scaling, sight)
        made.insert(0, long.to(made[0].dtype))
    return torch.cat(made)[None], None


def _flash(
    rows_THE: Sequence[Tensor],
    bounds: Tensor,
    longest: int,
    scaling: float | None,
    sight: tuple[int, int],
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    value_THE = rows_THE[2]
    # Rotary embeddings may leave float32, which its kernels do not take.
    half = value_THE.dtype if value_THE.dtype == torch.float16 else torch.bfloat16
    # torch leaves it without types.
    made: Tensor = varlen_attn(  # type: ignore[no-untyped-call, assignment]
        *(x.to(half) for x in rows_THE), bounds, bounds, longest, longest,
        scale=scaling, window_size=sight,
    )  # fmt: skip
    return made


def _padded(
    rows_THE: Sequence[Tensor],
    place: Tensor,
    mask_SW: Tensor,
    scaling: float | None,
    sight: tuple[int, int],
) -> Tensor:
    """Of short texts, in a grid."""
    texts, width = mask_SW.shape

    def grid(x_THE: Tensor) -> Tensor:
        # Copied into place, and back by selection: both go backward without sorting.
        empty = x_THE.new_zeros(texts * width, *x_THE.shape[1:])
        return empty.index_copy(0, place, x_THE).unflatten(0, (texts, width)).transpose(1, 2)

    dtype = rows_THE[2].dtype
    mask = mask_SW[:, None, None, :]
    if sight != (-1, -1):
        # A row that sees nothing but padding would be no number; padded rows are not used.
        mask = (mask & _seen(width, sight, mask.device)) | ~mask_SW[:, None, :, None]
    parts = (grid(x.to(dtype)) for x in rows_THE)
    made = scaled_dot_product_attention(*parts, attn_mask=mask, scale=scaling)
    return made.transpose(1, 2).flatten(0, 1).index_select(0, place)


def _one_by_one(
    rows_THE: Sequence[Tensor],
    bounds: Tensor,
    longest: int,
    scaling: float | None,
    sight: tuple[int, int],
) -> Tensor:
    """What the kernel computes, a text at a time: where there is no kernel."""
    made = []
    for start, end in pairwise(bounds.tolist()):
        parts = (x[start:end].transpose(0, 1) for x in rows_THE)
        seen = _seen(end - start, sight, bounds.device)
        attended = scaled_dot_product_attention(*parts, attn_mask=seen, scale=scaling)
        made.append(attended.transpose(0, 1))
    return torch.cat(made)


def _seen(tokens: int, sight: tuple[int, int], device: torch.device) -> Tensor:
    """Which token, of a row, another sees: so many back and ahead, or all where it is -1."""
    at = torch.arange(tokens, device=device)
    ahead = at[None, :] - at[:, None]
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if sight[0] >= 0:
        seen &= ahead >= -sight[0]
    if sight[1] >= 0:
        seen &= ahead <= sight[1]
    return seen
