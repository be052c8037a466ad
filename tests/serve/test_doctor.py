"""What the doctor finds, by level."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
from ray.dashboard.consts import DASHBOARD_METRIC_PORT

from serve.doctor import HOLES, HOLES_AS_OF, examine, installed
from serve.settings import ServeArgs

ROOT = Path(__file__).resolve().parents[2]
SAFE = {"RAY_AUTH_TOKEN": "t", "BIXSE_KEYS": "search:a-key-long-enough-for-this"}
NOW = {"ray": "2.60.0", "faiss-cpu": "1.15.1", "torch": "2.13.0+cpu"}


def sentences(level, environment=SAFE, versions=NOW, **flags) -> list[str]:
    args = ServeArgs.model_validate({"index": "i", "encoder": "e", **flags})
    return [f.sentence for f in examine(args, environment, versions) if f.level == level]


@pytest.mark.parametrize(
    "words", ["serve.doctor --index i --encoder e", "serve.app --help", "jobs.index bixse --help"]
)
def test_a_reader_that_has_gone_gets_no_traceback(words):
    reads, writes = os.pipe()
    os.close(reads)
    line = [sys.executable, "-m", *words.split()]
    with os.fdopen(writes) as gone:
        done = subprocess.run(line, cwd=ROOT, stdout=gone, stderr=subprocess.PIPE, timeout=120)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


def test_the_default_with_keys_has_no_fault_and_names_its_ports():
    assert sentences("fault") == []
    assert sentences("warning") == []
    ports = sentences("port")
    assert ports[0] == "8000: HTTP, for this machine only"
    assert any("all interfaces" in port for port in ports)
    assert not any("HAProxy" in port for port in ports)
    assert any("30000-31000" in port for port in sentences("port", profile="fast"))


def ports_of(process: psutil.Process) -> set[int]:
    """Where a program and all that it has started listen."""
    found: set[int] = set()
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            of_one = one.net_connections("tcp")
            found |= {at.laddr.port for at in of_one if at.status == psutil.CONN_LISTEN}
    return found


def test_what_listens_is_named_and_what_is_named_listens(served):
    """6379 and 10002-19999 were named, where nothing listens, and Ray's statistics were not."""
    said = sentences("port", port=int(served.url.rsplit(":", 1)[1]))
    assert any("chosen by the system" in sentence for sentence in said)
    named = {int(n) for sentence in said for n in re.findall(r"\d{4,}", sentence.split(": ")[0])}
    listening = ports_of(psutil.Process(served.process.pid))
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert {port for port in listening if not low <= port <= high} <= named
    # Those are in the system's range and the same every time; another Ray here may have them.
    fixed = {AUTOSCALER_METRIC_PORT, DASHBOARD_METRIC_PORT, DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}
    assert fixed <= named
    here = {at.laddr.port for at in psutil.net_connections("tcp") if at.status == "LISTEN"}
    assert named <= listening | (fixed & here)


def test_open_to_others_without_keys_or_tls(tls_pair):
    faults = sentences("fault", {"RAY_AUTH_TOKEN": "t"}, host="0.0.0.0")
    assert any(f.startswith("no keys, and 0.0.0.0") for f in faults)
    assert any(f.startswith("no TLS on 0.0.0.0") for f in faults)
    certificate, key = map(str, tls_pair)
    tls = {"host": "0.0.0.0", "tls_certificate": certificate, "tls_key": key}
    assert sentences("fault", **tls) == []


def test_a_certificate_that_cannot_be_used_and_a_key_for_all(tls_pair):
    """Of files that are not there it said that all was fine."""
    certificate, key = tls_pair
    tls = {"tls_certificate": str(certificate), "tls_key": str(key)}
    key.chmod(0o600)
    assert "TLS" in sentences("fine", **tls)
    assert sentences("warning", **tls) == []
    key.chmod(0o644)
    (warning,) = sentences("warning", **tls)
    assert warning == f"{key} is readable by others on this machine: chmod 600"
    for wrong in ({"tls_key": "/absent"}, {"tls_key": str(certificate)}):
        (fault,) = sentences("fault", **(tls | wrong))
        assert fault.startswith(f"cannot use {certificate} with {wrong['tls_key']}")


def test_no_keys_on_loopback_is_a_warning():
    assert any("no keys" in w for w in sentences("warning", {"RAY_AUTH_TOKEN": "t"}))


def test_rays_token(tmp_path):
    off = {**SAFE, "RAY_AUTH_MODE": "disabled"}
    assert any("RAY_AUTH_MODE=disabled" in f for f in sentences("fault", off))
    absent = {"BIXSE_KEYS": SAFE["BIXSE_KEYS"], "RAY_AUTH_TOKEN_PATH": str(tmp_path / "no")}
    assert any("no Ray token yet" in w for w in sentences("warning", absent))
    elsewhere = {**absent, "RAY_ADDRESS": "10.0.0.1:6379"}
    assert any("no Ray token for the cluster" in f for f in sentences("fault", elsewhere))


def test_shards_on_a_gpu_need_its_faiss():
    assert any("--shard-gpus" in w for w in sentences("warning", shard_gpus=1))
    assert sentences("warning", versions={**NOW, "faiss-gpu": "1.15.1"}, shard_gpus=1) == []
    assert sentences("warning") == []


@pytest.mark.parametrize("hole", HOLES, ids=lambda hole: f"{hole.package}-{hole.source}")
def test_each_known_hole_is_found_below_its_fix_and_not_from_it_on(hole):
    fixed = ".".join(map(str, hole.fixed))
    *head, last = hole.fixed
    below = (*head, last - 1) if last else (*head[:-1], head[-1] - 1, 9)
    before = ".".join(map(str, below))
    found = sentences("fault", versions={hole.package: before})
    assert any(hole.source in sentence and fixed in sentence for sentence in found)
    assert not any(hole.source in s for s in sentences("fault", versions={hole.package: fixed}))


def test_what_is_installed_here_has_no_known_hole():
    assert not any("fixed in" in s for s in sentences("fault", versions=installed()))
    assert any(HOLES_AS_OF in s for s in sentences("fine", versions=installed()))


def test_a_readable_keys_file_and_a_bad_one(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("search:a-key-long-enough-for-this\n")
    keys.chmod(0o644)
    assert any("chmod 600" in w for w in sentences("warning", keys_file=str(keys)))
    keys.chmod(0o600)
    assert sentences("warning", keys_file=str(keys)) == []
    assert any("cannot read" in f for f in sentences("fault", keys_file=str(tmp_path / "no")))


def test_the_program(tmp_path):
    command = [sys.executable, "-m", "serve.doctor", "--index", "i", "--encoder", "e", "--json"]
    env = {"PATH": "/bin", "RAY_AUTH_TOKEN": "t", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert {f["level"] for f in json.loads(ran.stdout)} <= {"warning", "port", "fine"}
    bad = subprocess.run(
        [*command, "--host", "0.0.0.0"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert bad.returncode == 1
