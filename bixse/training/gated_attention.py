"""A causal language model that also attends to the other chunks of a group, as far as it is let.

Revela, arXiv 2506.16552. A group of chunks is read twice. The first pass reads each by itself and
leaves the keys and values of every layer. In the second each layer adds to its causal
self-attention what the tokens of the other chunks say, chunk by chunk:

    o_it = self-attention of i at t  +  sum_{j != i} w_ij  A_ijt V_j / (A_ijt ||V_j|| + 1e-6)
    A_ijt = softmax(q_it K_j^T / sqrt(E)), over all tokens of j but padding

w_ij is the gate, the only way to the encoder whose similarity it is. All of j is visible, not only
what a causal model would see. Dividing by the values' norm as attention weighs it bounds the sum to
1 a head, whatever the size of values: the gate cannot be had cheaply by larger ones.

Keys keep the positions that they have in their own chunk. A layer that sees a window of its own
chunk sees all of the others. No class of transformers is touched: an attention is registered with
it by name, as in `reading/packing.py`.

Shapes: C chunks of a group, L tokens of the longest, H heads, E dimensions of one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_NAME = "bixse_gated"
_EPSILON = 1e-6


def gate(query_CE: Tensor, document_CE: Tensor, temperature: float) -> Tensor:
    """How far each chunk is let to attend to each other, [C, C]: a softmax of cosines, 0 to itself.

    A chunk that is alone attends to none. Of unit vectors; in float32 whatever autocast says: at
    the paper's temperature of 1e-4 a bfloat16 cosine, whose step is .004, would be a random arg-max
    without gradient.
    """
    with torch.autocast(query_CE.device.type, enabled=False):
        precision = torch.promote_types(query_CE.dtype, torch.float32)
        logit_CC = query_CE.to(precision) @ document_CE.to(precision).T / temperature
        if len(logit_CC) == 1:
            # A softmax of nothing is no number.
            return logit_CC * 0
        itself_CC = torch.eye(len(logit_CC), dtype=torch.bool, device=logit_CC.device)
        return logit_CC.masked_fill(itself_CC, -torch.inf).softmax(dim=1)


@dataclass(frozen=True)
class Context:
    """What the layers are told of a group, and in the first pass leave for the second."""

    read_CL: Tensor
    """True where a token stands, and no padding."""
    weight_CC: Tensor | None = None
    """The gate. None in the first pass."""
    left: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values [C, heads of keys, L, E] of each layer's attention, with gradient."""


def attended(language_model: Any, id_CL: Tensor, read_CL: Tensor, weight_CC: Tensor) -> Tensor:
    """Logits [C, L, vocabulary] of a group of chunks that are padded at the right, within `gated`.

    Raises ValueError when no layer attends as transformers has it registered.
    """
    told = {"input_ids": id_CL, "attention_mask": read_CL.long(), "use_cache": False}
    first = Context(read_CL)
    # Without its head: nothing is predicted here.
    language_model.base_model(**told, context=first)
    if not first.left:
        name = type(language_model).__name__
        raise ValueError(f"the attention of {name} cannot be gated: choose another language model")
    second = Context(read_CL, weight_CC, first.left)
    logit_CLV: Tensor = language_model(**told, context=second).logits
    return logit_CLV


@contextmanager
def gated(language_model: Any) -> Iterator[None]:
    """While it lasts the model may be given a `Context`; without one it reads as before.

    Raises ValueError for a model whose attention transformers cannot replace, or is not causal.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    now, name = language_model.config._attn_implementation, type(language_model).__name__
    backward = any(
        getattr(module, "is_causal", True) is False for module in _layers(language_model)
    )
    if now != "sdpa" or backward:
        why = "is not causal" if backward else "is not one that can be gated"
        raise ValueError(f"the attention of {name} {why}: choose another language model")
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    language_model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        language_model.set_attn_implementation(now)


def _layers(language_model: nn.Module) -> Iterator[nn.Module]:
    """Modules that call themselves an attention."""
    return (m for m in language_model.modules() if type(m).__name__.endswith("Attention"))


def cross_term(
    query_CHLE: Tensor,
    key_CHLE: Tensor,
    value_CHLE: Tensor,
    read_CL: Tensor,
    weight_CC: Tensor,
    scaling: float | None = None,
) -> Tensor:
    """What the other chunks add at each token and head, [C, L, H, E]; at most 1 long if the weights
    of a chunk sum to 1."""
    chunks, heads, longest, size = query_CHLE.shape
    precision = torch.promote_types(value_CHLE.dtype, torch.float32)
    norm_CHL1 = value_CHLE.to(precision).norm(dim=3, keepdim=True).to(value_CHLE.dtype)
    # Values and norms in one product; fused kernels want a multiple of 8.
    both_CHLE = torch.cat([value_CHLE, functional.pad(norm_CHL1, (0, 7))], dim=3)
    # Tokens of all chunks ask each chunk.
    asked = query_CHLE.transpose(0, 1).reshape(1, heads, chunks * longest, size)
    found = functional.scaled_dot_product_attention(
        asked.expand(chunks, -1, -1, -1),
        key_CHLE,
        both_CHLE,
        attn_mask=read_CL[:, None, None, :],
        scale=scaling,
    )
    with torch.autocast(found.device.type, enabled=False):
        found = found.to(weight_CC.dtype)
        said = found[..., :size] / (found[..., size : size + 1] + _EPSILON)
        said = said.view(chunks, heads, chunks, longest, size)
        return torch.einsum("ij,jhile->ilhe", weight_CC, said)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    context: Context | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention, of [C, H, L, E] to [C, L, H, E]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    own, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **more
    )
    if context is None:
        return own, None
    if context.weight_CC is None:
        context.left[module] = key, value
        return own, None
    if len(context.weight_CC) == 1:
        return own, None
    shared = query.shape[1] // key.shape[1]
    # Rotary embeddings may leave float32 beside values in bfloat16.
    first, second = (x.repeat_interleave(shared, dim=1) for x in context.left[module])
    # Of C * C * L * L cells a head none is kept: they are made again on the way back.
    added = checkpoint(
        cross_term, query.to(second.dtype), first.to(second.dtype), second, context.read_CL,
        context.weight_CC, scaling, use_reentrant=False, preserve_rng_state=False,
    )  # fmt: skip
    return own + added.to(own.dtype), None
