"""Pairs are asked in the order that shares most, and none is lost on the way."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from bixse.artifacts import Artifact
from bixse.judging.settings import Judging
from bixse.records import PAIRS
from bixse.retrieval.settings import Lexical
from bixse.scale import UMBRELA
from jobs.judge import judge as judging_of
from jobs.judges import order
from jobs.judges.order import ordered, sharing
from jobs.judges.seam import Judge
from jobs.recipe import Placement
from jobs.texts import DocumentTexts, QueryTexts
from tests.artifacts import artifact
from tests.jobs.test_store import corpus_of, judge_of, queries_of


def pairs_of(at: Path, keys: list[tuple[str, str]]) -> Artifact:
    rows = [
        {"query_id": q, "doc_id": d, "source": "bm25", "rank": rank, "score": 1.0}
        for rank, (q, d) in enumerate(keys, start=1)
    ]
    return artifact(at, "pairs", rows, PAIRS)


def judge(*prefixes: Literal["query", "document"]) -> Judge:
    build = order.Sharing  # Never built here.
    return Judge(build=build, arguments=(), scale=UMBRELA, origin="llm", prefixes=prefixes)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows_at_a_time", [1 << 18, 7, 1])
def test_grouped_by_document_where_that_shares_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_at_a_time: int
) -> None:
    """Three queries of 3 characters, each with all of ten passages of 20 characters."""
    monkeypatch.setattr(order, "BUCKET_ROWS", rows_at_a_time)
    corpus = corpus_of(tmp_path / "corpus", {f"d{n}": "x" * 20 for n in reversed(range(10))})
    queries = queries_of(tmp_path / "queries", {f"q{n}": "ask" for n in range(3)})
    keys = [(f"q{q}", f"d{d}") for q in range(3) for d in range(10)]
    pairs = pairs_of(tmp_path / "pairs", keys)
    found = sharing(pairs, QueryTexts(queries), DocumentTexts(corpus), 10)
    assert (found.query, found.document) == (3 * 9 * 3, 10 * 2 * 20)

    made, grouped = ordered(
        pairs, queries, corpus, judge("query", "document"), str(tmp_path / "out")
    )
    assert grouped == "document"
    rows = made.table().to_pylist()
    assert [row["doc_id"] for row in rows] == [f"d{n}" for n in reversed(range(10)) for _ in "abc"]
    assert [row["query_id"] for row in rows] == ["q0", "q1", "q2"] * 10
    assert sorted(rows, key=lambda row: row["rank"]) == pairs.table().to_pylist()

    # Prompts that never begin with the passage share nothing by it.
    assert ordered(pairs, queries, corpus, judge("query"), str(tmp_path / "no")) == (
        pairs,
        "query",
    )


def test_left_as_they_came_where_documents_do_not_recur(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "corpus", {f"d{n}": "x" * 20 for n in range(10)})
    queries = queries_of(tmp_path / "queries", {"q0": "ask", "q1": "ask"})
    pairs = pairs_of(tmp_path / "pairs", [(f"q{n // 5}", f"d{n}") for n in range(10)])
    found = ordered(pairs, queries, corpus, judge("query", "document"), str(tmp_path / "out"))
    assert found == (pairs, "query")
    assert not (tmp_path / "out").exists()


def test_an_order_of_other_pairs_is_made_again(tmp_path: Path) -> None:
    """It outlived the judgments that it was made for, and refused those that came after them."""
    corpus = corpus_of(tmp_path / "corpus", {f"d{n}": "x" * 20 for n in range(10)})
    queries = queries_of(tmp_path / "queries", {f"q{n}": "ask" for n in range(3)})
    for count in (10, 9):
        keys = [(f"q{q}", f"d{d}") for q in range(3) for d in range(count)]
        pairs = pairs_of(tmp_path / f"pairs-{count}", keys)
        made, grouped = ordered(
            pairs, queries, corpus, judge("query", "document"), str(tmp_path / "out")
        )
        assert (grouped, made.manifest.rows) == ("document", 3 * count)


def test_it_goes_when_the_judgments_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stayed for good, as large as the pairs; finished judgments are found without it."""
    corpus = corpus_of(tmp_path / "corpus", {f"d{n}": "x" * 20 for n in range(10)})
    queries = queries_of(tmp_path / "queries", {f"q{n}": f"ask {n}" for n in range(3)})
    pairs = pairs_of(tmp_path / "pairs", [(f"q{q}", f"d{d}") for q in range(3) for d in range(10)])
    both = replace(judge_of(tmp_path / "log"), prefixes=("query", "document"))
    # At the seam of judges: who answers is not what is tested, and a language model takes minutes.
    monkeypatch.setattr("jobs.judge.choose", lambda *_: both)
    out, settings = tmp_path / "judgments", Judging(judge="vllm", unit_pairs=7)

    def judged() -> Artifact:
        return judging_of(
            pairs, queries, corpus, None, settings, Lexical(), None, Placement(), str(out)
        )

    made = judged()
    assert made.manifest.config["grouped"] == "document"
    assert not (tmp_path / "judgments-order").exists()
    # Finished judgments must not even count what could be shared: that reads all pairs.
    monkeypatch.setattr("jobs.judge.ordered", lambda *_: pytest.fail("ordered again"))
    assert judged().fingerprint == made.fingerprint
