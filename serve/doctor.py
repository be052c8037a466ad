"""Say what would be open, and to whom, before anything is started.

    python -m serve.doctor --index URL --encoder PATH [the flags of serve.app] [--json]

Exit status 0 when nothing is wrong, 1 when something should not be started as it is. Nothing is
changed, started or reached over the network.
"""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from serve.access import is_loopback, load_keys
from serve.app import check_tls, parse
from serve.settings import ServeArgs

Level = Literal["fault", "warning", "port", "fine"]
"""fault: do not start it so. warning: know it. port: what listens, and for whom."""


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    sentence: str


@dataclass(frozen=True, slots=True)
class Hole:
    """A published hole of a package: versions from `since` up to, without, `fixed`."""

    package: str
    since: tuple[int, ...]
    fixed: tuple[int, ...]
    what: str
    source: str


HOLES_AS_OF = "2026-11-20"
"""When this table was last looked over: a hole published later is not in it."""

HOLES = (
    Hole("ray", (0,), (2, 8, 1), "command injection in the dashboard", "CVE-2023-6019"),
    Hole("ray", (0,), (2, 52, 0), "code execution through a browser", "CVE-2025-62593"),
    Hole("ray", (0,), (2, 52, 0), "no token authentication: an open port runs code",
         "CVE-2023-48022"),
    Hole("ray", (0,), (2, 54, 0), "unauthenticated DELETE on the dashboard stops Serve",
         "CVE-2026-27482"),
    Hole("ray", (2, 49, 0), (2, 55, 0), "code execution through a Parquet file read by Ray Data",
         "CVE-2026-41486"),
    Hole("faiss-cpu", (0,), (1, 15, 0), "memory corruption by a crafted index file",
         "github.com/facebookresearch/faiss/pull/5400"),
    Hole("faiss-gpu", (0,), (1, 15, 0), "memory corruption by a crafted index file",
         "github.com/facebookresearch/faiss/pull/5400"),
    Hole("torch", (0,), (2, 6, 0), "code execution by torch.load(weights_only=True)",
         "CVE-2025-32434"),
)  # fmt: skip


_RAYS_PORTS = (
    "others chosen by the system: Ray's own protocol, all interfaces, runs code for token holders",
    "52365, and one chosen by the system: Ray's agent of this machine, on its own address, for "
    "token holders; whether Ray is well it tells anybody",
    "44217, 44227, and one chosen by the system: Ray's statistics, all interfaces whatever --host "
    "says, no token: put a firewall before them",
)
"""Of a Ray that is started here: what listens beside the application."""


def examine(
    args: ServeArgs, environment: Mapping[str, str], versions: Mapping[str, str]
) -> list[Finding]:
    """All that can be known before the start; faults first."""
    found = [
        *_ports(args, environment),
        *_keys(args, environment),
        *_transport(args),
        *_token(environment),
        *_gpus(args, versions),
        *_holes(versions),
    ]
    order: tuple[Level, ...] = ("fault", "warning", "port", "fine")
    return sorted(found, key=lambda finding: order.index(finding.level))


def installed() -> dict[str, str]:
    """Versions of the packages that the table of holes names, as far as they are installed."""
    versions = {}
    for package in sorted({hole.package for hole in HOLES}):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def main() -> None:
    """Print the findings; exit 1 when one of them is a fault."""
    argv = [flag for flag in sys.argv[1:] if flag != "--json"]
    found = examine(parse(argv, prog="python -m serve.doctor"), os.environ, installed())
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps([asdict(finding) for finding in found]) + "\n")
    else:
        for finding in found:
            sys.stdout.write(f"{finding.level:8}{finding.sentence}\n")
    sys.exit(any(finding.level == "fault" for finding in found))


def _ports(args: ServeArgs, environment: Mapping[str, str]) -> list[Finding]:
    where = "this machine only" if is_loopback(args.host) else f"whoever reaches {args.host}"
    found = [Finding("port", f"{args.port}: HTTP, for {where}")]
    replicas = "each replica's gRPC port, chosen by the system: all interfaces"
    if "RAY_ADDRESS" in environment:
        found.append(Finding("port", "the ports of the running cluster are not examined here"))
    else:
        found += [Finding("port", sentence) for sentence in _RAYS_PORTS]
    found.append(Finding("port", f"{replicas}, unpickles requests of token holders"))
    if args.profile == "fast":
        sentence = (
            f"30000-31000, 8500: replicas behind HAProxy, Ray's own proxy, for {where}; keys "
            "are asked there too"
        )
        found.append(Finding("port", sentence))
        sentence = (
            "8404 and 9101: HAProxy's statistics, all interfaces whatever --host says, no key: put "
            "a firewall before them"
        )
        found.append(Finding("port", sentence))
        sentence = (
            "/tmp/haproxy-serve/*/admin.sock: HAProxy's control socket, for every user of this "
            "machine: share it with nobody"
        )
        found.append(Finding("warning", sentence))
    return found


def _keys(args: ServeArgs, environment: Mapping[str, str]) -> list[Finding]:
    try:
        keys = load_keys(args.keys_file, environment)
    except ValueError as error:
        return [Finding("fault", str(error))]
    found = []
    if not keys and not is_loopback(args.host):
        found.append(Finding("fault", f"no keys, and {args.host} is not loopback"))
    elif not keys:
        found.append(Finding("warning", "no keys: every program on this machine may search"))
    else:
        found.append(Finding("fine", "keys are asked for"))
    return [*found, *_readable(args.keys_file)]


def _readable(secret: str | None) -> list[Finding]:
    if secret is None or not Path(secret).stat().st_mode & 0o077:
        return []
    return [Finding("warning", f"{secret} is readable by others on this machine: chmod 600")]


def _transport(args: ServeArgs) -> list[Finding]:
    if args.tls_certificate is not None:
        try:
            check_tls(args.tls_certificate, args.tls_key)
        except ValueError as error:
            return [Finding("fault", str(error))]
        return [Finding("fine", "TLS"), *_readable(args.tls_key)]
    if is_loopback(args.host):
        return []
    sentence = (
        f"no TLS on {args.host}: keys and queries would be sent in the clear (give "
        "--tls-certificate and --tls-key, or listen on loopback behind a proxy)"
    )
    return [Finding("fault", sentence)]


def _token(environment: Mapping[str, str]) -> list[Finding]:
    mode = environment.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        return [
            Finding("fault", "RAY_AUTH_MODE=disabled: whoever reaches a port of Ray runs code here")
        ]
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if environment.get("RAY_AUTH_TOKEN") or path.exists():
        return [Finding("fine", "Ray has a token")]
    if "RAY_ADDRESS" in environment:
        return [Finding("fault", "no Ray token for the cluster of RAY_ADDRESS: "
                        "ray get-auth-token --generate")]  # fmt: skip
    return [Finding("warning", "no Ray token yet: Ray makes one when it starts here")]


def _gpus(args: ServeArgs, versions: Mapping[str, str]) -> list[Finding]:
    if not args.shard_gpus or "faiss-gpu" in versions:
        return []
    sentence = "--shard-gpus, and no faiss-gpu here: a node without it refuses to load shards"
    return [Finding("warning", sentence)]


def _holes(versions: Mapping[str, str]) -> list[Finding]:
    found = [
        Finding("fault", f"{hole.package} {versions[hole.package]}: {hole.what} ({hole.source}), "
                f"fixed in {'.'.join(map(str, hole.fixed))}")
        for hole in HOLES
        if hole.package in versions
        and hole.since <= _numbers(versions[hole.package]) < hole.fixed
    ]  # fmt: skip
    names = ", ".join(f"{package} {number}" for package, number in versions.items())
    checked = Finding("fine", f"no hole known on {HOLES_AS_OF}: {names}")
    return found or [checked]


def _numbers(text: str) -> tuple[int, ...]:
    numbers: Sequence[str] = text.split("+")[0].split(".")
    leading = [n for n in numbers if n.isdigit()]
    return tuple(int(n) for n in leading)


if __name__ == "__main__":
    # A reader that has seen enough (`| head`) ends it, as it ends any tool.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
