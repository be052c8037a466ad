"""Dense search as Ray Serve's documentation composes it: ingress, batching encoder, FAISS.

    python -m benchmarks.serve_plain DIRECTORY ENCODER PORT THREADS

`DIRECTORY` holds texts.json and an index of one shard, as plain FAISS reads it. Prints `ready` when
it answers.
"""

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import ray
import ray.serve
from fastapi import FastAPI
from pydantic import BaseModel

if TYPE_CHECKING:
    from ray.serve import Deployment

web = FastAPI()


class Ask(BaseModel):
    query: str
    k: int = 10


@ray.serve.deployment(max_ongoing_requests=64)
class Encoder:
    def __init__(self, path: str, threads: int) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        self.model = SentenceTransformer(path, device="cpu")

    @ray.serve.batch(max_batch_size=32, batch_wait_timeout_s=0.001)
    async def __call__(self, texts: list[str]) -> list[Any]:
        return list(self.model.encode(texts, normalize_embeddings=True))


@ray.serve.deployment(max_ongoing_requests=64)
class Searcher:
    def __init__(self, directory: str) -> None:
        import faiss

        self.texts = json.loads((Path(directory) / "texts.json").read_text())
        faiss.omp_set_num_threads(1)
        shard = Path(directory) / "index" / "shard-00000"
        known: Any = faiss  # faiss' type stubs lack most of it.
        self.index = index = known.read_index(str(shard / "index.faiss"))
        searched = shard / "search.json"
        width = json.loads(searched.read_text()) if searched.exists() else {}
        if width:
            if isinstance(index, faiss.IndexHNSW):
                index.hnsw.efSearch = width["ef_search"]
            else:
                known.extract_index_ivf(index).nprobe = width["nprobe"]
        if (shard / "vectors.npy").exists():
            self.coded, self.whole = index, faiss.IndexFlatIP(index.d)  # FAISS owns neither.
            self.whole.add(np.load(shard / "vectors.npy").astype(np.float32, copy=False))
            self.index = known.IndexRefine(index, self.whole)
            self.index.k_factor = width["refine_factor"]

    @ray.serve.batch(max_batch_size=32, batch_wait_timeout_s=0.001)
    async def __call__(self, vectors: list[Any]) -> list[Any]:
        scores, rows = self.index.search(np.stack(vectors), 10)
        return [
            [
                {"doc_id": f"{row:09d}", "score": score, "text": self.texts[row]}
                for score, row in one
            ]
            for one in (
                zip(s, r, strict=True) for s, r in zip(scores.tolist(), rows.tolist(), strict=True)
            )
        ]


@ray.serve.deployment(max_ongoing_requests=64)
@ray.serve.ingress(web)
class Ingress:
    def __init__(self, encoder: Any, searcher: Any) -> None:
        self.encoder, self.searcher = encoder, searcher

    @web.post("/search")
    async def search(self, ask: Ask) -> dict[str, Any]:
        vector = await self.encoder.remote(ask.query)
        return {"hits": await self.searcher.remote(vector)}


def main() -> None:
    directory, encoder, port, threads = sys.argv[1:]
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    ray.serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    ingress, encode, search = (cast("Deployment", made) for made in (Ingress, Encoder, Searcher))
    ray.serve.run(ingress.bind(encode.bind(encoder, int(threads)), search.bind(directory)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("ready", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
