"""The loop: learns, and goes on after an interruption as if there had been none."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel

from bixse.models.encoder import load_model
from bixse.models.reranker import load_reranker
from bixse.place import Place
from bixse.settings import Precision
from bixse.training.attention import fast_attention
from bixse.training.gather import World
from bixse.training.loop import METRICS, Notice, Run, Stopped, Trained, train_loop
from bixse.training.objective_settings import GradedBCE, InfoNCE, Objective, PairBCE
from bixse.training.settings import Training
from tests.encoders import save_tiny_encoder
from tests.training import ranks
from tests.training.rank_process import Ranks


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """A run without interruption."""
    return uninterrupted(tmp_path_factory.mktemp("whole"))


def uninterrupted(directory: Path) -> dict[str, torch.Tensor]:
    save_tiny_encoder(directory)
    return ranks.loop(World(), directory)


def interrupt(directory: Path, steps: int) -> None:
    """Stop a run after some steps; its last checkpoint lies at a multiple of 4."""
    (directory / "stop").write_text(str(steps))
    with pytest.raises(KeyboardInterrupt):
        uninterrupted(directory)
    (directory / "stop").unlink()


@pytest.mark.parametrize("steps", [3, 8, 13])
def test_resumed_equals_uninterrupted_bit_by_bit(
    steps: int, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    interrupt(tmp_path, steps)
    resumed = ranks.loop(World(), tmp_path)
    assert len(whole["curve"]) > 20
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_resumed_on_two_ranks_equals_uninterrupted_to_rounding(
    whole: dict[str, torch.Tensor], tmp_path: Path, run_ranks: Ranks
) -> None:
    interrupt(tmp_path, 13)
    resumed = run_ranks("loop", 2, tmp_path)
    torch.testing.assert_close(resumed["curve"], whole["curve"], atol=1e-4, rtol=1e-4)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, atol=2e-4, rtol=1e-3, msg=name)


def trained(directory: Path, objective: Objective, **changes: Any) -> Trained:
    model = load_model(str(save_tiny_encoder(directory)), "cpu")
    settings = Training(objective=objective, batch_size=16, learning_rate=2e-3).replace(**changes)
    run = Run(settings, ranks.labels(16, 12, seed=9), Place(str(directory / "checkpoints")), "run")
    return train_loop(run, model, World())


@pytest.mark.parametrize(
    "objective",
    [
        GradedBCE(learn_scale=True),
        *(InfoNCE(positives=form) for form in ("all", "threshold", "weighted")),
    ],
    ids=["graded_bce", "all", "threshold", "weighted"],
)
def test_every_objective_learns(objective: Objective, tmp_path: Path) -> None:
    curve = trained(tmp_path, objective, epochs=5).history
    first, last = (sum(line["excess"] for line in part) for part in (curve[:5], curve[-5:]))
    assert last < 0.9 * first
    assert [line["step"] for line in curve] == list(range(1, len(curve) + 1))
    assert set(curve[0]) == set(METRICS)
    assert all(line["excess"] >= 0 and line["grad_norm"] > 0 for line in curve)
    # A softmax can reach 0, graded BCE the entropy of its labels.
    graded = isinstance(objective, GradedBCE)
    assert all((line["excess"] < line["loss"] - 0.1) == graded for line in curve)


def test_an_encoder_stored_in_bfloat16_is_tuned_in_float32(tmp_path: Path) -> None:
    # A weight of 0.02 has neighbours at 1e-4 in bfloat16: a step of 2e-5 rounds back to it.
    changes: dict[str, Any] = {
        "epochs": 1,
        "max_steps": 4,
        "learning_rate": 2e-5,
        "weight_decay": 0.0,
    }
    found = {}
    for name in ("rounded", "whole"):
        start = str(save_tiny_encoder(tmp_path / name))
        model = load_model(start, "cpu").bfloat16()
        (model if name == "rounded" else model.float()).save_pretrained(start)
        found[name] = ranks.loop(World(), tmp_path / name, **changes)
    before = dict(load_model(start, "cpu").named_parameters())
    for name, value in found["whole"].items():
        assert torch.equal(found["rounded"][name], value), name
    moved = [(found["rounded"][name] - before[name]).abs().max().item() for name in before]
    assert 2e-5 < max(moved) < 1e-4


def test_the_bias_starts_calibrated_and_a_fixed_scale_stays(tmp_path: Path) -> None:
    result = trained(tmp_path, GradedBCE(), epochs=1, learning_rate=1e-9)
    assert result.scale == 20
    # At an untrained encoder's cosines, near 1, a bias near -20 gives the mean target.
    assert -30 < result.bias < -15
    assert result.history[0]["loss"] < 0.1 * 20 * result.history[0]["documents"]


def test_numbers_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lower the learning rate|not finite"):
        trained(tmp_path, GradedBCE(), learning_rate=1e30, epochs=2)


@pytest.mark.parametrize(
    ("objective", "tokens"),
    [(GradedBCE(), {"document_tokens": 300}), (PairBCE(), {"query_tokens": 128})],
)
def test_longer_texts_than_the_model_reads_are_refused(
    objective: Objective, tokens: dict[str, int], tmp_path: Path
) -> None:
    start = str(save_tiny_encoder(tmp_path))
    pairs = objective.scores_pairs
    model = load_reranker(start, "cpu") if pairs else load_model(start, "cpu")
    run = Run(
        Training(objective=objective, **tokens),
        ranks.labels(16, 12, seed=9),
        Place(str(tmp_path)),
        "run",
    )
    asked, read = (384, 64) if pairs else (300, 32)
    with pytest.raises(ValueError, match=f"texts of {asked} tokens, and the model reads {read}"):
        train_loop(run, model, World())


@pytest.mark.parametrize("role", ["query", "document"])
def test_a_prompt_that_leaves_no_room_for_a_text_is_refused(role: str, tmp_path: Path) -> None:
    prompts = {"query": "", "document": "", role: "ask tell : " * 2}
    model = load_model(str(save_tiny_encoder(tmp_path, prompts)), "cpu")
    # With the two tokens that stand around every text, eight.
    for limit in (8, 9):
        tokens = {f"{role}_tokens": limit}
        settings = Training(max_steps=1, **tokens)
        run = Run(
            settings, ranks.labels(16, 12, seed=9), Place(str(tmp_path / "checkpoints")), "run"
        )
        if limit == 9:
            assert len(train_loop(run, model, World()).history) == 1
            continue
        sentence = f"the {role} prompt of the model takes 8 tokens and leaves none for a {role}"
        with pytest.raises(ValueError, match=sentence):
            train_loop(run, model, World())


def test_micro_batches_change_nothing_but_rounding(
    whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_tiny_encoder(tmp_path)
    cached = ranks.loop(World(), tmp_path, micro_batch_tokens=32)
    for name, value in whole.items():
        torch.testing.assert_close(cached[name], value, atol=2e-4, rtol=1e-3, msg=name)


def out_of_memory_above(tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a BERT run out of memory on more than some tokens at a time; what it was asked for."""
    forward, asked = BertModel.forward, []

    def limited(self: BertModel, input_ids: torch.Tensor, **kwargs: object) -> object:
        asked.append(input_ids.numel())
        if input_ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, input_ids, **kwargs)

    limited.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(BertModel, "forward", limited)
    return asked


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step(
    whole: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_encoder(tmp_path)
    asked = out_of_memory_above(40, monkeypatch)
    halved = ranks.loop(World(), tmp_path)
    too_large = [tokens for tokens in asked if tokens > 40]
    # Each attempt ends at its first chunk that does not fit; later steps keep to what did.
    assert 1 <= len(too_large) <= 6
    assert asked.index(too_large[-1]) < len(asked) // 4
    for name, value in whole.items():
        torch.testing.assert_close(halved[name], value, atol=2e-4, rtol=1e-3, msg=name)


def test_a_text_that_fits_nowhere_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_encoder(tmp_path)
    out_of_memory_above(4, monkeypatch)
    with pytest.raises(RuntimeError, match="memory does not suffice for one text"):
        ranks.loop(World(), tmp_path, objective=InfoNCE())


def test_a_notice_saves_and_stops_and_the_run_goes_on_exactly(
    whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_tiny_encoder(tmp_path)
    heard = iter([Notice.NONE, Notice.SAVE, Notice.SAVE, Notice.NONE, Notice.NONE, Notice.STOP])
    saved = []

    def notice() -> Notice:
        saved.append(sorted(path.name[:13] for path in (tmp_path / "checkpoints").glob("step-*")))
        return next(heard)

    with pytest.raises(Stopped, match="after step 6 of"):
        ranks.loop(World(), tmp_path, notice)
    # Saved once after step 2, as told, and after step 4, as always.
    assert saved[2:6] == [["step-00000002"]] * 2 + [["step-00000002", "step-00000004"]] * 2
    assert (tmp_path / "checkpoints").exists()
    resumed = ranks.loop(World(), tmp_path)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_attention_is_what_it_was_after_training(tmp_path: Path) -> None:
    model = load_model(str(save_tiny_encoder(tmp_path)), "cpu")
    config = model[0].model.config
    chosen: dict[Precision, str] = {"float32": "sdpa", "bfloat16": "bixse_packed"}
    for precision, attention in chosen.items():
        with fast_attention(model, precision, 128):
            assert config._attn_implementation == attention
        assert config._attn_implementation == "sdpa"


def test_what_cannot_be_packed_is_multiplied_plainly_unless_it_is_long(tmp_path: Path) -> None:
    model = load_model(str(save_tiny_encoder(tmp_path)), "cpu")
    # A module that `may_pack` does not know.
    model.append(torch.nn.Identity())
    config = model[0].model.config
    for longest, attention in ((128, "eager"), (8192, "sdpa")):
        with fast_attention(model, "bfloat16", longest):
            assert config._attn_implementation == attention
        assert config._attn_implementation == "sdpa"
