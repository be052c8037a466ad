"""What all tests share."""

from pathlib import Path

import pytest
from hypothesis import settings

# Other work on the machine must not fail a property: no test here is a measurement.
settings.register_profile("bixse", deadline=None)
settings.load_profile("bixse")

_SLOW_WITHIN_S = 1800
"""What a slow test may take that says nothing else: a test that hangs is to end, a machine that has
other work to do is no failure."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_SLOW_WITHIN_S))


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Qwen3-architecture model made on the spot: 0.4 M random weights, digits are tokens."""
    return save_tiny_llm(tmp_path_factory.mktemp("tiny-llm"))


@pytest.fixture(scope="session")
def tiny_writer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same, with nothing to say but printable ASCII: held to a schema it writes JSON."""
    ascii_ = [chr(c) for c in range(ord("!"), 127)]
    return save_tiny_llm(tmp_path_factory.mktemp("tiny-writer"), [*ascii_, "\u0120", "\u010a"])


def save_tiny_llm(folder: Path, alphabet: list[str] | None = None) -> str:
    """Random weights over the characters of `alphabet` (all bytes), and words that tests use."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    bytes_ = alphabet or pre_tokenizers.ByteLevel.alphabet()
    tokens = Tokenizer(models.BPE(unk_token="<|unknown|>" if alphabet else None))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    special = ["<|start|>", "<|end|>", *(["<|unknown|>"] if alphabet else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=bytes_, special_tokens=special,
        show_progress=False,
    )  # fmt: skip
    tokens.train_from_iterator(["query passage grade search tea water leaf"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "<|start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    )
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, initializer_range=0.1,
        max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id, dtype="float32",
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
