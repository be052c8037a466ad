"""What a prefill computes and what the hardware could: how much of its peak an engine reaches.

A share of the peak says whether a faster engine is to be had on this hardware, which pairs a second
do not. It is given where both are known, and nowhere guessed.
"""

from typing import Any

PEAKS = {
    "A100": 312e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
}
"""Dense bfloat16 or float16 operations a second, by what NVIDIA calls the GPU (its data sheets)."""


def peak_flops(device: str, dtype: str) -> float | None:
    """Operations a second of a GPU by its name; None where they are not known, as of a slice."""
    words = device.replace("-", " ").split()
    if dtype not in ("bfloat16", "float16") or "MIG" in words:
        return None
    known = [name for name in PEAKS if set(name.split()) <= set(words)]
    return PEAKS[max(known, key=len)] if known else None


def token_flops(config: Any) -> float | None:
    """Operations that one token of a prompt takes in a language model of this configuration: two
    for each weight of its layers' matrices.

    Attention over what came before is left out, and so is the head, which reads the last token
    alone: the true number is a little higher. None for experts, of which a token meets a few, and
    for what transformers does not know.
    """
    import torch
    from transformers import AutoModel

    if any(hasattr(config, name) for name in ("num_experts", "num_local_experts")):
        return None
    try:
        with torch.device("meta"):
            # transformers leaves it without types.
            model: Any = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    except (ValueError, ImportError):
        return None
    embeddings = {id(weight) for weight in model.get_input_embeddings().parameters()}
    matrices = [w for w in model.parameters() if w.dim() == 2 and id(w) not in embeddings]
    weights: int = sum(weight.numel() for weight in matrices)
    return 2.0 * weights


def known_peak(llm: Any, gpus: int, dtype: str) -> tuple[float, float] | None:
    """Operations of a token, and a second of the GPUs that an engine spans, if both are known."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return None
    peak = peak_flops(current_platform.get_device_name(), dtype)
    each = token_flops(llm.model_config.hf_text_config) if peak else None
    return (each, peak * gpus) if peak and each else None
