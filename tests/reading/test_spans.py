"""Attention in spans: what each text's own attention is, forward and backward."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bixse.reading import spans
from bixse.reading.spans import Sight, attend, round_up

SIGHTS: list[Sight] = [(-1, -1), (-1, 0), (5, 5), (5, 0)]


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, bounds: list[int], sight: Sight
) -> Tensor:
    """A text at a time, by torch."""
    made = []
    for start, end in pairwise(bounds):
        at = torch.arange(end - start)
        ahead = at[None, :] - at[:, None]
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if sight[0] >= 0:
            seen &= ahead >= -sight[0]
        if sight[1] >= 0:
            seen &= ahead <= sight[1]
        q, k, v = (x[None, :, start:end] for x in (query, key, value))
        made.append(scaled_dot_product_attention(q, k, v, attn_mask=seen)[0])
    return torch.cat(made, dim=1)


def drawn(bounds: list[int], seed: int, heads: int = 3, dimensions: int = 4) -> list[Tensor]:
    """Query, key, value and a gradient, in double precision."""
    torch.manual_seed(seed)
    shape = (bounds[-1], heads, dimensions)
    # As layers hand them over: in the order of tokens.
    made = [torch.randn(shape, dtype=torch.float64).transpose(0, 1) for _ in range(4)]
    return [x.requires_grad_() for x in made]


def with_gradients(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], x: list[Tensor]
) -> list[Tensor]:
    """What is made of x, and the gradients of its query, key and value."""
    query, key, value, along = x
    made = attention(query, key, value)
    return [made, *torch.autograd.grad(made, (query, key, value), along)]


@pytest.mark.parametrize("sight", SIGHTS)
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_each_text_sees_itself_alone(sight: Sight, lengths: list[int], seed: int) -> None:
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    x = drawn(bounds, seed)
    found = with_gradients(lambda q, k, v: attend(q, k, v, bounds, None, sight), x)
    wanted = with_gradients(lambda q, k, v: one_by_one(q, k, v, bounds, sight), x)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-10)


def test_heads_may_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = [0, 300, 340, 345]
    x = drawn(bounds, 0)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, bounds, None, (-1, -1))

    at_once = with_gradients(attention, x)
    monkeypatch.setattr(spans, "_CELLS", 1)
    in_turn = with_gradients(attention, x)
    for mine, theirs in zip(in_turn, at_once, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-10)


def test_lengths_of_spans_are_few() -> None:
    bounds = [0, *torch.arange(200, 0, -1).cumsum(0).tolist()]
    found = spans.spans(tuple(bounds), torch.float32, (-1, -1))
    assert {span.tokens for span in found[:-1]} <= {64, 128, 192, 256}
    assert [span.at.start for span in found] == sorted({span.at.start for span in found})
    # A text of its own, of a round length, needs no mask; nor does one that is long.
    alone = spans.spans((0, 256, 384, 5001), torch.float32, (-1, -1))
    assert [(span.at, span.mask_SS) for span in alone] == [
        (slice(0, 256), None),
        (slice(256, 384), None),
        (slice(384, 5001), None),
    ]


@given(tokens=st.integers(1, 200_000))
def test_a_round_number_of_tokens_is_little_more(tokens: int) -> None:
    assert tokens <= round_up(tokens) <= max(tokens + 31, tokens * 17 / 16)
    assert round_up(round_up(tokens)) == round_up(tokens)


def test_round_numbers_of_tokens_are_few() -> None:
    assert len({round_up(tokens) for tokens in range(4097, 8193)}) == 16
