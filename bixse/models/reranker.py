"""The reranker: a cross-encoder of sentence-transformers, query and document -> one log-odds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bixse.models.encoder import (
    encoder_fingerprint,
    give_padding,
    keep_to_positions,
    load_model,
    refuse_wordless,
    resolve,
    unloadable,
)
from bixse.precision import in_bfloat16
from bixse.records import Hit
from bixse.settings import Precision

_WITH_A_HEAD = ("ForSequenceClassification", "ForCausalLM")
"""What sentence-transformers takes scores from as it finds it."""

if TYPE_CHECKING:
    import torch
    from sentence_transformers import CrossEncoder


def load_reranker(
    start: str, device: str | None = None, seed: int = 0, pooled: bool = True
) -> "CrossEncoder":
    """The cross-encoder at `start`, or one that begins as the encoder there.

    An encoder lacks the head that makes a score: it is drawn by `seed`, and reads a pair's vector,
    pooled as the encoder pools. Without `pooled` it is that of transformers, which reads the first
    token through a pooler that an encoder's training has not touched: it learns far more slowly,
    and is what vLLM can serve.

    Raises ValueError as `resolve`, `refuse_wordless`, `give_padding` and `_tell_padding`, or when
    the directory holds no model that gives one score a pair.
    """
    import torch
    from sentence_transformers import CrossEncoder
    from transformers.utils import logging as hf_logging

    # transformers leaves it without types.
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    directory = resolve(start, "reranker")
    if pooled and _pools(directory):
        return _over_pooling(str(directory), device, seed)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: CrossEncoder = CrossEncoder(
                str(directory), num_labels=1, device=device, local_files_only=True
            )
    except unloadable() as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{start} is no reranker with one score a pair: {reason}") from None
    refuse_wordless(model.tokenizer, start)
    give_padding(model, start)
    keep_to_positions(model)
    _tell_padding(model, start)
    return model


def _tell_padding(model: "CrossEncoder", start: str) -> None:
    """A decoder's head reads the last token that is no padding, and no two pairs at once where the
    configuration names none: as of many a base model. That of the tokenizer is meant.

    Raises ValueError when texts end in that token: which of them is padding, no head could say.
    """
    config = getattr(getattr(model[0], "model", None), "config", None)
    padding = getattr(model.tokenizer, "pad_token_id", None)
    if config is None or padding is None or config.get_text_config().pad_token_id is not None:
        return
    if model.tokenizer("a")["input_ids"][-1:] == [padding]:
        raise ValueError(
            f"{start} pads with the token that its texts end in, and its configuration names no "
            "pad_token_id: give it a padding token of its own"
        )
    config.get_text_config().pad_token_id = padding


def _pools(directory: Path) -> bool:
    """Whether an encoder of sentence-transformers stands there that pools its tokens."""
    if _told(directory, "config_sentence_transformers.json").get("model_type") == "CrossEncoder":
        return False
    modules = _told(directory, "modules.json") or []
    return any(module["type"].endswith("Pooling") for module in modules)


def _over_pooling(start: str, device: str | None, seed: int) -> "CrossEncoder":
    """The modules of an encoder up to its vector, and a linear head."""
    import torch
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Dense

    from bixse.reading.packing import positions

    encoder = load_model(start, device, seed)
    modules = [module for module in encoder if type(module).__name__ != "Normalize"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Dense(
            int(encoder.get_embedding_dimension() or 0),
            1,
            activation_function=torch.nn.Identity(),
            module_output_name="scores",
        )
    # An encoder is often told to read less than its model can: a pair is longer than a document.
    first: Any = modules[0]
    most = positions(encoder)
    if most is not None and hasattr(first, "max_seq_length"):
        first.max_seq_length = most
    model: CrossEncoder = CrossEncoder(modules=[*modules, head], device=device)
    return model


def _told(directory: Path, name: str) -> Any:
    path = directory / name
    found: Any = json.loads(path.read_text()) if path.is_file() else {}
    return found


def trained_directory(start: str) -> Path:
    """The directory of a cross-encoder that has a head of its own.

    Raises ValueError as `resolve`, and when `load_reranker` would draw one: to score by chance.
    """
    directory = resolve(start, "reranker")
    saved_as = _told(directory, "config_sentence_transformers.json").get("model_type")
    architectures = _told(directory, "config.json").get("architectures") or ["no architecture"]
    if saved_as != "CrossEncoder" and not architectures[0].endswith(_WITH_A_HEAD):
        raise ValueError(
            f"{start} is no trained reranker: a CrossEncoder of sentence-transformers is needed, "
            f"found {architectures[0]}"
        )
    return directory


def _round(model: "CrossEncoder", heads: "Sequence[torch.nn.Linear]") -> None:
    """Weights to bfloat16, in place, but for those of the heads."""
    from bixse.models.prepacking import prepack

    model.bfloat16()
    for head in heads:
        head.float().register_forward_pre_hook(_widen)
    if model.device.type == "cpu":
        prepack(model)


def _heads(model: "CrossEncoder") -> "list[torch.nn.Linear]":
    """The linear layers of one output: of those the score is made, unless it is a token's."""
    import torch

    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1]


def _widen(head: "torch.nn.Module", given: "tuple[torch.Tensor, ...]") -> Any:
    return tuple(x.float() for x in given)


class Reranker:
    """Pairs in, log-odds out; loaded once, called often. Not thread-safe."""

    def __init__(self, model: "CrossEncoder", fingerprint: str) -> None:
        self.model = model
        self.fingerprint = fingerprint

    @classmethod
    def load(
        cls, start: str, device: str | None = None, precision: Precision = "float32"
    ) -> "Reranker":
        """With weights in bfloat16 where `precision` says so, but for the head: log-odds that are
        rounded to three digits would be ties. A model without such a head, whose score is the
        log-odds of a token, stays in float32 where `precision` is auto.

        Raises ValueError as `trained_directory` and `load_reranker`, and for such a model where
        `precision` is bfloat16.
        """
        directory = trained_directory(start)
        model = load_reranker(str(directory), device)
        model.eval()
        heads = _heads(model)
        if precision == "bfloat16" and not heads:
            raise ValueError(
                f"{start} makes its score by no linear layer of one output, and bfloat16 would "
                "round it to three digits: float32 does not"
            )
        if heads and in_bfloat16(model.device, precision):
            _round(model, heads)
        return cls(model, encoder_fingerprint(directory))

    def score(
        self, query: str, documents: Sequence[str], batch_size: int = 64
    ) -> npt.NDArray[np.float32]:
        """Log-odds [len(documents)] in the order given: what `CrossEncoder.predict` gives before
        its activation. Raises ValueError when one is not finite.
        """
        scores = self.logits([(query, document) for document in documents], batch_size)
        if not np.isfinite(scores).all():
            raise ValueError(f"the reranker gave a score that is not finite for query {query!r}")
        return scores

    def logits(
        self, pairs: Sequence[tuple[str, str]], batch_size: int = 64
    ) -> npt.NDArray[np.float32]:
        """Log-odds [len(pairs)] of (query, document), finite or not."""
        if not pairs:
            return np.zeros(0, np.float32)
        import torch

        found = self.model.predict(
            list(pairs),
            batch_size=batch_size,
            activation_fn=torch.nn.Identity(),
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        return np.asarray(found.float().cpu().numpy(), np.float32)

    def lengths(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.int64]:
        """Tokens of each pair that the model reads, after truncation: those that a chat template
        puts around it too."""
        from bixse.reading.chunks import Texts, lengths_of

        return lengths_of(self.model, Texts(pairs, "pair"))


def reranked(hits: Sequence[Hit], scores: Sequence[float]) -> list[Hit]:
    """The first `len(scores)` hits by falling score, ties by `doc_id`; the others stay below them.

    Those others keep the score of whoever found them.
    """
    head = sorted(
        zip(scores, hits[: len(scores)], strict=True), key=lambda pair: (-pair[0], pair[1].doc_id)
    )
    order = [Hit(hit.doc_id, float(score), 0) for score, hit in head] + list(hits[len(scores) :])
    return [Hit(hit.doc_id, hit.score, rank) for rank, hit in enumerate(order, start=1)]
