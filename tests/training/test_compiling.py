"""Compiled layers learn what they learn uncompiled."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bixse.models.encoder import load_model
from bixse.place import Place
from bixse.training.compiling import compiled, compiles, layers_of
from bixse.training.gather import World
from bixse.training.loop import Run, train_loop
from bixse.training.settings import Training
from tests.encoders import save_tiny_encoder
from tests.training import ranks


@pytest.mark.slow
def test_the_curve_is_the_same(tmp_path: Path) -> None:
    start = str(save_tiny_encoder(tmp_path))
    curves = []
    for wanted in (False, True):
        model = load_model(start, "cpu")
        settings = Training(
            batch_size=8, epochs=1, learning_rate=1e-3, precision="float32", compiled=wanted
        )
        place = Place(str(tmp_path / f"checkpoints-{wanted}"))
        torch._dynamo.utils.counters.clear()
        run = Run(settings, ranks.labels(20, 12, seed=3), place, "run")
        curves.append([line["loss"] for line in train_loop(run, model, World()).history])
        assert bool(torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)) == wanted
        assert all(layer._compiled_call_impl is None for layer in layers_of(model))
        # What is saved is the model that was.
        model.save_pretrained(str(tmp_path / f"trained-{wanted}"), create_model_card=False)
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
    assert len(curves[0]) > 5


def test_long_runs_on_a_gpu_compile(tmp_path: Path) -> None:
    model = load_model(str(save_tiny_encoder(tmp_path)), "cpu")
    assert not compiles(model, Training(), 10_000)
    assert compiles(model, Training(compiled=True), 1)
    assert len(list(layers_of(model))) == 2
    with compiled(model, wanted=False):
        assert all(layer._compiled_call_impl is None for layer in layers_of(model))
