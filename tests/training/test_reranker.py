"""A reranker goes through the encoder's loop: its losses, its texts, resuming, its scores."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoTokenizer

from bixse.models.encoder import load_model
from bixse.models.reranker import Reranker, load_reranker, reranked
from bixse.reading.chunks import Texts, tokenise
from bixse.records import Hit
from bixse.training.gather import World, cells_of
from bixse.training.gradients import batch_gradients
from bixse.training.objective_settings import LCE, Combined, GradedBCE, PairBCE
from bixse.training.scoring import RerankerScoring
from bixse.training.settings import Training
from tests.encoders import (
    save_tiny_cross_encoder,
    save_tiny_decoder,
    save_tiny_encoder,
    texts,
    without_padding,
)
from tests.training import ranks
from tests.training.rank_process import Ranks


@pytest.mark.parametrize("kind", ranks.batches())
@pytest.mark.parametrize("name", ["lce", "pair_bce"])
def test_one_process_equals_the_formula(name: str, kind: str) -> None:
    """Methods 9 and 1.1, written out pair by pair."""
    objective, batch = ranks.OBJECTIVES[name], ranks.batches()[kind]
    model = ranks.Together()
    pairs = np.flatnonzero(batch.own_K)
    score = model({"words": ranks.pair_words(batch, pairs)}, "pair")["scores"][:, 0]
    row, z = batch.row_K[pairs], batch.relevance_K[pairs].astype(float)
    loss, count = torch.zeros((), dtype=torch.float64), 0
    for n in range(len(pairs)):
        if isinstance(objective, PairBCE):
            p = torch.sigmoid(score[n])
            loss = loss - z[n] * p.log() - (1 - z[n]) * (1 - p).log()
            count += 1
        else:
            others = [k for k in range(len(pairs)) if row[k] == row[n] and z[k] < 0.5]
            if z[n] >= 0.5 and others:
                scores = torch.stack([score[n], *(score[k] for k in others)]) / 0.5
                loss = loss - scores[0] + scores.exp().sum().log()
                count += 1
    loss = loss / max(count, 1)
    if count:
        loss.backward()

    module = ranks.scoring(objective, World())
    cells = cells_of(batch, objective, World(), torch.device("cpu"))
    shares = batch_gradients(module, cells, ranks.reading(module, batch))
    assert shares is not None
    torch.testing.assert_close(shares[0], loss.detach(), atol=1e-10, rtol=1e-9)
    # What the labels leave open: nothing of a positive among negatives.
    open_ = -(z * np.log(z) + (1 - z) * np.log(1 - z)) if isinstance(objective, PairBCE) else 0 * z
    assert float(shares[1]) == pytest.approx(open_.mean(), abs=1e-6)
    for mine, wanted in zip(module.encoder.parameters(), model.parameters(), strict=True):
        expected = torch.zeros_like(mine) if wanted.grad is None else wanted.grad
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, expected, atol=1e-10, rtol=1e-9)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """A run without interruption, from an encoder without a head."""
    directory = tmp_path_factory.mktemp("whole")
    save_tiny_encoder(directory)
    return ranks.reranker(World(), directory)


def interrupt(directory: Path, steps: int) -> None:
    save_tiny_encoder(directory)
    (directory / "stop").write_text(str(steps))
    with pytest.raises(KeyboardInterrupt):
        ranks.reranker(World(), directory)
    (directory / "stop").unlink()


# Before the first checkpoint too: the head that the encoder lacks is drawn again the same.
@pytest.mark.parametrize("steps", [2, 7])
def test_resumed_equals_uninterrupted_bit_by_bit(
    steps: int, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    interrupt(tmp_path, steps)
    resumed = ranks.reranker(World(), tmp_path)
    assert len(whole["curve"]) > 10
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.slow
def test_resumed_on_two_ranks_equals_uninterrupted_to_rounding(
    whole: dict[str, torch.Tensor], tmp_path: Path, run_ranks: Ranks
) -> None:
    interrupt(tmp_path, 7)
    resumed = run_ranks("reranker", 2, tmp_path)
    # A softmax does not see what these add to every score: their gradients are rounding, which Adam
    # scales up.
    added = {"2.linear.bias", "0.model.encoder.layer.1.output.LayerNorm.bias"}
    assert added < whole.keys()
    for name in whole.keys() - added:
        value = whole[name]
        torch.testing.assert_close(resumed[name], value, atol=2e-4, rtol=1e-3, msg=name)


def test_trained_and_served_scores_agree(tmp_path: Path) -> None:
    directory = str(save_tiny_cross_encoder(tmp_path, logits=1))
    reranker = Reranker.load(directory, "cpu")
    (query, *documents) = texts(40, seed=1, longest=40)
    model = load_reranker(directory, "cpu").eval()
    module = RerankerScoring(model, LCE(), World(), "float32")
    side = tokenise(model, [Texts([(query, document) for document in documents], "pair", 512, 39)])
    side = side.within(512)
    assert len(side.chunks) >= 3
    scores = module.ordered(torch.cat(list(module.made(side))), side.sides[0]).detach().squeeze(1)
    np.testing.assert_allclose(scores, reranker.score(query, documents), atol=1e-5)
    assert scores.std() > 0.1
    assert reranker.score(query, []).shape == (0,)


def test_a_model_of_other_scores_is_refused(tmp_path: Path) -> None:
    three = save_tiny_cross_encoder(tmp_path, logits=3)
    with pytest.raises(ValueError, match="is no reranker with one score a pair"):
        load_reranker(str(three), "cpu")


def weight(model: torch.nn.Module, name: str) -> torch.Tensor:
    return next(value for key, value in model.state_dict().items() if key.endswith(name))


@pytest.mark.parametrize("pooled", [True, False])
def test_a_head_is_drawn_by_the_seed(pooled: bool, tmp_path: Path) -> None:
    start = str(save_tiny_encoder(tmp_path))
    models = [load_reranker(start, "cpu", seed, pooled) for seed in (0, 0, 1)]
    heads = [
        weight(model, "2.linear.weight" if pooled else "classifier.weight") for model in models
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    body = weight(load_model(start, "cpu"), "word_embeddings.weight")
    assert torch.equal(weight(models[0], "word_embeddings.weight"), body)


def test_a_decoder_takes_the_padding_that_its_tokenizer_knows(tmp_path: Path) -> None:
    start = save_tiny_decoder(tmp_path, "right")
    assert AutoConfig.from_pretrained(start).pad_token_id is None
    load_reranker(str(start), "cpu", pooled=False).save_pretrained(str(tmp_path / "reranker"))
    reranker = Reranker.load(str(tmp_path / "reranker"), "cpu")
    pairs = [("bal", text) for text in texts(6, seed=1)]
    alone = np.concatenate([reranker.logits([pair]) for pair in pairs])
    np.testing.assert_allclose(reranker.logits(pairs), alone, atol=1e-5)

    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(start)
    with pytest.raises(ValueError, match="give it a padding token of its own"):
        load_reranker(str(start), "cpu", pooled=False)


def test_a_decoder_without_padding_reads_several_pairs_at_once(tmp_path: Path) -> None:
    """Its texts end in no token of their own, as those of Llama do."""
    start = without_padding(save_tiny_decoder(tmp_path, "right"))
    tokenizer = json.loads((start / "tokenizer.json").read_text())
    (start / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    load_reranker(str(start), "cpu", pooled=False).save_pretrained(str(tmp_path / "reranker"))
    reranker = Reranker.load(str(tmp_path / "reranker"), "cpu")
    pairs = [("bal", text) for text in texts(6, seed=1)]
    alone = np.concatenate([reranker.logits([pair]) for pair in pairs])
    np.testing.assert_allclose(reranker.logits(pairs), alone, atol=1e-5)


def test_reranked_hits_stand_by_score_and_the_others_below() -> None:
    hits = [Hit(name, 0.9 - n / 10, n + 1) for n, name in enumerate("dcba")]
    found = reranked(hits, [0.5, 2.0, 0.5])
    assert [(hit.doc_id, hit.score, hit.rank) for hit in found] == [
        ("c", 2.0, 1),
        ("b", 0.5, 2),
        ("d", 0.5, 3),
        ("a", pytest.approx(0.6), 4),
    ]


def test_settings_that_teach_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="counts the positive"):
        Training(objective=LCE())
    with pytest.raises(ValidationError, match="there is one model"):
        Combined(parts=(LCE(), GradedBCE()), weights=(1.0, 1.0))
