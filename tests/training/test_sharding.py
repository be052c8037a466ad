"""A model spread over the ranks: the same weights, and checkpoints that others read."""

from pathlib import Path

import pytest
import torch

from bixse.training.gather import World, cells_of
from bixse.training.gradients import batch_gradients
from tests.encoders import save_tiny_encoder
from tests.training import ranks
from tests.training.rank_process import Ranks


def assert_close(found: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> None:
    assert found["dev"][-1, 0] == whole["dev"][-1, 0]
    for name, value in whole.items():
        exact = 1e-3 if name == "dev" else 2e-4
        torch.testing.assert_close(found[name], value, atol=exact, rtol=1e-3, msg=name)


def test_a_run_goes_on_sharded_and_whole_again_to_the_same_weights(
    tmp_path: Path, run_ranks: Ranks
) -> None:
    for name in ("whole", "moved"):
        save_tiny_encoder(tmp_path / name)
    whole, moved = ranks.dev(World(), tmp_path / "whole"), tmp_path / "moved"
    (moved / "stop").write_text("9")
    with pytest.raises(KeyboardInterrupt):
        ranks.dev(World(), moved)
    (moved / "stop").unlink()
    assert_close(run_ranks("spread", 2, moved), whole)
    # Killed before its last checkpoint: the one before that was written by two ranks too.
    before, last = sorted((moved / "checkpoints").glob("step-*"))
    assert before.name > "step-00000012"
    last.unlink()
    assert_close(ranks.dev(World(), moved), whole)


def test_out_of_memory_is_told_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    objective, batch = ranks.OBJECTIVES["all"], ranks.batches()["even"]
    module = ranks.scoring(objective, World())
    read = ranks.reading(module, batch)
    cells = cells_of(batch, objective, World(), torch.device("cpu"))
    monkeypatch.setattr(module.encoder, "forward", forward)
    assert batch_gradients(module, cells, read) is None
    module.sharded = True
    with pytest.raises(RuntimeError, match=r"set training\.micro_batch_tokens"):
        batch_gradients(module, cells, read)
