"""Servers that a user would pick, each in a virtual environment of its own.

Run by that environment's Python, outside this project:

    python serve_peers.py txtai|chroma DIRECTORY ENCODER PORT

`DIRECTORY` holds vectors.npy, texts.json; txtai is its API over FAISS, exact up to 50,000 documents
and then as it comes; Chroma is its server with HNSW as it comes, and the small application before
it that a user writes, since its server does not encode. Both encode queries by
sentence-transformers. Nothing of bixse is imported here.
"""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

NEEDS = {
    "txtai": ("txtai[api]", "sentence-transformers", "faiss-cpu"),
    "chroma": ("chromadb", "sentence-transformers", "fastapi", "uvicorn"),
}
INSTALL_WITHIN_S = 600


def installed(peer: str, peers: Path) -> Path:
    """The Python of a peer's environment, made when there is none.

    What it needs and this environment has, as torch, it takes from here: the same release, and
    minutes less. Raises CalledProcessError, TimeoutExpired or OSError when it cannot be installed.
    """
    place, done = peers / peer, peers / f"{peer}.installed"
    python = place / "bin" / "python"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        own = place / "lib" / version / "site-packages"
        (own / "shared.pth").write_text(sysconfig.get_path("purelib"))
        command = [str(python), "-m", "pip", "install", "-q", *NEEDS[peer]]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_WITHIN_S)
        if ran.returncode:
            raise OSError(f"pip ends with {ran.returncode}: {ran.stderr.strip()[-500:]}")
        done.touch()
    return python


def txtai(directory: Path, encoder: str, port: int) -> None:
    """Index into a directory, then serve it by txtai's own application."""
    import numpy as np
    import uvicorn
    from txtai import Embeddings

    saved = directory / "txtai"
    if not saved.exists():
        vectors, texts = np.load(directory / "vectors.npy"), texts_of(directory)
        config = {"method": "external", "transform": "serve_peers.encode", "content": False}
        if len(texts) <= 50_000:
            config |= {"faiss": {"components": "IDMap,Flat"}}
        embeddings = Embeddings(config)
        embeddings.index((f"{n:09d}", vectors[n], None) for n in range(len(texts)))
        embeddings.save(str(saved))
    (directory / "txtai.yml").write_text(f"path: {saved}\nwritable: false\nembeddings:\n")
    os.environ["CONFIG"] = str(directory / "txtai.yml")
    uvicorn.run("txtai.api:app", port=port, log_level="error")


def encode(texts: list[str]) -> object:
    """txtai's transform: vectors of texts."""
    if not _model:
        from sentence_transformers import SentenceTransformer

        _model.append(SentenceTransformer(os.environ["PEER_ENCODER"], device="cpu"))
    return _model[0].encode(texts, normalize_embeddings=True)


_model: list = []


def chroma(directory: Path, encoder: str, port: int) -> None:
    """Chroma's server on the next port, filled once, and an application before it."""
    import chromadb
    import numpy as np
    import uvicorn
    from fastapi import FastAPI

    program = Path(sys.executable).with_name("chroma")
    command = [str(program), "run", "--path", str(directory / "chroma"), "--port", str(port + 1)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        client = _connected(chromadb, port + 1)
        vectors, texts = np.load(directory / "vectors.npy"), texts_of(directory)
        held = client.get_or_create_collection("docs", metadata={"hnsw:space": "cosine"})
        for start in range(held.count(), len(texts), 2000):
            part = slice(start, start + 2000)
            ids = [f"{n:09d}" for n in range(start, min(start + 2000, len(texts)))]
            held.add(ids=ids, embeddings=vectors[part], documents=texts[part])
        web = FastAPI()

        @web.get("/search")
        def search(query: str, limit: int = 10) -> list[dict[str, object]]:
            vector = encode([query])
            found = held.query(query_embeddings=vector, n_results=limit)
            columns = (found["ids"][0], found["distances"][0], found["documents"][0])
            return [{"id": i, "score": 1 - d, "text": t} for i, d, t in zip(*columns, strict=True)]

        encode(["warm"])
        # uvicorn ends and raises SIGTERM once more, which would leave Chroma's server running.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        uvicorn.run(web, port=port, log_level="error")
    finally:
        server.terminate()
        server.wait()


def _connected(chromadb: Any, port: int) -> Any:
    for _ in range(200):
        try:
            return chromadb.HttpClient(port=port)
        except ValueError:
            time.sleep(0.2)
    raise SystemExit("chroma's server did not start")


def texts_of(directory: Path) -> list[str]:
    return json.loads((directory / "texts.json").read_text())


if __name__ == "__main__":
    name, place, encoder, port = sys.argv[1:]
    os.environ["PEER_ENCODER"] = encoder
    os.environ["ALLOW_RESOLVE_TRANSFORM"] = "True"  # txtai asks for it before it imports `encode`.
    {"txtai": txtai, "chroma": chroma}[name](Path(place), encoder, int(port))
