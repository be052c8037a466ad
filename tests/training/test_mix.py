"""Several sets of labels: they take turns, share the encoder, and have a bias each."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bixse.models.encoder import load_model
from bixse.place import Place
from bixse.training.feed import batches_from, first_batches
from bixse.training.gather import World, cells_of
from bixse.training.gradients import batch_gradients
from bixse.training.groups import Labels
from bixse.training.loop import Run, Trained, train_loop, turns_of
from bixse.training.objective_settings import LCE, GradedBCE, Objective
from bixse.training.seen import Seen
from bixse.training.settings import Training
from tests.encoders import save_tiny_encoder
from tests.training import ranks
from tests.training.rank_process import Ranks

SETS = (ranks.labels(20, 12, seed=3), ranks.labels(11, 9, seed=8), ranks.labels(6, 30, seed=5))


@pytest.mark.parametrize(
    "objective, docs", [(GradedBCE(), 1), (GradedBCE(), 3), (LCE(), 4)], ids=["1", "3", "lce"]
)
def test_every_batch_is_one_that_its_set_has_alone(objective: Objective, docs: int) -> None:
    settings = Training(objective=objective, docs_per_query=docs, batch_size=8, epochs=2)
    mixed = list(batches_from(SETS, settings, turns_of(SETS, settings), 0))
    assert {batch.set_number for batch in mixed} == {0, 1, 2}
    for number, labels in enumerate(SETS):
        alone = batches_from([labels], settings, turns_of([labels], settings), 0)
        found = [batch for batch in mixed if batch.set_number == number]
        for ours, wanted in zip(found, alone, strict=True):
            for name, value in vars(replace(wanted, set_number=number)).items():
                assert np.array_equal(getattr(ours, name), value), name


@pytest.mark.parametrize("first", [1, 17, 40])
def test_batches_from_a_step_are_the_rest_of_all(first: int) -> None:
    settings = Training(batch_size=8, epochs=2)
    turns = turns_of(SETS, settings)
    whole, rest = (list(batches_from(SETS, settings, turns, step)) for step in (0, first))
    assert len(whole) == turns.steps > 40
    for ours, wanted in zip(rest, whole[first:], strict=True):
        for name, value in vars(wanted).items():
            assert np.array_equal(getattr(ours, name), value), name


def test_the_first_batch_of_each_set_is_the_first_that_training_meets() -> None:
    settings = Training(batch_size=8)
    turns = turns_of(SETS, settings)
    mixed = list(batches_from(SETS, settings, turns, 0))
    firsts = list(first_batches(SETS, settings, turns))
    assert len(firsts) == len(SETS)
    for number, first in enumerate(firsts):
        met = next(batch for batch in mixed if batch.set_number == number)
        assert np.array_equal(first.query_Q, met.query_Q)
        assert np.array_equal(first.document_D, met.document_D)


@pytest.mark.parametrize("name", ["graded_bce", "matryoshka", "combined"])
def test_a_batch_has_the_loss_and_moves_the_bias_of_its_set_alone(name: str) -> None:
    objective, batch = ranks.OBJECTIVES[name], ranks.batches()["even"]
    module = ranks.scoring(objective, World(), name, sets=3)
    alone = ranks.scoring(objective, World(), name)
    biases = torch.arange(len(module.bias), dtype=torch.float64) / 7 - 1
    module.bias.data = biases.clone()
    alone.bias.data = module.biases(1).detach().clone()
    found = {}
    for scoring, number in ((module, 1), (alone, 0)):
        of_set = replace(batch, set_number=number)
        cells = cells_of(of_set, objective, World(), torch.device("cpu"))
        found[scoring] = batch_gradients(scoring, cells, ranks.reading(scoring, of_set))
    torch.testing.assert_close(found[module], found[alone], rtol=0, atol=0)
    for ours, wanted in zip(module.parameters(), alone.parameters(), strict=True):
        if ours is not module.bias and wanted.grad is not None:
            torch.testing.assert_close(ours.grad, wanted.grad, rtol=0, atol=0)
    per_set = module.bias.grad.view(3, -1)
    torch.testing.assert_close(per_set[1], alone.bias.grad, rtol=0, atol=0)
    assert per_set[1].abs().min() > 0
    assert not per_set[[0, 2]].any()


def trained(directory: Path, sets: tuple[Labels, ...], name: str, **changes: Any) -> Trained:
    model = load_model(str(directory / "encoder"), "cpu")
    settings = Training(batch_size=16, learning_rate=2e-3, precision="float32")
    place = Place(str(directory / name))
    settings = settings.replace(**changes)
    return train_loop(Run(settings, sets[0], place, "run", sets[1:]), model, World())


def test_each_bias_starts_where_its_own_set_asks(tmp_path: Path) -> None:
    save_tiny_encoder(tmp_path)
    still = {"max_steps": 1, "learning_rate": 1e-12}
    mixed = trained(tmp_path, SETS, "mixed", **still)
    found = (mixed.bias, *mixed.mix_bias)
    for number, labels in enumerate(SETS):
        alone = trained(tmp_path, (labels,), f"alone-{number}", **still)
        assert found[number] == pytest.approx(alone.bias, abs=1e-3)
    assert len({round(bias, 1) for bias in found}) == 3


def test_every_set_learns_and_the_curve_says_whose_a_step_was(tmp_path: Path) -> None:
    save_tiny_encoder(tmp_path)
    curve = trained(tmp_path, SETS, "mixed", epochs=8).history
    for number in range(3):
        excess = [line["excess"] for line in curve if line["set"] == number]
        epoch = len(excess) // 8
        assert sum(excess[-epoch:]) < 0.9 * sum(excess[:epoch]), number


def test_what_is_shown_says_whose_a_step_was(tmp_path: Path) -> None:
    """While it trains, and of the steps that an interrupted run has behind it."""
    save_tiny_encoder(tmp_path)
    settings = Training(batch_size=16, max_steps=8, precision="float32")
    run = Run(settings, SETS[0], Place(str(tmp_path / "made")), "run", SETS[1:])
    for shows in ([0] + [1] * 8, [8]):
        shown: list[Seen] = []
        model = load_model(str(tmp_path / "encoder"), "cpu")
        history = train_loop(run, model, World(), shown.append).history
        assert [len(seen.lines) for seen in shown] == shows
        assert [line for seen in shown for line in seen.lines] == history
    assert {line["set"] for line in history} == {0, 1, 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """A run without interruption."""
    directory = tmp_path_factory.mktemp("whole")
    save_tiny_encoder(directory)
    return ranks.mixed(World(), directory)


def interrupt(directory: Path, steps: int) -> None:
    save_tiny_encoder(directory)
    (directory / "stop").write_text(str(steps))
    with pytest.raises(KeyboardInterrupt):
        ranks.mixed(World(), directory)
    (directory / "stop").unlink()


@pytest.mark.parametrize("steps", [5, 13, 31])
def test_resumed_equals_uninterrupted_bit_by_bit(
    steps: int, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    interrupt(tmp_path, steps)
    resumed = ranks.mixed(World(), tmp_path)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_two_ranks_equal_one_to_rounding_after_an_interruption_too(
    whole: dict[str, torch.Tensor], tmp_path: Path, run_ranks: Ranks
) -> None:
    interrupt(tmp_path, 13)
    resumed = run_ranks("mixed", 2, tmp_path)
    torch.testing.assert_close(resumed["curve"], whole["curve"], atol=1e-4, rtol=1e-4)
    assert torch.equal(resumed["curve"][:, -1], whole["curve"][:, -1])
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, atol=2e-4, rtol=1e-3, msg=name)
