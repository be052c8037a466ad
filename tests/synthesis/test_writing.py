"""Requests become texts or rejections, whatever the model does: one outcome each, in order."""

import json
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import kendalltau

from bixse.reading.chats import Messages
from bixse.records import Query, Rejection
from bixse.synthesis.examples import MAX_CHARACTERS, GivenPair, choose, example_of, grade_of
from bixse.synthesis.prompts import Example
from bixse.synthesis.requests import Request, document_requests, draw, query_requests
from bixse.synthesis.settings import (
    FewShot,
    Generator,
    GradedQueries,
    Styled,
)
from bixse.synthesis.writing import (
    Asked,
    Comparison,
    Completion,
    Refused,
    WrittenDocument,
    ask,
    compare,
    sampling_seed,
    write_documents,
    write_queries,
)
from tests.encoders import texts
from tests.synthesis.stubs import Stub

DOCS = {f"d{n}": text for n, text in enumerate(texts(50, seed=2))}


def test_an_unreadable_answer_is_asked_again_with_another_seed_then_rejected() -> None:
    seen: list[int] = []

    def reply(turn: str, draw: random.Random) -> str:
        return '{"query": "tea"}' if turn == "good" or (turn == "late" and len(seen) > 1) else "?"

    def complete(chats: Sequence[Messages], seeds: Sequence[int]) -> list[Completion]:
        seen.append(len(chats))
        return Stub(reply)(chats, seeds)

    def read(response: str) -> str:
        from bixse.synthesis.reading import read_query

        return read_query(response, "a document")

    asked = [
        Asked(key, [{"role": "user", "content": key}], read) for key in ("bad", "good", "late")
    ]
    found = ask(asked, complete, attempts=3, seed=0)
    assert seen == [3, 2, 1]  # Only what is not there yet is asked again.
    assert found[1:] == ["tea", "tea"]
    assert isinstance(found[0], Refused)
    assert found[0].response == "?"
    assert found[0].reason.startswith("not the JSON")
    seeds = {sampling_seed("bad", 0, attempt) for attempt in range(3)}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_completion_lost_on_the_way_is_an_error_and_no_text() -> None:
    asked = [Asked("a", [], str), Asked("b", [], str)]
    with pytest.raises(RuntimeError, match="2 chats were asked, 1 came back"):
        ask(asked, lambda chats, seeds: [Completion("x")], attempts=1, seed=0)


def test_a_problem_is_a_rejection_with_what_was_received() -> None:
    """An answer that was cut off is none, even where what came would read."""
    cut = Stub(
        lambda turn, draw: Completion('{"query": "tea"}', "the answer was cut off: 9 tokens")
    )
    requests = list(query_requests(["d0"], FewShot(queries_per_document=1)))
    (found,) = write_queries(requests, DOCS, FewShot(), [], cut)
    assert found == Rejection(
        "the answer was cut off: 9 tokens", '{"query": "tea"}', query_id="few-shot:d0:0",
        doc_id="d0",
    )  # fmt: skip
    assert len(cut.chats) == 2


def test_each_style_is_asked_as_often_as_configured() -> None:
    """CustomIR: queries per chunk and style mix as configured."""
    settings = Styled(styles=("question", "keywords"), queries_per_style=3)
    requests = list(query_requests(list(DOCS), settings))
    stub = Stub(lambda turn, draw: {"query": f"about {draw.random()}"})
    made = write_queries(requests, DOCS, settings, [], stub)
    assert all(isinstance(item, Query) for item in made)
    found = Counter((q.seed_doc_id, q.query_id.split(":")[0]) for q in made if isinstance(q, Query))
    assert set(found.values()) == {3}
    assert len(found) == 2 * len(DOCS)
    assert len({query.query_id for query in made if isinstance(query, Query)}) == len(made)
    styles = Counter("key words" in chat[-1]["content"] for chat in stub.chats)
    assert styles[True] == styles[False]


def test_no_query_is_a_copy_of_its_document() -> None:
    """A model that copies half of the time: every copy is a rejection, none a query."""

    def copies(turn: str, draw: random.Random) -> object:
        passage = turn.removeprefix("Passage:\n").split("\n")[0]
        return {"query": passage if draw.random() < 0.5 else f"what of {passage.split()[0]}"}

    settings = FewShot(queries_per_document=2, generator=Generator(attempts=1))
    made = write_queries(
        list(query_requests(list(DOCS), settings)), DOCS, settings, [], Stub(copies)
    )
    rejected = [item for item in made if isinstance(item, Rejection)]
    kept = [item for item in made if isinstance(item, Query)]
    assert 20 < len(rejected) < 80
    assert {item.reason for item in rejected} == {"the query is copied from the document"}
    assert all(query.text.startswith("what of") for query in kept)
    again = write_queries(
        list(query_requests(list(DOCS), settings)), DOCS, settings, [], Stub(copies)
    )
    assert again == made  # The seeds come from the request.


def test_a_grade_is_asked_of_a_document_as_often_as_configured() -> None:
    settings = GradedQueries(queries_per_grade=(0, 2, 1, 1))
    requests = list(query_requests(["d0", "d1"], settings))
    assert [r.target_grade for r in requests] == [1, 1, 2, 3] * 2
    obeys = Stub(lambda turn, draw: {"query": f"of grade {turn[-1]}, {draw.random()}"})
    made = write_queries(requests, DOCS, settings, [], obeys)
    assert all(isinstance(q, Query) and f"grade {q.target_grade:g}," in q.text for q in made)


def passages(turn: str, draw: random.Random) -> dict[str, str]:
    return {f"grade_{grade}": f"passage {grade} {draw.random()}" for grade in (3, 2, 1, 0)}


def test_documents_of_all_grades_are_written_together_or_not_at_all() -> None:
    """SyCL: four levels or another try; a model that forgets one in two of three answers."""

    def forgets(turn: str, draw: random.Random) -> object:
        answer = passages(turn, draw)
        if draw.random() < 2 / 3:
            del answer["grade_1"]
        return answer

    queries = {f"q{n}": f"what is {n}" for n in range(60)}
    requests = list(document_requests(queries))
    assert len(requests) == 240
    stub = Stub(forgets)
    made = write_documents(requests, queries, attempts=2, seed=0, complete=stub)
    assert 60 < len(stub.chats) < 120
    written = [item for item in made if isinstance(item, WrittenDocument)]
    of_query = Counter(document.query_id for document in written)
    assert set(of_query.values()) == {4}
    assert 20 < len(of_query) < 48  # 5 of 9 in the mean
    assert len(written) + sum(isinstance(item, Rejection) for item in made) == 240
    for request, item in zip(requests, made, strict=True):
        if isinstance(item, WrittenDocument):
            assert item.text.startswith(f"passage {request.target_grade} ")
            assert (item.doc_id, item.target_grade) == (request.made_id, request.target_grade)
        else:
            assert (item.query_id, item.doc_id) == (request.query_id, request.made_id)
            assert json.loads(item.response).keys() == {"grade_3", "grade_2", "grade_0"}


@pytest.mark.parametrize(("obeys", "low", "high"), [(0.8, 0.6, 1.0), (0.25, -0.2, 0.2)])
def test_a_judge_finds_the_levels_that_documents_were_written_at(
    obeys: float, low: float, high: float
) -> None:
    """SyCL: judged level against written level, Kendall's tau; a writer that only guesses shows."""

    def passages_about(turn: str, draw: random.Random) -> object:
        asked, other = turn.split("\n")[1].split(), ["other", "words", "that", "say", "nothing"]
        said = {}
        for grade in (3, 2, 1, 0):
            meant = grade if draw.random() < obeys else draw.randrange(4)
            kept = draw.sample(asked, 2 * meant)
            said[f"grade_{grade}"] = " ".join([*kept, *other, str(draw.random())])
        return said

    queries = {f"q{n}": " ".join(f"word{n}{k}" for k in range(6)) for n in range(100)}
    requests = list(document_requests(queries))
    made = write_documents(requests, queries, attempts=3, seed=0, complete=Stub(passages_about))
    kept = [item for item in made if isinstance(item, WrittenDocument)]
    assert len(kept) > 300
    judged = [
        len(set(queries[document.query_id].split()) & set(document.text.split())) // 2
        for document in kept
    ]
    assert low <= kendalltau([document.target_grade for document in kept], judged)[0] <= high


def test_length_and_difficulty_vary_with_the_query_and_not_with_the_run() -> None:
    queries = {f"q{n}": f"what is {n}" for n in range(40)}
    requests = list(document_requests(queries))
    first, second = Stub(passages), Stub(passages)
    write_documents(requests, queries, 1, 0, first)
    write_documents(requests[::-1], queries, 1, 0, second)
    asked = {chat[-1]["content"] for chat in first.chats}
    assert asked == {chat[-1]["content"] for chat in second.chats}
    assert len({turn.split("Each passage")[1] for turn in asked}) == 9


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        (("first", "second"), "high"),
        (("second", "first"), "low"),
        (("first", "first"), "undecided"),
        (("second", "second"), "undecided"),
    ],
)
def test_a_comparison_is_decided_when_both_orders_agree(
    answers: tuple[str, str], verdict: str
) -> None:
    asked = iter(answers)
    stub = Stub(lambda turn, draw: {"better": next(asked)})
    queries = {"h": "high", "l": "low"}
    found = compare([Comparison("d0", "h", "l")], queries, DOCS, 1, 0, stub)
    assert found == [verdict]
    turns = [chat[-1]["content"] for chat in stub.chats]
    assert turns[0].index("high") < turns[0].index("low")
    assert turns[1].index("low") < turns[1].index("high")


def test_a_comparison_without_an_answer_is_a_rejection_and_no_verdict() -> None:
    stub = Stub(lambda turn, draw: "both")
    (found,) = compare([Comparison("d0", "h", "l")], {"h": "a", "l": "b"}, DOCS, 1, 0, stub)
    assert isinstance(found, Rejection)
    assert (found.doc_id, found.query_id, found.response) == ("d0", "h", "both")


def test_the_draw_depends_on_the_ids_and_the_seed_alone() -> None:
    ids = [f"d{n}" for n in range(500)]
    assert draw(ids, 50, 0) == draw(ids[::-1], 50, 0) == draw(ids, 100, 0)[:50]
    assert draw(ids, 50, 0) != draw(ids, 50, 1)
    assert len(draw(ids, 900, 0)) == 500


def test_the_grade_of_an_example_is_the_nearest_and_half_goes_up() -> None:
    """As the scorer's (`Scale.nearest`): both models are tuned on the same labels."""
    grades = [grade_of(value) for value in (0, 1 / 6, 1 / 3, 0.5, 2 / 3, float(np.float32(5 / 6)))]
    assert grades == [0, 1, 1, 2, 2, 3]


def test_a_style_twice_is_refused_since_its_queries_would_repeat_each_other() -> None:
    for styles in ((), ("question", "claim", "question")):
        with pytest.raises(ValueError, match="one or more styles are needed, each once"):
            Styled(styles=styles)


def test_the_examples_are_the_best_pairs_that_share_nothing() -> None:
    pairs = [
        GivenPair("q0", "d0", 1.0), GivenPair("q0", "d1", 1.0), GivenPair("q1", "d2", 0.7),
        GivenPair("q2", "d2", 0.7), GivenPair("q3", "d3", 0.0), GivenPair("q4", "d4", 0.3),
    ]  # fmt: skip
    chosen = choose(pairs, FewShot(examples=8))
    assert chosen == choose(pairs[::-1], FewShot(examples=8))
    assert [pair.relevance for pair in chosen] == [1.0, 0.7, 0.3]
    assert len({pair.query_id for pair in chosen} | {pair.doc_id for pair in chosen}) == 6
    assert choose(pairs, FewShot(examples=1)) == chosen[:1]
    of_grades = choose(pairs, GradedQueries(examples=1))
    assert [pair.grade for pair in of_grades] == [0, 1, 2, 3]


def test_a_long_example_is_cut_and_a_short_one_stays() -> None:
    pair = GivenPair("q", "d", 1.0, grade=3)
    assert example_of(pair, "tea", "leaf " * 10) == Example("tea", "leaf " * 10, 3)
    cut = example_of(pair, "tea", "leaf " * 1000).document
    assert cut == ("leaf " * 1000)[:MAX_CHARACTERS]
    assert len(cut) == MAX_CHARACTERS


def test_requests_of_ids_that_look_alike_stay_apart() -> None:
    settings = Styled(styles=("question",), queries_per_style=2)
    made = [r.made_id for r in query_requests(["a", "a:0", "a:1"], settings)]
    assert len(set(made)) == 6
    assert Request("x") == Request("x", None, None, None, None)
