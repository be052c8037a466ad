"""The running application searched by metadata: equal to exact search of the subset."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from bixse.records import document_text
from bixse.retrieval.lexical import LexicalIndex
from bixse.retrieval.settings import Lexical
from serve.client import Client

QUESTION = "where does the raven feed at dusk"
FILTERS = [
    ({"animal": "otter"}, lambda m: m.get("animal") == "otter"),
    ({"number": {"gte": 1, "lt": 3}}, lambda m: m.get("number") in (1, 2)),
    (
        {"words": {"any": ["dusk"]}, "not": {"animal": {"in": ["raven", "seal"]}}},
        lambda m: "dusk" in m.get("words", ()) and m["animal"] not in ("raven", "seal"),
    ),
    (
        {"or": [{"seen": True}, {"animal": {"exists": False}}]},
        lambda m: m.get("seen") or not m,
    ),
    ({"animal": "dodo"}, lambda m: False),
    ({}, lambda m: True),
]


@pytest.fixture(scope="module")
def ranking(served, exact, encoder):
    return exact(encoder.encode([QUESTION], "query"), 200)[0]


@pytest.fixture(scope="module")
def described(served):
    return {d.doc_id: d.metadata or {} for d in served.corpus}


@pytest.mark.parametrize("said, meets", FILTERS, ids=lambda one: str(one)[:40])
def test_vectors_are_searched_among_the_documents_that_meet_it(
    served, ranking, described, said, meets
):
    reply = served.search(query=QUESTION, k=50, filter=said).json()
    expected = [hit for hit in ranking if meets(described[hit.doc_id])][:50]
    assert [h["doc_id"] for h in reply["hits"]] == [h.doc_id for h in expected]
    assert [h["score"] for h in reply["hits"]] == pytest.approx(
        [h.score for h in expected], abs=1e-5
    )
    assert [h["rank"] for h in reply["hits"]] == list(range(1, len(expected) + 1))
    assert reply["coverage"]["fraction"] == 1.0, "few hits are no missing shard"
    for hit in reply["hits"]:
        assert hit.get("metadata", {}) == described[hit["doc_id"]]


def test_words_too(served, described):
    texts = [document_text(d.title, d.text) for d in served.corpus]
    by_words = LexicalIndex([d.doc_id for d in served.corpus], texts, Lexical())
    said = {"number": {"lte": 1}}
    whole = by_words.search(QUESTION, 200)
    expected = [hit for hit in whole if described[hit.doc_id].get("number", 9) <= 1][:25]
    hits = served.search(query=QUESTION, k=25, mode="lexical", filter=said).json()["hits"]
    assert [h["doc_id"] for h in hits] == [h.doc_id for h in expected]
    assert [h["score"] for h in hits] == pytest.approx([h.score for h in expected], rel=1e-6)
    both = served.search(query=QUESTION, k=50, mode="hybrid", filter=said).json()["hits"]
    assert len(both) == 50
    assert all(described[hit["doc_id"]]["number"] <= 1 for hit in both)


def test_requests_with_other_filters_at_once_each_get_their_own_answer(served, ranking, described):
    def ask(number: int) -> bool:
        wanted = number % 4
        with_text = {"include_text": number % 2 == 0}
        filter_ = None if wanted == 3 else {"number": wanted}
        reply = served.search(query=QUESTION, k=20, filter=filter_, **with_text).json()
        expected = [
            hit.doc_id
            for hit in ranking
            if filter_ is None or described[hit.doc_id].get("number") == wanted
        ][:20]
        assert all(("text" in hit) == with_text["include_text"] for hit in reply["hits"])
        return [hit["doc_id"] for hit in reply["hits"]] == expected

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(40)))


def test_the_client_filters(served):
    with Client(served.url, served.search_key) as client:
        hits = client.search(QUESTION, k=3, filter={"animal": "raven"}).hits
        assert [hit.metadata["animal"] for hit in hits] == ["raven"] * 3


@pytest.mark.parametrize(
    "said, param, sentence",
    [
        ({"colour": "red"}, "filter.colour", "there are animal, number, seen, words"),
        ({"not": {"colour": "red"}}, "filter.not.colour", "no field 'colour'"),
        ({"number": "1"}, "filter.number", "holds numbers"),
        ({"animal": {"gte": 1}}, "filter.animal", "holds strings"),
        ({"words": "dusk"}, "filter.words", "ask with any all exists"),
        ({"animal": {"like": "o"}}, "filter.animal", "must not hold 'like'"),
        ({"and": [{"animal": "otter"}]}, "filter.and", "side by side must all hold"),
        ({"animal": {}}, "filter.animal", "needs an operator"),
        ({"or": [{"animal": ["otter"]}]}, "filter.or.0.animal", "must not be a list"),
        ({"number": {"gte": 1, "lt": None}}, "filter.number.lt", "must be a string, true, false"),
        ([], "filter", "dictionary"),
        ({"half \udfff": 1}, None, ""),
        ({"or": [{"number": n} for n in range(99)]}, "filter", "at most 64"),
    ],
    ids=repr,
)
def test_a_filter_that_cannot_be_meant_is_422(served, said, param, sentence):
    headers = {"Content-Type": "application/json"}
    body = json.dumps({"query": "otter", "filter": said})
    reply = served.client.post("/search", content=body, headers=headers)
    assert reply.status_code == 422, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request"
    assert sentence in error["message"]
    if param is not None:
        assert error["param"] == param
