"""Causal language models as they are tuned: read in float32, written as they came."""

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


def save_language_model(
    model: Any, stored: "torch.dtype", start: str, revision: str | None, directory: Path
) -> None:
    """What transformers and vLLM load, with the tokenizer and chat template of `start`."""
    from transformers import AutoTokenizer

    model.to(stored).save_pretrained(directory)
    AutoTokenizer.from_pretrained(start, revision=revision).save_pretrained(directory)
