"""The `train` verb on Ray Train: it learns, survives kill -9, and refuses what teaches nothing."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from bixse.artifacts import Artifact, ArtifactError
from bixse.models.encoder import Encoder, Role
from bixse.records import CORPUS, JUDGMENTS, QUERIES
from bixse.training.objective_settings import GradedBCE
from bixse.training.settings import Training
from jobs.recipe import Placement
from jobs.supervision import read_labels
from jobs.train import train
from tests.artifacts import artifact
from tests.encoders import save_tiny_encoder, texts

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Training(
    objective=GradedBCE(learn_scale=True),
    batch_size=8,
    epochs=6,
    learning_rate=1e-3,
    checkpoint_every=5,
)
# 24 queries with 3 judgments each.
QUERY_TEXTS = texts(24, seed=1)
DOCUMENT_TEXTS = texts(30, seed=2)


def judgments(path: Path, rows: list[tuple[str, str, float]]) -> Artifact:
    fields = {"grade_probs": [1.0], "judge": "test", "prompt": "", "origin": "human"}
    judged = [{"query_id": q, "doc_id": d, "relevance": z, **fields} for q, d, z in rows]
    return artifact(path / "judgments", "judgments", judged, JUDGMENTS)


def inputs(path: Path) -> tuple[Artifact, list[Artifact], Artifact]:
    """Judgments, queries and corpus, made once at `path`."""
    documents = [
        {"doc_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(DOCUMENT_TEXTS)
    ]
    asked = [
        {"query_id": f"q{i}", "text": text, "origin": "given"} for i, text in enumerate(QUERY_TEXTS)
    ]
    corpus = artifact(path / "corpus", "corpus", documents, CORPUS)
    queries = artifact(path / "queries", "queries", asked, QUERIES)
    rows = [
        (f"q{q}", f"d{(q * 7 + k) % 30}", grade)
        for q in range(24)
        for k, grade in enumerate((1.0, 0.5, 0.0))
    ]
    return judgments(path, rows), [queries], corpus


def train_at(path: Path, out: str, workers: int = 1) -> Artifact:
    judged, queries, corpus = inputs(path)
    placement = Placement(train_workers=workers)
    start = str(path / "start" / "encoder")
    return train(judged, queries, corpus, SETTINGS, start, placement, str(path / out))


def curve(encoder: Artifact) -> list[dict[str, float]]:
    return [json.loads(line) for line in encoder.place.read("training.jsonl").splitlines()]


DRIVER = """
import sys
from importlib import import_module
from pathlib import Path
import_module(sys.argv[3]).train_at(Path(sys.argv[1]), sys.argv[2])
"""


@contextmanager
def driver_at(
    path: Path, out: str, steps: int, module: str = "tests.jobs.test_train"
) -> Iterator[subprocess.Popen[bytes]]:
    """A driver of its own, which trains as `module` does, once a checkpoint of `steps` steps
    stands; killed in the end.
    """
    command = [sys.executable, "-c", DRIVER, str(path), out, module]
    with open(path / f"{out}.log", "w") as log:
        driver = subprocess.Popen(command, cwd=ROOT, stderr=log)
    deadline = time.monotonic() + 240
    try:
        while not list((path / f"{out}-checkpoints").glob(f"step-{steps:08d}-*.safetensors")):
            assert driver.poll() is None, "the driver ended too early"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield driver
    finally:
        driver.kill()
        driver.wait()


def kill_after(path: Path, out: str, steps: int) -> None:
    """Start a driver and kill it with -9 once a checkpoint of `steps` steps stands."""
    with driver_at(path, out, steps):
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("train")
    save_tiny_encoder(path / "start", {"query": "ask: ", "document": "tell: "})
    return path


@pytest.fixture(scope="module")
def whole(place: Path) -> Artifact:
    """An uninterrupted run on one worker."""
    return train_at(place, "whole")


def test_an_encoder_is_made_and_learned_something(whole: Artifact, place: Path) -> None:
    lines = curve(whole)
    assert len(lines) == whole.manifest.extra["steps"] == 54
    assert sum(line["excess"] for line in lines[-9:]) < 0.8 * sum(
        line["excess"] for line in lines[:9]
    )
    scale_bias = json.loads(whole.place.read("scale_bias.json"))
    assert scale_bias == {"scale": lines[-1]["scale"], "bias": lines[-1]["bias"]}
    assert whole.manifest.rows == whole.manifest.extra["judgments"] == 72
    assert whole.manifest.extra["workers"] == 1
    assert whole.manifest.extra["pairs_per_second"] > 0
    assert whole.manifest.inputs.keys() == {"judgments", "queries-0", "corpus", "start"}
    assert not (place / "whole-checkpoints").exists()
    assert Artifact.open(whole.url, "encoder").fingerprint == whole.fingerprint


def test_sentence_transformers_gives_the_vectors_that_we_serve(whole: Artifact) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = Encoder.load(whole.url, "cpu")
    assert encoder.fingerprint == whole.manifest.extra["encoder"]
    model = SentenceTransformer(whole.url, device="cpu")
    theirs_of: dict[Role, Any] = {"query": model.encode_query, "document": model.encode_document}
    for role, encode in theirs_of.items():
        ours, theirs = encoder.encode(DOCUMENT_TEXTS, role), encode(DOCUMENT_TEXTS)
        cosine = (ours * theirs / np.linalg.norm(theirs, axis=1, keepdims=True)).sum(axis=1)
        assert cosine.min() > 0.9999
        np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-5)
    assert not list(Path(whole.url).rglob("*.bin"))


def test_a_killed_driver_goes_on_to_the_same_encoder(whole: Artifact, place: Path) -> None:
    kill_after(place, "killed", steps=15)
    assert not (place / "killed" / "manifest.json").exists()
    again = train_at(place, "killed")
    assert curve(again) == curve(whole)
    assert again.fingerprint == whole.fingerprint
    assert train_at(place, "killed").manifest == again.manifest


@pytest.mark.slow
def test_a_killed_run_goes_on_with_two_workers(whole: Artifact, place: Path) -> None:
    # What a driver leaves that dies after the last checkpoint before step 54 is written.
    kill_after(place, "moved", steps=10)
    moved = train_at(place, "moved", workers=2)
    assert moved.manifest.extra["workers"] == 2
    ours, theirs = curve(moved), curve(whole)
    assert ours[:10] == theirs[:10]
    np.testing.assert_allclose(
        [line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=1e-3
    )
    vectors = [Encoder.load(run.url, "cpu").encode(QUERY_TEXTS, "query") for run in (moved, whole)]
    assert (vectors[0] * vectors[1]).sum(axis=1).min() > 0.9999


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_goes_on(whole: Artifact, place: Path) -> None:
    with driver_at(place, "replaced", steps=15) as driver:
        workers = [
            process
            for process in psutil.Process(driver.pid).children(recursive=True)
            if any("RayTrainWorker" in part for part in process.cmdline())
        ]
        assert len(workers) == 1
        workers[0].kill()
        assert driver.wait(240) == 0
    replaced = train_at(place, "replaced")
    assert curve(replaced) == curve(whole)
    assert replaced.fingerprint == whole.fingerprint


@pytest.mark.slow
def test_a_driver_told_to_stop_saves_its_last_step_and_goes_on(
    whole: Artifact, place: Path
) -> None:
    with driver_at(place, "stopped", steps=10) as driver:
        driver.terminate()
        assert driver.wait(240) == 1
    log = (place / "stopped.log").read_text()
    found = re.search(r"stopped after step (\d+) of 54, which is saved", log)
    assert found, log[-2000:]
    steps = int(found.group(1))
    assert 10 <= steps < 54
    assert list((place / "stopped-checkpoints").glob(f"step-{steps:08d}-*.safetensors"))
    stopped = train_at(place, "stopped")
    assert curve(stopped) == curve(whole)
    assert stopped.fingerprint == whole.fingerprint


_ON_CTRL_C = signal.getsignal(signal.SIGINT)


def test_training_leaves_ctrl_c_as_it_was(whole: Artifact) -> None:
    assert signal.getsignal(signal.SIGINT) is _ON_CTRL_C


def test_workers_that_a_machine_has_no_room_for_are_refused(place: Path) -> None:
    judged, queries, corpus = inputs(place)
    start, out = str(place / "start" / "encoder"), str(place / "unmet")
    with pytest.raises(ValueError, match=r"asks for 1000 CPUs .* or --placement\.train-workers"):
        train(judged, queries, corpus, SETTINGS, start, Placement(train_workers=1000), out)


def test_other_settings_or_inputs_are_refused(whole: Artifact, place: Path) -> None:
    judged, queries, corpus = inputs(place)
    other = SETTINGS.replace(learning_rate=1e-4)
    start = str(place / "start" / "encoder")
    with pytest.raises(ArtifactError, match="learning_rate"):
        train(judged, queries, corpus, other, start, Placement(), whole.url)


@pytest.mark.parametrize(
    "rows, sentence",
    [
        ([], "no judgments"),
        ([("q0", "d0", 0.0), ("q1", "d1", 0.0)], "all 2 judgments have relevance 0"),
        ([("q0", "d0", 1.0)], "2 rows or more, found 1"),
        ([("q0", "d0", 1.0), ("nobody", "d1", 1.0)], "1 of 2 judgments name a query .*'nobody'"),
        ([("q0", "d0", 1.0), ("q1", "gone", 1.0)], "1 of 2 judgments name a document .*'gone'"),
    ],
)
def test_what_teaches_nothing_is_refused_before_ray_starts(
    rows: list[tuple[str, str, float]], sentence: str, place: Path, tmp_path: Path
) -> None:
    _, queries, corpus = inputs(place)
    judged, start = judgments(tmp_path, rows), str(place / "start" / "encoder")
    with pytest.raises(ValueError, match=sentence):
        train(judged, queries, corpus, SETTINGS, start, Placement(), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_query_with_two_texts_is_refused(place: Path, tmp_path: Path) -> None:
    judged, queries, corpus = inputs(place)
    rows = [{"query_id": "q3", "text": "another text", "origin": "synthetic"}]
    other = artifact(tmp_path / "queries", "queries", rows, QUERIES)
    with pytest.raises(ValueError, match="query 'q3' stands twice"):
        read_labels(judged, [*queries, other], corpus, aside=tmp_path)


def test_only_judged_documents_are_held(place: Path, tmp_path: Path) -> None:
    _, queries, corpus = inputs(place)
    judged = judgments(tmp_path, [("q0", "d0", 1.0), ("q1", "d3", 0.5)])
    labels = read_labels(judged, queries, corpus, aside=tmp_path)
    assert labels.document_text_D.to_pylist() == [DOCUMENT_TEXTS[0], DOCUMENT_TEXTS[3]]
    assert labels.query_text_Q.to_pylist() == QUERY_TEXTS[:2]


def test_a_query_that_is_a_document_is_no_negative_of_itself(tmp_path: Path) -> None:
    """Those of ArguAna are; a document of an equal id alone is another."""
    documents = [
        {"doc_id": name, "title": title, "text": text}
        for name, title, text in (
            ("a", "Cats", "Cats purr."),
            ("b", "", "Dogs bark"),
            ("c", "", "Ants"),
        )
    ]
    corpus = artifact(tmp_path / "corpus", "corpus", documents, CORPUS)
    asked = [
        {"query_id": name, "text": text, "origin": "given"}
        for name, text in (("a", "cats  purr."), ("b", "dogs BARK"), ("c", "bees"))
    ]
    queries = artifact(tmp_path / "queries", "queries", asked, QUERIES)
    judged = judgments(
        tmp_path, [("a", "b", 1.0), ("b", "a", 0.5), ("c", "c", 0.5), ("c", "a", 0.0)]
    )
    labels = read_labels(judged, [queries], corpus, aside=tmp_path)
    assert labels.query_text_Q.to_pylist() == ["cats  purr.", "dogs BARK", "bees"]
    assert labels.document_text_D.to_pylist() == ["Dogs bark", "Cats Cats purr.", "Ants"]
    assert labels.suspects == {0: (1,), 1: (0,)}


def test_a_start_that_is_no_model_is_refused_before_ray_starts(place: Path, tmp_path: Path) -> None:
    judged, queries, corpus = inputs(place)
    start, out = str(place / "corpus"), str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"/corpus holds no model: none of modules.json, "):
        train(judged, queries, corpus, SETTINGS, start, Placement(), out)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_start_that_a_worker_cannot_load_is_one_sentence(place: Path, tmp_path: Path) -> None:
    judged, queries, corpus = inputs(place)
    shutil.copytree(place / "start" / "encoder", tmp_path / "not-an-encoder")
    next((tmp_path / "not-an-encoder").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"is not an encoder"):
        train(
            judged,
            queries,
            corpus,
            SETTINGS,
            str(tmp_path / "not-an-encoder"),
            Placement(train_retries=0),
            str(tmp_path / "out"),
        )
