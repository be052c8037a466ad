"""CustomIR (methods 5): queries written for a corpus adapt an encoder to it, and harm it nowhere.

Everything is the product's own but the two language models, which are functions that behave.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bixse.candidates.pools import pool
from bixse.evaluation.significance import interval, resampled_means
from bixse.judging.settings import Verification
from bixse.judging.verified import Judged, unverified
from bixse.models.encoder import Encoder, load_model
from bixse.place import Place
from bixse.records import Hit, Query, text_hash
from bixse.synthesis.prompts import STYLES
from bixse.synthesis.requests import query_requests
from bixse.synthesis.settings import Styled
from bixse.synthesis.sifting import repeated
from bixse.synthesis.writing import write_queries
from bixse.training.gather import World
from bixse.training.groups import Labels, group
from bixse.training.loop import Run, train_loop
from bixse.training.objective_settings import InfoNCE
from bixse.training.settings import Training
from tests.encoders import WORDS, save_tiny_encoder
from tests.synthesis.stubs import Stub

Values = npt.NDArray[np.float64]

JARGON = dict(zip(WORDS[:60], WORDS[60:120], strict=True))
"""What documents say -> what people here ask for it by: no word of one is a word of the other."""
COMMON = WORDS[120:220]
"""Words that everyone uses, here and elsewhere."""

Corpus = Mapping[str, str]


def corpus_of(draw: random.Random, count: int, own: int, common: int) -> dict[str, str]:
    """Documents of `own` words that are known here alone and `common` that are known anywhere."""
    return {
        f"d{number:03}": " ".join(draw.sample(sorted(JARGON), own) + draw.sample(COMMON, common))
        for number in range(count)
    }


def words_for(text: str, draw: random.Random, count: int) -> list[str]:
    """Some words of a text, as people ask for them."""
    return [JARGON.get(word, word) for word in draw.sample(text.split(), count)]


def writes(turn: str, draw: random.Random) -> object:
    """A generator: one answer in ten is no JSON, one in ten asks about another document."""
    passage = turn.split("\n")[1]
    style = next(name for name, words in STYLES.items() if words in turn)
    count = {"keywords": 3, "title": 4, "question": 5, "claim": 6, "request": 6}[style]
    chance = draw.random()
    if chance < 0.1:
        return "I would rather not"
    if chance < 0.2:
        passage = " ".join(draw.sample([*JARGON, *COMMON], 10))
    return {"query": " ".join(words_for(passage, draw, count))}


def judges(query: str, text: str) -> float:
    """A judge that knows the jargon: the share of what was asked for that the text has."""
    said = {JARGON.get(word, word) for word in text.split()}
    asked = set(query.split())
    return len(asked & said) / len(asked)


def found(encoder: Encoder, corpus: Corpus, queries: Sequence[str], k: int) -> list[list[Hit]]:
    doc_ids = list(corpus)
    scores_QN = encoder.encode(queries, "query") @ encoder.encode([*corpus.values()], "document").T
    best_QK = np.argsort(-scores_QN, axis=1, kind="stable")[:, :k]
    return [
        [Hit(doc_ids[row], float(scores[row]), rank) for rank, row in enumerate(rows, start=1)]
        for scores, rows in zip(scores_QN, best_QK.tolist(), strict=True)
    ]


def recall_at_10(encoder: Encoder, corpus: Corpus, queries: Mapping[str, str]) -> Values:
    """1 for each query that finds its document among ten; `queries` by doc_id."""
    hits = found(encoder, corpus, list(queries.values()), 10)
    named = [{hit.doc_id for hit in of_query} for of_query in hits]
    return np.asarray([d in ten for d, ten in zip(queries, named, strict=True)], np.float64)


def written(corpus: Corpus) -> list[Query]:
    """Queries in five styles for every document, repeats and whatever cannot be read apart."""
    settings = Styled()
    made = write_queries(list(query_requests(corpus, settings)), corpus, settings, [], Stub(writes))
    queries = [item for item in made if isinstance(item, Query)]
    gone = repeated(queries, [], settings.near_duplicate)
    return [query for query in queries if query.query_id not in gone]


def verified(
    queries: Sequence[Query], corpus: Corpus, base: Encoder
) -> tuple[Labels, list[Judged]]:
    """Candidates of the base encoder and the query's own document, judged; what can be trusted."""
    hashes = {doc_id: text_hash(text) for doc_id, text in corpus.items()}
    seeds = {query.query_id: query.seed_doc_id or "" for query in queries}
    mined = found(base, corpus, [query.text for query in queries], 20)
    judged = [
        Judged(pair.query_id, pair.doc_id, judges(query.text, corpus[pair.doc_id]))
        for query, hits in zip(queries, mined, strict=True)
        for pair in pool(
            query.query_id, {"seed": [Hit(seeds[query.query_id], 0.0, 1)], "dense": hits}, hashes
        )
    ]
    dropped = unverified(judged, seeds, corpus, Verification())
    kept = [row for row in judged if (row.query_id, row.doc_id) not in dropped]
    texts = {query.query_id: query.text for query in queries}
    relevance = np.asarray([row.relevance for row in kept], np.float32)
    query_ids, doc_ids = [row.query_id for row in kept], [row.doc_id for row in kept]
    return group(query_ids, doc_ids, relevance, texts, corpus, seeds), kept


def test_recall_rises_on_the_corpus_and_stays_elsewhere(tmp_path: Path) -> None:
    """Recall@10 of people's queries for documents that no query was written from, and a control.

    The split is by document: no written query has a held-out document as its seed.
    """
    draw = random.Random(0)
    corpus, control = corpus_of(draw, 160, own=7, common=3), corpus_of(draw, 200, own=0, common=10)
    held_out = list(corpus)[100:]
    asked = {d: " ".join(words_for(corpus[d], draw, 4)) for d in held_out}
    elsewhere = {d: " ".join(draw.sample(text.split(), 5)) for d, text in control.items()}

    start = str(save_tiny_encoder(tmp_path))
    base = Encoder(load_model(start, "cpu"), "")
    known = {doc_id: text for doc_id, text in corpus.items() if doc_id not in held_out}
    queries = written(known)
    labels, kept = verified(queries, known, base)
    assert not {query.seed_doc_id for query in queries} & set(held_out)
    assert not {row.doc_id for row in kept} & set(held_out)

    model = load_model(start, "cpu")
    settings = Training(
        objective=InfoNCE(positives="threshold"), batch_size=16, docs_per_query=8, epochs=3,
        learning_rate=2e-3, precision="float32",
    )  # fmt: skip
    train_loop(Run(settings, labels, Place(str(tmp_path / "run")), "toy"), model, World())
    trained = Encoder(model, "")

    differences = []
    for where, people in ((corpus, asked), (control, elsewhere)):
        before, after = (recall_at_10(encoder, where, people) for encoder in (base, trained))
        change = after - before
        (means,) = resampled_means(change[:, None], 1000, seed=0).T
        differences.append(interval(means))
    (rise, _), (fall, _) = differences
    # The lower ends: by far more than chance here, and not a point less there.
    assert rise > 0.3
    assert fall > -0.01
