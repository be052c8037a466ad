"""The real vLLM engine on a tiny model: its numbers are those of a plain forward pass."""

import importlib.util
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch

from bixse.judging.pointwise import Logprobs
from bixse.judging.prompts import ORDERS
from bixse.judging.settings import Pointwise
from bixse.judging.tokens import PromptTokenizer
from jobs.engine import Engine

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)

QUERIES = ["tea", "what is water?", "how to grade a passage", "水"]
PASSAGES = ["Tea is brewed from leaves.", "Water.", "The passage " * 60, "🫖 and a leaf"]


@pytest.fixture(scope="module")
def settings(tiny_llm: str) -> Pointwise:
    return Pointwise(model=tiny_llm, dtype="float32", max_model_len=1024)


@pytest.fixture(scope="module")
def engine(settings: Pointwise) -> Engine:
    return Engine(settings)


@pytest.fixture(scope="module")
def tokens(settings: Pointwise) -> PromptTokenizer:
    return PromptTokenizer.load(settings)


def forward(model: str, prompts: Sequence[list[int]], ids: Sequence[int], dtype: Any) -> Any:
    """[prompts, ids]: log-probabilities of the next token by transformers alone."""
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    with torch.no_grad():
        rows = [causal(torch.tensor([p])).logits[0, -1].float().log_softmax(-1) for p in prompts]
    return torch.stack(rows)[:, list(ids)]


def test_log_probabilities_equal_a_plain_forward_pass(
    engine: Engine, tokens: PromptTokenizer, tiny_llm: str
) -> None:
    """Every label token of every prompt in both orders, cold and from the prefix cache."""
    prompts = [ids for order in ORDERS for ids in tokens.encode(QUERIES, PASSAGES, order)]
    expected = forward(tiny_llm, prompts, tokens.label_ids, torch.float32)
    assert expected.std() > 0.1  # The prompts do differ.
    assert engine.dtype == "float32"
    assert engine.logprobs([], tokens.label_ids).logprobs == []
    for _ in range(2):
        found = torch.tensor(engine.logprobs(prompts, tokens.label_ids).logprobs)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_what_a_prefill_computes_is_counted_where_the_peak_is_known(
    engine: Engine, tokens: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows the peak of a CPU; with one, tokens from the cache are not work."""
    prompts = tokens.encode(QUERIES, PASSAGES, ORDERS[0])
    assert engine.logprobs(prompts, tokens.label_ids).usage.peak_flops == 0
    monkeypatch.setattr(engine, "_peak", (10.0, 1000.0))
    usage = engine.logprobs(prompts, tokens.label_ids).usage
    assert 0 < usage.cached_tokens < usage.prompt_tokens
    assert usage.flops == 10 * (usage.prompt_tokens - usage.cached_tokens)
    assert usage.peak_flops == pytest.approx(1000 * usage.seconds)


@pytest.mark.parametrize("changes,reason", [({"max_model_len": 4096}, "2048")])
def test_a_refused_setting_is_one_sentence(
    settings: Pointwise, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        Engine(settings.replace(**changes))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("vLLM refused ")


@pytest.mark.slow
def test_bfloat16_stays_within_its_tolerance(tokens: PromptTokenizer, tiny_llm: str) -> None:
    """Eight bits of mantissa: transformers in bfloat16 is as far from float32 (0.04) as vLLM."""
    settings = Pointwise(model=tiny_llm, dtype="bfloat16", max_model_len=1024)
    prompts = [ids for order in ORDERS for ids in tokens.encode(QUERIES, PASSAGES, order)]
    # One process holds one engine.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        dtype, found = pool.submit(ask, settings, prompts, tokens.label_ids).result()
    assert dtype == "bfloat16"
    expected = forward(tiny_llm, prompts, tokens.label_ids, torch.float32)
    torch.testing.assert_close(torch.tensor(found), expected, atol=0.1, rtol=0)


def ask(
    settings: Pointwise, prompts: Sequence[list[int]], ids: Sequence[int]
) -> tuple[str, list[Logprobs]]:
    engine = Engine(settings)
    return engine.dtype, engine.logprobs(prompts, ids).logprobs
