"""Attention over packed texts on a CPU, where no kernel knows sequences of different lengths.

Tokens are cut into spans: a long text, or several short ones, and what follows up to a round
length, of which a mask lets each token see its own text alone. Lengths are round because oneDNN
compiles its kernels for every shape that it meets, 1 to 10 ms each, and forgets all but the last
1,024: with a shape a text more time went into that than into the products themselves.

Backward the probabilities are made again, in memory that fits into the cache, and multiplied as
plain matrices: torch's own backward pass of fused attention takes 3.5 times as long in bfloat16
(one MiniLM layer over a text of 256 tokens, torch 2.13, two threads with AMX: 2.5 ms against .7).

Shapes: H heads, T tokens, E dimensions of one, S tokens of a span.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Sight = tuple[int, int]
"""Tokens that one sees before and behind itself; -1 is all."""

_SPAN = 256
"""Tokens that short texts are put together up to: 128 were slower, for all that masks hide."""
_GRAIN = 64
_LONG = 1024
"""From here on a length need not be round: a kernel that is compiled is soon paid for."""
_CELLS = 1 << 20
"""Probabilities that are held at a time: 2 MB in bfloat16, about a core's cache."""


@dataclass(frozen=True)
class Span:
    """Tokens that are looked at together."""

    at: slice
    mask_SS: Tensor | None
    """Added to the scores: -inf where a token is not seen. None where all are."""

    @property
    def tokens(self) -> int:
        return int(self.at.stop - self.at.start)


def attend(
    query_HTE: Tensor,
    key_HTE: Tensor,
    value_HTE: Tensor,
    bounds: Sequence[int],
    scaling: float | None,
    sight: Sight,
) -> Tensor:
    """[H, T, E]: each token's mean of the values of its text that it sees, weighted by softmax.

    Text n has the tokens from `bounds[n]` to `bounds[n + 1]`, and all T are some text's.
    """
    cut = spans(tuple(bounds), value_HTE.dtype, sight)
    scale = query_HTE.shape[-1] ** -0.5 if scaling is None else scaling
    # torch leaves `Function.apply` without types.
    made: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        query_HTE, key_HTE, value_HTE, cut, scale
    )
    return made


def round_up(tokens: int) -> int:
    """The next number of tokens that recurs: of those to twice as many there are sixteen."""
    step = max(32, 1 << max(0, (tokens - 1).bit_length() - 5))
    return -(-tokens // step) * step


# The layers of a model ask for the same.
@lru_cache(maxsize=2)
def spans(bounds: tuple[int, ...], dtype: torch.dtype, sight: Sight) -> tuple[Span, ...]:
    """All tokens in spans, in order; each token's text is whole in the last span that has it."""
    made, first = [], 0
    for last in range(1, len(bounds)):
        if last + 1 < len(bounds) and bounds[last + 1] - bounds[first] <= _SPAN:
            continue
        start, end = bounds[first], bounds[last]
        if end - start < _LONG:
            # Into the texts that follow: what is made of those here, their own span makes anew.
            end = min(start + -(-(end - start) // _GRAIN) * _GRAIN, bounds[-1])
        alone = last - first == 1 and end == bounds[last]
        whole = alone and sight == (-1, -1)
        ends = torch.tensor(bounds[first + 1 : last + 1]) - start
        mask_SS = None if whole else _mask(ends, end - start, dtype, sight)
        made.append(Span(slice(start, end), mask_SS))
        first = last
    return tuple(made)


def _mask(ends: Tensor, tokens: int, dtype: torch.dtype, sight: Sight) -> Tensor:
    """[S, S] over texts that end at `ends`, and what follows them as one more."""
    at = torch.arange(tokens)
    text = torch.searchsorted(ends, at, right=True)
    ahead = at[None, :] - at[:, None]
    seen = text[None, :] == text[:, None]
    back, forth = sight
    if back >= 0:
        seen &= ahead >= -back
    if forth >= 0:
        seen &= ahead <= forth
    return torch.zeros(tokens, tokens, dtype=dtype).masked_fill_(~seen, float("-inf"))


class _Attention(torch.autograd.Function):
    """A span after the other: where two overlap, the later one's tokens are right."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cut: tuple[Span, ...], scale: float
    ) -> Tensor:
        made_HTE = _like(value)
        for span in cut:
            query_HSE, key_HSE, value_HSE = (x[None, :, span.at] for x in (query, key, value))
            made_HTE[:, span.at] = scaled_dot_product_attention(
                query_HSE, key_HSE, value_HSE, attn_mask=span.mask_SS, scale=scale
            )[0]
        ctx.save_for_backward(query, key, value)
        ctx.cut, ctx.scale = cut, scale
        return made_HTE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, (grad,) = ctx.saved_tensors, grads
        found = tuple(map(_like, saved))
        heads = saved[0].shape[0]
        for span in ctx.cut:
            at_once = max(1, min(heads, _CELLS // span.tokens**2))
            for first in range(0, heads, at_once):
                here = slice(first, first + at_once), span.at
                query, key, value, along = (x[here].contiguous() for x in (*saved, grad))
                made = _backward(query, key, value, along, span.mask_SS, ctx.scale)
                for x, part in zip(found, made, strict=True):
                    x[here] = part
        return (*found, None, None)


def _backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, [H, S, E], from that of what was made of them."""
    nothing = query.new_zeros(1, 1, 1)

    def scaled(left: Tensor, right: Tensor) -> Tensor:
        return torch.baddbmm(nothing, left, right, beta=0, alpha=scale)

    key_ES = key.transpose(1, 2)
    score_HSS = (
        scaled(query, key_ES) if mask is None else torch.baddbmm(mask, query, key_ES, alpha=scale)
    )
    prob_HSS = torch.softmax(score_HSS, dim=-1)
    of_value = torch.bmm(prob_HSS.transpose(1, 2), grad)
    of_prob_HSS = torch.bmm(grad, value.transpose(1, 2), out=score_HSS)
    of_score_HSS = torch._softmax_backward_data(of_prob_HSS, prob_HSS, -1, prob_HSS.dtype)
    return scaled(of_score_HSS, key), scaled(of_score_HSS.transpose(1, 2), query), of_value


def _like(x_HTE: Tensor) -> Tensor:
    """As large, in memory in the order of tokens, as the layers around have it."""
    heads, tokens, dimensions = x_HTE.shape
    return x_HTE.new_empty(tokens, heads, dimensions).transpose(0, 1)
