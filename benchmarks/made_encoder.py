"""An untrained encoder of a known shape, made on the spot: speed does not depend on weights.

For machines that reach no model hub and hold no packaged encoder.
"""

import re
from pathlib import Path
from typing import Any, Literal

Shape = Literal["tiny", "minilm-l6", "bert-base"]
_SHAPES: dict[Shape, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
    "minilm-l6": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "bert-base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
}
_VOCABULARY = 30_522


def make_encoder(shape: Shape, directory: Path) -> Path:
    """A BERT with mean pooling whose vocabulary is that of Python's documentation, at `directory`.

    Random weights, as many as the original has.
    """
    from pydoc_data.topics import topics

    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    bert = directory / "bert"
    bert.mkdir(parents=True)
    words = sorted({w for text in topics.values() for w in re.findall(r"[a-z]+|\S", text.lower())})
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    unused = [f"[unused{number}]" for number in range(_VOCABULARY - len(known))]
    (bert / "vocab.txt").write_text("\n".join([*known, *unused]))
    BertTokenizer(str(bert / "vocab.txt")).save_pretrained(bert)
    BertModel(BertConfig(vocab_size=_VOCABULARY, **_SHAPES[shape])).save_pretrained(bert)
    module = Transformer(str(bert), max_seq_length=512)
    pooling = Pooling(module.get_embedding_dimension(), "mean")
    model = SentenceTransformer(modules=[module, pooling], device="cpu")
    model.save_pretrained(str(directory / "encoder"), create_model_card=False)
    return directory / "encoder"
