"""Jobs as processes: killed, they lose nothing; side by side on one store, they share the work."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bixse.artifacts import Artifact
from bixse.judging.labels import Labels, label_key
from bixse.records import PAIRS
from tests.artifacts import artifact
from tests.jobs.slow_judge import IN_FLIGHT, UNIT_PAIRS
from tests.jobs.test_store import asked_in, corpus_of, queries_of

ROOT = Path(__file__).resolve().parent.parent.parent
QUERIES, DOCUMENTS = 12, 60


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "tests.jobs.slow_judge", str(folder), *words]
    with open(folder / "output", "ab") as handle:
        return subprocess.Popen(
            line, cwd=ROOT, stdout=handle, stderr=handle, start_new_session=True
        )


def kill(run: subprocess.Popen[bytes], what: str) -> None:
    """The process of this run that `what` names, and the driver when it does not survive that."""
    if what == "driver":
        run.kill()
        return
    wanted = {"worker": "MapWorker", "raylet": "raylet/raylet"}[what]
    with contextlib.suppress(psutil.NoSuchProcess):  # The run has ended meanwhile.
        for process in psutil.Process(run.pid).children(recursive=True):
            if wanted in " ".join(process.cmdline()):
                process.kill()


def wait_for_progress(run: subprocess.Popen[bytes], log: Path, more: int) -> None:
    """Until `more` further pairs were asked, or the run has ended."""
    before, deadline = len(asked_in(log)), time.monotonic() + 240
    while run.poll() is None and len(asked_in(log)) < before + more:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end(run: subprocess.Popen[bytes]) -> None:
    """The group too: a Ray without its driver or raylet may take a while to notice."""
    try:
        run.wait(60)
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait(60)
    try:
        os.killpg(run.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def inputs(folder: Path) -> list[tuple[str, str]]:
    """Corpus, queries and all pairs of them; the ids of the pairs."""
    texts = {f"d{n}": f"word {n} " * (1 + n % 7) for n in range(DOCUMENTS)}
    asked = {f"q{n}": f"query {n}" for n in range(QUERIES)}
    corpus_of(folder / "corpus", texts)
    queries_of(folder / "queries", asked)
    keys = [(q, d) for q in asked for d in texts]
    rows = [{"query_id": q, "doc_id": d, "source": "bm25", "rank": 1, "score": 1.0}
            for q, d in keys]  # fmt: skip
    artifact(folder / "pairs", "pairs", rows, PAIRS)
    return keys


@pytest.mark.slow
def test_two_jobs_on_one_store_at_once_share_the_work(tmp_path: Path) -> None:
    """They begin at both ends: whoever comes where the other has been asks nobody."""
    keys = inputs(tmp_path)
    runs = [start(tmp_path, out, "labels") for out in ("forwards", "backwards")]
    try:
        codes = [run.wait(600) for run in runs]
    finally:
        for run in runs:
            end(run)
    assert codes == [0, 0], (tmp_path / "output").read_text()[-3000:]
    asked = {out: asked_in(tmp_path / f"{out}.log") for out in ("forwards", "backwards")}
    assert len({*asked["forwards"], *asked["backwards"]}) == len(keys)
    # Both have in hand what the other has not filed yet; a unit more where labels were just read.
    twice = len(asked["forwards"]) + len(asked["backwards"]) - len(keys)
    assert twice <= 2 * (IN_FLIGHT + 1) * UNIT_PAIRS
    assert min(map(len, asked.values())) > 0
    first, second = (Artifact.open(str(tmp_path / out)).table() for out in asked)
    assert first == second
    assert first.num_rows == len(keys)
    lines = [line.split("\t") for line in asked["forwards"] + asked["backwards"]]
    signature = {"judge": "length"}
    found = Labels(str(tmp_path / "labels"), signature)
    assert all(found.find([label_key(signature, query, text) for query, text in lines]))


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path: Path) -> None:
    keys = inputs(tmp_path)
    whole = start(tmp_path, "whole")
    assert whole.wait(600) == 0, (tmp_path / "output").read_text()[-3000:]
    assert len(asked_in(tmp_path / "whole.log")) == len(keys)

    draw, log, kills = random.Random(0), tmp_path / "killed.log", 0
    while kills < 10:
        finished = stored(tmp_path / "killed-labels")
        offset = len(asked_in(log))
        run = start(tmp_path, "killed")
        what = ""
        while what not in ("driver", "raylet") and kills < 10:
            wait_for_progress(run, log, draw.randint(5, 90))
            what = draw.choice(["driver", "worker", "raylet"])
            kill(run, what)
            kills += 1
            if run.poll() is not None:
                break
        end(run)
        # Whoever had an answer when this session began was not asked again in it.
        again = {line for line in asked_in(log)[offset:] if line in finished}
        assert not again
    last = start(tmp_path, "killed")
    assert last.wait(600) == 0, (tmp_path / "output").read_text()[-3000:]

    made, expected = (Artifact.open(str(tmp_path / name)) for name in ("killed", "whole"))
    assert made.table() == expected.table()
    assert made.manifest.rows == len(keys)
    # At most what was in hand at each kill was asked a second time.
    assert len(asked_in(log)) <= len(keys) + 10 * IN_FLIGHT * UNIT_PAIRS


def stored(place: Path) -> set[str]:
    """The lines of the log whose labels are in the store."""
    signature = {"judge": "length"}
    labels = Labels(str(place), signature)
    lines = asked_in(place.parent / "killed.log")
    keys = [label_key(signature, *line.split("\t")) for line in lines]
    return {line for line, label in zip(lines, labels.find(keys), strict=True) if label}
