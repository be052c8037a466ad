"""Candidates that are refused, and a query that would be its own."""

import json
from pathlib import Path

import pytest

from bixse.candidates.settings import Pools
from bixse.records import QUERIES, Rejection
from bixse.retrieval.settings import Lexical
from jobs.embed import embed
from jobs.ingest import ingest
from jobs.pair import pair
from jobs.parts import rejected_table
from jobs.recipe import Ingest, Placement
from tests.artifacts import drafted
from tests.encoders import save_tiny_encoder, texts


def test_candidates_that_bm25_alone_does_not_find_are_refused(tmp_path: Path) -> None:
    """And leave nothing in the way of another flag."""
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "text": "tea leaves"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "zebra"}\n')
    found, out = ingest(str(tmp_path), Ingest(), str(tmp_path / "out")), str(tmp_path / "pairs")
    arguments = ([found.queries], found.corpus, None, "")
    alone = Pools(bm25=5, dense=0, random=0)
    with pytest.raises(ValueError, match="no document shares a word with any of the 1 queries"):
        pair(*arguments, alone, Lexical(), out)
    made = pair(*arguments, alone.replace(random=1), Lexical(), out)
    assert made.table()["source"].to_pylist() == ["random"]


def test_no_query_to_train_on_is_refused_with_what_became_of_them(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "text": "tea leaves"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "tea"}\n{"_id": "r"}\n')
    found, out = ingest(str(tmp_path), Ingest(), str(tmp_path / "out")), str(tmp_path / "pairs")
    short = Rejection("no sentence of 4 or more words", doc_id="d")
    draft = drafted(tmp_path / "synthetic", "queries")
    draft.write_part(0, QUERIES.empty_table(), rejected_table([short]))
    queries = [found.queries, draft.finish()]
    with pytest.raises(ValueError, match="no query to train on, since 1 are of dev or test") as why:
        pair(queries, found.corpus, None, "", Pools(dense=0), Lexical(), out, frozenset("q"))
    assert "/out/queries/rejected (empty query) and 1 were rejected, see" in str(why.value)
    assert "/synthetic/rejected (no sentence of 4 or more words): put queries" in str(why.value)


def test_a_query_that_is_a_document_is_no_candidate_of_its_own(tmp_path: Path) -> None:
    """As in `evaluate`; one of the same id and another text is a document like any."""
    encoder = str(save_tiny_encoder(tmp_path / "encoder"))
    bodies = texts(12, seed=1)
    corpus = [{"_id": f"d{n}", "title": "Tea", "text": body} for n, body in enumerate(bodies)]
    asked = [("d0", bodies[0]), ("d1", f"Tea {bodies[1]}"), ("d2", bodies[3])]
    for name, rows in (("corpus", corpus), ("queries", [{"_id": q, "text": t} for q, t in asked])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    found = ingest(str(tmp_path), Ingest(), str(tmp_path / "out"))
    vectors = embed(found.corpus, encoder, Placement(), str(tmp_path / "embeddings"))

    def pools(**counts: int) -> dict[str, set[str]]:
        settings = Pools(**{"bm25": 0, "dense": 0, "random": 0, **counts})
        out = str(tmp_path / "-".join(counts))
        of_query: dict[str, set[str]] = {}
        made = pair([found.queries], found.corpus, vectors, encoder, settings, Lexical(), out)
        for row in made.table().to_pylist():
            of_query.setdefault(row["query_id"], set()).add(row["doc_id"])
        return of_query

    everyone = {f"d{n}" for n in range(12)}
    for counts in ({"dense": 12}, {"random": 12}):
        assert pools(**counts) == {q: everyone - {q} if q != "d2" else everyone for q, _ in asked}
    best = pools(bm25=1)
    assert best["d2"] == {"d3"}
    assert "d0" not in best.get("d0", ())
    assert len(best["d1"] - {"d1"}) == 1  # The title is every document's.
