"""`ray job submit` against a head with token authentication runs a real stage."""

import json
import subprocess

import pytest

from bixse.artifacts import Artifact
from bixse.models.settings import PACKAGED

DOCUMENTS = {"d1": "Ray Data streams blocks.", "d2": "A shard is searched.", "d3": "Grades 0 to 3."}


@pytest.fixture(scope="module")
def submitted(head, root, tmp_path_factory):
    """A finished `ray job submit` of the embed stage on three documents, and its `--out`."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    rows = [{"_id": name, "title": "", "text": text} for name, text in DOCUMENTS.items()]
    (data / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        *("ray", "job", "submit", "--address", head.url, "--working-dir", ".", "--"),
        *("python", "-m", "jobs.embed", "bixse", "--data", str(data), "--out", str(out)),
        *("--encoder", PACKAGED, "--json"),
    ]
    done = subprocess.run(
        command, cwd=root, env=head.env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done, out


def test_a_request_without_the_token_is_refused(head, tmp_path):
    body = {"entrypoint": f"touch {tmp_path}/ran"}
    assert head.request("/api/jobs/")[0] == 401
    assert head.request("/api/jobs/", body=body)[0] == 401
    assert head.request("/api/jobs/", token="guess", body=body)[0] == 403
    assert head.request("/api/jobs/", token=head.token) == (200, [])
    assert not (tmp_path / "ran").exists()


def test_a_submitted_stage_leaves_a_finished_artefact(submitted):
    done, out = submitted
    made = Artifact.open(str(out / "embeddings"), "embeddings")
    assert made.table(["doc_id"])["doc_id"].to_pylist() == list(DOCUMENTS)
    summary = next(line for line in done.stdout.splitlines() if line.startswith('{"verb"'))
    assert json.loads(summary)["rows"] == len(DOCUMENTS)


def test_a_submitted_stage_works_on_the_cluster_it_was_submitted_to(head, submitted):
    status, reply = head.request("/api/v0/actors?limit=100", token=head.token)
    assert status == 200
    classes = [actor["class_name"] for actor in reply["data"]["result"]["result"]]
    assert any("PartWriter" in name for name in classes), classes


def test_the_working_directory_is_shipped_without_what_git_ignores(head, submitted):
    resources = head.temp_dir / "session_latest" / "runtime_resources" / "working_dir_files"
    (shipped,) = (path for path in resources.iterdir() if path.is_dir())
    names = {path.name for path in shipped.iterdir()}
    assert {"bixse", "jobs", "serve", "pyproject.toml"} <= names
    assert names.isdisjoint({".venv", ".git", "runs", ".mypy_cache", ".ruff_cache"})
