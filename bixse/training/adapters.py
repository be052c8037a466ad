"""Low-rank adapters in place of all weights: LoRA, arXiv 2106.09685, by the library `peft`.

A linear layer's W stays as it is; s * B A is added to it, of which A and B alone are trained, with
scale and bias and, of a reranker, its head. B begins as 0, so training begins at the model that was
given. What is left behind is W + s * B A: a model like any other, which no reader needs `peft` for.
"""

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bixse.training.settings import LoRA

if TYPE_CHECKING:
    from sentence_transformers.base import BaseModel


_PACKAGES = "peft==0.21.2 accelerate==1.15.0"


def refuse_missing(lora: LoRA) -> None:
    """Raises ValueError when adapters are asked for and `peft` is not installed."""
    if lora.rank is not None and importlib.util.find_spec("peft") is None:
        raise ValueError(f"training with LoRA needs a package: pip install {_PACKAGES}")


def refuse_adapted(model: "BaseModel") -> None:
    """Raises ValueError for a model whose start was adapters over another: transformers keeps all
    of it frozen, and saves the adapters alone."""
    if any(getattr(module, "_hf_peft_config_loaded", False) for module in model.modules()):
        raise ValueError(
            "what training starts from holds adapters over another model: merge them into its "
            "weights (peft's merge_and_unload) and start from those"
        )


def adapt(model: "BaseModel", lora: LoRA, seed: int) -> Callable[[], object]:
    """Freeze `model` but for adapters on its transformer and a reranker's head, in place.

    Its weights keep their type, but float16 becomes float32 on a CPU. Returns what merges the
    adapters into the weights and removes them. Raises ValueError as `adapt_transformer`, when
    `peft` is not installed or the model has no transformer.
    """
    refuse_missing(lora)
    transformer = getattr(model[0], "model", None)
    if not isinstance(transformer, nn.Module):
        raise ValueError("LoRA is for transformers: this model has none")
    if model.device.type == "cpu" and any(p.dtype == torch.float16 for p in model.parameters()):
        # A CPU's norms take no float16 beside what was multiplied in bfloat16.
        model.float()
    model.requires_grad_(False)
    merge = adapt_transformer(transformer, lora, seed)
    for module in model:
        if getattr(module, "module_output_name", None) == "scores":
            module.float().requires_grad_(True)
    return merge


def adapt_transformer(transformer: nn.Module, lora: LoRA, seed: int) -> Callable[[], object]:
    """The same of a transformer by itself: adapters stand on the linear layers of its
    `base_model`, and what it has besides is its head.

    Raises ValueError when a name in `target_modules` is of none of those layers.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    assert lora.rank is not None
    base = getattr(transformer, "base_model", transformer)
    # A BERT's pooler is a part of the head, which a start may lack: it is drawn then.
    pooler = getattr(base, "pooler", None) or nn.Module()
    body = set(base.modules()) - set(pooler.modules())
    layers = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and module in body
    ]
    targets = _chosen(layers, lora.target_modules)
    config: Any = LoraConfig(
        r=lora.rank, lora_alpha=lora.scaling * lora.rank, target_modules=targets
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters = LoraModel(transformer, config, "default")
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            # Steps this small vanish in a bfloat16, which the frozen weights may stay in.
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    if base is not transformer:
        inside = {id(p) for p in base.parameters()} - {id(p) for p in pooler.parameters()}
        for parameter in transformer.parameters():
            if id(parameter) not in inside:
                parameter.requires_grad_(True)
    merge: Callable[[], object] = adapters.merge_and_unload
    return merge


def _chosen(layers: list[str], names: tuple[str, ...]) -> list[str]:
    """The layers that end in one of the names; all of them where there are no names."""
    chosen = {name: [x for x in layers if f".{x}".endswith(f".{name}")] for name in names}
    unknown = [name for name, found in chosen.items() if not found]
    if unknown or not layers:
        known = ", ".join(dict.fromkeys(layer.rsplit(".", 1)[-1] for layer in layers)) or "none"
        raise ValueError(
            f"training.lora.target_modules: no linear layer is called "
            f"{unknown[0] if unknown else 'anything'}; this model has {known}"
        )
    return layers if not names else [x for found in chosen.values() for x in found]
