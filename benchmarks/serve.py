"""The served application against the limit, plain Ray Serve, and servers that a user would pick.

    python -m benchmarks.serve --json                    # 100,000 documents, 3 rounds
    python -m benchmarks.serve --quick --json            # 20,000, one round, about five minutes
    python -m benchmarks.serve --rows 1000000 --encoded 100000 --structure ivf_flat --corpus-dir DIR

Documents are made of the words of Python's documentation and encoded once (with `--encoded`, the
first so many: vectors of the others are made up around theirs); queries are others of their kind.
Every system encodes each query with the same weights and gives ten documents. The limit is this
process: batches of `clients` queries through `Encoder` and `Shard`, no HTTP. Up to 50,000 documents
search is exact, but for Chroma's HNSW. Beyond, bixse, the limit and plain Ray Serve share one FAISS
index (a graph, or `--structure`) tuned to recall@10 .95, txtai and Chroma take what they take by
themselves, and the recall of each is given. In a round each server is started, warmed, asked by
`clients` clients and by one, in a closed loop from a process of its own, and stopped; medians over
the rounds. A processor that has rested for a few milliseconds may be slower: `one_rested_p50_ms` is
the limit of one client that rests before each query, as a server does that waits for the next.
Recall is against exact search by vectors in float32. Load, servers and their proxies share the
machine's cores: `load_cores` says how much of one the load took.
"""

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import tyro

from benchmarks import serve_peers
from benchmarks.serve_corpus import Corpus, K, made
from bixse.models.encoder import Encoder, resolve
from bixse.models.settings import PACKAGED
from bixse.retrieval.library import use_threads
from bixse.retrieval.settings import EXACT_BELOW, Structure
from bixse.retrieval.shard import Shard

ROOT = Path(__file__).resolve().parents[1]
REST_S = 0.005
"""Between two queries of one client a server's processes wait about so long for each other."""
SYSTEMS = ("replicate", "replicate_fast", "shard", "shard_fast", "plain_ray_serve")


@dataclass(frozen=True)
class Options:
    """What is compared, and for how long."""

    rows: int = 100_000
    """Documents."""
    encoded: int | None = None
    """Documents that are encoded, all when unset: a million take two cores about an hour."""
    encoder: str = PACKAGED
    """Encoder of every system."""
    threads: int = 2
    """Threads of every system's encoder."""
    clients: int = 32
    """Clients of the loaded run; the other has one."""
    seconds: float = 10.0
    """Longest run of one load."""
    count: int = 20_000
    """Most requests of one load."""
    structure: Structure | None = None
    """Of the index; unset: exact up to 50,000 documents, then hnsw. Plain Ray Serve refines codes
    as FAISS does (`IndexRefine`)."""
    rounds: int = 3
    """Rounds that each system takes, in turn."""
    query_precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """Of the limit and of bixse; the others take float32."""
    systems: tuple[str, ...] = (*SYSTEMS, *serve_peers.NEEDS)
    """What is run besides the limit."""
    corpus_dir: str | None = None
    """Where documents, vectors and index are made and kept; a temporary directory when unset."""
    peers_dir: str | None = None
    """Where the peers' environments are made and kept; a temporary directory when unset."""
    quick: bool = False
    """20,000 documents, one round, short."""
    json: bool = False
    """One JSON object on standard output."""


def main() -> None:
    options = tyro.cli(Options)
    if options.quick:
        options = replace(options, rows=20_000, seconds=6.0, rounds=1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(options.corpus_dir or Path(folder) / "corpus").resolve()
        place.mkdir(parents=True, exist_ok=True)
        few = options.rows <= EXACT_BELOW
        structure = options.structure or ("exact" if few else "hnsw")
        corpus = made(options.rows, options.encoder, place, structure, options.encoded)
        peers = Path(options.peers_dir or Path(folder) / "peers").resolve()
        peers.mkdir(parents=True, exist_ok=True)
        turns: dict[str, list[dict[str, float]]] = {}
        for number in range(options.rounds):
            ways = ["limit", *options.systems]
            for name in ways[number % len(ways) :] + ways[: number % len(ways)]:
                try:
                    found = turn(name, corpus, peers, options)
                except RuntimeError as error:
                    if name not in serve_peers.NEEDS:
                        raise
                    print(f"SKIPPED {name}: {error}", file=sys.stderr, flush=True)
                    found = None
                if found is not None:
                    turns.setdefault(name, []).append(found)
                    said = "  ".join(f"{key}={value:.4g}" for key, value in found.items())
                    print(f"round {number + 1}, {name}: {said}", file=sys.stderr, flush=True)
    result = summary(turns)
    if options.json:
        print(json.dumps(result))


def summary(turns: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds."""
    medians = {
        name: {key: round(median(found[key] for found in column), 4) for key in column[0]}
        for name, column in turns.items()
    }
    result: dict[str, Any] = {
        f"{name}_qps": found["qps"]
        for name, found in medians.items()
        if name not in serve_peers.NEEDS
    }
    result["peers"] = {n: medians[n]["qps"] for n in serve_peers.NEEDS if n in medians}
    if "replicate_fast" in medians:
        gap = medians["replicate_fast"]["one_p50_ms"] - medians["limit"]["one_p50_ms"]
        result["p50_overhead_ms"] = round(gap, 3)
        gap = medians["replicate_fast"]["one_p50_ms"] - medians["limit"]["one_rested_p50_ms"]
        result["p50_overhead_rested_ms"] = round(gap, 3)
    result["recall@10"] = {name: found["recall"] for name, found in medians.items()}
    return {**result, "medians": medians}


def turn(name: str, corpus: Corpus, peers: Path, options: Options) -> dict[str, float] | None:
    """One system's figures of one round, or None when a peer cannot be had."""
    if name == "limit":
        return limit(corpus, options)
    python = Path(sys.executable)
    if name in serve_peers.NEEDS:
        try:
            python = serve_peers.installed(name, peers)
        except (subprocess.SubprocessError, OSError) as error:
            print(f"SKIPPED {name}: not installed: {error}", file=sys.stderr, flush=True)
            return None
    port = _free_port()
    with running(_command(name, python, port, corpus, options), port, corpus):
        requests = [_request(name, port, query) for query in corpus.queries]
        _load(requests[:128], port, options.clients, options, seconds=3.0)
        loaded = _load(requests, port, options.clients, options, options.seconds)
        alone = _load(requests, port, 1, options, options.seconds / 2)
        found = [_ids(name, port, query) for query in corpus.queries[:128]]
    if loaded["failed"] or alone["failed"]:
        print(f"{name} refused requests: {loaded} {alone}", file=sys.stderr)
    return {
        "qps": loaded["qps"],
        "p50_ms": loaded["p50_ms"],
        "p99_ms": loaded["p99_ms"],
        "one_qps": alone["qps"],
        "one_p50_ms": alone["p50_ms"],
        "load_cores": loaded["load_cores"],
        "failed": loaded["failed"] + alone["failed"],
        "recall": _recall(found, corpus.truth),
    }


def limit(corpus: Corpus, options: Options) -> dict[str, float]:
    """Encoding and search in this process, in batches of as many as there are clients."""
    import torch

    torch.set_num_threads(options.threads)
    use_threads(1)
    encoder = Encoder.load(options.encoder, "cpu", options.query_precision)
    shard = Shard.load(corpus.index.local_directory() / "shard-00000")

    def ask(texts: list[str]) -> list[set[str]]:
        found = shard.rankings(encoder.encode(texts, "query"), [K] * len(texts))
        for one in found:
            shard.documents(one.rows)
        return [set(one.doc_ids) for one in found]

    def took(size: int, seconds: float, rest_s: float = 0.0) -> list[float]:
        every, start = [], time.perf_counter()
        while time.perf_counter() - start < seconds:
            time.sleep(rest_s)
            at = len(every) * size % (len(corpus.queries) - size)
            begun = time.perf_counter()
            ask(corpus.queries[at : at + size])
            every.append((time.perf_counter() - begun) * 1e3)
        return every

    took(options.clients, 1.0)
    batches, single = took(options.clients, options.seconds), took(1, options.seconds / 2)
    rested = took(1, options.seconds / 2, REST_S)
    return {
        "qps": options.clients * len(batches) / (sum(batches) / 1e3),
        "p50_ms": median(batches),
        "one_qps": len(single) / (sum(single) / 1e3),
        "one_p50_ms": median(single),
        "one_rested_p50_ms": median(rested),
        "recall": _recall(ask(corpus.queries[:128]), corpus.truth),
    }


def _command(name: str, python: Path, port: int, corpus: Corpus, options: Options) -> list[str]:
    place, encoder = str(corpus.place), str(resolve(options.encoder))
    if name in serve_peers.NEEDS:
        return [str(python), serve_peers.__file__, name, place, encoder, str(port)]
    if name == "plain_ray_serve":
        command = [str(python), "-m", "benchmarks.serve_plain", place, encoder]
        return [*command, str(port), str(options.threads)]
    topology, _, fast = name.partition("_")
    command = [str(python), "-m", "serve.app", "--index", corpus.index.url, "--encoder", encoder]
    command += ["--port", str(port), "--topology", topology]
    command += ["--encoder-cpus", str(options.threads)]
    command += ["--query-precision", options.query_precision]
    return command + (["--profile", "fast"] if fast else [])


@contextmanager
def running(command: list[str], port: int, corpus: Corpus) -> Iterator[None]:
    """A server that answers. Raises RuntimeError with the end of its log when it does not."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + 1800
            while not _answers(command, port, corpus.queries[0]):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"{command} does not answer: {log.read()[-2000:]}")
                time.sleep(0.5)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _answers(command: list[str], port: int, query: str) -> bool:
    name = next((peer for peer in serve_peers.NEEDS if peer in command), "bixse")
    try:
        return len(_ids(name, port, query)) == K
    except OSError:
        return False


def _request(name: str, port: int, query: str) -> str:
    """A whole HTTP request; the peers' are GET."""
    if name in serve_peers.NEEDS:
        asked = urllib.parse.urlencode({"query": query, "limit": K})
        return f"GET /search?{asked} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"
    body = json.dumps({"query": query, "k": K})
    return (
        f"POST /search HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )


def _ids(name: str, port: int, query: str) -> set[str]:
    url, body = f"http://127.0.0.1:{port}/search", None
    if name in serve_peers.NEEDS:
        url += "?" + urllib.parse.urlencode({"query": query, "limit": K})
    else:
        body = json.dumps({"query": query, "k": K}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        said = json.load(reply)
    hits = said if isinstance(said, list) else said["hits"]
    return {hit["id"] if "id" in hit else hit["doc_id"] for hit in hits}


def _load(
    requests: list[str], port: int, clients: int, options: Options, seconds: float
) -> dict[str, float]:
    plan = {"host": "127.0.0.1", "port": port, "requests": requests, "clients": clients}
    plan |= {"seconds": seconds, "count": options.count}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(plan, file)
        file.flush()
        command = [sys.executable, "-m", "benchmarks.serve_load", file.name]
        ran = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(ran.stdout)
    return found


def _recall(found: list[set[str]], truth: list[frozenset[str]]) -> float:
    pairs = list(zip(found, truth, strict=False))
    return sum(len(mine & true) for mine, true in pairs) / sum(len(true) for _, true in pairs)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
