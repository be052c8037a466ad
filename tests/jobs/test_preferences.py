"""Preferences from a file to a trained encoder: read, refused, learnt from."""

import json
from pathlib import Path

import pytest

from bixse.artifacts import Artifact
from bixse.models.encoder import load_model
from bixse.place import Place
from bixse.records import CORPUS, PREFERENCES, QUERIES
from bixse.training.gather import World
from bixse.training.loop import Run, train_loop
from bixse.training.objective_settings import Combined, ListKL, PreferenceKL
from bixse.training.settings import Training
from jobs.preferences import import_preferences
from jobs.recipe import Placement
from jobs.supervision import read_labels
from jobs.train import train
from jobs.verbs import main
from tests.artifacts import artifact
from tests.encoders import save_tiny_encoder, texts
from tests.jobs.conftest import write_beir
from tests.jobs.test_train import judgments

WON = "query-id\tpreferred-id\tother-id\tround\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """Eight queries and sixteen documents."""
    path = tmp_path_factory.mktemp("data")
    documents = [
        {"doc_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts(16, seed=2))
    ]
    queries = [
        {"query_id": f"q{i}", "text": text, "origin": "given"}
        for i, text in enumerate(texts(8, seed=1))
    ]
    return (
        artifact(path / "queries", "queries", queries, QUERIES),
        artifact(path / "corpus", "corpus", documents, CORPUS),
    )


def imported(data: tuple[Artifact, Artifact], path: Path, lines: str) -> Artifact:
    file = path / "preferences.tsv"
    file.write_text(lines)
    return import_preferences([data[0]], data[1], str(file), str(path / "preferences"))


def test_both_layouts_are_read(data: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    made = imported(data, tmp_path, WON + "q0\td1\td2\t1\nq1\td3\td4\t0\n")
    assert made.table().schema == PREFERENCES
    assert made.table().to_pylist() == [
        {"query_id": "q0", "doc_id_a": "d1", "doc_id_b": "d2", "prob_a": 1.0},
        {"query_id": "q1", "doc_id_a": "d3", "doc_id_b": "d4", "prob_a": 1.0},
    ]
    assert imported(data, tmp_path, WON + "q0\td1\td2\t1\nq1\td3\td4\t0\n").url == made.url
    (tmp_path / "b").mkdir()
    named = "prob_a\tquery_id\tdoc_id_a\tdoc_id_b\n0.25\tq0\td1\td2\n"
    assert imported(data, tmp_path / "b", named).table()["prob_a"].to_pylist() == [0.25]


def test_a_byte_order_mark_is_no_part_of_the_header(
    data: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    """Windows puts one before the first line."""
    assert imported(data, tmp_path, "\ufeff" + WON + "q0\td1\td2\t1\n").manifest.rows == 1


def test_every_bad_line_is_a_rejection(data: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    lines = (
        "query_id\tdoc_id_a\tdoc_id_b\tprob_a\nq0\td1\td2\t0.5\nq9\td1\td2\t0.5\n"
        "q0\td1\tnowhere\t1\nq0\td1\td1\t1\nq0\td1\td2\t1.5\nq0\td1\td2\tnan\nq0\td1\n"
    )
    made = imported(data, tmp_path, lines)
    assert (made.manifest.rows, made.manifest.rejected) == (1, 6)
    reasons = [row["reason"] for row in made.rejected().to_pylist()]
    assert reasons == [
        "unknown query_id",
        "unknown doc_id",
        "a document is compared with itself",
        "prob_a is no number in [0, 1]",
        "prob_a is no number in [0, 1]",
        "expected 4 columns, found 2",
    ]


def test_what_holds_no_preference_is_refused(
    data: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="has columns query-id, corpus-id, score: expected"):
        imported(data, tmp_path, "query-id\tcorpus-id\tscore\nq0\td1\t1\n")
    with pytest.raises(ValueError, match="no preference between known documents"):
        imported(data, tmp_path, WON + "q9\td1\td2\t0\n")


def test_objectives_and_preferences_must_fit(
    data: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    judged = judgments(tmp_path, [("q0", "d1", 1.0), ("q0", "d2", 0.5)])
    inputs = (judged, [data[0]], data[1])
    start, out = str(save_tiny_encoder(tmp_path / "start")), str(tmp_path / "encoder")
    made = imported(data, tmp_path, WON + "q0\td1\td2\t0\n")
    with pytest.raises(ValueError, match=r"set --judging.preferences"):
        train(*inputs, Training(objective=PreferenceKL()), start, Placement(), out)
    with pytest.raises(ValueError, match="graded_bce does not read preferences"):
        train(*inputs, Training(), start, Placement(), out, preferences=made)
    assert not (tmp_path / "encoder").exists()


def test_an_encoder_learns_the_preferred_order(
    data: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    # Pointwise grades tie; preferences order the two documents of each query.
    judged = judgments(
        tmp_path, [(f"q{q}", f"d{2 * q + k}", 0.5) for q in range(8) for k in (0, 1)]
    )
    lines = "".join(f"q{q}\td{2 * q + q % 2}\td{2 * q + 1 - q % 2}\t0\n" for q in range(8))
    labels = read_labels(
        judged,
        [data[0]],
        data[1],
        preferences=imported(data, tmp_path, WON + lines),
        aside=tmp_path,
    )
    objective = Combined(parts=(ListKL(in_batch=False), PreferenceKL()), weights=(1.0, 3.0))
    settings = Training(
        objective=objective,
        batch_size=8,
        docs_per_query=2,
        epochs=60,
        learning_rate=3e-3,
        precision="float32",
    )
    model = load_model(str(save_tiny_encoder(tmp_path / "start")), "cpu")

    def right() -> int:
        query = model.encode(texts(8, seed=1), normalize_embeddings=True)
        document = model.encode(texts(16, seed=2), normalize_embeddings=True)
        cosine = query @ document.T
        return sum(int(cosine[q, 2 * q + q % 2] > cosine[q, 2 * q + 1 - q % 2]) for q in range(8))

    before = right()
    trained = train_loop(
        Run(settings, labels, Place(str(tmp_path / "checkpoints")), "x"), model, World()
    )
    assert right() == 8 > before
    assert trained.history[-1]["loss"] < 0.5 * trained.history[0]["loss"]


@pytest.mark.slow
def test_the_recipe_trains_from_files_to_an_encoder(tmp_path: Path) -> None:
    source = write_beir(tmp_path / "beir", documents=60, queries=24)
    # The worse-graded document wins: what only the preferences say. Test queries have some too.
    lines = "".join(f"q{q:03d}\td{q + 1:05d}\td{q:05d}\t0\n" for q in range(24))
    (tmp_path / "preferences.tsv").write_text(WON + lines)
    start = str(save_tiny_encoder(tmp_path / "start"))
    out = tmp_path / "out"
    flags = ["--data", str(source), "--out", str(out), "--start", start]
    flags += ["--training.epochs", "3", "--training.learning-rate", "1e-3"]
    flags += ["--training.batch-size", "4", "--judging.preferences"]
    main("train", ["pairdistill", *flags, str(tmp_path / "preferences.tsv")])
    made, preferences = (Artifact.open(str(out / name)) for name in ("encoder", "preferences"))
    assert preferences.manifest.rows == 24
    assert made.manifest.inputs["preferences"] == preferences.fingerprint
    curve = [json.loads(line) for line in made.place.read("training.jsonl").splitlines()]
    assert len(curve) == 9
    assert curve[-1]["loss"] < curve[0]["loss"]
