"""A reranker in bfloat16: scores near to those of float32, and no coarser."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bixse.models.reranker import Reranker, load_reranker
from tests.encoders import (
    save_tiny_chat_reranker,
    save_tiny_cross_encoder,
    save_tiny_encoder,
    texts,
)

PAIRS = [(query, text) for query in texts(4, seed=1) for text in texts(40, seed=2, longest=30)]


def with_a_linear_head(place: Path) -> Path:
    return save_tiny_cross_encoder(place, 1)


def over_pooling(place: Path) -> Path:
    """As `train` saves what began as an encoder."""
    load_reranker(str(save_tiny_encoder(place)), "cpu").save_pretrained(str(place / "reranker"))
    return place / "reranker"


@pytest.mark.parametrize("make", [with_a_linear_head, over_pooling])
def test_bfloat16_rounds_all_but_the_head(make, tmp_path: Path) -> None:
    start = str(make(tmp_path))
    exact, rounded = (Reranker.load(start, "cpu", p) for p in ("float32", "bfloat16"))
    wanted, found = exact.logits(PAIRS), rounded.logits(PAIRS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=0.01 * np.abs(wanted).max() + 0.2 * wanted.std())
    assert not np.array_equal(found, wanted)
    # Of a score in bfloat16 a few values would be left.
    assert len(set(found.tolist())) > 0.9 * len(set(wanted.tolist()))
    types = {m.out_features == 1: m.weight.dtype for m in linear(rounded)}
    assert types == {True: torch.float32} | dict.fromkeys({False} & types.keys(), torch.bfloat16)
    assert rounded.fingerprint == exact.fingerprint


def linear(reranker: Reranker) -> list[torch.nn.Linear]:
    return [m for m in reranker.model.modules() if isinstance(m, torch.nn.Linear)]


def test_a_score_that_is_a_tokens_is_left_in_float32_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A CPU without instructions for it would stay in float32; torch multiplies there all the same.
    monkeypatch.setattr("bixse.precision._multiplies_bfloat16", lambda device: True)
    start = str(save_tiny_chat_reranker(tmp_path))
    exact, auto = (Reranker.load(start, "cpu", p) for p in ("float32", "auto"))
    np.testing.assert_array_equal(auto.logits(PAIRS[:9]), exact.logits(PAIRS[:9]))
    with pytest.raises(ValueError, match="no linear layer of one output"):
        Reranker.load(start, "cpu", "bfloat16")
