"""A Ray head of the tests' own, with token authentication, that ends with them."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Head:
    """Where a running head listens, and the environment that holds its token."""

    url: str
    serve_port: int
    env: dict[str, str]
    temp_dir: Path

    @property
    def token(self) -> str:
        return self.env["RAY_AUTH_TOKEN"]

    def request(
        self, path: str, token: str | None = None, body: Any = None, method: str | None = None
    ) -> tuple[int, Any]:
        """The status and JSON of a GET, or of a POST of `body`; None where there is no JSON."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                text = reply.read()
                return int(reply.status), json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            return error.code, None


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` on loopback, with its own ports, directory and token."""
    # Ray puts sockets below its directory, and a socket's path has at most 107 bytes.
    temp_dir = Path(tempfile.mkdtemp(prefix="bixse-", dir="/tmp"))
    gcs, dashboard, serve, *others = free_ports(7)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    names = (
        "--dashboard-agent-listen-port",
        "--dashboard-agent-grpc-port",
        "--runtime-env-agent-port",
        "--metrics-export-port",
    )
    command = [
        *("ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=4"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--port={gcs}"),
        *(f"{name}={port}" for name, port in zip(names, others, strict=True)),
        *("--object-store-memory=200000000", f"--temp-dir={temp_dir}", "--disable-usage-stats"),
    ]
    with open(temp_dir / "head.log", "wb") as log:
        process = subprocess.Popen(
            command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    started = Head(f"http://127.0.0.1:{dashboard}", serve, env, temp_dir)
    try:
        wait_for(started, process)
        yield started
    finally:
        end(process)
        shutil.rmtree(temp_dir, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for bound in sockets:
            bound.bind(("127.0.0.1", 0))
        return [bound.getsockname()[1] for bound in sockets]


def wait_for(head: Head, process: subprocess.Popen[bytes], timeout_s: float = 60) -> None:
    """Return when the Jobs API answers; fail with the head's own words when it does not."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(urllib.error.URLError):
            if head.request("/api/jobs/", head.token)[0] == 200:
                return
        time.sleep(0.25)
    raise AssertionError(f"no head came up: {(head.temp_dir / 'head.log').read_text()[-3000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill this head and what it started, by process id: `ray stop` would end every other Ray."""
    with suppress(psutil.NoSuchProcess):
        # From the root down: a raylet that is gone starts no more workers.
        head = psutil.Process(process.pid)
        for member in [head, *head.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait(timeout=30)
