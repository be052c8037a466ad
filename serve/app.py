"""Wire the deployments into an application, and run it on one machine.

    python -m serve.app --index URL --encoder PATH --port 8000      # starts Ray here
    serve run serve.app:build index=URL encoder=PATH                # on a running cluster

Each replica loads its own files: nothing but paths and fingerprints goes through Ray.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NoReturn, TextIO

import ray
import ray.serve
import tyro
from ray.serve.config import BackpressureConfig, HTTPOptions
from ray.serve.schema import LoggingConfig

from bixse.artifacts import Artifact
from bixse.models.encoder import encoder_fingerprint, resolve
from serve.access import check_binding, load_keys
from serve.gateway import CALLS_A_REPLICA, Gateway
from serve.query_encoder import QueryEncoder
from serve.settings import ServeArgs, ServedIndex
from serve.shard import ShardServer

NAME = "bixse"

_READY_WITHIN_S = 60.0
_SPARE_REQUESTS = 64
"""Requests beyond `max_in_flight` that the gateway takes, to refuse them itself or to be probed."""


def build(args: ServeArgs) -> ray.serve.Application:
    """The application: a gateway over one encoder deployment and one deployment a shard.

    Raises ValueError when there is no index, or another encoder made it.
    """
    index = ServedIndex.read(args.index)
    index.check_encoder(args.encoder, encoder_fingerprint(resolve(args.encoder)))
    encoder = _deployment(QueryEncoder).options(
        num_replicas=args.encoder_replicas,
        # Two roles are batched apart.
        max_ongoing_requests=2 * CALLS_A_REPLICA * args.encoder_replicas,
        ray_actor_options={"num_cpus": args.encoder_cpus, "num_gpus": args.encoder_gpus},
    )
    shard = _deployment(ShardServer).options(
        num_replicas=args.replicas_per_shard,
        max_ongoing_requests=CALLS_A_REPLICA * args.replicas_per_shard,
        ray_actor_options={"num_cpus": args.shard_cpus},
    )
    shards = {
        name: shard.options(name=name).bind(index.url, index.fingerprint, name, args.shard_cpus)
        for name in index.shard_rows
    }
    gateway = _deployment(Gateway).options(
        # One: limits, batches and metrics are those of the process that holds them.
        num_replicas=1,
        max_ongoing_requests=args.max_in_flight + _SPARE_REQUESTS,
        max_queued_requests=args.max_in_flight,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        ray_actor_options={"num_cpus": 1},
    )
    application: ray.serve.Application = gateway.bind(
        args, index, encoder.bind(args.encoder, index, args.encoder_cpus), shards
    )
    return application


def _deployment(of: type) -> Any:
    # Ray's own annotation knows `deployment` as a decorator with arguments only.
    return ray.serve.deployment(of)


def main() -> None:
    """Serve until SIGINT or SIGTERM. Bad input is one sentence and exit status 2."""
    args = tyro.cli(ServeArgs, prog="python -m serve.app", description=__doc__.splitlines()[0])
    try:
        check_binding(args.host, load_keys(args.keys_file, os.environ))
        # One sentence here instead of a replica's traceback; the replicas verify again.
        Artifact.open(args.index, "index", verify=True)
        application = build(args)
        check_port(args.host, args.port)
    except ValueError as error:
        _refuse(str(error))
    start_ray(args)
    stop = threading.Event()
    # After Ray, which takes these signals for itself.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        deploy(args, application)
        index = ServedIndex.read(args.index)
        url = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{args.port}"
        problem = wait_until_ready(url, stop)
        if problem is not None:
            _refuse(f"the application did not become ready: {problem}", status=1)
        if not stop.is_set():
            documents, shards = sum(index.shard_rows.values()), len(index.shard_rows)
            _say(sys.stdout, f"ready at {url} ({documents} documents in {shards} shards)")
        stop.wait()
    finally:
        if "RAY_ADDRESS" in os.environ:
            # Others may have applications there.
            ray.serve.delete(NAME)
        else:
            # Ray leaves it without types.
            ray.serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def deploy(args: ServeArgs, application: ray.serve.Application) -> None:
    """Start Serve on the connected cluster, and wait until every replica has loaded."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.serve.start(
        http_options=HTTPOptions(
            host=args.host,
            port=args.port,
            # A backstop: every request has a deadline of its own.
            request_timeout_s=args.max_timeout_ms / 1e3 + 30,
        ),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    ray.serve.run(application, name=NAME, route_prefix="/")


def start_ray(args: ServeArgs) -> None:
    """Join the cluster of RAY_ADDRESS, or start a local one with room for every replica."""
    # Workers must find bixse and serve wherever the program was started from.
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    env = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "TOKENIZERS_PARALLELISM": "false"}
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": env},
        "log_to_driver": False,
        "logging_level": "warning",
    }
    if "RAY_ADDRESS" in os.environ:
        ray.init(address=os.environ["RAY_ADDRESS"], **options)
        return
    shards = len(ServedIndex.read(args.index).shard_rows)
    wanted = 1 + args.encoder_cpus * args.encoder_replicas
    wanted += args.shard_cpus * args.replicas_per_shard * shards
    # On a laptop replicas share cores rather than wait for some that never come.
    cpus = max(wanted, os.cpu_count() or 1)
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)


def wait_until_ready(url: str, stop: threading.Event) -> str | None:
    """Ask `/readyz` until it says yes; gives what it said last when that takes too long."""
    said, until = "it gave no answer", time.monotonic() + _READY_WITHIN_S
    while not stop.is_set():
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=10):
                return None
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
        except OSError as error:
            said = str(error)
        if time.monotonic() > until:
            return said
        stop.wait(0.2)
    return None


def check_port(host: str, port: int) -> None:
    """Raises ValueError when nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}") from None


def _say(stream: TextIO, sentence: str) -> None:
    stream.write(f"{sentence}\n")
    stream.flush()


def _refuse(sentence: str, status: int = 2) -> NoReturn:
    _say(sys.stderr, f"error: {sentence}")
    sys.exit(status)


if __name__ == "__main__":
    main()
