"""nDCG@10 on the dev split while training: what `evaluate` would say of the encoder as it stands.

Every rank encodes its share of the whole corpus, some thousand documents at a time, and keeps the
best of each dev query; the shares are merged on every rank, so all ranks get one number. The
test split is never read here, and a dev query that training reads is refused. The trainer's weights
are float32 and its attention may be another: `evaluate` differs by rounding.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from bixse.artifacts import MANIFEST, Artifact
from bixse.evaluation.leakage import find_leaks
from bixse.evaluation.metrics import Qrels, ndcg, others, themselves
from bixse.records import CORPUS, Hit, document_text

if TYPE_CHECKING:
    from bixse.models.encoder import Encoder
    from bixse.training.gather import World

DEV = "dev"
K = 10


@dataclass(frozen=True)
class DevSplit:
    """Judged dev queries, and the corpus they are asked of."""

    corpus: Artifact
    texts: Mapping[str, str]
    """query_id -> text."""
    gains: Qrels
    inputs: Mapping[str, str]
    """Fingerprints of what it was read from."""
    itself: frozenset[str] = frozenset()
    """Queries that are documents too, and do not find themselves."""


def dev_split(corpus: Artifact, queries: Artifact, qrels: Artifact) -> DevSplit:
    """Raises ValueError when nobody judged a dev query, or one has no text."""
    gains: dict[str, dict[str, float]] = {}
    for split, query_id, doc_id, relevance in qrels.rows(
        "split", "query_id", "doc_id", "relevance"
    ):
        if split == DEV:
            gains.setdefault(query_id, {})[doc_id] = relevance
    if not gains:
        raise ValueError(
            "training.evaluate_every needs judged queries of a dev split, and there are none: "
            "give qrels/dev.tsv beside the others, or all grades in one qrels.tsv, whose queries "
            "are divided by a hash"
        )
    known = dict(queries.rows("query_id", "text"))
    missing = [query_id for query_id in gains if query_id not in known]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(gains)} judged dev queries are not in {queries.url}, "
            f"first {missing[0]!r}"
        )
    gains = dict(sorted(gains.items()))
    texts = {query_id: known[query_id] for query_id in gains}
    inputs = {"dev queries": queries.fingerprint, "dev qrels": qrels.fingerprint}
    itself = themselves(texts, gains, corpus.rows("doc_id", "title", "text"))
    return DevSplit(corpus, texts, gains, inputs, itself)


def chosen_on(directory: Path) -> dict[str, str]:
    """The dev split on which the encoder there was chosen, as `DevSplit.inputs`; else nothing."""
    manifest = directory / MANIFEST
    inputs = json.loads(manifest.read_text())["inputs"] if manifest.exists() else {}
    return {name: inputs[name] for name in ("dev queries", "dev qrels") if name in inputs}


def refuse_trained(dev: DevSplit, training_texts: Iterable[str]) -> None:
    """Raises ValueError when training reads a dev query, under whatever id."""
    leaks = find_leaks(dev.texts, (("", text) for text in training_texts))
    if leaks:
        raise ValueError(
            f"{len(leaks)} dev queries stand in training too, first {leaks[0].query_id!r} "
            f"({leaks[0].text!r}): training cannot be measured on them"
        )


def dev_ndcg(dev: DevSplit, encoder: "Encoder", world: "World", tokens: int | None = None) -> float:
    """Mean nDCG@10 over the dev queries, the same on every rank; all ranks must call it.

    Raises RuntimeError on all of them when one cannot encode its share.
    """
    import torch.distributed as dist

    mine: tuple[list[list[Hit]], str] = [], ""
    try:
        mine = _found(dev, encoder, world, tokens), ""
    except ValueError as error:
        mine = [], str(error)
    every: list[Any] = [mine]
    if world.size > 1:
        every = [None] * world.size
        dist.all_gather_object(every, mine)
    if complaint := next((said for _, said in every if said), ""):
        raise RuntimeError(f"the dev split cannot be measured: {complaint}")
    from bixse.retrieval.merge import merge

    shares = zip(*(found for found, _ in every), strict=True)
    values = [
        ndcg(others(query_id, merge(hits, K + 1), dev.itself), gains, K)
        for hits, (query_id, gains) in zip(shares, dev.gains.items(), strict=True)
    ]
    return sum(values) / len(values)


def _found(
    dev: DevSplit, encoder: "Encoder", world: "World", tokens: int | None
) -> list[list[Hit]]:
    """The best of this rank's share of the corpus, for each query."""
    from bixse.retrieval.finder import Finder
    from bixse.retrieval.library import faiss
    from bixse.retrieval.merge import merge
    from bixse.retrieval.shard import Shard
    from bixse.training.order import share

    vectors_QE = encoder.encode(list(dev.texts.values()), "query", tokens)
    best: list[list[Hit]] = [[] for _ in vectors_QE]
    for batch in dev.corpus.batches(CORPUS.names):
        rows = share(batch.num_rows, world.rank, world.size)
        part = batch.slice(rows.start, rows.stop - rows.start).sort_by("doc_id")
        if not part.num_rows:
            continue
        pairs = zip(part["title"].to_pylist(), part["text"].to_pylist(), strict=True)
        texts = [document_text(title, text) for title, text in pairs]
        vectors_NE = encoder.encode(texts, "document", tokens)
        index = faiss.IndexFlatIP(vectors_NE.shape[1])
        index.add(vectors_NE)
        ids = pa.Table.from_batches([part.select(["doc_id"])])
        # One more, for a query that is a document itself.
        found = Shard(Finder(index), ids).search(vectors_QE, K + 1)
        best = [merge(both, K + 1) for both in zip(best, found, strict=True)]
    return best
