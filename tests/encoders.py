"""A bi-encoder of 20,000 parameters, made on the spot: what a test trains in seconds."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrst"]


def texts(count: int, seed: int, longest: int = 12) -> list[str]:
    """Sentences of invented words, all different."""
    draw = random.Random(seed)
    made: dict[str, None] = {}
    while len(made) < count:
        made[" ".join(draw.choices(WORDS, k=draw.randint(3, longest)))] = None
    return list(made)


def save_tiny_encoder(directory: Path, prompts: dict[str, str] | None = None) -> Path:
    """A BERT of 2 layers and 32 dimensions with dropout, as a sentence-transformers directory."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    bert = directory / "bert"
    bert.mkdir(parents=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ask", "tell", ":"]
    (bert / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    BertTokenizer(str(bert / "vocab.txt")).save_pretrained(bert)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(special) + len(WORDS),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
        BertModel(config).save_pretrained(bert)
    module = Transformer(str(bert), max_seq_length=32)
    pooling = Pooling(module.get_embedding_dimension(), "mean")
    model = SentenceTransformer(modules=[module, pooling], device="cpu", prompts=prompts)
    model.save_pretrained(str(directory / "encoder"), create_model_card=False)
    return directory / "encoder"


def save_tiny_cross_encoder(directory: Path, logits: int, words: Sequence[str] = WORDS) -> Path:
    """A BERT of 2 layers with a classification head, whose answers differ from pair to pair of
    `words`.
    """
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    directory.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (directory / "vocab.txt").write_text("\n".join([*special, *words]))
    BertTokenizer(str(directory / "vocab.txt")).save_pretrained(directory)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(special) + len(words),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
        config.num_labels = logits
        BertForSequenceClassification(config).save_pretrained(directory)
    return directory


def _of_words(special: Sequence[str]) -> Any:
    """A tokenizer that knows `special`, which come first, and WORDS, each a token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def _qwen3(tokenizer: Any, **more: Any) -> Any:
    """The configuration of a Qwen3 of 2 layers and 32 dimensions that reads 64 tokens."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=64,
        # Vectors of different texts stand apart.
        initializer_range=0.3,
        **more,
    )


def save_tiny_roberta(directory: Path) -> Path:
    """A RoBERTa of 2 layers that reads 32 tokens, as transformers saves it; its tokenizer has no
    limit.
    """
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    tokenizer = _of_words(["[UNK]", "[PAD]"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(directory)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = RobertaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            # Two of them stand before the first token.
            max_position_embeddings=34,
            pad_token_id=1,
        )
        RobertaModel(config).save_pretrained(directory)
    return directory


def save_tiny_decoder(directory: Path, padding_side: str) -> Path:
    """A Qwen3 of 2 layers and 32 dimensions that reads causally, its vector the last token's."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, Qwen3Model

    qwen = directory / "qwen"
    qwen.mkdir(parents=True)
    special = ["[PAD]", "[UNK]", "[END]", "ask", "tell", ":"]
    tokenizer = _of_words(special)
    tokenizer.post_processor = TemplateProcessing(single="$A [END]", special_tokens=[("[END]", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[END]",
        padding_side=padding_side,
    ).save_pretrained(qwen)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3Model(_qwen3(tokenizer)).save_pretrained(qwen)
    module = Transformer(str(qwen), max_seq_length=32)
    pooling = Pooling(module.get_embedding_dimension(), "lasttoken")
    prompts = {"query": "ask : ", "document": ""}
    model = SentenceTransformer(modules=[module, pooling], device="cpu", prompts=prompts)
    model.save_pretrained(str(directory / "encoder"), create_model_card=False)
    return directory / "encoder"


def without_padding(directory: Path) -> Path:
    """Take the padding token from the tokenizer of a model: that of Llama or GPT-2 has none."""
    config = directory / "tokenizer_config.json"
    told = json.loads(config.read_text())
    del told["pad_token"]
    config.write_text(json.dumps(told))
    return directory


def save_tiny_chat_reranker(directory: Path) -> Path:
    """A Qwen3 that says yes or no to a query and a document in its chat template, which adds 11
    tokens of WORDS to every pair."""
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

    tokenizer = _of_words(["[PAD]", "[UNK]", "yes", "no"])
    before, after = " ".join(WORDS[:7]), " ".join(WORDS[7:11])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    fast.chat_template = (
        f"{before} {{% for m in messages %}}{{{{ m.content }}}} {{% endfor %}}{after}"
    )
    fast.save_pretrained(directory)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = _qwen3(tokenizer, pad_token_id=0)
        Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory
