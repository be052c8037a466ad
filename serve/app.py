"""Serve an index with its encoder over HTTP.

    python -m serve.app --index URL --encoder PATH --port 8000      # starts Ray here
    serve run serve.app:build index=URL encoder=PATH                # on a running cluster

Bad input is one sentence and exit status 2, before anything heavy is imported.
"""

import contextlib
import io
import itertools
import os
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn, TextIO

import tyro

from bixse.leaving import own_status
from bixse.settings import plain_refusal
from serve.access import check_binding, load_keys
from serve.request_log import made
from serve.settings import ServeArgs, ServedIndex

if TYPE_CHECKING:
    import ray.serve

_READY_WITHIN_S = 60.0
_HAPROXYS_PORTS = {
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
}
"""The variables of Ray that name them, and what they are without."""


def build(args: ServeArgs) -> "ray.serve.Application":
    """The application, for `serve run serve.app:build`. Raises ValueError as `wiring.build`."""
    from serve import wiring

    return wiring.build(args)


def parse(argv: Sequence[str], prog: str = "python -m serve.app") -> ServeArgs:
    """What a command line describes; exits 2 with one sentence when it describes nothing."""
    if {"-h", "--help"} & {*argv}:
        # Who reads it (`less`, `head`) may have seen enough: that ends the process, as any tool.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                ServeArgs,
                prog=prog,
                description=(__doc__ or "").splitlines()[0],
                args=list(argv),
            )
    except SystemExit as exit_:
        if exit_.code:
            _refuse(_one_sentence(complaint.getvalue()))
        raise


def main() -> None:
    """Serve until SIGINT or SIGTERM, then answer what is under way and exit 0.

    Bad input is one sentence and exit status 2.
    """
    args = parse(sys.argv[1:])
    try:
        if args.plan:
            _plan(args)
            return
        check_binding(args.host, load_keys(args.keys_file, os.environ))
        check_tls(args.tls_certificate, args.tls_key)
        check_port(args.host, args.port)
        if args.profile == "fast" and "RAY_ADDRESS" not in os.environ:
            check_haproxys_ports(os.environ)
        if args.request_log is not None:
            made(args.request_log)
        set_profile(args)
        from bixse.artifacts import Artifact
        from serve import wiring

        # One sentence here instead of a replica's traceback; the replicas verify again.
        Artifact.open(args.index, "index", verify=True)
        application = wiring.build(args)
    except (ValueError, OSError, ImportError) as error:
        # The last two of what reads a URL: it is not reached, or its package is not installed.
        _refuse(" ".join(str(error).split()) or type(error).__name__)
    try:
        wiring.start_ray(args)
    except ValueError as error:
        _refuse(str(error))
    except ConnectionError as error:
        _refuse(str(error), status=1)
    stop, deployed = threading.Event(), threading.Event()

    def asked_to_stop(*_: object) -> None:
        stop.set()
        if not deployed.is_set():
            # Replicas may load for minutes; nobody waits for them any more.
            sys.exit(0)

    # After Ray, which takes these signals for itself.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, asked_to_stop)
    try:
        try:
            wiring.deploy(args, application)
        except RuntimeError as error:
            _refuse(str(error), status=1)
        deployed.set()
        index = ServedIndex.read(args.index)
        scheme = "http" if args.tls_certificate is None else "https"
        url = f"{scheme}://{f'[{args.host}]' if ':' in args.host else args.host}:{args.port}"
        problem = wait_until_ready(url, stop, args.tls_certificate)
        if problem is not None:
            _refuse(f"the application did not become ready: {problem}", status=1)
        if not stop.is_set():
            documents, shards = sum(index.shard_rows.values()), len(index.shard_rows)
            _say(sys.stdout, f"ready at {url} ({documents} documents in {shards} shards)")
        stop.wait()
        if not wiring.drain(args.drain_within_s):
            within_s = f"{args.drain_within_s:g} s"
            _say(sys.stderr, f"stopping with requests that were not answered within {within_s}")
    finally:
        deployed.set()
        wiring.stop()


def _plan(args: ServeArgs) -> None:
    from bixse.models.encoder import resolve
    from bixse.models.reranker import trained_directory
    from serve.plan import as_text, plan

    reranker = None if args.reranker is None else trained_directory(args.reranker)
    _say(sys.stdout, as_text(plan(args, resolve(args.encoder), reranker)))


def set_profile(args: ServeArgs) -> None:
    """Set the variables that Ray Serve reads when it is imported.

    Raises ValueError for the fast profile when that has happened already.
    """
    if args.profile == "fast" and "ray.serve" in sys.modules:
        raise ValueError("Ray Serve is imported already: its profile can no longer be chosen")
    for name, value in args.ray_variables().items():
        os.environ.setdefault(name, value)


def wait_until_ready(url: str, stop: threading.Event, certificate: str | None) -> str | None:
    """Ask `/readyz` until it says yes; gives what it said last when that takes too long."""
    context = None if certificate is None else _trusting(certificate)
    said, until = "it gave no answer", time.monotonic() + _READY_WITHIN_S
    while not stop.is_set():
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=10, context=context):
                return None
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
        except OSError as error:
            said = str(error)
        if time.monotonic() > until:
            return said
        stop.wait(0.2)
    return None


def _trusting(certificate: str) -> ssl.SSLContext:
    """For a probe of ourselves: this certificate, whatever name it was given for."""
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    # A leaf with no authority behind it is as good here.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def check_tls(certificate: str | None, key: str | None) -> None:
    """Raises ValueError when the files are no certificate and its key."""
    if certificate is None or key is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except OSError as error:
        raise ValueError(f"cannot use {certificate} with {key}: {error}") from None


def check_port(host: str, port: int) -> None:
    """Raises ValueError when nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}") from None


def check_haproxys_ports(environment: Mapping[str, str]) -> None:
    """Raises ValueError when HAProxy, which one machine can run once, could not give statistics."""
    for variable, port in _HAPROXYS_PORTS.items():
        try:
            check_port("0.0.0.0", int(environment.get(variable, port)))
        except ValueError as error:
            raise ValueError(f"{error} (HAProxy's statistics: {variable} moves them)") from None


def _say(stream: TextIO, sentence: str) -> None:
    stream.write(f"{sentence}\n")
    stream.flush()


def _refuse(sentence: str, status: int = 2) -> NoReturn:
    _say(sys.stderr, f"error: {sentence}")
    sys.exit(status)


def _one_sentence(box: str) -> str:
    """tyro's boxed complaint as a sentence, with the nearest flag if it knows one."""
    # The frame is drawn in ASCII where the terminal has no other: only rules, no sides.
    rows = [line.strip("│| ") for line in box.splitlines()[1:]]
    rows = ["" if set(row) <= set("─-╰╯+") else row for row in rows]
    rows = list(itertools.dropwhile(lambda row: not row, rows))
    rule = next((i for i, row in enumerate(rows) if not row), len(rows))
    sentence = " ".join(row for row in rows[:rule] if "errors.pydantic.dev" not in row)
    sentence = sentence.split(" For further information")[0]
    sentence = plain_refusal(sentence)
    nearest = [row for row in rows[rule + 1 :] if row.startswith("--")]
    if "Perhaps you meant:" in rows[rule + 1 :] and nearest:
        sentence += f": the nearest is {nearest[0].split()[0]}"
    return sentence


if __name__ == "__main__":
    with own_status():
        main()
