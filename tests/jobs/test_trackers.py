"""Trackers: each step stands once in what they stored, also after kill -9; a failing one is left
out."""

import json
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from bixse.artifacts import Artifact
from bixse.place import Place
from bixse.training.seen import Seen
from jobs import trackers
from jobs.command import Run
from jobs.recipe import Placement
from jobs.trackers import DEV, refuse_missing, tracked
from jobs.train import train
from tests.encoders import save_tiny_encoder
from tests.jobs import test_train as trains

CONFIG = {"batch_size": 8, "objective": {"kind": "graded_bce"}, "inputs": {"corpus": "f1"}}

Curve = dict[str, list[tuple[int, float]]]
"""Metric -> (step, value), as it is stored."""


def line(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1 / step, "pairs": 8}


def dev(steps: int) -> list[tuple[int, float]]:
    """An evaluation every five steps, and one before the first."""
    return [(step, 0.25 + step / 100) for step in range(0, steps + 1, 5)]


def told(name: str, path: Path, first: int, last: int, *, ended: bool = True) -> None:
    """A session of a run: what the loop shows from `first` steps, that stand already, to `last`."""
    with tracked([name], Place(f"{path}/out-checkpoints"), "f", f"{path}/out", CONFIG) as tell:
        # A worker says that it is there before it has read its checkpoint.
        tell(Seen(0, [], []))
        tell(Seen(first, [line(step) for step in range(1, first + 1)], dev(first) if first else []))
        if not first:
            tell(Seen(0, [], dev(0)))
        for step in range(first + 1, last + 1):
            tell(Seen(step, [line(step)], dev(step)))
        if not ended:
            raise KeyboardInterrupt


def event_files(path: Path) -> tuple[Curve, str]:
    """The curves that TensorBoard shows, and what it is told of the settings."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (run,) = path.glob("*-tensorboard/*")
    stored = events.EventAccumulator(str(run), size_guidance=events.STORE_EVERYTHING_SIZE_GUIDANCE)
    stored.Reload()
    tags = stored.Tags()
    curves = {tag: [(e.step, e.value) for e in stored.Scalars(tag)] for tag in tags["scalars"]}
    params = stored.Tensors(tags["tensors"][0])[-1].tensor_proto.string_val[0]
    return curves, params.decode()


def mlflow_store(path: Path) -> tuple[Curve, str]:
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("bixse")
    (run,) = client.search_runs([experiment.experiment_id])
    curves = {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    assert run.info.status == "FINISHED"
    assert run.info.run_name.endswith("/out")
    return curves, json.dumps(run.data.params)


@pytest.fixture
def mlflow_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow-skinny needs an older cachetools than we pin")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def assert_whole(found: tuple[Curve, str]) -> None:
    """Twelve steps, each once, and three evaluations; the settings stand beside them."""
    curves, params = found
    assert curves.keys() == {"loss", "pairs", DEV}
    assert [step for step, _ in curves["loss"]] == list(range(1, 13))
    assert [value for _, value in curves["loss"]] == pytest.approx([1 / s for s in range(1, 13)])
    assert [step for step, _ in curves[DEV]] == [0, 5, 10]
    assert [value for _, value in curves[DEV]] == pytest.approx([0.25, 0.3, 0.35])
    for said in ('"objective.kind": "graded_bce"', '"inputs.corpus": "f1"', '"batch_size": "8"'):
        assert said in params


def interrupted(name: str, path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        told(name, path, 0, 7, ended=False)
    # The last checkpoint was of step 6.
    told(name, path, 6, 12)


def test_tensorboard_shows_a_run_that_went_on_once(tmp_path: Path) -> None:
    interrupted("tensorboard", tmp_path)
    assert_whole(event_files(tmp_path))


@pytest.mark.usefixtures("mlflow_at")
def test_mlflow_has_a_run_that_went_on_once(tmp_path: Path) -> None:
    interrupted("mlflow", tmp_path)
    assert_whole(mlflow_store(tmp_path))


@pytest.mark.usefixtures("mlflow_at")
def test_mlflow_is_told_of_steps_that_only_the_checkpoint_has(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        told("mlflow", tmp_path, 0, 3, ended=False)
    told("mlflow", tmp_path, 9, 12)
    assert_whole(mlflow_store(tmp_path))


def logged(data: bytes) -> Iterator[bytes]:
    """The records of a W&B file: LevelDB's log format after a header of 7 bytes."""
    at, record = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield record
            record = b""


def wandb_curve(file: Path) -> list[tuple[int, float]]:
    from wandb.proto import wandb_internal_pb2

    curve = []
    for data in logged(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        values = {
            item.key or item.nested_key[0]: json.loads(item.value_json)
            for item in record.history.item
        }
        if "loss" in values:
            curve.append((values["_step"], values["loss"]))
    return curve


def test_wandb_writes_every_step_of_a_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    told("wandb", tmp_path, 0, 12)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    # What writes the file is a process of its own, which may be at it yet.
    until = time.monotonic() + 30
    while len(curve := wandb_curve(file)) < 12 and time.monotonic() < until:
        time.sleep(0.1)
    assert curve == [(step, pytest.approx(1 / step)) for step in range(1, 13)]


def test_each_set_of_a_mix_has_a_loss_of_its_own(tmp_path: Path) -> None:
    """Which set has its turn is drawn: odd steps of the first, the others of the second."""

    def of_mix(step: int) -> dict[str, float]:
        return {**line(step), "set": 1 - step % 2}

    config = {**CONFIG, "sets": {"0": "runs/own/judgments", "1": "runs/other/judgments"}}
    place = Place(f"{tmp_path}/out-checkpoints")
    with tracked(["tensorboard"], place, "f", f"{tmp_path}/out", config) as tell:
        tell(Seen(6, [of_mix(step) for step in range(1, 7)], []))
    curves, params = event_files(tmp_path)
    assert curves.keys() == {"loss", "pairs", "set", "set_0/loss", "set_1/loss"}
    assert [step for step, _ in curves["loss"]] == [1, 2, 3, 4, 5, 6]
    assert curves["set_0/loss"] == [(step, pytest.approx(1 / step)) for step in (1, 3, 5)]
    assert curves["set_1/loss"] == [(step, pytest.approx(1 / step)) for step in (2, 4, 6)]
    assert '"sets.1": "runs/other/judgments"' in params


@pytest.mark.usefixtures("mlflow_at")
def test_mlflow_takes_the_losses_of_sets(tmp_path: Path) -> None:
    place = Place(f"{tmp_path}/out-checkpoints")
    with tracked(["mlflow"], place, "f", f"{tmp_path}/out", CONFIG) as tell:
        tell(Seen(1, [{**line(1), "set": 1}], []))
    curves, _ = mlflow_store(tmp_path)
    assert curves["loss"] == curves["set_1/loss"] == [(1, 1.0)]


def test_a_new_run_at_the_same_place_is_another(tmp_path: Path) -> None:
    told("tensorboard", tmp_path, 0, 3)
    Place(f"{tmp_path}/out-checkpoints").clear()
    told("tensorboard", tmp_path, 0, 3)
    assert len(list(tmp_path.glob("out-tensorboard/*"))) == 2


def train_at(path: Path, out: str, **changes: object) -> Artifact:
    settings, track = trains.SETTINGS.replace(**changes), ("tensorboard",)
    judged, queries, corpus = trains.inputs(path)
    start, at = str(path / "start" / "encoder"), str(path / out)
    return train(judged, queries, corpus, settings, start, Placement(), at, track=track)


def assert_shown(made: Artifact, path: Path, steps: int) -> None:
    """The curve beside the encoder is the one that TensorBoard shows."""
    curves, params = event_files(path)
    for name in ("loss", "excess", "learning_rate"):
        expected = [(row["step"], row[name]) for row in trains.curve(made)]
        assert len(expected) == steps
        assert curves[name] == [(step, pytest.approx(value)) for step, value in expected]
    assert '"objective.learn_scale": "True"' in params
    assert made.manifest.inputs["corpus"] in params


@pytest.mark.slow
def test_every_step_of_a_worker_is_shown(tmp_path: Path) -> None:
    save_tiny_encoder(tmp_path / "start")
    assert_shown(train_at(tmp_path, "made", max_steps=12), tmp_path, 12)


@pytest.mark.slow
def test_a_killed_run_is_shown_once_and_whole(tmp_path: Path) -> None:
    save_tiny_encoder(tmp_path / "start")
    with trains.driver_at(tmp_path, "killed", 15, "tests.jobs.test_trackers"):
        pass
    assert_shown(train_at(tmp_path, "killed"), tmp_path, 54)


def test_one_that_fails_warns_once_and_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out-tensorboard").write_text("a file where a directory would have to be")
    told("tensorboard", tmp_path, 0, 12)
    (warning,) = caplog.messages
    assert warning.startswith("tensorboard failed, training goes on without it: ")


class _Stuck:
    """A tracker whose server never answers."""

    last = -1

    def __init__(self, _: object) -> None:
        self.released = threading.Event()

    def log(self, _: object) -> None:
        self.released.wait()

    def finish(self, *, complete: bool) -> None: ...


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    opened: list[_Stuck] = []

    def opens(run: object) -> _Stuck:
        opened.append(_Stuck(run))
        return opened[-1]

    opening: Callable[[object], _Stuck] = opens
    monkeypatch.setitem(trackers._TRACKERS, "wandb", (opening, "os", ""))
    monkeypatch.setattr(trackers, "_WAIT_S", 0.1)
    yield
    for one in opened:
        one.released.set()


@pytest.mark.usefixtures("stuck")
def test_one_that_hangs_is_left_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told("wandb", tmp_path, 0, 12)
    assert caplog.messages == ["wandb does not answer, and lacks the last steps"]


def test_a_missing_package_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        trackers._TRACKERS, "mlflow", (trackers.MLflow, "not_installed", "its-name==1.0")
    )
    # A folder of that name, as wandb leaves one, is no package.
    (tmp_path / "not_installed").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    save_tiny_encoder(tmp_path / "start")
    judged, queries, corpus = trains.inputs(tmp_path)
    start, out = str(tmp_path / "start" / "encoder"), tmp_path / "out"
    with pytest.raises(ValueError, match="--track mlflow needs a package: pip install its-name"):
        train(
            judged,
            queries,
            corpus,
            trains.SETTINGS,
            start,
            Placement(),
            str(out),
            track=("mlflow",),
        )
    assert not os.path.exists(out)
    assert not os.path.exists(f"{out}-checkpoints")


def test_event_files_are_refused_on_an_object_store() -> None:
    with pytest.raises(ValueError, match="tensorboard writes local files, and not to s3://"):
        refuse_missing(["tensorboard"], "s3://bucket/runs/b/encoder")


def test_the_flag_names_every_tracker() -> None:
    (named, _) = get_args(get_type_hints(Run)["track"])
    assert set(get_args(named)) == trackers._TRACKERS.keys()
