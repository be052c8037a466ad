"""Evaluation while training: the best encoder is kept, and training is what it is without."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bixse.training.dev import Dev
from bixse.training.gather import World
from bixse.training.objective_settings import LCE
from bixse.training.settings import Training
from tests.encoders import save_tiny_encoder
from tests.training import ranks
from tests.training.rank_process import Ranks


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """A run without interruption, evaluated every third step."""
    return evaluated(tmp_path_factory.mktemp("evaluated"))


def evaluated(directory: Path, **changes: Any) -> dict[str, torch.Tensor]:
    save_tiny_encoder(directory)
    return ranks.loop(World(), directory, **{"evaluate_every": 3, **changes})


def stopped_at(directory: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights after `step` steps of the schedule of the whole run, without any evaluation."""
    save_tiny_encoder(directory)
    (directory / "stop").write_text(str(step))
    with pytest.raises(KeyboardInterrupt):
        ranks.loop(World(), directory, checkpoint_every=1)
    (saved,) = (directory / "checkpoints").glob(f"step-{step:08d}-*")
    from safetensors.torch import load_file

    return load_file(saved)


def test_the_best_encoder_is_kept_and_training_is_what_it_is_without(
    whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    plain = evaluated(tmp_path / "plain", evaluate_every=None)
    assert torch.equal(plain["curve"], whole["curve"])
    steps = len(whole["curve"])
    assert steps % 3 == 0
    *found, (best, _) = whole["dev"].tolist()
    assert [step for step, _ in found] == list(range(0, steps + 1, 3))
    assert best == max(found, key=lambda one: (one[1], -one[0]))[0]
    assert 0 < best < steps
    at_best = stopped_at(tmp_path / "best", int(best))
    weights = [name for name in plain if name not in ("curve", "dev")]
    assert weights
    for name in weights:
        assert torch.equal(whole[name], at_best[f"model.encoder.{name}"]), name
    assert not all(torch.equal(whole[name], plain[name]) for name in weights)


@pytest.mark.parametrize("steps", [2, 9, 13])
def test_resumed_equals_uninterrupted_bit_by_bit(
    steps: int, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_tiny_encoder(tmp_path)
    (tmp_path / "stop").write_text(str(steps))
    with pytest.raises(KeyboardInterrupt):
        ranks.dev(World(), tmp_path)
    (tmp_path / "stop").unlink()
    resumed = ranks.dev(World(), tmp_path)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_two_ranks_keep_the_same_step(
    whole: dict[str, torch.Tensor], tmp_path: Path, run_ranks: Ranks
) -> None:
    save_tiny_encoder(tmp_path)
    two = run_ranks("dev", 2, tmp_path)
    assert two["dev"][-1, 0] == whole["dev"][-1, 0]
    torch.testing.assert_close(two["dev"], whole["dev"], atol=1e-3, rtol=1e-3)


def test_patience_ends_the_run_for_good(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    stopped = evaluated(tmp_path, patience=1)
    *found, (best, _) = stopped["dev"].tolist()
    last = len(stopped["curve"])
    assert last < len(whole["curve"])
    assert torch.equal(stopped["curve"], whole["curve"][:last])
    assert found[-1][0] == last
    assert best == found[-2][0]
    # What a driver finds that died between the last checkpoint and the export.
    again = ranks.loop(World(), tmp_path, evaluate_every=3, patience=1)
    for name, value in stopped.items():
        assert torch.equal(again[name], value), name


def test_of_equal_scores_the_first_is_best_and_does_not_improve() -> None:
    module, dev = torch.nn.Linear(1, 1), Dev()
    for step, score in ((0, 0.25), (5, 0.5), (10, 0.5), (15, 0.25)):
        dev.add(step, score, module)
    assert dev.best_step == 5
    assert dev.is_over(2)
    assert not dev.is_over(3)
    assert not dev.is_over(None)


def test_settings_that_measure_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="patience counts evaluations"):
        Training(patience=2)
    with pytest.raises(ValueError, match="a reranker ranks no corpus"):
        Training(objective=LCE(), docs_per_query=4, evaluate_every=5)
