"""How much of a GPU a training step uses."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def flops_of(model: Any, sides: Sequence[tuple[Sequence[str], int]]) -> float:
    """Floating-point operations of training on texts, each side's cut at so many tokens; those of
    padding are not among them.

    Forward and backward, six for each weight of a matrix and token, and for each layer twelve for
    each dimension and pair of tokens that see each other (arXiv 2204.02311, appendix B).
    """
    layers = model[0].model
    weights = sum(
        module.weight.numel()
        for name, module in layers.named_modules()
        # A pooler is not asked when means are taken.
        if isinstance(module, torch.nn.Linear) and "pooler" not in name
    )
    tokens = seen = 0
    for texts, limit in sides:
        found = model.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
        lengths = np.array([len(ids) for ids in found])
        tokens += int(lengths.sum())
        seen += int((lengths**2).sum())
    shape = layers.config
    return float(6 * weights * tokens + 12 * shape.num_hidden_layers * shape.hidden_size * seen)


def peak_tflops() -> float:
    """What the card does at most, in bfloat16: products of two 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(20):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        a @ b
        ended.record()
        torch.cuda.synchronize()
        times.append(started.elapsed_time(ended) / 1000)
    return 2 * 8192**3 / statistics.median(times) / 1e12
