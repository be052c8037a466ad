"""Which attention an encoder is trained with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bixse.precision import in_bfloat16
from bixse.reading.packing import may_pack, packed
from bixse.settings import Precision

if TYPE_CHECKING:
    from sentence_transformers.base import BaseModel

_LONGEST = 512


@contextmanager
def fast_attention(model: "BaseModel", precision: Precision, longest: int) -> Iterator[None]:
    """While it lasts, the attention that is fastest to train with, for texts of `longest` tokens.

    In bfloat16 texts are packed where the model can read them so: on two cores with AMX that gave
    1.8 times the pairs a second of padded chunks and plain products (MiniLM, 32 pairs). Where it
    cannot, as a reranker, plain products on a CPU: torch's fused attention goes backward in
    bfloat16 far slower, 32 texts of 64 tokens in a MiniLM layer in 60 ms against 11, 16 texts of
    256 tokens in 128 ms against 65 (torch 2.13, AVX512-BF16, one core). Beyond 512 tokens its
    memory, which does not grow with their square, is worth more. The results differ by rounding.
    """
    if in_bfloat16(model.device, precision) and may_pack(model):
        with packed(model):
            yield
        return
    transformer: Any = getattr(model[0], "model", None)
    config = getattr(transformer, "config", None)
    now = getattr(config, "_attn_implementation", None)
    slow = now == "sdpa" and longest <= _LONGEST
    if not (slow and model.device.type == "cpu" and in_bfloat16(model.device, precision)):
        yield
        return
    transformer.set_attn_implementation("eager")
    try:
        yield
    finally:
        transformer.set_attn_implementation(now)
