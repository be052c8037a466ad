"""Learning to choose context: what teaches the encoder, what changes nothing, what learns."""

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.nn import functional

from bixse.models.encoder import load_model
from bixse.models.language_model import load_language_model
from bixse.training import gated as module
from bixse.training.gated import choices, gated_gradients, losses
from bixse.training.gated_attention import gated
from bixse.training.gather import World
from bixse.training.loop import Notice, Stopped
from bixse.training.settings import Gated
from tests.conftest import save_tiny_llm
from tests.encoders import save_tiny_decoder, save_tiny_encoder
from tests.training import ranks
from tests.training.rank_process import Ranks

WHOLE = World()
SETTINGS = Gated(temperature=0.05, precision="float32")
GROUPS = ranks.chunk_groups()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder and a tiny language model."""
    directory = tmp_path_factory.mktemp("start")
    save_tiny_encoder(directory, {"query": "ask: ", "document": "tell: "})
    save_tiny_llm(directory / "llm")
    return directory


@pytest.fixture(scope="module")
def models(start: Path) -> tuple[Any, Any]:
    language_model, _ = load_language_model(str(start / "llm"))
    return load_model(str(start / "encoder"), "cpu").float().eval(), language_model.eval()


@pytest.fixture(scope="module")
def whole(start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """A run without interruption."""
    return ranks.gated(WHOLE, copied(start, tmp_path_factory.mktemp("whole")))


def copied(start: Path, directory: Path) -> Path:
    shutil.copytree(start, directory, dirs_exist_ok=True)
    return directory


def test_a_chunk_asks_with_its_first_half_and_answers_whole(models: tuple[Any, Any]) -> None:
    encoder, _ = models
    group = GROUPS.group(0)
    assert all(w.startswith(h) and h != w for h, w in zip(group.halves, group.wholes, strict=True))
    asked, told = encoder.encode_query(group.halves), encoder.encode_document(group.wholes)
    cosine = torch.from_numpy(asked @ told.T)
    expected = (cosine / 0.05).masked_fill(torch.eye(4).bool(), -torch.inf).softmax(1)
    with torch.no_grad():
        found = choices(encoder, group, SETTINGS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_a_loss_is_of_every_token_but_the_first_of_each_chunk(models: tuple[Any, Any]) -> None:
    """With all weights zero, that of the plain model, one chunk at a time."""
    _, model = models
    group = GROUPS.group(3)
    expected = []
    for ids in group.ids:
        logits = model(input_ids=torch.tensor([ids.tolist()])).logits[0]
        target = torch.tensor(ids[1:].tolist())
        expected.append(functional.cross_entropy(logits[:-1], target, reduction="sum"))
    with gated(model):
        found = losses(model, group, torch.zeros(5, 5), SETTINGS)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-5)


def _norms(models: tuple[Any, Any]) -> tuple[float, ...]:
    """Of the gradients of each model."""
    return tuple(
        sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
        for model in models
    )


def test_the_encoder_learns_through_the_gate_alone(models: tuple[Any, Any]) -> None:
    encoder, model = models
    batch = np.arange(3)
    with gated(model):
        loss, _ = gated_gradients(encoder, model, GROUPS, batch, SETTINGS, WHOLE)
        both = _norms(models)
        with patch.object(module, "choices", lambda *given: choices(*given).detach()):
            again, _ = gated_gradients(encoder, model, GROUPS, batch, SETTINGS, WHOLE)
    assert loss == again
    assert both[0] > 1e-4
    assert both[1] > 1e-2
    assert _norms(models) == (0, pytest.approx(both[1], rel=1e-4))


def test_the_loss_of_a_batch_is_the_mean_of_its_tokens(models: tuple[Any, Any]) -> None:
    encoder, model = models
    batch = np.array([5, 0, 2])
    summed, tokens = 0.0, 0
    with gated(model), torch.no_grad():
        for number in batch.tolist():
            group = GROUPS.group(number)
            weight_CC = choices(encoder, group, SETTINGS)
            summed += float(losses(model, group, weight_CC, SETTINGS).sum())
            tokens += sum(len(ids) - 1 for ids in group.ids)
    with gated(model):
        loss, attends = gated_gradients(encoder, model, GROUPS, batch, SETTINGS, WHOLE)
        warm = SETTINGS.replace(temperature=1e6)
        _, evenly = gated_gradients(encoder, model, GROUPS, batch, warm, WHOLE)
    assert loss == pytest.approx(summed / tokens, rel=1e-5)
    assert 1 <= attends < evenly
    # 3, 4 and 2 chunks, each of which attends to all others alike.
    assert evenly == pytest.approx((3 * 2 + 4 * 3 + 2 * 1) / 9, rel=1e-4)


def test_a_step_is_taken_of_both_models(whole: dict[str, torch.Tensor], start: Path) -> None:
    curve = whole["curve"]
    assert len(curve) == 9
    assert curve[-3:, 2].mean() < curve[:3, 2].mean()
    assert curve[:, 5].sum() == 3 * 7
    for of, before in (
        ("encoder", load_model(str(start / "encoder"), "cpu")),
        ("language model", load_language_model(str(start / "llm"))[0]),
    ):
        moved = [
            name
            for name, value in before.named_parameters()
            if not torch.equal(value, whole[f"{of}.{name}"])
        ]
        still = {name for name, _ in before.named_parameters()} - set(moved)
        assert all("pooler" in name for name in still), still


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_resumed_equals_uninterrupted_bit_by_bit(
    steps: int, whole: dict[str, torch.Tensor], start: Path, tmp_path: Path
) -> None:
    copied(start, tmp_path)
    (tmp_path / "stop").write_text(str(steps))
    with pytest.raises(KeyboardInterrupt):
        ranks.gated(WHOLE, tmp_path)
    (tmp_path / "stop").unlink()
    resumed = ranks.gated(WHOLE, tmp_path)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_a_notice_saves_and_stops(
    whole: dict[str, torch.Tensor], start: Path, tmp_path: Path
) -> None:
    copied(start, tmp_path)
    notices = iter([Notice.NONE, Notice.NONE, Notice.STOP])
    with pytest.raises(Stopped, match="after step 3 of 9, which is saved"):
        ranks.gated(WHOLE, tmp_path, lambda: next(notices))
    resumed = ranks.gated(WHOLE, tmp_path)
    assert torch.equal(resumed["curve"], whole["curve"])


def test_two_ranks_equal_one_to_rounding(
    whole: dict[str, torch.Tensor], start: Path, tmp_path: Path, run_ranks: Ranks
) -> None:
    """Batches of two groups and three: a rank has one group or two, of other sizes."""
    found = run_ranks("gated", 2, copied(start, tmp_path))
    torch.testing.assert_close(found["curve"], whole["curve"], atol=1e-4, rtol=1e-3)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, atol=2e-4, rtol=1e-3, msg=name)


def test_adapters_of_both_are_trained_and_those_of_the_encoder_merged(
    start: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    found = ranks.gated_adapters(WHOLE, copied(start, tmp_path))
    before = dict(load_model(str(start / "encoder"), "cpu").named_parameters())
    of_encoder = {k.removeprefix("encoder."): v for k, v in found.items() if k[:8] == "encoder."}
    assert of_encoder.keys() == before.keys()
    moved = {name for name, value in before.items() if not torch.equal(value, of_encoder[name])}
    assert moved
    assert all("attention" in name or "dense" in name for name in moved)
    frozen, _ = load_language_model(str(start / "llm"))
    assert torch.equal(found["language model.lm_head.weight"], frozen.lm_head.weight)
    trained = [name for name in found if "language model" in name and "lora_B" in name]
    assert trained
    assert all(found[name].abs().max() > 0 for name in trained)


def test_an_encoder_that_is_a_decoder_learns_too(tmp_path: Path) -> None:
    """Of the paper's kind: its vector is the last token's."""
    save_tiny_decoder(tmp_path, "left")
    save_tiny_llm(tmp_path / "llm")
    found = ranks.gated(WHOLE, tmp_path, max_steps=2)
    assert np.isfinite(found["curve"]).all()


def test_a_group_that_memory_does_not_hold_is_one_sentence(models: tuple[Any, Any]) -> None:
    full = torch.OutOfMemoryError("of 80 GiB nothing is left")
    with (
        patch.object(module, "choices", side_effect=full),
        pytest.raises(RuntimeError, match=r"a group of 4 chunks: lower --gated\.group-size"),
    ):
        gated_gradients(*models, GROUPS, np.arange(3), SETTINGS, WHOLE)


def test_in_bfloat16_the_gate_is_not(models: tuple[Any, Any]) -> None:
    encoder, model = models
    rough = SETTINGS.replace(precision="bfloat16")
    with gated(model):
        exact, _ = gated_gradients(encoder, model, GROUPS, np.arange(3), SETTINGS, WHOLE)
        near, _ = gated_gradients(encoder, model, GROUPS, np.arange(3), rough, WHOLE)
        assert choices(encoder, GROUPS.group(0), rough).dtype == torch.float32
    assert near == pytest.approx(exact, rel=0.02)
    assert near != exact
    assert _norms(models)[0] > 1e-4
