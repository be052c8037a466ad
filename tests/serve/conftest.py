"""A small index, and one application that serves it to all tests of this directory."""

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pytest

from bixse.artifacts import Artifact, begin
from bixse.models.encoder import Encoder
from bixse.models.encoder import resolve as resolve_encoder
from bixse.models.settings import PACKAGED
from bixse.records import CORPUS, JUDGMENTS, QUERIES, Document, Hit, Kind, document_text
from bixse.retrieval.building import build_shard
from bixse.retrieval.lexical_shard import LEXICAL_DIR, Statistics, build_lexical, texts_of
from bixse.retrieval.library import faiss
from bixse.retrieval.settings import Lexical, Retrieval
from bixse.retrieval.shard import DOCUMENTS_FILE, Shard
from bixse.retrieval.structures import resolve as resolve_structure
from bixse.retrieval.structures import trained
from tests.encoders import save_tiny_cross_encoder

ROOT = Path(__file__).resolve().parents[2]

ANIMALS = (
    "otter",
    "heron",
    "lynx",
    "beetle",
    "salmon",
    "raven",
    "hedgehog",
    "toad",
    "moth",
    "seal",
)
PLACES = ("the river", "a meadow", "the old forest", "a city park", "the coast")
KINDS: dict[str, Kind] = {
    "animal": "text",
    "number": "number",
    "seen": "boolean",
    "words": "texts",
}
HABITS = ("sleeps through the winter", "feeds at dusk", "builds its nest", "raises its young")


def documents() -> list[Document]:
    """200 documents, no two of which read the same."""
    return [
        Document(
            f"{animal}-{place.split()[-1]}-{number}",
            f"The {animal} of {place}",
            f"In {place} the {animal} {habit}. Observation {number} of the naturalists.",
            # Nobody has described the herons.
            None
            if animal == "heron"
            else {"animal": animal, "number": number, "seen": number > 1, "words": habit.split()},
        )
        for animal in ANIMALS
        for place in PLACES
        for number, habit in enumerate(HABITS)
    ]


def index_of(
    url: Path,
    corpus: list[Document],
    vectors: np.ndarray,
    encoder: str,
    shards: int,
    recall: float = 1.0,
    lexical: Lexical | None = None,
    settings: Retrieval | None = None,
    latency_ms: float | None = None,
) -> Artifact:
    """An index artefact as `jobs.index` writes it; documents go round the shards."""
    metadata = {d.doc_id: d.metadata for d in corpus if d.metadata}
    kinds = KINDS if metadata else {}
    words = Statistics.of([[document_text(d.title, d.text) for d in corpus]], "english")
    draft = begin(str(url), "index", config={}, inputs={})
    assert not isinstance(draft, Artifact)
    settings = settings or resolve_structure(Retrieval(), *vectors.shape)
    template = trained(settings, vectors)
    names = [f"shard-{number:05d}" for number in range(shards)]
    for number, name in enumerate(names):
        rows = list(range(number, len(corpus), shards))
        table = pa.Table.from_pylist(
            [
                {"doc_id": d.doc_id, "title": d.title, "text": d.text}
                for d in (corpus[i] for i in rows)
            ],
            schema=CORPUS,
        )
        with tempfile.TemporaryDirectory() as local:
            copy = faiss.clone_index(template)
            build_shard(Path(local), table, vectors[rows], settings, copy, metadata, kinds)
            if lexical is not None:
                texts = texts_of(Path(local) / DOCUMENTS_FILE)
                build_lexical(Path(local) / LEXICAL_DIR, texts, words, lexical)
            draft.add_directory(Path(local), under=f"{name}/")
    return draft.finish(
        rows=len(corpus),
        extra={
            "encoder": encoder,
            "dim": vectors.shape[1],
            "shards": names,
            "shard_rows": [len(range(n, len(corpus), shards)) for n in range(shards)],
            "structure": settings.structure,
            "recall@10": recall,
            "latency_ms": latency_ms,
            "metadata": kinds,
            "lexical": None if lexical is None else lexical.model_dump(mode="json"),
            # The document of row 0, so the first shard holds it.
            "canary": {
                "query": document_text(corpus[0].title, corpus[0].text),
                "doc_id": corpus[0].doc_id,
                "score": 1.0,
            },
        },
    )


@dataclass
class Served:
    """A running application, its keys, and what it should answer."""

    url: str
    index: Artifact
    search_key: str
    monitor_key: str
    admin_key: str
    process: subprocess.Popen[str]
    corpus: list[Document]
    log: Path
    verify: ssl.SSLContext | bool = True
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.search_key}"}
        self.client = httpx.Client(
            base_url=self.url, headers=headers, timeout=30, verify=self.verify
        )

    def search(self, **request: Any) -> httpx.Response:
        return self.client.post("/search", json=request)

    def change(self, **request: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.admin_key}"}
        return self.client.post("/admin/generation", json=request, headers=headers, timeout=120)

    def replicas(self, deployment: str = "") -> list[psutil.Process]:
        """The processes of a deployment's replicas, among the children of this application."""
        title = f"ray::ServeReplica:bixse:{deployment}"
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if child.cmdline() and child.cmdline()[0].startswith(title):
                    found.append(child)
        return found

    def replica(self, deployment: str) -> psutil.Process:
        """The process of a deployment's only replica."""
        found = self.replicas(deployment)
        assert len(found) == 1, found
        return found[0]


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return Encoder.load(PACKAGED)


@pytest.fixture(scope="session")
def corpus() -> list[Document]:
    return documents()


@pytest.fixture(scope="session")
def vectors(encoder: Encoder, corpus: list[Document]) -> np.ndarray:
    return encoder.encode([document_text(d.title, d.text) for d in corpus], "document")


@pytest.fixture(scope="session")
def make_index() -> Callable[..., Artifact]:
    return index_of


@pytest.fixture(scope="session")
def index(
    tmp_path_factory: pytest.TempPathFactory,
    corpus: list[Document],
    vectors: np.ndarray,
    encoder: Encoder,
) -> Artifact:
    url = tmp_path_factory.mktemp("served") / "index"
    return index_of(url, corpus, vectors, encoder.fingerprint, shards=2, lexical=Lexical())


@pytest.fixture(scope="session")
def exact(
    corpus: list[Document], vectors: np.ndarray
) -> Callable[[np.ndarray, int], list[list[Hit]]]:
    """Exact search over the whole corpus in one piece, in this process."""
    table = pa.Table.from_pylist([asdict(d) for d in corpus], schema=CORPUS)
    with tempfile.TemporaryDirectory() as local:
        build_shard(Path(local), table, vectors, Retrieval())
        shard = Shard.load(Path(local))
    return shard.search


@pytest.fixture(scope="session")
def other_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The packaged encoder with its weights shaken: other vectors, another fingerprint."""
    from safetensors.numpy import load_file, save_file

    url = tmp_path_factory.mktemp("other") / "encoder"
    shutil.copytree(resolve_encoder(PACKAGED), url)
    weights = load_file(url / "model.safetensors")
    draw = np.random.default_rng(0)
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            noise = draw.standard_normal(tensor.shape).astype(np.float32)
            weights[name] = tensor + 0.2 * tensor.std() * noise
    save_file(weights, url / "model.safetensors", metadata={"format": "pt"})
    return str(url)


@pytest.fixture(scope="session")
def other_index(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[Document], other_encoder: str
) -> Artifact:
    """Half of the documents, other ids, the other encoder, three shards for two slots."""
    encoder = Encoder.load(other_encoder)
    documents = [Document(f"b-{d.doc_id}", d.title, d.text) for d in corpus[:90]]
    vectors = encoder.encode([document_text(d.title, d.text) for d in documents], "document")
    url = tmp_path_factory.mktemp("other") / "index"
    return index_of(url, documents, vectors, encoder.fingerprint, shards=3)


@contextmanager
def run_application(
    place: Path, index: Artifact, corpus: list[Document], **flags: Any
) -> Iterator[Served]:
    """`python -m serve.app` as a user starts it, with three keys; asserts that it ends well."""
    place.mkdir(exist_ok=True)
    keys = {f"{role}_key": f"{role}-key-of-the-tests" for role in ("search", "monitor", "admin")}
    lines = [f"{key.split('-')[0]}:{key}" for key in keys.values()]
    (place / "keys").write_text("\n".join(["# of the tests", *lines, ""]))
    port, log = free_port(), place / "log"
    flags = {"index": index.url, "encoder": PACKAGED, "port": port, **flags}
    flags |= {"keys-file": place / "keys"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve.app", *(f"--{k}={v}" for k, v in flags.items())],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "BIXSE_"))},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            until(lambda: "ready at" in log.read_text() or process.poll() is not None, 240)
            assert process.poll() is None, log.read_text()
            certificate = flags.get("tls-certificate")
            scheme = "http" if certificate is None else "https"
            verify = certificate is None or ssl.create_default_context(cafile=certificate)
            url = f"{scheme}://127.0.0.1:{port}"
            yield Served(url, index, **keys, process=process, corpus=corpus, log=log, verify=verify)
        finally:
            alive = process.poll() is None
            children = psutil.Process(process.pid).children(recursive=True) if alive else []
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
    assert status == 0, log.read_text()
    _, left = psutil.wait_procs(children, timeout=10)
    assert not left, f"left running: {left}"


@pytest.fixture(scope="session")
def run_app() -> Callable[..., AbstractContextManager[Served]]:
    return run_application


@pytest.fixture(scope="session")
def reranker(tmp_path_factory: pytest.TempPathFactory, corpus: list[Document]) -> Path:
    """A cross-encoder that knows the words of the corpus, and nothing of what they mean."""
    words = {w for d in corpus for w in re.findall(r"\w+|[^\w\s]", f"{d.title} {d.text}".lower())}
    place = tmp_path_factory.mktemp("reranker")
    return save_tiny_cross_encoder(place, logits=1, words=sorted(words | {"where", "does", "x"}))


@pytest.fixture(scope="session")
def other_reranker(tmp_path_factory: pytest.TempPathFactory, reranker: Path) -> str:
    """The reranker with the weights of its head turned round: nearly the reverse order."""
    from safetensors.numpy import load_file, save_file

    url = tmp_path_factory.mktemp("other") / "reranker"
    shutil.copytree(reranker, url)
    weights = load_file(url / "model.safetensors")
    weights["classifier.weight"] = -weights["classifier.weight"]
    save_file(weights, url / "model.safetensors", metadata={"format": "pt"})
    return str(url)


def save_heldout(place: Path, texts: dict[str, str]) -> dict[str, Path]:
    """doc_id -> the text of a question whose only answer it is, as the flags of the gate."""
    rows = {"queries": [], "judgments": []}
    for number, (doc_id, text) in enumerate(texts.items()):
        rows["queries"].append({"query_id": str(number), "text": text, "origin": "given"})
        rows["judgments"].append(
            {
                "query_id": str(number),
                "doc_id": doc_id,
                "grade_probs": [0.0, 1.0],
                "relevance": 1.0,
                "judge": "human",
                "prompt": "",
                "origin": "human",
            }
        )
    for kind, schema in (("queries", QUERIES), ("judgments", JUDGMENTS)):
        draft = begin(str(place / kind), kind, config={}, inputs={})
        assert not isinstance(draft, Artifact)
        draft.write_part(0, pa.Table.from_pylist(rows[kind], schema=schema))
        draft.finish(rows=len(texts))
    return {f"gate-{kind}": place / kind for kind in rows}


@pytest.fixture(scope="session")
def make_heldout() -> Callable[..., dict[str, Path]]:
    return save_heldout


@pytest.fixture(scope="package")
def served(
    tmp_path_factory: pytest.TempPathFactory,
    index: Artifact,
    corpus: list[Document],
    reranker: Path,
) -> Iterator[Served]:
    """An application with limits small enough to reach, and a reranker."""
    flags = {"default-timeout-ms": 10_000, "max-in-flight": 8, "max-k": 50, "max-hits": 400}
    flags |= {"max-queries": 16, "max-body-bytes": 65536}
    place = tmp_path_factory.mktemp("application")
    with run_application(place, index, corpus, reranker=reranker, **flags) as served:
        yield served


@pytest.fixture(scope="session")
def tls_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    place = tmp_path_factory.mktemp("tls")
    certificate, key = place / "certificate.pem", place / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-out", str(certificate), "-keyout", str(key)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs the program openssl to make a certificate")
    return certificate, key


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], bool], float], None]:
    return until


def until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
