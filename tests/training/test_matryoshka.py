"""Leading dimensions rank by themselves, and cut vectors are what plain cutting gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize

from bixse.models.encoder import load_model, truncated
from bixse.place import Place
from bixse.training import losses
from bixse.training.batches import batch_of
from bixse.training.gather import World, cells_of
from bixse.training.gradients import batch_gradients
from bixse.training.loop import Run, train_loop
from bixse.training.objective_settings import LCE, GradedBCE
from bixse.training.scoring import EncoderScoring
from bixse.training.settings import Training
from tests.encoders import save_tiny_encoder
from tests.training import ranks


def test_the_loss_is_the_mean_over_dimensions_each_with_its_bias() -> None:
    objective, batch = GradedBCE(scale=5.0), ranks.batches()["even"]
    module = ranks.scoring(objective, World(), "matryoshka")
    module.bias.data = torch.tensor([-0.5, 0.25, 1.0], dtype=torch.float64)
    cells = cells_of(batch, objective, World(), torch.device("cpu"))
    shares = batch_gradients(module, cells, ranks.reading(module, batch))
    assert shares is not None
    query, document = ranks.vectors(module.encoder, batch)
    target, weight = torch.from_numpy(batch.target_QD), torch.from_numpy(batch.weight_QD)
    by_hand = [
        losses.graded_bce(
            5.0 * normalize(query[:, :n]) @ normalize(document[:, :n]).T + bias,
            target,
            weight,
            len(batch.query_Q),
        )
        for n, bias in zip((6, 4, 2), module.bias, strict=True)
    ]
    torch.testing.assert_close(shares[0], torch.stack(by_hand).mean())
    assert len({round(loss.item(), 3) for loss in by_hand}) == 3


def test_each_bias_starts_where_its_own_cosines_ask(tmp_path: Path) -> None:
    save_tiny_encoder(tmp_path)
    model = load_model(str(tmp_path / "encoder"), "cpu")
    settings = Training(batch_size=8, max_steps=1, learning_rate=1e-12, dimensions=(8, 2))
    labels = ranks.labels(20, 12, seed=3)
    scorings: list[EncoderScoring] = []
    plain = EncoderScoring.__init__

    def noted(self: EncoderScoring, *args: object) -> None:
        plain(self, *args)  # type: ignore[arg-type]
        scorings.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EncoderScoring, "__init__", noted)
        train_loop(Run(settings, labels, Place(str(tmp_path / "c")), "f"), model, World())
    (module,) = scorings
    bias = module.bias.detach().tolist()
    assert len(set(bias)) == 3
    whole = Training(batch_size=8, max_steps=1, learning_rate=1e-12)
    alone = train_loop(Run(whole, labels, Place(str(tmp_path / "d")), "f"), model, World())
    assert bias[0] == pytest.approx(alone.bias, abs=1e-3)


def loss_at(leading: int, directory: Path, **changes: object) -> float:
    """Graded BCE at so many `leading` dimensions, after training, at its best bias."""
    settings = Training(batch_size=8, epochs=20, learning_rate=3e-3, precision="float32").replace(
        **changes
    )
    model = load_model(str(directory / "encoder"), "cpu")
    labels = ranks.labels(20, 12, seed=3)
    name = f"checkpoints-{len(settings.dimensions)}"
    train_loop(Run(settings, labels, Place(str(directory / name)), "f"), model, World())
    batch = batch_of(labels, np.arange(labels.pairs))
    query, document = (
        normalize(torch.tensor(model.encode(texts.to_pylist()))[:, :leading])
        for texts in (
            labels.query_text_Q.take(batch.query_Q),
            labels.document_text_D.take(batch.document_D),
        )
    )
    cosine, target = query @ document.T, torch.from_numpy(batch.target_QD)
    weight = torch.from_numpy(batch.weight_QD)
    bias = losses.calibrate_bias(cosine, target, weight, 20.0)
    return float(losses.graded_bce(20 * cosine + bias, target, weight, len(query)))


@pytest.mark.slow
def test_cut_vectors_rank_better_when_they_were_trained_to(tmp_path: Path) -> None:
    save_tiny_encoder(tmp_path)
    plain = loss_at(4, tmp_path)
    trained = loss_at(4, tmp_path, dimensions=(8, 4))
    assert trained < 0.9 * plain


def test_a_cut_encoder_is_plain_cutting_to_everybody(tmp_path: Path) -> None:
    save_tiny_encoder(tmp_path)
    texts = ["bal bem", "tot tut " * 9, "bal"]
    whole = SentenceTransformer(str(tmp_path / "encoder")).encode(texts)
    model = truncated(load_model(str(tmp_path / "encoder"), "cpu"), 8)
    model.save_pretrained(str(tmp_path / "cut"), create_model_card=False)
    found = SentenceTransformer(str(tmp_path / "cut")).encode(texts)
    expected = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    assert found.shape == (3, 8)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(ValueError, match="32 dimensions cannot be cut to 32"):
        truncated(load_model(str(tmp_path / "encoder"), "cpu"), 32)


def test_dimensions_that_are_not_there_are_refused(tmp_path: Path) -> None:
    save_tiny_encoder(tmp_path)
    model = load_model(str(tmp_path / "encoder"), "cpu")
    run = Run(
        Training(dimensions=(32,)), ranks.labels(20, 12, seed=3), Place(str(tmp_path / "c")), "f"
    )
    with pytest.raises(ValueError, match=r"fewer than the model's 32: found 32"):
        train_loop(run, model, World())
    with pytest.raises(ValidationError, match="makes no vectors"):
        Training(objective=LCE(), docs_per_query=4, dimensions=(8,))
    with pytest.raises(ValidationError, match="name a number twice"):
        Training(dimensions=(8, 8))
