"""A model spread over the ranks (FSDP2, `fully_shard`): of weights, gradients and moments each rank
holds its part, and of a layer it has all only while that layer is at work.

What is trained is a twin. The model itself waits whole in the host's memory, is given the twin's
weights where a whole model is needed, for an evaluation and in the end, and so never knows.

Every forward and backward pass is a collective. So all ranks take as many chunks of texts
(`Side.filled`), and a rank that runs out of memory ends the run: no other can be told to wait.
Each backward pass sums the gradients over the ranks and keeps a part (reduce-scatter); to keep
whole ones until the last chunk would save messages and cost the memory that is to be spared.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from bixse.training.compiling import layers_of

if TYPE_CHECKING:
    from sentence_transformers.base import BaseModel


class Twin:
    """A copy of a model, spread over the ranks; the model moves to the host."""

    def __init__(self, model: "BaseModel", ranks: int, bfloat16: bool) -> None:
        self._whole, self._device = model, model.device
        model.to("cpu")
        self.model = copy.deepcopy(model)
        spread(self.model, self._device, ranks, bfloat16)

    @torch.no_grad()
    def gather(self) -> None:
        """Give the model the twin's weights; all ranks call it."""
        weights = dict(self.model.named_parameters())
        for name, parameter in self._whole.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(whole(weights[name]))

    def measured(self, measure: Callable[[], float]) -> float:
        """What `measure` says of the model, which is on the device meanwhile."""
        self.gather()
        self._whole.to(self._device)
        try:
            return measure()
        finally:
            self._whole.to("cpu")


def spread(model: nn.Module, device: torch.device, ranks: int, bfloat16: bool) -> None:
    """Spread a model over the ranks, in place: its layers one by one, and what is left together.

    With `bfloat16` layers are gathered in it; their parts and the sums of gradients stay as they
    are.
    """
    mesh = init_device_mesh(device.type, (ranks,))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if bfloat16:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in (*layers_of(model), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The shares of all ranks add up to the loss, so gradients are sums, and no means.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def is_spread(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each rank may hold a part; then all ranks must ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()
    return gathered


def as_parts(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of `like`, and as it is spread where the shapes agree."""
    value = value.to(like.device)
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    mesh: Any = like.device_mesh
    return distribute_tensor(value, mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def clip(module: nn.Module, most: float) -> float:
    """Clip gradients of which some are spread; the norm of them all before that."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    parts = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    alike = [grad for grad in grads if not isinstance(grad, DTensor)]
    square = torch.stack([part.double().square().sum() for part in parts]).sum()
    dist.all_reduce(square)
    for grad in alike:
        square += grad.double().square().sum()
    norm = float(square.sqrt())
    for grad in (*parts, *alike):
        # As `nn.utils.clip_grad_norm_`.
        grad.mul_(min(1.0, most / (norm + 1e-6)))
    return norm
