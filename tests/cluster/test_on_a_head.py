"""What is submitted to a head with token authentication runs, and what is deployed answers."""

import json
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import yaml

from bixse.artifacts import Artifact
from bixse.models.settings import PACKAGED

DOCUMENTS = {"d1": "Ray Data streams blocks.", "d2": "A shard is searched.", "d3": "Grades 0 to 3."}
KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def submitted(head, root, tmp_path_factory):
    """A finished `ray job submit` of `jobs.index` on three documents, and its `--out`."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    rows = [{"_id": name, "title": "", "text": text} for name, text in DOCUMENTS.items()]
    (data / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        *("ray", "job", "submit", "--address", head.url, "--working-dir", ".", "--"),
        *("python", "-m", "jobs.index", "bixse", "--data", str(data), "--out", str(out)),
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


def test_a_submitted_stage_leaves_finished_artefacts(submitted):
    done, out = submitted
    made = Artifact.open(str(out / "embeddings"), "embeddings")
    assert made.table(["doc_id"])["doc_id"].to_pylist() == list(DOCUMENTS)
    summary = next(line for line in done.stdout.splitlines() if line.startswith('{"verb"'))
    index = Artifact.open(str(out / "index"), "index")
    assert json.loads(summary)["rows"] == index.manifest.rows == len(DOCUMENTS)


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


@pytest.mark.slow
def test_the_serve_config_of_the_rayservice_answers_a_search(head, root, submitted, tmp_path):
    _, out = submitted
    config, url = local_serve_config(root, head, out, tmp_path)
    assert head.request("/api/serve/applications/", body=config, method="PUT")[0] == 401
    status, _ = head.request(
        "/api/serve/applications/", token=head.token, body=config, method="PUT"
    )
    assert status == 200
    wait_until_running(head)

    query = json.dumps({"query": "which shard is searched", "k": 2}).encode()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{url}/search", query, timeout=30)
    request = urllib.request.Request(
        f"{url}/search",
        query,
        {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        found = json.load(reply)
    assert found["hits"][0]["doc_id"] == "d2"
    assert found["coverage"]["fraction"] == 1.0


def local_serve_config(root, head, out, tmp_path):
    """The serveConfigV2 of cluster/rayservice.yaml with this machine's paths, port and size."""
    manifest = yaml.safe_load((root / "cluster" / "rayservice.yaml").read_text())
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    (tmp_path / "keys").write_text(f"search:{KEY}\n")
    config["http_options"] = {"host": "127.0.0.1", "port": head.serve_port}
    (application,) = config["applications"]
    application["args"] |= {
        "index": str(out / "index"),
        "encoder": PACKAGED,
        "keys_file": str(tmp_path / "keys"),
        "encoder_replicas": 1,
        "replicas_per_shard": 1,
    }
    # What the image sets for every process of the cluster.
    application["runtime_env"] = {"env_vars": {"PYTHONPATH": str(root)}}
    return config, f"http://127.0.0.1:{head.serve_port}"


def wait_until_running(head, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        _, reply = head.request("/api/serve/applications/", token=head.token)
        (application,) = reply["applications"].values()
        if application["status"] == "RUNNING":
            return
        assert application["status"] in ("NOT_STARTED", "DEPLOYING"), application["message"]
        time.sleep(0.5)
    raise AssertionError(application["message"])
