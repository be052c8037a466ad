"""BM25 in shards gives the ranking, the scores and the ties of BM25 over the whole corpus."""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bixse.records import CORPUS, Hit
from bixse.retrieval.building import build_shard
from bixse.retrieval.lexical import LexicalIndex
from bixse.retrieval.lexical_shard import LexicalShard, Statistics, build_lexical, texts_of
from bixse.retrieval.merge import ranked
from bixse.retrieval.settings import Lexical, Retrieval
from bixse.retrieval.shard import DOCUMENTS_FILE, Shard
from bixse.retrieval.sources import shard_of

WORDS = [f"{a}{b}" for a in ("kel", "mor", "tan", "vil", "sun") for b in ("da", "fex", "lup")]


def corpus(rows: int, seed: int) -> dict[str, str]:
    """Few words, so that ties abound; every seventh text stands twice, some hold no word."""
    rng = random.Random(seed)
    texts: dict[str, str] = {}
    for n in range(rows):
        count = min(rng.randrange(12), rng.randrange(12))
        again = n % 7 == 6 and texts
        texts[f"d{n:03d}"] = (
            texts[f"d{n - 1:03d}"] if again else " ".join(rng.choices(WORDS, k=count))
        )
    return texts


def in_shards(
    place: Path, texts: dict[str, str], shards: int, lexical: Lexical
) -> list[tuple[Shard, LexicalShard]]:
    """Built as `jobs.index` does: all shards, then all counts, then each lexical part."""
    folders = []
    for number in range(shards):
        mine = [doc_id for doc_id in texts if shard_of(doc_id, shards) == number]
        table = pa.table(
            {"doc_id": mine, "title": [""] * len(mine), "text": [texts[d] for d in mine]},
            schema=CORPUS,
        )
        folder = place / str(number)
        folder.mkdir(parents=True)
        build_shard(folder, table, np.zeros((len(mine), 4), "f4"), Retrieval(structure="exact"))
        folders.append(folder)
    counted = [Statistics.of(texts_of(f / DOCUMENTS_FILE), lexical.language) for f in folders]
    whole = Statistics.total(counted)
    loaded = []
    for folder in folders:
        build_lexical(folder / "lexical", texts_of(folder / DOCUMENTS_FILE), whole, lexical)
        shard = Shard.load(folder)
        loaded.append((shard, LexicalShard.load(folder / "lexical", shard)))
    return loaded


def merged(loaded: list[tuple[Shard, LexicalShard]], queries: list[str], k: int) -> list[list[Hit]]:
    found = [part.rankings(queries, [k] * len(queries), shard) for shard, part in loaded]
    return [
        ranked(
            ((s, d) for one in of_query for s, d in zip(one.scores, one.doc_ids, strict=True)), k
        )
        for of_query in zip(*found, strict=True)
    ]


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
@pytest.mark.parametrize("lexical", [Lexical(), Lexical(k1=0.9, b=0.4, language="bigrams")])
def test_sharded_equals_whole_to_the_bit(shards: int, lexical: Lexical, tmp_path: Path) -> None:
    texts = corpus(150, seed=shards)
    whole = LexicalIndex(list(texts), list(texts.values()), lexical)
    loaded = in_shards(tmp_path, texts, shards, lexical)
    queries = [*WORDS, "kelda morfex kelda", " ".join(WORDS), "unheard of", "?!", ""]
    tied = 0
    for k in (1, 4, 10, 200):
        expected = [whole.search(query, k) for query in queries]
        assert merged(loaded, queries, k) == expected
        tied += sum(a.score == b.score for hits in expected for a, b in pairwise(hits))
    assert tied > 100, "ties at the k-th place are what could go wrong"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=6), min_size=1, max_size=20), st.data())
def test_any_corpus_in_any_shards(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[str]], data: st.DataObject
) -> None:
    texts = {f"d{n:02d}": " ".join(words) for n, words in enumerate(documents)}
    queries = [" ".join(data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=5)))]
    shards, place = data.draw(st.integers(1, 7)), tmp_path_factory.mktemp("shards")
    if not any(documents):
        with pytest.raises(ValueError, match="no document of the corpus holds a word"):
            in_shards(place, texts, shards, Lexical())
        return
    whole = LexicalIndex(list(texts), list(texts.values()), Lexical())
    found = merged(in_shards(place, texts, shards, Lexical()), queries, 5)
    assert found == [whole.search(queries[0], 5)]


def test_the_lexical_part_of_another_shard_is_refused(tmp_path: Path) -> None:
    (one, _), (other, _) = in_shards(tmp_path, corpus(21, seed=1), 2, Lexical())
    assert one.size != other.size
    with pytest.raises(ValueError, match=rf"is of {one.size} documents, its shard of {other.size}"):
        LexicalShard.load(tmp_path / "0" / "lexical", other)
