"""Tuning a language model on answers: what carries loss, what changes nothing, what learns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from bixse.models.language_model import load_language_model
from bixse.training.completions import (
    Completions,
    answer_losses,
    completion_gradients,
    expectations,
)
from bixse.training.gather import World
from tests.conftest import save_tiny_llm
from tests.training import ranks
from tests.training.rank_process import Ranks

WHOLE = World()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    found, stored = load_language_model(save_tiny_llm(tmp_path_factory.mktemp("llm")))
    assert stored == torch.float32
    return found.eval()


def test_a_loss_is_the_answers_log_probability_one_row_at_a_time(model: torch.nn.Module) -> None:
    prompts, answers = [[5, 6, 7, 8], [9], [10, 11]], [[3, 4], [12, 13, 14, 15], [20]]
    rows = Completions.of(zip(prompts, answers, strict=True))
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
        log_probs = functional.log_softmax(logits, -1)
        at = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        expected.append(-log_probs[list(at), answer].sum())
    found = answer_losses(model, rows, np.arange(3))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-5)
    per_token, labels = expectations(model, rows, [3, 12], 6, WHOLE, "float32")
    np.testing.assert_allclose(
        np.asarray(per_token),
        [-e.item() / len(a) for e, a in zip(expected, answers, strict=True)],
        atol=1e-4,
    )
    logits = model(input_ids=torch.tensor([prompts[0]])).logits[0, -1]
    first = functional.log_softmax(logits, -1)
    np.testing.assert_allclose(labels[0], first[[3, 12]].detach().numpy(), atol=1e-4)


def test_prompt_tokens_carry_no_loss(model: torch.nn.Module) -> None:
    """The gradient at the logits is zero wherever the next token is one of the prompt's."""
    rows = Completions.of([([5, 6, 7, 8, 9], [3, 4]), ([9, 10], [12, 13, 14])])
    seen: list[torch.Tensor] = []
    forward = model.forward

    def watched(**kwargs: object) -> object:
        kwargs["logits_to_keep"] = 0  # All positions.
        found = forward(**kwargs)
        found.logits.retain_grad()
        seen.append(found.logits)
        found["logits"] = found.logits[:, -4:]
        return found

    model.forward = watched
    try:
        completion_gradients(model, rows, np.arange(2), 1000, WHOLE, "float32")
    finally:
        model.forward = forward
    # Width 7; rows end together: logits at 4, 5 tell the first answer, at 3, 4, 5 the second.
    touched = seen[0].grad.abs().sum(-1) > 0
    assert touched.tolist() == [
        [False, False, False, False, True, True, False],
        [False, False, False, True, True, True, False],
    ]


def test_micro_batches_change_nothing_but_rounding(model: torch.nn.Module) -> None:
    rows = ranks.completions(20)
    found = []
    for limit in (10_000, 1):
        loss = completion_gradients(model, rows, np.arange(20), limit, WHOLE, "float32")
        found.append([torch.tensor(loss), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def test_a_chunk_is_within_the_limit_or_one_row() -> None:
    rows = ranks.completions(30)
    length = np.diff(rows.begin_R1)
    chunks = list(rows.chunks(np.arange(5, 30), 40))
    assert sorted(np.concatenate(chunks)) == list(range(5, 30))
    assert all(len(c) == 1 or len(c) * length[c].max() <= 40 for c in chunks)
    assert any(len(c) > 1 for c in chunks)
    with pytest.raises(ValueError, match="a prompt and an answer"):
        Completions.of([([1], [])])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """A run without interruption."""
    directory = tmp_path_factory.mktemp("whole")
    save_tiny_llm(directory / "llm")
    return ranks.tuning(WHOLE, directory)


def interrupt(directory: Path, steps: int) -> None:
    """Stop a run after some steps; its last checkpoint lies at a multiple of 4."""
    save_tiny_llm(directory / "llm")
    (directory / "stop").write_text(str(steps))
    with pytest.raises(KeyboardInterrupt):
        ranks.tuning(WHOLE, directory)
    (directory / "stop").unlink()


def test_answers_become_likelier_and_held_out_ones_are_measured(
    whole: dict[str, torch.Tensor],
) -> None:
    curve = whole["curve"]
    assert len(curve) == 2 * 8
    assert curve[-4:, 2].mean() < 0.8 * curve[:4, 2].mean()
    # Held-out rows are the same task: what was learned holds for them.
    assert whole["after"].mean() > whole["before"].mean() + 0.5


@pytest.mark.parametrize("steps", [3, 8, 13])
def test_resumed_equals_uninterrupted_bit_by_bit(
    steps: int, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    interrupt(tmp_path, steps)
    resumed = ranks.tuning(WHOLE, tmp_path)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.slow
def test_resumed_on_two_ranks_equals_uninterrupted_to_rounding(
    whole: dict[str, torch.Tensor], tmp_path: Path, run_ranks: Ranks
) -> None:
    interrupt(tmp_path, 8)
    resumed = run_ranks("tuning", 2, tmp_path)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_two_ranks_equal_one_to_rounding(
    whole: dict[str, torch.Tensor], tmp_path: Path, run_ranks: Ranks
) -> None:
    save_tiny_llm(tmp_path / "llm")
    found = run_ranks("tuning", 2, tmp_path)
    torch.testing.assert_close(found["curve"], whole["curve"], atol=1e-4, rtol=1e-3)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, atol=2e-4, rtol=1e-3, msg=name)


def test_numbers_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    save_tiny_llm(tmp_path / "llm")
    with pytest.raises(ValueError, match="lower the learning rate"):
        ranks.tuning(WHOLE, tmp_path, learning_rate=1e30)
