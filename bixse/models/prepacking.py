"""Linear layers whose bfloat16 weights lie in memory as oneDNN multiplies them.

oneDNN reads a weight in tiles of the processor's registers. Laid out by rows, as a model is stored,
it is brought into that order at every call; here it is once. A GELU is taken before a product
leaves the cache. In float32 the same is no gain: MKL is the faster there.

For inference on a CPU alone. The numbers are those of `torch.nn.Linear` up to rounding. The
operators are the ones that torch's own compiler emits for frozen weights
(torch/_inductor/fx_passes/mkldnn_fusion.py).
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import GELUActivation


class PrepackedLinear(torch.nn.Module):
    """A linear layer, [..., I] -> [..., O]. What it reads is rounded to bfloat16.

    Its weight is no parameter: neither a state nor a change of type reaches it.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        # Models ask a layer for the type of its weight.
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach().contiguous(), None
        )
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.activation = "none"

    def forward(self, input: Tensor) -> Tensor:
        made: Tensor = torch.ops.mkldnn._linear_pointwise(
            input.bfloat16(), self.weight, self.bias, self.activation, [], "none"
        )
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> "PrepackedLinear":
        # Nothing can change it, and torch cannot copy its weight.
        return self


def prepacks() -> bool:
    """Whether this torch has oneDNN, and the processor what that needs for bfloat16."""
    # torch leaves it without types; without oneDNN there is no operator to ask.
    found = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(found and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepack(model: torch.nn.Module) -> None:
    """Prepack the linear layers in bfloat16 of transformers in a model, in place; nothing where
    `prepacks` says no."""
    if not prepacks():
        return
    # Only of models that are known to call their layers, where others may read their weights.
    for transformer in [one for one in model.modules() if isinstance(one, PreTrainedModel)]:
        for parent in list(transformer.modules()):
            for name, child in list(parent.named_children()):
                # A kind of `Linear` may do more than that.
                if type(child) is torch.nn.Linear and child.weight.dtype == torch.bfloat16:
                    setattr(parent, name, PrepackedLinear(child))
            _take_in_gelu(parent)


def _take_in_gelu(parent: Any) -> None:
    """Where a layer is followed by GELU alone, as in BERT and those made after it."""
    dense, activation = (getattr(parent, name, None) for name in ("dense", "intermediate_act_fn"))
    if isinstance(dense, PrepackedLinear) and isinstance(activation, GELUActivation):
        dense.activation = "gelu"
        parent.intermediate_act_fn = torch.nn.Identity()
