"""One encoder trained on the judgments of two runs: what it reads, learns, and refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bixse.artifacts import Artifact, begin
from bixse.judging.calibration import FILE, KIND, Calibration, Isotonic, signers
from bixse.records import JUDGMENTS
from bixse.training.objective_settings import Combined, GradedBCE, PreferenceKL
from bixse.training.settings import Training
from jobs.mix import labels_of, open_run, refuse_held_out, refuse_repeated
from jobs.verbs import main
from tests.encoders import save_tiny_encoder
from tests.jobs.conftest import write_beir
from tests.jobs.test_bad_input import sentence
from tests.jobs.test_trackers import event_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of equal ids and other texts, the second judged already."""
    path = tmp_path_factory.mktemp("mix")
    write_beir(path / "own", documents=50)
    write_beir(path / "other", documents=60, queries=48, seed=5)
    save_tiny_encoder(path / "start")
    judge(path / "other", path / "judged")
    return path


def judge(data: Path, out: Path) -> None:
    main("judge", ["bixse", "--data", str(data), "--out", str(out), "--json"])


def run(verb: str, *words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", f"jobs.{verb}", *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, timeout=280, env=environment
    )


def words(place: Path, mix: Path) -> list[str]:
    line = [
        "bixse", "--data", place / "own", "--out", place / "out", "--json",
        "--start", place / "start" / "encoder", "--training.mix", mix,
        "--training.batch-size", 8, "--training.epochs", 10, "--training.learning-rate", 1e-3,
        "--track", "tensorboard",
    ]  # fmt: skip
    return list(map(str, line))


def mixed(verb: str, place: Path, mix: Path) -> subprocess.CompletedProcess[str]:
    return run(verb, *words(place, mix))


@pytest.fixture(scope="module")
def encoder(place: Path) -> Artifact:
    # Here and not in a process of its own, which would start Ray again.
    main("train", words(place, place / "judged"))
    return Artifact.open(str(place / "out" / "encoder"), "encoder")


def test_both_sets_teach(place: Path, encoder: Artifact) -> None:
    own, other = (Artifact.open(str(place / name / "judgments")) for name in ("out", "judged"))
    inputs = encoder.manifest.inputs
    assert inputs["judgments"] == own.fingerprint
    assert inputs["mix-0-judgments"] == other.fingerprint
    assert {name for name in inputs if name.startswith("mix")} == {
        *("mix-0-judgments", "mix-0-queries-0", "mix-0-corpus"),
    }
    assert encoder.manifest.rows == own.manifest.rows + other.manifest.rows == 40 + 48
    curve = [json.loads(line) for line in encoder.place.read("training.jsonl").splitlines()]
    assert [line["epoch"] for line in curve[::11]] == list(range(10))
    for number, (steps, judgments) in enumerate([(5, own), (6, other)]):
        lines = [line for line in curve if line["set"] == number]
        assert len(lines) == 10 * steps
        first, last = (
            sum(line["excess"] for line in part) for part in (lines[:steps], lines[-steps:])
        )
        assert last < 0.9 * first
        of_set = encoder.manifest.extra["sets"][number]
        assert of_set["steps"] == 10 * steps
        assert of_set["pairs"] == 10 * judgments.manifest.rows
        assert of_set["first_excess"] == pytest.approx(first / steps)
        assert of_set["last_excess"] == pytest.approx(last / steps)
    scale_bias = json.loads(encoder.place.read("scale_bias.json"))
    biases = {line["set"]: line["bias"] for line in curve}
    assert scale_bias.keys() == {"scale", "bias", "mix_bias"}
    # Momentum goes on while the other set has its turn.
    assert scale_bias["bias"] == pytest.approx(biases[0], abs=1e-2)
    assert scale_bias["mix_bias"] == [pytest.approx(biases[1], abs=1e-2)]
    curves, params = event_files(place / "out")
    for number in (0, 1):
        shown = [(line["step"], line["loss"]) for line in curve if line["set"] == number]
        assert curves[f"set_{number}/loss"] == [(step, pytest.approx(loss)) for step, loss in shown]
    assert f'"sets.1": "{other.url}"' in params


def test_a_moved_run_is_the_same_and_another_is_refused(
    place: Path, encoder: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "judged", tmp_path / "moved")
    main("train", words(place, tmp_path / "moved"))
    assert Artifact.open(encoder.url).manifest == encoder.manifest
    judge(write_beir(tmp_path / "data", documents=60, queries=48, seed=6), tmp_path / "judged")
    with pytest.raises(SystemExit) as exit_:
        main("train", words(place, tmp_path / "judged"))
    assert exit_.value.code == 1
    assert "was made with inputs.mix-0-corpus" in capsys.readouterr().err


@pytest.mark.slow
def test_the_own_set_is_evaluated(place: Path, encoder: Artifact) -> None:
    done = mixed("evaluate", place, place / "judged")
    assert done.returncode == 0, done.stderr
    report = json.loads((place / "out" / "report" / "report.json").read_text())
    assert (report["n_queries"], report["n_documents"]) == (20, 50)
    assert report["fingerprints"]["encoder trained"] == encoder.manifest.extra["encoder"]


def refused(url: Path, sentence: str) -> None:
    """Assert that a directory is refused in a sentence that names the flag and it."""
    with pytest.raises(ValueError, match=sentence) as caught:
        open_run(str(url))
    assert str(caught.value).startswith(f"--training.mix {url}: ")


def test_a_directory_that_holds_no_run_is_refused(place: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "holds no judgments")
    refused(place / "own", "holds no judgments")
    run_ = tmp_path / "run"
    shutil.copytree(place / "judged", run_)
    part = next((run_ / "corpus").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    refused(run_, "corpus is damaged: part-00000.parquet differs")
    shutil.rmtree(run_ / "corpus")
    refused(run_, "no finished artefact at .*/corpus")
    # What a later stage of that run has begun, and not finished, is what it would train on.
    (run_ / "judgments-verified").mkdir()
    (run_ / "judgments-verified" / "begun.json").write_text("{}")
    refused(run_, "no finished artefact at .*/judgments-verified")


@pytest.mark.parametrize("later", ["verified", "contrasted", "sampled"])
def test_a_later_stage_s_judgments_and_made_queries_are_read(
    later: str, place: Path, tmp_path: Path
) -> None:
    run_ = tmp_path / "run"
    shutil.copytree(place / "judged", run_)
    shutil.copytree(run_ / "judgments", run_ / "judgments-verified", dirs_exist_ok=True)
    shutil.copytree(run_ / "judgments", run_ / f"judgments-{later}", dirs_exist_ok=True)
    shutil.copytree(run_ / "queries", run_ / "synthetic")
    found = open_run(str(run_))
    assert found.judgments.url.endswith(f"/judgments-{later}")
    assert [queries.url.rpartition("/")[2] for queries in found.queries] == ["queries", "synthetic"]
    assert len(found.inputs("mix-3")) == 4


def test_a_run_s_judgments_are_read_through_the_map_it_trained_through(
    place: Path, tmp_path: Path
) -> None:
    run_ = tmp_path / "run"
    shutil.copytree(place / "judged", run_)
    stored = open_run(str(run_))
    scale = stored.judgments.manifest.extra["scale"]["values"]

    def save_map(top: float) -> Artifact:
        """Puts `top` in place of the highest relevance."""
        shutil.rmtree(run_ / "calibration", ignore_errors=True)
        signed = signers(stored.judgments.table(JUDGMENTS.names))
        map_ = Isotonic(judged=(0.0, 1.0), human=(0.0, top))
        made = Calibration(map=map_, signed=signed, scale=scale, pairs=2, queries=1)
        draft = begin(str(run_ / "calibration"), KIND, config={"top": top}, inputs={})
        draft.write_file(FILE, made.model_dump_json().encode())
        return draft.finish(rows=2)

    calibration = save_map(0.5)
    before = labels_of(open_run(str(run_)), Training(), tmp_path)
    assert open_run(str(run_)).calibration is None, "a map that no model was trained through"

    inputs = {"calibration": calibration.fingerprint}
    draft = begin(str(run_ / "encoder"), "encoder", config={}, inputs=inputs)
    for _ in ("begun", "finished"):
        found = open_run(str(run_))
        assert found.inputs("mix-0")["mix-0-calibration"] == calibration.fingerprint
        after = labels_of(found, Training(), tmp_path)
        assert after.relevance_P == pytest.approx(before.relevance_P / 2)
        draft.finish(rows=1)
    assert after.relevance_P.max() > 0

    other = save_map(0.25)
    refused(run_, f"through calibration map {calibration.fingerprint}, and map {other.fingerprint}")
    shutil.rmtree(run_ / "calibration")
    refused(run_, "and nothing stands at .*/calibration: copy the map's directory there")


def test_what_teaches_nothing_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    shutil.copytree(place / "other", tmp_path / "one" / "data")
    qrels = tmp_path / "one" / "data" / "qrels" / "train.tsv"
    qrels.write_text("".join(qrels.read_text().splitlines(keepends=True)[:2]))
    judge(tmp_path / "one" / "data", tmp_path / "one" / "out")
    other = open_run(str(tmp_path / "one" / "out"))
    with pytest.raises(ValueError, match=r"training.mix .*/one/out: .* 2 rows or more, found 1"):
        labels_of(other, Training(), tmp_path)


def test_the_same_judgments_are_no_two_sets(place: Path) -> None:
    other = open_run(str(place / "judged"))
    with pytest.raises(ValueError, match="has the judgments of this run"):
        refuse_repeated(other.judgments, [other])
    own = Artifact.open(str(place / "judged" / "corpus"))
    with pytest.raises(ValueError, match=r"has the judgments of .*/judged"):
        refuse_repeated(own, [other, other])


def test_queries_that_are_measured_on_are_not_trained_on(place: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(place / "other", data)
    (data / "qrels" / "train.tsv").rename(data / "qrels" / "dev.tsv")
    (data / "qrels" / "test.tsv").rename(data / "qrels" / "train.tsv")
    judge(data, out)
    other, swapped = open_run(str(place / "judged")), open_run(str(out))
    kept = swapped.queries[0], Artifact.open(str(out / "qrels"))
    with pytest.raises(ValueError, match="24 queries of this run's dev or test split are judged"):
        refuse_held_out(other, *kept, "this run's")
    # As a file of grades may do, which any query may stand in.
    shutil.rmtree(out / "judgments")
    shutil.copytree(place / "judged" / "judgments", out / "judgments")
    refused(out, "24 queries of its own dev or test split are judged there, first 'q000'")


def test_a_run_s_test_queries_are_refused_under_whatever_id(place: Path, tmp_path: Path) -> None:
    """The other run trains on one of this run's test queries, in capitals."""
    data = tmp_path / "data"
    shutil.copytree(place / "other", data)
    asked = [
        [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
        for folder in (place / "own", data)
    ]
    asked[1][3]["text"] = asked[0][25]["text"].upper()
    (data / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in asked[1]))
    judge(data, tmp_path / "judged")
    message = sentence(mixed("train", place, tmp_path / "judged"))
    assert "1 queries of this run's dev or test split are judged there, first 'q003'" in message


def test_preferences_cannot_be_mixed() -> None:
    both = Combined(parts=(GradedBCE(), PreferenceKL()), weights=(1.0, 1.0))
    with pytest.raises(ValueError, match="brings judgments and no preferences"):
        Training(objective=both, mix=("runs/a",))


def test_a_refusal_is_one_sentence_before_anything_is_judged(place: Path, tmp_path: Path) -> None:
    done = run(
        "train", "bixse", "--data", place / "own", "--out", tmp_path / "out",
        "--start", place / "start" / "encoder", "--training.mix", tmp_path / "nowhere",
    )  # fmt: skip
    assert sentence(done) == (
        f"error: --training.mix {tmp_path}/nowhere: holds no judgments: name the --out of a run "
        "that judged or trained"
    )
    assert not (tmp_path / "out" / "judgments").exists()
