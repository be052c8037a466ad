"""Attention to other chunks: what bounds it, what it cannot see, what gradient goes through it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from bixse.training.gated_attention import attended, cross_term, gate, gated


def _qwen3(key_heads: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=40, hidden_size=32, intermediate_size=64, head_dim=8, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=key_heads, initializer_range=0.3,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


MODELS: dict[str, Callable[[], Any]] = {
    "grouped keys": lambda: _qwen3(2),
    "a key for each head": lambda: _qwen3(4),
    "learned positions": _gpt2,
}


@pytest.fixture(params=MODELS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def group(seed: int = 0, chunks: int = 4, longest: int = 9) -> tuple[Tensor, Tensor]:
    """Tokens of chunks of different length, and where they stand."""
    draw = torch.Generator().manual_seed(seed)
    length_C = torch.randint(4, longest + 1, (chunks,), generator=draw)
    length_C[0] = longest
    read_CL = torch.arange(longest) < length_C[:, None]
    id_CL = torch.randint(1, 40, (chunks, longest), generator=draw)
    return id_CL * read_CL, read_CL


def weights(chunks: int, seed: int = 0) -> Tensor:
    vectors = torch.randn(2, chunks, 8, generator=torch.Generator().manual_seed(seed))
    query_CE, document_CE = functional.normalize(vectors, dim=2)
    return gate(query_CE, document_CE, 0.5)


def plain(model: Any, id_CL: Tensor, read_CL: Tensor) -> Tensor:
    found: Tensor = model(input_ids=id_CL, attention_mask=read_CL.long()).logits
    return found


def test_without_weight_or_company_it_is_the_plain_model(model: Any) -> None:
    id_CL, read_CL = group()
    expected = plain(model, id_CL, read_CL)
    with gated(model):
        closed = attended(model, id_CL, read_CL, torch.zeros(4, 4))
        unasked = plain(model, id_CL, read_CL)
        alone = attended(model, id_CL[:1], read_CL[:1], weights(1))
        open_ = attended(model, id_CL, read_CL, weights(4))
    torch.testing.assert_close(closed[read_CL], expected[read_CL], atol=1e-6, rtol=0)
    torch.testing.assert_close(unasked[read_CL], expected[read_CL], atol=1e-6, rtol=0)
    torch.testing.assert_close(alone, plain(model, id_CL[:1], read_CL[:1]), atol=1e-6, rtol=0)
    assert (open_ - expected)[read_CL].abs().max() > 0.1
    # Afterwards it is as it was.
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(plain(model, id_CL, read_CL), expected)


def test_a_layer_adds_what_the_formula_says() -> None:
    """Written out for each chunk, token and head, with keys that two heads share."""
    draw = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(3, heads, 5, 4, generator=draw, dtype=torch.float64) for heads in (2, 2, 2)
    )
    read_CL = torch.arange(5) < torch.tensor([[5], [3], [4]])
    weight_CC = weights(3).double()
    found = cross_term(query, key, value, read_CL, weight_CC)
    for i in range(3):
        for head in range(2):
            for t in range(5):
                expected = torch.zeros(4, dtype=torch.float64)
                for j in {0, 1, 2} - {i}:
                    n = int(read_CL[j].sum())
                    a = (key[j, head, :n] @ query[i, head, t] / 4**0.5).softmax(0)
                    v = value[j, head, :n]
                    expected += weight_CC[i, j] * (a @ v) / (a @ v.norm(dim=1) + 1e-6)
                torch.testing.assert_close(found[i, t, head], expected, atol=1e-12, rtol=0)


def test_keys_that_heads_share_are_those_of_each() -> None:
    """The same model with its keys and values written out for every head."""
    torch.manual_seed(0)
    shared, apart = _qwen3(2).eval(), _qwen3(4).eval()
    weights_of = dict(shared.state_dict())
    for name, value in weights_of.items():
        if "k_proj" in name or "v_proj" in name:
            by_head = value.view(2, 8, -1).repeat_interleave(2, dim=0)
            weights_of[name] = by_head.reshape(32, -1)
    apart.load_state_dict(weights_of)
    id_CL, read_CL = group()
    with gated(shared), gated(apart):
        found, expected = (attended(m, id_CL, read_CL, weights(4)) for m in (shared, apart))
    torch.testing.assert_close(found[read_CL], expected[read_CL], atol=1e-4, rtol=1e-4)


@given(seed=st.integers(0, 1000), size=st.floats(0.1, 1000))
def test_what_is_added_is_at_most_1_a_head_however_large_values_are(seed: int, size: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    query, key, value = (3 * torch.randn(3, 2, 6, 8, generator=draw) for _ in range(3))
    _, read_CL = group(seed, 3, 6)
    weight_CC = weights(3, seed)
    found = cross_term(query, key, value, read_CL, weight_CC)
    assert found.norm(dim=-1).max() <= 1 + 1e-5
    larger = cross_term(query, key, size * value, read_CL, weight_CC)
    torch.testing.assert_close(larger, found, atol=1e-4, rtol=1e-4)


def test_padding_of_a_chunk_changes_nothing(model: Any) -> None:
    id_CL, read_CL = group()
    with gated(model):
        found = attended(model, id_CL, read_CL, weights(4))
        other = attended(model, torch.where(read_CL, id_CL, 7), read_CL, weights(4))
        more = functional.pad(id_CL, (0, 3)), functional.pad(read_CL, (0, 3))
        wider = attended(model, *more, weights(4))
    torch.testing.assert_close(other[read_CL], found[read_CL], atol=1e-5, rtol=0)
    torch.testing.assert_close(wider[:, :9][read_CL], found[read_CL], atol=1e-5, rtol=0)


def test_all_of_another_chunk_is_seen_and_nothing_later_of_its_own(model: Any) -> None:
    id_CL, read_CL = group(chunks=2)
    read_CL[:] = True
    weight_CC = torch.tensor([[0.0, 1], [1, 0]])
    changed = id_CL.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 40
    with gated(model):
        before, after = (attended(model, ids, read_CL, weight_CC) for ids in (id_CL, changed))
    moved_CL = (before - after).abs().amax(2) > 1e-6
    assert moved_CL[1].all()  # Its very first token, too.
    # What chunk 1 tells it is read in the first pass, where nobody has told chunk 1 anything.
    assert moved_CL[0].tolist() == [False] * 8 + [True]


def test_gradient_reaches_the_gate_and_the_keys_of_the_first_pass(model: Any) -> None:
    id_CL, read_CL = group()
    weight_CC = weights(4).requires_grad_()
    model.zero_grad()
    with gated(model):
        attended(model, id_CL, read_CL, weight_CC)[read_CL].square().sum().backward()
    assert weight_CC.grad is not None
    assert (weight_CC.grad.abs().sum(1) > 0).all()


def test_gradients_at_gate_and_model_are_finite_differences() -> None:
    """Of the model in a direction that is drawn: through the keys and values of the first pass,
    too."""
    # A GPT-2 is double precision throughout; the norms of a Qwen3 are not.
    torch.manual_seed(0)
    model = _gpt2().eval().double()
    id_CL, read_CL = group()
    weight_CC = weights(4).double().requires_grad_()
    ways = [torch.randn_like(p) for p in model.parameters()]
    way_CC = torch.randn(4, 4, dtype=torch.float64)

    def loss(weight_CC: Tensor) -> Tensor:
        return attended(model, id_CL, read_CL, weight_CC)[read_CL].square().sum()

    @torch.no_grad()
    def moved(step: float) -> float:
        for parameter, way in zip(model.parameters(), ways, strict=True):
            parameter += step * way
        found = float(loss(weight_CC))
        for parameter, way in zip(model.parameters(), ways, strict=True):
            parameter -= step * way
        return found

    with gated(model):
        loss(weight_CC).backward()
        after, before = moved(1e-6), moved(-1e-6)
        gate_after, gate_before = (
            loss(weight_CC.detach() + sign * 1e-6 * way_CC).item() for sign in (1, -1)
        )
    slope = sum(
        float((p.grad * way).sum())
        for p, way in zip(model.parameters(), ways, strict=True)
        if p.grad is not None
    )
    assert slope == pytest.approx((after - before) / 2e-6, rel=1e-5)
    assert weight_CC.grad is not None
    at_gate = float((weight_CC.grad * way_CC).sum())
    assert at_gate == pytest.approx((gate_after - gate_before) / 2e-6, rel=1e-5)


def test_a_gate_is_of_cosines_in_float32_whatever_autocast_says() -> None:
    vectors = torch.tensor([[1.0, 0], [0.8, 0.6], [0.79, (1 - 0.79**2) ** 0.5]])
    with torch.autocast("cpu", torch.bfloat16):
        found = gate(vectors, vectors, 1e-2)
    assert found.dtype == torch.float32
    # As methods have it: cosines of .80 and .79 at 1e-2.
    torch.testing.assert_close(found[0], torch.tensor([0, 0.731, 0.269]), atol=1e-3, rtol=0)
    torch.testing.assert_close(gate(vectors, vectors, 1e-4)[0], torch.tensor([0.0, 1, 0]))
    assert gate(vectors[:1], vectors[:1], 1e-2).tolist() == [[0]]
    torch.testing.assert_close(found.sum(1), torch.ones(3))
    assert (found.diagonal() == 0).all()


def test_a_model_that_reads_both_ways_is_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    bert = BertLMHeadModel(config)
    with pytest.raises(ValueError, match="BertLMHeadModel is not causal"), gated(bert):
        pass


def test_a_model_without_an_attention_of_transformers_is_refused() -> None:
    model = _qwen3(2)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="not one that can be gated"), gated(model):
        pass
