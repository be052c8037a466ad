"""A teacher's scores, a sample that covers them, a student: the recipe `stratified_kd`."""

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest

from bixse.artifacts import Artifact
from bixse.candidates.settings import Stratified
from bixse.judging.calibration import FILE, KIND, Calibration, Isotonic
from jobs.labels import sample
from jobs.verbs import main
from tests.artifacts import drafted
from tests.encoders import save_tiny_cross_encoder, save_tiny_encoder
from tests.jobs.conftest import write_beir
from tests.jobs.test_train import judgments


def scores(count: int, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [round(draw.random(), 6) for _ in range(count)]


def test_the_sample_covers_each_query_and_accounts_for_every_row(tmp_path: Path) -> None:
    asked = {f"q{n}": scores(60, seed=n) for n in range(5)} | {"few": [0.2, 0.9, 0.4]}
    rows = [(q, f"d{n:02}", z) for q, found in asked.items() for n, z in enumerate(found)]
    judged = judgments(tmp_path, rows)
    made = sample(judged, Stratified(documents=8), str(tmp_path / "sampled"))
    assert made.manifest.rows == 5 * 8 + 3
    assert made.manifest.rows + made.manifest.rejected == len(rows)
    found: dict[str, dict[str, float]] = {}
    for row in made.table().to_pylist():
        found.setdefault(row["query_id"], {})[row["doc_id"]] = row["relevance"]
    assert len(found["few"]) == 3
    for query_id in (f"q{n}" for n in range(5)):
        kept, pool = np.sort(list(found[query_id].values())), np.sort(asked[query_id])
        assert kept[-1] == pytest.approx(pool[-1])
        assert kept.var() > 20 * pool[-8:].var()
        # One from each bin of an eighth of the range, but for the best, which is another.
        assert np.diff(kept).max() < 0.35
    # Neither the order of rows nor other queries have a part in a query's draw.
    (tmp_path / "b").mkdir()
    alone = judgments(tmp_path / "b", [row for row in rows[::-1] if row[0] == "q3"])
    again = sample(alone, Stratified(documents=8), str(tmp_path / "b" / "sampled"))
    assert set(again.table()["doc_id"].to_pylist()) == set(found["q3"])
    other = sample(judged, Stratified(documents=8, seed=1), str(tmp_path / "other"))
    assert other.table() != made.table()


def test_the_recipe_samples_through_the_map_that_it_trains_through(tmp_path: Path) -> None:
    data, out = write_beir(tmp_path / "beir", documents=80, queries=24), tmp_path / "out"
    lines = [
        f"q{q:03d}\td{d:05d}\t{z}" for q in range(12) for d, z in enumerate(scores(30, seed=q))
    ]
    lines += ["q000\td00070\t1.0"]
    (tmp_path / "teacher.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines))
    fitted = Calibration(
        map=Isotonic(judged=(0.0, 1.0), human=(0.0, 0.5)), signed=(("teacher", ""),), scale=(0, 1),
        pairs=1, queries=1,
    )  # fmt: skip
    draft = drafted(tmp_path / "map", KIND)
    draft.write_file(FILE, fitted.model_dump_json().encode())
    map_ = draft.finish()
    line = ["--judging.judge", "given", "--judging.given.file", str(tmp_path / "teacher.tsv")]
    line += ["--data", str(data), "--out", str(out), "--judging.calibration", map_.url]
    main("judge", ["stratified_kd", *line])
    sampled = Artifact.open(str(out / "judgments-sampled"))
    assert sampled.manifest.inputs["calibration"] == map_.fingerprint


def run(tmp_path: Path, *flags: str) -> Path:
    data, out = write_beir(tmp_path / "beir", documents=80, queries=24), tmp_path / "out"
    start = str(save_tiny_encoder(tmp_path / "start"))
    line = ["--data", str(data), "--out", str(out), "--start", start, "--training.batch-size", "4"]
    main("train", ["stratified_kd", *line, "--training.learning-rate", "1e-3", *flags])
    return out


def check(out: Path, kept: int) -> None:
    judged, sampled, encoder = (
        Artifact.open(str(out / name)) for name in ("judgments", "judgments-sampled", "encoder")
    )
    assert sampled.manifest.rows == kept
    assert sampled.manifest.rows + sampled.manifest.rejected == judged.manifest.rows
    assert encoder.manifest.inputs["judgments"] == sampled.fingerprint
    assert encoder.manifest.rows == kept
    curve = [json.loads(line) for line in encoder.place.read("training.jsonl").splitlines()]
    assert curve[-1]["loss"] < curve[0]["loss"]


@pytest.mark.slow
def test_the_recipe_trains_on_given_scores(tmp_path: Path) -> None:
    """A teacher that likes a query's own document best, and scores 29 others anyhow."""
    lines = [
        f"q{q:03d}\td{d:05d}\t{1.0 if d == q else z * 0.9:.6f}"
        for q in range(12)
        for d, z in enumerate(scores(30, seed=q))
    ]
    file = tmp_path / "teacher.tsv"
    file.write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines))
    given = ["--judging.judge", "given", "--judging.given.file", str(file)]
    out = run(tmp_path, *given, "--training.epochs", "8")
    check(out, 12 * 8)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_recipe_asks_a_cross_encoder(tmp_path: Path) -> None:
    model = str(save_tiny_cross_encoder(tmp_path / "teacher", logits=1))
    teacher = ["--judging.cross-encoder.model", model, "--judging.cross-encoder.max-model-len"]
    flags = [*teacher, "64", "--candidates.dense", "20", "--training.epochs", "8"]
    out = run(tmp_path, *flags)
    assert Artifact.open(str(out / "pairs")).manifest.rows == 12 * 20
    check(out, 12 * 8)
