"""Matrix products go in bfloat16 when they are asked to, and never in double precision."""

import pytest
import torch

from bixse.precision import autocast
from bixse.settings import Precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "wanted"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_products_have_the_precision_asked_for(precision: Precision, wanted: torch.dtype) -> None:
    with autocast(CPU, precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == wanted
        assert (torch.ones(2, 2).double() @ torch.ones(2, 2).double()).dtype == torch.float64


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", None])
def test_auto_is_bfloat16_where_the_cpu_has_instructions(
    flag: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True})
    with autocast(CPU):
        found = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    assert found == (torch.float32 if flag is None else torch.bfloat16)


def test_auto_is_float32_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    with autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
