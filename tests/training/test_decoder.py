"""A decoder whose vector is its last token's: padding on either side changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bixse.models.encoder import Encoder, encoder_fingerprint, load_model
from bixse.place import Place
from bixse.reading.chunks import Texts, tokenise
from bixse.training.gather import World
from bixse.training.loop import Run, train_loop
from bixse.training.objective_settings import GradedBCE
from bixse.training.scoring import EncoderScoring
from bixse.training.settings import Training
from tests.encoders import save_tiny_decoder, texts
from tests.training import ranks

SIDES = ("left", "right")


@pytest.mark.parametrize("padding_side", SIDES)
def test_a_padded_batch_equals_texts_one_by_one(padding_side: str, tmp_path: Path) -> None:
    directory = save_tiny_decoder(tmp_path, padding_side)
    model, encoder = load_model(str(directory), "cpu").eval(), Encoder.load(str(directory), "cpu")
    assert model.tokenizer.padding_side == padding_side
    module = EncoderScoring(model, GradedBCE(), World(), "float32")
    # The longest are cut.
    read = texts(40, seed=1, longest=60)
    alone = np.concatenate([encoder.encode([text], "query") for text in read])
    assert (alone[0] @ alone[1:].T).max() < 0.999
    assert (alone * encoder.encode(read, "query")).sum(axis=1).min() > 0.9999
    for most in (None, 128):
        side = tokenise(model, [Texts(read, "query", 512)], most)
        padded = [not chunk["attention_mask"].all() for _, chunk in side.chunks]
        assert any(padded)
        vectors = module.vectors(torch.cat(list(module.made(side))), side.sides[0]).detach().numpy()
        assert (alone * vectors).sum(axis=1).min() > 0.9999


def test_it_learns_alike_from_either_side_and_is_saved_as_it_is(tmp_path: Path) -> None:
    curves = []
    for side in SIDES:
        start = save_tiny_decoder(tmp_path / side, side)
        model = load_model(str(start), "cpu")
        settings = Training(batch_size=16, epochs=5, learning_rate=2e-3, precision="float32")
        checkpoints = Place(str(tmp_path / side / "checkpoints"))
        run = Run(settings, ranks.labels(16, 12, seed=9), checkpoints, "run")
        curves.append([line["excess"] for line in train_loop(run, model, World()).history])
        saved = tmp_path / side / "trained"
        model.save_pretrained(str(saved), create_model_card=False)
        assert encoder_fingerprint(saved) != encoder_fingerprint(start)
        expected = model.encode_query(["bal bem", "tot"], normalize_embeddings=True)
        found = Encoder.load(str(saved), "cpu").encode(["bal bem", "tot"], "query")
        assert (found * expected).sum(axis=1).min() > 0.9999
    assert sum(curves[0][-5:]) < 0.9 * sum(curves[0][:5])
    # Before rounding has been trained upon.
    np.testing.assert_allclose(curves[0][:3], curves[1][:3], rtol=1e-3)
