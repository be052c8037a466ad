"""What the benchmark of judging asks: made-up pairs on disk, and a model of random weights."""

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from bixse.artifacts import Artifact, Draft, begin
from bixse.judging.prompts import ORDERS
from bixse.judging.settings import Pointwise
from bixse.judging.tokens import PromptTokenizer
from bixse.records import CORPUS, PAIRS, QUERIES, document_text
from bixse.settings import Settings

if TYPE_CHECKING:
    from benchmarks.judge import Options

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrst"]


class Case(Settings):
    """One set of prompts, as all systems find it on disk."""

    name: str
    folder: str
    engine: Pointwise
    gpus: float

    def artifact(self, name: str) -> Artifact:
        return Artifact.open(f"{self.folder}/{name}")

    def prompts(self) -> tuple[list[list[int]], tuple[int, ...]]:
        """In file order, both orders of a pair together; and the grade tokens."""
        tokens = PromptTokenizer.load(self.engine)
        documents = self.artifact("corpus").rows("doc_id", "title", "text")
        passages = {doc_id: document_text(title, text) for doc_id, title, text in documents}
        queries = dict(self.artifact("queries").rows("query_id", "text"))
        pairs = self.artifact("pairs")
        asked = [queries[query_id] for query_id in pairs.column("query_id")]
        read = [passages[doc_id] for doc_id in pairs.column("doc_id")]
        by_order = [tokens.encode(asked, read, order) for order in ORDERS]
        return [ids for pair in zip(*by_order, strict=True) for ids in pair], tokens.label_ids


def make_case(options: "Options", root: Path, name: str) -> Case:
    """Pairs grouped by query, as candidates come; each document stands in several groups.

    `shuffled` has them in random order; in `unshared` nothing stands twice.
    """
    draw, folder = random.Random(0), root / name
    each = 1 if name == "unshared" else options.queries_per_document
    documents = -(-options.pairs // each)
    per_query = 1 if name == "unshared" else max(1, documents // 4)
    corpus = [
        {"doc_id": f"d{n}", "title": "", "text": _words(draw, options.passage_words)}
        for n in range(documents)
    ]
    pairs, queries = [], []
    while len(pairs) < options.pairs:
        query_id = f"q{len(queries)}"
        queries.append({"query_id": query_id, "text": _words(draw, 8), "origin": "given"})
        for rank in range(1, min(per_query, options.pairs - len(pairs)) + 1):
            doc_id = f"d{len(pairs) % documents}"
            pairs.append({"query_id": query_id, "doc_id": doc_id, "source": "random",
                          "rank": rank, "score": 0.0})  # fmt: skip
    if name == "shuffled":
        draw.shuffle(pairs)
    for kind, rows, schema in (("corpus", corpus, CORPUS), ("queries", queries, QUERIES),
                               ("pairs", pairs, PAIRS)):  # fmt: skip
        draft = begin(str(folder / kind), kind, config={}, inputs={})
        if isinstance(draft, Draft):
            draft.write_part(0, pa.Table.from_pylist(rows, schema=schema))
            draft.finish()
    model = options.model or make_model(root / "model")
    # Random weights follow no prompt: whatever mass the grades get will do.
    engine = Pointwise(
        model=model, max_model_len=2048, min_grade_mass=1e-30, gpu_memory_utilization=0.8
    )
    return Case(name=name, folder=str(folder), engine=engine, gpus=options.gpus)


def _words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def make_model(folder: Path) -> str:
    """A Qwen3-shaped model of about 100 million random weights, its tokenizer trained here."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    if folder.exists():
        return str(folder)
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|start|>", "<|end|>"],
        show_progress=False,
    )
    tokens.train_from_iterator([" ".join(WORDS), *(f" {word}" for word in WORDS)] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "<|start|>assistant\n"
    )
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=2304, num_hidden_layers=14,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id, dtype="bfloat16",
    )  # fmt: skip
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
