"""The whole pipeline, killed with -9 at random moments and run again, makes the same artefacts."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bixse.artifacts import Artifact
from jobs.verbs import main
from tests.encoders import save_tiny_encoder
from tests.jobs.conftest import write_beir

ROOT = Path(__file__).resolve().parent.parent.parent
MADE = ("corpus", "queries", "qrels", "judgments", "encoder", "embeddings", "index")


def words(data: Path, encoder: Path, out: Path) -> list[str]:
    line = ["bixse", "--data", data, "--out", out,
            "--start", encoder, "--training.epochs", 2, "--training.batch-size", 8,
            "--training.checkpoint-every", 2, "--retrieval.shards", 2, "--json"]  # fmt: skip
    return list(map(str, line))


def start(data: Path, encoder: Path, out: Path, log: Path, *more: str) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "jobs.pipeline", *words(data, encoder, out), *more]
    with open(log, "ab") as handle:
        return subprocess.Popen(
            line,
            cwd=ROOT,
            stdout=handle,
            stderr=handle,
            start_new_session=True,
            # What a script has put into the background ignores Ctrl-C, and all that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def fingerprints(out: Path) -> dict[str, str]:
    return {name: Artifact.open(str(out / name)).fingerprint for name in MADE}


def report(out: Path) -> dict[str, Any]:
    """All numbers but the times, in which two runs differ."""
    found: dict[str, Any] = json.loads((out / "report" / "report.json").read_text())
    return {key: value for key, value in found.items() if key != "seconds"}


@pytest.mark.slow
def test_killed_at_random_moments_the_pipeline_makes_the_same(tmp_path: Path) -> None:
    data = write_beir(tmp_path / "data", documents=2500)
    encoder, log = save_tiny_encoder(tmp_path / "tiny"), tmp_path / "log"
    started = time.monotonic()
    whole = start(data, encoder, tmp_path / "whole", log)
    assert whole.wait(400) == 0, log.read_text()[-3000:]
    seconds = time.monotonic() - started
    draw = random.Random(0)
    done = False
    for _ in range(8):
        run = start(data, encoder, tmp_path / "killed", log)
        try:
            run.wait(draw.uniform(0.2, 0.8) * seconds)
            done = run.returncode == 0
            break
        except subprocess.TimeoutExpired:
            if draw.random() < 0.5:
                run.kill()  # the driver alone: its Ray must go with it
            else:
                os.killpg(run.pid, signal.SIGKILL)
            run.wait(60)
    if not done:
        last = start(data, encoder, tmp_path / "killed", log)
        assert last.wait(400) == 0, log.read_text()[-3000:]
    assert fingerprints(tmp_path / "killed") == fingerprints(tmp_path / "whole")
    assert report(tmp_path / "killed") == report(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_last_step_of_training_and_gives_the_status(
    number: signal.Signals, tmp_path: Path
) -> None:
    data, encoder = write_beir(tmp_path / "data", 60), save_tiny_encoder(tmp_path / "tiny")
    out, log = tmp_path / "out", tmp_path / "log"
    run = start(data, encoder, out, log, "--training.epochs", "100000")
    deadline = time.monotonic() + 300
    while not list((out / "encoder-checkpoints").glob("step-*")):
        assert run.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # Ctrl-C is told to all of a terminal's group.
    (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)
    assert run.wait(240) == 128 + number, log.read_text()[-3000:]
    said = re.search(
        r"^error: training stopped after step (\d+) of .* saved:", log.read_text(), re.M
    )
    assert said, log.read_text()[-3000:]
    assert list((out / "encoder-checkpoints").glob(f"step-{int(said[1]):08d}-*"))


def test_a_second_run_skips_what_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_beir(tmp_path / "data", documents=300)
    line = words(data, save_tiny_encoder(tmp_path / "tiny"), tmp_path / "out")
    # Here and not in processes of their own, which would start Ray again.
    main("pipeline", line)
    first = capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")}
    main("pipeline", line)
    again = capsys.readouterr()
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")}
    assert after == before
    progress = re.compile(r"^(judge|train|embed|evaluate|index) +━", re.MULTILINE)
    assert progress.search(first.err)
    assert not progress.search(again.err)
    summary = json.loads(again.out.splitlines()[-1])
    assert set(summary["ndcg@10"]) == {"bm25", "base", "trained"}
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert {"ndcg@10", "ci95", "n_queries", "recipe", "seconds"} <= set(report)
    assert {"ingest", "judge", "train"} <= set(report["seconds"])
