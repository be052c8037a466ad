"""Bad input through the real command line: one sentence, a status, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.encoders import save_tiny_encoder
from tests.jobs.conftest import write_beir

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_encoder(tmp_path_factory.mktemp("encoder")))


def run(verb: str, *words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", f"jobs.{verb}", "bixse", *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, timeout=200, env=environment
    )


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that says what was wrong; a traceback is no sentence."""
    assert done.returncode not in (0, None), done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def finished(out: Path) -> list[str]:
    return sorted(path.parent.name for path in out.rglob("manifest.json"))


def test_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("")
    done = run("index", "--data", tmp_path / "corpus.jsonl", "--out", tmp_path / "out")
    assert "no valid document" in sentence(done)
    assert finished(tmp_path / "out") == []


def test_a_missing_column(tmp_path: Path) -> None:
    (tmp_path / "docs.csv").write_text("name,words\na,b\n")
    done = run("ingest", "--data", tmp_path / "docs.csv", "--out", tmp_path / "out")
    assert "has no column doc_id" in sentence(done)
    assert finished(tmp_path / "out") == []


def test_an_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").mkdir()
    done = run("ingest", "--data", tmp_path, "--out", tmp_path / "out")
    assert "no corpus in" in sentence(done)
    done = run("ingest", "--data", "/proc/self/mem", "--out", tmp_path / "out2")
    assert "cannot read /proc/self/mem" in sentence(done)


def test_no_judgments_says_which_flag_to_set(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "text": "one"}\n')
    done = run("train", "--data", tmp_path, "--out", tmp_path / "out")
    assert "--judging.judge" in sentence(done)
    assert "judgments" not in finished(tmp_path / "out")


def test_a_directory_without_a_model_is_refused_before_ray_starts(tmp_path: Path) -> None:
    data = write_beir(tmp_path / "data", documents=60)
    words = ("--data", data, "--encoder", data, "--out", tmp_path / "out")
    assert f"{data} holds no model" in sentence(run("index", *words))
    assert "embeddings" not in {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("verb", ["pipeline", "evaluate"])
def test_a_split_that_is_trained_on_is_refused_before_the_training(
    tmp_path: Path, verb: str
) -> None:
    data = write_beir(tmp_path / "data", documents=60)
    done = run(verb, "--data", data, "--out", tmp_path / "out", "--split", "train")
    assert "--split train evaluates on the queries that are trained on" in sentence(done)
    assert finished(tmp_path / "out") == ["corpus", "qrels", "queries"]


@pytest.mark.slow
def test_no_such_encoder_and_no_such_split(tmp_path: Path, encoder: str) -> None:
    data = write_beir(tmp_path / "data", documents=60)
    words = ("--data", data, "--out", tmp_path / "out")
    assert "no encoder 'nowhere'" in sentence(run("index", *words, "--encoder", "nowhere"))
    done = run(
        "evaluate", *words, "--encoder", encoder, "--start", encoder, "--split", "dev"
    )  # fmt: skip
    message = sentence(done)
    assert "dev" in message
    assert "test" in message
    # Nor is a corpus embedded, or an encoder trained, to say so.
    assert finished(tmp_path / "out") == ["corpus", "qrels", "queries"]


@pytest.mark.slow
def test_without_judged_test_queries_there_is_an_index_and_no_report(
    tmp_path: Path, encoder: str
) -> None:
    data = write_beir(tmp_path / "data", documents=60)
    (data / "qrels" / "test.tsv").unlink()
    done = run(
        "pipeline", "--data", data, "--out", tmp_path / "out", "--start", encoder,
        "--training.batch-size", 8, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert "nobody judged a query of split test" in summary["report"]
    assert "index" in finished(tmp_path / "out")


@pytest.mark.slow
def test_one_document_every_plane_and_a_megabyte(tmp_path: Path, encoder: str) -> None:
    planes = "".join(chr(plane << 16 | 0x41) for plane in range(17)) + "\u202e\ufffd\0"
    texts = {"one": ["the only text"], "strange": [planes, "mega " * 200_000, "\u200b.", "é" * 99]}
    for name, bodies in texts.items():
        folder = tmp_path / name
        folder.mkdir()
        lines = [json.dumps({"_id": str(n), "text": text}) for n, text in enumerate(bodies)]
        (folder / "corpus.jsonl").write_text("\n".join(lines))
        out = tmp_path / f"{name}-out"
        done = run("index", "--data", folder, "--out", out, "--encoder", encoder,
                   "--retrieval.shards", 2, "--json")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["rows"] == len(bodies)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None, reason="a tmpfs needs root to be mounted"
)
def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        data = tmp_path / "corpus.jsonl"
        rows = [{"_id": str(n), "text": os.urandom(100).hex()} for n in range(5000)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = run("ingest", "--data", data, "--out", disk / "out")
        assert "No space left on device" in sentence(done)
        assert finished(disk) == []
        assert not list(disk.rglob("part-*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
