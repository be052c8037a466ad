"""Texts end to end in one row, and an attention in which each sees itself alone.

Padding is nothing but cost: of documents of log-normal length, padded to the longest of a batch,
it is more than half of all tokens. FlashAttention's kernels for sequences of different lengths,
which come with torch, read such a row as it is (arXiv 2205.14135). transformers and the pooling of
sentence-transformers know the layout, by the names of FlashAttention's arguments; only the
attention itself is ours, because theirs needs a package that has to be compiled. On a CPU it is
`reading/spans.py`.

Shapes: N texts, T tokens of all of them, H heads, E dimensions of one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bixse.reading import spans
from bixse.reading.ragged import Features, Ragged

if TYPE_CHECKING:
    from sentence_transformers.base import BaseModel

_NAME = "bixse_packed"
_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def packed_features(model: "BaseModel", texts: Ragged) -> Features:
    """Features of texts, none of them empty, packed: `input_ids` [1, T], the bounds `cu_seq_lens_q`
    [N + 1], the number `seq_idx` [1, T] of each token's text."""
    bounds = torch.zeros(len(texts.length_N) + 1, dtype=torch.int32)
    bounds[1:] = texts.length_N.cumsum(0)
    longest = int(texts.length_N.max())
    number_N = torch.arange(len(texts.length_N), dtype=torch.int32)
    tokens = {name: value[None] for name, value in texts.of_tokens.items()}
    # Every token is one.
    del tokens["attention_mask"]
    return {
        **tokens,
        **texts.of_texts,
        **texts.of_all,
        "position_ids": texts.positions()[None] + first_position(model),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": torch.repeat_interleave(number_N, texts.length_N)[None],
    }


def is_packed(features: Features) -> bool:
    return "cu_seq_lens_q" in features


def packed_rows(features: Features, rows: slice) -> Features:
    """Some of the texts of packed features, that follow each other."""
    bounds = features["cu_seq_lens_q"]
    tokens = slice(int(bounds[rows.start]), int(bounds[rows.stop]))
    total, texts = int(bounds[-1]), len(bounds) - 1

    def of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.ndim > 1 and value.shape[:2] == (1, total):
            return value[:, tokens]
        return value[rows] if value.ndim and len(value) == texts else value

    part = {name: of(value) for name, value in features.items()}
    part_bounds = bounds[rows.start : rows.stop + 1] - bounds[rows.start]
    longest = int(part_bounds.diff().max())
    lengths = {"max_length_q": longest, "max_length_k": longest}
    part |= {"cu_seq_lens_q": part_bounds, "cu_seq_lens_k": part_bounds, **lengths}
    part["seq_idx"] = part["seq_idx"] - rows.start
    return part


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
    """Whether a model may read packed texts: all of its modules know them, and it makes of a few
    texts what it makes of them padded.
    """
    from sentence_transformers.sentence_transformer.modules import (
        Dense,
        Dropout,
        Normalize,
        Pooling,
        Transformer,
    )

    first, *rest = model
    inner: Any = getattr(first, "model", None)
    if (
        model.device.type not in ("cuda", "cpu")
        or not isinstance(first, Transformer)
        or first.transformer_task != "feature-extraction"
        or not getattr(inner, "is_backend_compatible", lambda: False)()
        or inner.config._attn_implementation != "sdpa"
        or not all(isinstance(module, Pooling | Dense | Dropout | Normalize) for module in rest)
    ):
        return False
    # Rounding in bfloat16 left .9999 (BERT-base, H100). MiniLM with positions that run on from text
    # to text gives .42, with texts that see each other .61.
    return agreement(model) > 0.99


@torch.no_grad()
def agreement(model: "BaseModel") -> float:
    """The lowest cosine of a few texts' vectors, packed, with the same padded; in bfloat16 on a
    GPU, where rounding alone keeps it below 1."""
    from bixse.reading.chunks import Texts, tokenise

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


def first_position(model: "BaseModel") -> int:
    """RoBERTa and its kin count positions from behind that of padding."""
    for module in model[0].modules():
        padding = getattr(module, "padding_idx", None)
        learned = getattr(module, "position_embeddings", None)
        if isinstance(padding, int) and isinstance(learned, torch.nn.Embedding):
            return padding + 1
    return 0


def positions(model: "BaseModel") -> int | None:
    """Tokens of a text that the model has a position for, where its configuration says so."""
    config = getattr(getattr(model[0], "model", None), "config", None)
    most = getattr(config, "max_position_embeddings", None)
    return None if most is None else int(most) - first_position(model)


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
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    attend = _flash if query.is_cuda else _in_spans
    return attend(query, key, value, cu_seq_lens_q, max_length_q, scaling, sight)[None], None


def _flash(
    query_THE: Tensor,
    key_THE: Tensor,
    value_THE: Tensor,
    bounds: Tensor,
    longest: int,
    scaling: float | None,
    sight: spans.Sight,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Rotary embeddings may leave float32, which its kernels do not take.
    half = value_THE.dtype if value_THE.dtype == torch.float16 else torch.bfloat16
    query_THE, key_THE, value_THE = (x.to(half) for x in (query_THE, key_THE, value_THE))
    made = varlen_attn(
        query_THE, key_THE, value_THE, bounds, bounds, longest, longest,
        scale=scaling, window_size=sight,
    )  # fmt: skip
    assert isinstance(made, Tensor)
    return made


def _in_spans(
    query_THE: Tensor,
    key_THE: Tensor,
    value_THE: Tensor,
    bounds: Tensor,
    longest: int,
    scaling: float | None,
    sight: spans.Sight,
) -> Tensor:
    query, key, value = (
        x.to(value_THE.dtype).transpose(0, 1) for x in (query_THE, key_THE, value_THE)
    )
    return spans.attend(query, key, value, bounds.tolist(), scaling, sight).transpose(0, 1)
