"""A bi-encoder of 20,000 parameters, made on the spot: what a test trains in seconds."""

import random
from pathlib import Path

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
    from transformers import BertConfig, BertModel, BertTokenizerFast

    bert = directory / "bert"
    bert.mkdir(parents=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ask", "tell", ":"]
    (bert / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    BertTokenizerFast(str(bert / "vocab.txt")).save_pretrained(bert)
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


def save_tiny_cross_encoder(directory: Path, logits: int) -> Path:
    """A BERT of 2 layers with a classification head, whose answers differ from pair to pair."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    directory.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (directory / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    BertTokenizerFast(str(directory / "vocab.txt")).save_pretrained(directory)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(special) + len(WORDS),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            num_labels=logits,
            initializer_range=0.3,
        )
        BertForSequenceClassification(config).save_pretrained(directory)
    return directory
