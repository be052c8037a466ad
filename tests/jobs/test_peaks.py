"""How much of the hardware a prefill uses: by hand, and nothing where it is not known."""

from collections import Counter

import pytest

from bixse.judging.settings import Judging
from jobs.judge import summary
from jobs.peaks import peak_flops, token_flops


@pytest.mark.parametrize(
    ("device", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "float16", 756e12),
        ("NVIDIA H100 NVL", "bfloat16", 835e12),
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA L40", "bfloat16", None),
        ("NVIDIA GH200 480GB", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("", "bfloat16", None),
    ],
)
def test_a_peak_is_known_by_the_name_or_not_at_all(
    device: str, dtype: str, peak: float | None
) -> None:
    assert peak_flops(device, dtype) == peak


def test_operations_of_a_token_by_hand() -> None:
    """Two a weight of the layers: queries, keys, values and their output, and three of the MLP."""
    from transformers import Qwen3Config, Qwen3MoeConfig

    config = Qwen3Config(
        vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    layer = 128 * (4 + 2 + 2) * 32 + 4 * 32 * 128 + 3 * 128 * 256
    assert token_flops(config) == 2 * 2 * layer
    assert token_flops(Qwen3MoeConfig()) is None


def test_the_share_is_of_the_time_at_work_and_absent_where_nothing_is_known() -> None:
    counts = Counter({"new": 10, "prompt_tokens": 3000, "engine_seconds": 2.0})
    assert "peak_share" not in summary(counts, 10, Judging())
    known = counts + Counter({"flops": 3e12, "peak_flops": 2 * 4e12})
    assert summary(known, 10, Judging())["peak_share"] == 0.375
