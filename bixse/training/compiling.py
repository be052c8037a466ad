"""An encoder's layers, compiled: what stands between matrix products becomes few kernels.

A layer of BERT in bfloat16 is four matrix products and about thirty small operations, each of which
reads and writes all tokens: on a GPU those take longer than the products. One layer is compiled for
all (they share their code), in seconds, and for any number of tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from bixse.training.settings import Training

if TYPE_CHECKING:
    from sentence_transformers.base import BaseModel

_STEPS = 200
"""Steps from which compiling is won back."""


def compiles(model: "BaseModel", settings: Training, steps: int) -> bool:
    """Whether layers are to be compiled for so many steps."""
    if settings.compiled is not None:
        return settings.compiled
    return model.device.type == "cuda" and not settings.sharded and steps >= _STEPS


@contextmanager
def compiled(model: "BaseModel", wanted: bool) -> Iterator[None]:
    """While it lasts a model's layers are compiled, if `wanted`."""
    layers = list(layers_of(model)) if wanted else []
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from layers_of(child)
