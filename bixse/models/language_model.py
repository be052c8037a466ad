"""Causal language models as they are trained: read in float32, written as they came."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bixse.models.encoder import unloadable

if TYPE_CHECKING:
    import torch


def load_language_model(
    start: str, revision: str | None = None, device: str | None = None
) -> tuple[Any, "torch.dtype"]:
    """The model of a directory or hub id in float32, and the type that its weights have there.

    Raises ValueError when there is none.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    # transformers leaves it without types.
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        stored = AutoConfig.from_pretrained(start, revision=revision).dtype
        model: Any = AutoModelForCausalLM.from_pretrained(
            start, revision=revision, dtype=torch.float32
        )
    except unloadable() as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{start} is no causal language model: {reason}") from None
    return model.to(device or "cpu"), stored or torch.float32


def refuse_no_language_model(start: str, revision: str | None, tokens: int) -> None:
    """Raises ValueError when the configuration of a directory or hub id is of no causal language
    model, or of one that reads fewer than `tokens` tokens.

    In a second, where loading one takes a worker. transformers would make a causal model of nearly
    any, and draw the head that it lacks.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(start, revision=revision)
    except unloadable() as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{start} is no causal language model: {reason}") from None
    found = config.architectures or ["no architecture"]
    if not set(found) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise ValueError(
            f"{start} is no causal language model: its config.json says {', '.join(found)}"
        )
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and most < tokens:
        raise ValueError(
            f"{start} reads {most} tokens, and chunks may have {tokens}: lower --gated.chunk-tokens"
        )


def save_language_model(
    model: Any, stored: "torch.dtype", start: str, revision: str | None, directory: Path
) -> None:
    """What transformers and vLLM load, with the tokenizer and chat template of `start`."""
    from transformers import AutoTokenizer

    model.to(stored).save_pretrained(directory)
    AutoTokenizer.from_pretrained(start, revision=revision).save_pretrained(directory)
