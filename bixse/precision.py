"""bfloat16 where the device multiplies it faster than float32."""

from typing import TYPE_CHECKING

from bixse.settings import Precision

if TYPE_CHECKING:
    import torch


def autocast(device: "torch.device", precision: Precision = "auto") -> "torch.autocast":
    """A context in which matrix products of float32 tensors are taken in `precision`.

    Every CUDA device that we support has instructions for bfloat16, and a CPU with AVX512-BF16 or
    AMX. Tensors of double precision stay as they are; so do weights, sums and norms.
    """
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(device, precision))


def in_bfloat16(device: "torch.device", precision: Precision = "auto") -> bool:
    """Whether `autocast` multiplies in bfloat16."""
    return precision == "bfloat16" or (precision == "auto" and _multiplies_bfloat16(device))


def _multiplies_bfloat16(device: "torch.device") -> bool:
    import torch

    if device.type != "cpu":
        return device.type == "cuda"
    # `get_capabilities` came after the torch that GPU machines may have.
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
