"""LCE's locality (methods 9): negatives of the head that is reranked against random ones."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from bixse.candidates.pools import head_negatives, random_hits
from bixse.evaluation.metrics import ndcg
from bixse.models.reranker import Reranker, load_reranker, reranked
from bixse.place import Place
from bixse.records import Hit
from bixse.retrieval.lexical import LexicalIndex
from bixse.retrieval.settings import Lexical
from bixse.training.gather import World
from bixse.training.groups import group
from bixse.training.loop import Run, train_loop
from bixse.training.objective_settings import LCE
from bixse.training.settings import Training
from tests.encoders import WORDS, save_tiny_encoder

TOPICS, TRAIN, RELEVANT, SPAM, OTHERS = 40, 30, 5, 15, 30_000


@dataclass(frozen=True)
class Toy:
    """Of 20 documents with all words of a query, 15 hold two words of spam, and only they do.

    The head of BM25 is three quarters spam, the corpus a fiftieth.
    """

    corpus: Mapping[str, str]
    queries: Mapping[str, str]
    relevant: Mapping[str, Mapping[str, float]]
    heads: Mapping[str, Sequence[Hit]]


def make(seed: int) -> Toy:
    draw = random.Random(seed)
    spam, words = WORDS[:6], WORDS[6:]
    corpus: dict[str, str] = {}
    topics = [draw.sample(words, 3) for _ in range(TOPICS)]
    for number, topic in enumerate(topics):
        for copy in range(RELEVANT + SPAM):
            more = draw.choices(words if copy < RELEVANT else spam, k=2) + draw.choices(words, k=3)
            corpus[f"{number}-{copy}"] = " ".join(draw.sample([*topic, *more], 8))
    for number in range(OTHERS):
        corpus[f"other-{number}"] = " ".join(draw.choices(words, k=8))
    index = LexicalIndex(list(corpus), list(corpus.values()), Lexical())
    queries = {str(number): " ".join(topic) for number, topic in enumerate(topics)}
    relevant = {name: {f"{name}-{copy}": 1.0 for copy in range(RELEVANT)} for name in queries}
    return Toy(
        corpus, queries, relevant, {q: index.search(text, 20) for q, text in queries.items()}
    )


def trained(toy: Toy, negatives: Mapping[str, Sequence[Hit]], start: str, folder: Path) -> Reranker:
    train = list(toy.queries)[:TRAIN]
    rows = [(q, d, 1.0) for q in train for d in toy.relevant[q]]
    rows += [(q, hit.doc_id, 0.0) for q in train for hit in negatives[q]]
    query_ids, doc_ids, grades = zip(*rows, strict=True)
    labels = group(query_ids, doc_ids, np.asarray(grades, np.float32), toy.queries, toy.corpus, {})
    settings = Training(
        objective=LCE(), batch_size=10, docs_per_query=8, epochs=5, learning_rate=2e-3
    )
    model = load_reranker(start, "cpu", pooled=False)
    train_loop(Run(settings, labels, Place(str(folder)), "toy"), model, World())
    return Reranker(model, "")


def measured(toy: Toy, reranker: Reranker | None) -> float:
    """nDCG@10 of the heads of unseen queries, reranked or as BM25 has them."""
    values = []
    for name in list(toy.queries)[TRAIN:]:
        hits = toy.heads[name]
        if reranker is not None:
            texts = [toy.corpus[hit.doc_id] for hit in hits]
            hits = reranked(hits, reranker.score(toy.queries[name], texts).tolist())
        values.append(ndcg(hits, toy.relevant[name], 10))
    return float(np.mean(values))


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_negatives_of_the_head_beat_random_ones(seed: int, tmp_path: Path) -> None:
    toy = make(seed)
    doc_ids = list(toy.corpus)
    local, chance = {}, {}
    for name in list(toy.queries)[:TRAIN]:
        positives = toy.relevant[name]
        local[name] = head_negatives(name, toy.heads[name], positives, 20, SPAM, seed)
        drawn = random_hits(name, doc_ids, SPAM + RELEVANT, seed)
        chance[name] = [hit for hit in drawn if hit.doc_id not in positives][: len(local[name])]
    # As many negatives, and little spam among the random ones.
    assert [*map(len, chance.values())] == [*map(len, local.values())]
    strangers = [hit.doc_id.startswith("other") for hits in chance.values() for hit in hits]
    assert np.mean(strangers) > 0.9
    start = str(save_tiny_encoder(tmp_path))
    head = measured(toy, trained(toy, local, start, tmp_path / "head"))
    random_ = measured(toy, trained(toy, chance, start, tmp_path / "random"))
    assert head > 0.9
    assert head > random_ + 0.1
    assert random_ > measured(toy, None) + 0.1
