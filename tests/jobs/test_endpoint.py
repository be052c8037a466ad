"""A real HTTP server that misbehaves: nothing is lost, nothing strange becomes a grade."""

import math
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from bixse.artifacts import Artifact
from bixse.judging.asked import Asked, Refused
from bixse.judging.endpoint import Answer, Unreadable, read, request
from bixse.judging.prompts import ORDERS, PROMPTS
from bixse.judging.settings import ChatEndpoint, Judging
from bixse.records import CORPUS, PAIRS, QUERIES, Judgment, Rejection
from bixse.retrieval.settings import Lexical
from jobs.endpoint import PING, Endpoint, check_endpoint, check_key, retry_after
from jobs.judge import judge
from jobs.judges.budget import FIRST
from jobs.judges.chat import chat
from jobs.parts import Stopped
from jobs.recipe import Placement
from tests.artifacts import artifact
from tests.jobs.hostile import KEY, Hostile, hostile, probs

UMBRELA = PROMPTS["umbrela"]

MENDED = ["500", "503", "429", "429-one", "html", "empty", "cut-json", "reset", "half", "hang",
          "drip", "no-choices", "flood"]  # fmt: skip
"""What may be another answer the next time."""

LOST = {
    "500": "status 500",
    "503": "status 503",
    "429": "status 429",
    "429-years": "status 429, to be repeated after 99999999 s",
    "400": "status 400",
    "403": "status 403",
    "html": "the reply is not JSON",
    "empty": "the reply is not JSON",
    "number": "the reply has no choices",
    "cut-json": "the reply is not JSON",
    "nested": "the reply is",
    "not-gzip": "the connection failed (DecodingError)",
    "not-utf8": "the reply is not JSON",
    "hang": "no whole reply in 3 s",
    "drip": "no whole reply in 3 s",
    "flood": "the reply exceeds 1048576 bytes",
    "reset": "the connection failed",
    "half": "the connection failed",
    "no-choices": "the reply has 0 choices where 1 were asked for",
    "many-choices": "the reply has 9 choices where 1 were asked for",
    "null-choice": "no logprobs",
    "no-logprobs": "no logprobs",
    "two-tokens": "2 tokens where one was asked for",
    "few-top": "19 top_logprobs where 20 were asked for",
    "nan": "a top token without a log-probability",
    "above-one": "the top tokens have probability",
    "words": "grade mass 0.1 is below 0.5",
    "surrogate": "no logprobs",
}
"""What never is an answer, and the reason that its rejection gives."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hostile]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with hostile() as found:
        yield found


def settings(server: Hostile, **changes: Any) -> ChatEndpoint:
    impatient = {"timeout_s": 3, "give_up_after_s": 5, "max_retries": 2, "max_wait_s": 3}
    impatient |= {"concurrency": 64}
    return ChatEndpoint(base_url=server.url, model="any", **{**impatient, **changes})


def ask(chat: ChatEndpoint, passages: list[str]) -> list[Answer | Unreadable]:
    bodies = [request(chat, UMBRELA, "tea", passage, "query first") for passage in passages]
    return [
        found if isinstance(found, Unreadable) else read(found, chat, UMBRELA.scale.labels)
        for found in Endpoint(chat).ask(bodies, chat.votes or 1).found
        if found is not None
    ]


def run(
    passages: list[str],
    chat: ChatEndpoint,
    at: Path,
    unit_pairs: int = 512,
    store: str | None = None,
    max_cost: float | None = None,
) -> Artifact:
    """The job on one query and these documents, through Ray Data."""
    rows = [{"doc_id": f"d{n:03d}", "title": "", "text": p} for n, p in enumerate(passages)]
    pairs = [
        {"query_id": "q0", "doc_id": row["doc_id"], "source": "bm25", "rank": n, "score": 1.0}
        for n, row in enumerate(rows, start=1)
    ]
    query = [{"query_id": "q0", "text": "tea", "origin": "given"}]
    return judge(
        artifact(at / "pairs", "pairs", pairs, PAIRS),
        [artifact(at / "queries", "queries", query, QUERIES)],
        artifact(at / "corpus", "corpus", rows, CORPUS),
        None,
        Judging(judge="openai", openai=chat, unit_pairs=unit_pairs, store=store, max_cost=max_cost),
        Lexical(),
        None,
        Placement(),
        str(at / "judgments"),
    )


def test_a_hostile_endpoint_loses_no_pair_and_yields_no_wrong_grade(server: Hostile) -> None:
    """Honest, mended and lost pairs side by side: one verdict each, grades as told."""
    graded = [f"honest {n % 4}" for n in range(12)]
    graded += [f"once-{name} {n % 4}" for n, name in enumerate(MENDED)]
    passages = graded + [f"{name} 3" for name in LOST]
    asked = [Asked("q0", f"d{n:03d}", "tea", passage) for n, passage in enumerate(passages)]
    judge = chat(settings(server))
    answers = judge.build(*judge.arguments)(asked)
    assert [(v.query_id, v.doc_id) for v in answers.verdicts] == [
        (pair.query_id, pair.doc_id) for pair in asked
    ]
    for pair, verdict in zip(asked, answers.verdicts[: len(graded)], strict=False):
        assert isinstance(verdict, Judgment), (pair.passage, verdict)
        assert verdict.grade_probs == pytest.approx(probs(int(pair.passage[-1]))), pair.passage
        assert verdict.disagreement == pytest.approx(0)
    for (name, reason), verdict in zip(LOST.items(), answers.verdicts[len(graded) :], strict=True):
        assert isinstance(verdict, Rejection), name
        # On a busy machine a megabyte may take longer than we wait.
        expected = (reason, LOST["hang"]) if name == "flood" else reason
        assert verdict.reason.startswith(expected), name
        # Neither the key nor an endless reply is kept.
        assert KEY not in verdict.reason + verdict.response
        assert len(verdict.response) <= 2000
    assert all(server.requests[said] >= 2 for said in server.requests if "once-" in said)
    # Both orders were asked.
    assert any(said.startswith("Passage:") for said in server.requests)
    assert any(said.startswith("Query:") for said in server.requests)
    assert answers.usage.requests >= 2 * len(graded)


def test_the_plan_counts_what_is_sent_and_no_tokens(server: Hostile) -> None:
    judge = chat(settings(server))
    assert judge.plan is not None
    asked = [Asked("q0", f"d{n}", "tea", f"honest {n % 4}") for n in range(5)]
    costs = judge.plan(*judge.arguments)(asked)
    judge.build(*judge.arguments)(asked)
    assert sum(cost.requests for cost in costs) == sum(server.requests.values()) == 10
    for pair, cost in zip(asked, costs, strict=True):
        bodies = [request(settings(server), UMBRELA, "tea", pair.passage, o) for o in ORDERS]
        sent = [message["content"] for body in bodies for message in body["messages"]]
        assert cost.characters == len("".join(sent))
    assert judge.planned == ("requests", "characters")


def test_retry_after_is_waited_for_by_all(server: Hostile) -> None:
    """One request was told to wait a second: none begins its next attempt before, and none is given
    up because it would have been repeated sooner."""
    chat = settings(server, concurrency=1, timeout_s=10, max_wait_s=0.1)
    found = ask(chat, ["once-429-one 3", "honest 1"])
    assert [type(answer) for answer in found] == [Answer, Answer]
    times = next(times for said, times in server.times.items() if "once-" in said)
    assert times[1] - times[0] >= 1


@pytest.mark.parametrize("name", ["429", "503", "reset"])
def test_what_the_server_suffers_is_outlived_by_the_clock(server: Hostile, name: str) -> None:
    """More failures than a broken reply is allowed: a rate limit of minutes rejects no pair."""
    chat = settings(server, give_up_after_s=60, max_retries=0, max_wait_s=0.05)
    assert [type(answer) for answer in ask(chat, [f"nine-{name} 3"])] == [Answer]
    assert sum(server.requests.values()) == 10


@pytest.mark.parametrize("name", ["html", "empty", "no-choices", "not-gzip"])
def test_a_broken_reply_is_given_up_after_a_few_attempts(server: Hostile, name: str) -> None:
    chat = settings(server, give_up_after_s=3600, max_retries=2, max_wait_s=0.05)
    assert [type(answer) for answer in ask(chat, [f"{name} 3"])] == [Unreadable]
    assert sum(server.requests.values()) == 3


def test_an_endpoint_that_is_gone_is_not_waited_for_once_a_request(server: Hostile) -> None:
    """After a second of silence the rest are tried once each, not for a second each."""
    chat = settings(server, concurrency=1, give_up_after_s=1, max_wait_s=0.05)
    found = ask(chat, [f"500 3 {n}" for n in range(20)])
    assert [isinstance(answer, Unreadable) for answer in found] == [True] * 20
    first, *others = (n for said, n in server.requests.items() if said != PING["content"])
    assert first > 2
    assert others == [1] * 19


@pytest.mark.parametrize("beyond", ["429-years", "reset"])
def test_a_quota_that_runs_out_rejects_no_pair(
    server: Hostile, tmp_path: Path, beyond: str
) -> None:
    """What it has not come to was rejected, in a unit that counted as finished: also by a run that
    was too early, and found nothing but labels and refusals."""
    passages = [f"honest {n % 4} for {n}" for n in range(20)]
    chat = settings(server, concurrency=1, orders=1, give_up_after_s=0, api_key_env="")
    server.quota, server.beyond, store = 12, beyond, str(tmp_path / "labels")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"does not answer .*the same command asks for the"):
            run(passages, chat, tmp_path, store=store)
    assert not list((tmp_path / "judgments").glob("part-*"))
    server.quota = math.inf
    made = run(passages, chat, tmp_path, store=store)
    assert (made.manifest.rows, made.manifest.rejected) == (20, 0)
    assert server.requests.pop(PING["content"]) == 2
    assert sorted(server.requests.values()) == [1] * 12 + [3] * 8


def test_pairs_that_are_never_answered_are_rejected_where_others_are(
    server: Hostile, tmp_path: Path
) -> None:
    """Also when they are all that is left to ask."""
    chat = settings(server, orders=1, give_up_after_s=0, api_key_env="")
    made = run(["503 1", "429-years 2"], chat, tmp_path, store=str(tmp_path / "labels"))
    assert (made.manifest.rows, made.manifest.rejected) == (0, 2)


def test_requests_in_flight_are_bounded(server: Hostile) -> None:
    ask(settings(server, concurrency=3, timeout_s=30), [f"honest {n % 4}" for n in range(40)])
    assert server.most_in_flight == 3


@pytest.mark.parametrize("name", ["401", "redirect"])
def test_what_no_repetition_mends_stops_the_job(server: Hostile, name: str) -> None:
    with pytest.raises(ValueError, match="check the address, model and key") as caught:
        ask(settings(server), ["honest 1", f"{name} 3"])
    assert KEY not in str(caught.value)
    assert len(server.requests) <= 2


def test_a_key_that_opens_nothing_is_told_from_a_passage_that_is_forbidden(server: Hostile) -> None:
    """A passage that a guard before the endpoint took for an attack stopped every run for ever."""
    forbidden, graded = ask(settings(server, concurrency=1), ["403 1", "honest 2"])
    assert isinstance(forbidden, Unreadable)
    assert isinstance(graded, Answer)
    asked = server.requests.total()
    server.quota, server.beyond = 0, "403"
    with pytest.raises(ValueError, match="answered 403, check the address, model and key"):
        ask(settings(server, concurrency=1), ["honest 1", "honest 2"])
    assert server.requests.total() == asked + 2


def test_votes_are_asked_for_until_there_are_enough(server: Hostile) -> None:
    """A server that knows no `n` gives one choice a request."""
    chat = settings(server, votes=5)
    assert ask(chat, ["honest 2"]) == [Answer((0, 0, 1.0, 0), 1.0)]
    assert sum(server.requests.values()) == 1
    single = chat.replace(extra='{"temperature": 0.5}')
    body = request(single, UMBRELA, "tea", "honest 2", "query first")
    assert body["temperature"] == 0.5
    assert ask(chat, ["null-choice 2"]) == [Unreadable("none of 5 votes is a grade")]
    assert sum(server.requests.values()) == 1 + 5


def test_an_endpoint_that_never_answers_ends_the_job_resumably(
    server: Hostile, tmp_path: Path
) -> None:
    """A first part of grades, then nothing but errors: the part stays, the rest is for a rerun."""
    passages = [f"honest {n % 4} for {n}" for n in range(32)]
    passages += [f"once-500 {n % 4} for {n}" for n in range(32)]
    # No key: workers that Ray already runs have the environment of their start.
    chat = settings(server, give_up_after_s=0, timeout_s=10, api_key_env="")
    with pytest.raises(ValueError, match=r"none of 32 answers was a grade .status 500"):
        run(passages, chat, tmp_path, unit_pairs=32)
    assert len(list((tmp_path / "judgments").glob("part-*"))) == 1
    asked = sum(server.requests.values())
    made = run(passages, chat, tmp_path, unit_pairs=32)
    assert (made.manifest.rows, made.manifest.rejected) == (64, 0)
    assert sum(server.requests.values()) == asked + 64


def test_what_was_answered_before_the_money_ran_out_is_not_asked_again(
    server: Hostile, tmp_path: Path
) -> None:
    """A unit that was refused in the middle threw away all that it had been answered."""
    passages = [f"honest {n % 4} for {n}" for n in range(20)]
    passages.insert(12, "once-402 3")
    chat = settings(server, concurrency=1, orders=1, timeout_s=30, api_key_env="")
    store = str(tmp_path / "labels")
    with pytest.raises(ValueError, match="answered 402, check the address, model and key"):
        run(passages, chat, tmp_path, store=store)
    assert sum(server.requests.values()) == 12 + 1
    made = run(passages, chat, tmp_path, store=store)
    assert (made.manifest.rows, made.manifest.rejected) == (21, 0)
    assert made.manifest.extra["usage"]["new"] == 21
    assert sum(server.requests.values()) == 21 + 1


def test_an_endpoint_is_asked_as_far_as_the_money_goes(server: Hostile, tmp_path: Path) -> None:
    """A request costs a cent: of 100 pairs in two orders 120 cents buy 60, and the rest later."""
    passages = [f"honest {n % 4} for {n}" for n in range(100)]
    prices = {"price_per_million_prompt_tokens": 80.0, "price_per_million_output_tokens": 2000.0}
    chat, store = settings(server, api_key_env="", timeout_s=30, **prices), str(tmp_path / "labels")
    server.usage = {"prompt_tokens": 100, "completion_tokens": 1}
    with pytest.raises(Stopped, match=r"stopped at --judging\.max-cost: 60 pairs asked for 1\.20,"):
        run(passages, chat, tmp_path, 50, store, max_cost=1.2)
    assert sum(server.requests.values()) == 120
    with pytest.raises(Stopped, match=r"60 pairs asked for 1\.20,"):
        run(passages, chat, tmp_path, 50, store, max_cost=1.2)
    made = run(passages, chat, tmp_path, 50, store, max_cost=5.0)
    assert (made.manifest.rows, made.manifest.extra["usage"]["cost"]) == (100, 2.0)
    assert set(server.requests.values()) == {1}


def test_what_an_endpoint_has_cost_stands_in_the_progress_line(
    server: Hostile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of all sessions, beside what it may cost."""
    chat = settings(server, orders=1, api_key_env="", price_per_million_prompt_tokens=100.0)
    server.usage = {"prompt_tokens": 100, "completion_tokens": 1}
    passages, store = [f"honest {n % 4} for {n}" for n in range(40)], str(tmp_path / "labels")
    with pytest.raises(Stopped):
        run(passages, chat, tmp_path, 5, store, max_cost=0.2)
    assert "cost 0.20 of 0.20" in " ".join(capsys.readouterr().err.split())
    run(passages, chat, tmp_path, 5, store, max_cost=2.0)
    assert "cost 0.40 of 2.00" in " ".join(capsys.readouterr().err.split())
    run(passages, chat, tmp_path / "free", 5)
    assert capsys.readouterr().err.rstrip().endswith("cost 0.40")


def test_an_endpoint_that_counts_no_tokens_is_not_asked_for_ever(
    server: Hostile, tmp_path: Path
) -> None:
    chat = settings(server, api_key_env="", timeout_s=30, price_per_million_prompt_tokens=1.0)
    passages = [f"honest {n % 4} for {n}" for n in range(100)]
    with pytest.raises(ValueError, match="does not say how many tokens it has read"):
        run(passages, chat, tmp_path, max_cost=1.0)
    assert sum(server.requests.values()) == 2 * FIRST
    assert run(passages[:1], chat, tmp_path / "free").manifest.rows == 1


def test_answers_that_cannot_be_read_are_paid_for_too(server: Hostile) -> None:
    """Read, rejected, repeated and given up: the endpoint charges for every one of them."""
    server.usage = {"prompt_tokens": 100, "completion_tokens": 1}
    spoilt = ["words 1", "no-logprobs 2", "no-choices 3", "many-choices 0", "once-no-choices 1"]
    asked = [Asked("q0", passage, "tea", passage) for passage in ["honest 1", *spoilt]]
    judge = chat(settings(server, max_wait_s=0.05))
    answers = judge.build(*judge.arguments)(asked)
    assert [isinstance(one, Rejection) for one in answers.verdicts] == 1 * [False] + 4 * [True] + [
        False
    ]
    replies = server.requests.total()
    assert replies > 2 * len(asked)
    usage = answers.usage
    assert (usage.requests, usage.prompt_tokens, usage.output_tokens) == (
        replies, 100 * replies, replies,
    )  # fmt: skip


@pytest.mark.parametrize("beyond", ["400", "402"])
def test_votes_that_came_before_a_refusal_are_paid_for(server: Hostile, beyond: str) -> None:
    """Of one pair alone, and of the whole job."""
    server.usage = {"prompt_tokens": 100, "completion_tokens": 1}
    server.quota, server.beyond = 3, beyond
    judge = chat(settings(server, votes=5, orders=1))
    asked = [Asked("q0", "d0", "tea", "null-choice 2")]
    try:
        usage = judge.build(*judge.arguments)(asked).usage
    except Refused as refused:
        usage = refused.usage
    assert usage.prompt_tokens == 300


def test_money_for_nothing_counts_in_the_next_run(server: Hostile, tmp_path: Path) -> None:
    """A unit of unreadable answers ended the run, and was asked again as if it had cost nothing."""
    chat = settings(server, orders=1, timeout_s=30, api_key_env="", max_wait_s=0.05,
                    price_per_million_prompt_tokens=100.0)  # fmt: skip
    server.usage = {"prompt_tokens": 100, "completion_tokens": 1}
    passages, store = [f"words 3 for {n}" for n in range(32)], str(tmp_path / "labels")
    with pytest.raises(ValueError, match="none of 32 answers was a grade"):
        run(passages, chat, tmp_path, store=store, max_cost=0.32)
    with pytest.raises(Stopped, match=r"stopped at --judging\.max-cost: 32 pairs asked for 0\.32,"):
        run(passages, chat, tmp_path, store=store, max_cost=0.32)
    assert server.requests.total() == 32


@pytest.mark.parametrize("store", [None, "labels"])
def test_what_a_job_took_before_it_was_refused_is_in_its_usage(
    server: Hostile, tmp_path: Path, store: str | None
) -> None:
    """With a label store its answers stand and are not asked for again; their tokens count."""
    passages = [*(f"honest {n % 4} for {n}" for n in range(4)), "once-402 3", "words 1"]
    chat = settings(server, concurrency=1, orders=1, timeout_s=30, api_key_env="")
    server.usage = {"prompt_tokens": 100, "completion_tokens": 1}
    at = None if store is None else str(tmp_path / store)
    with pytest.raises(ValueError, match="answered 402"):
        run(passages, chat, tmp_path, store=at)
    made = run(passages, chat, tmp_path, store=at)
    assert (made.manifest.rows, made.manifest.rejected) == (5, 1)
    assert made.manifest.extra["usage"]["prompt_tokens"] == 100 * (server.requests.total() - 1)


def test_removed_judgments_leave_no_counts_behind(server: Hostile, tmp_path: Path) -> None:
    """After `rm -r judgments` the pairs asked, and a budget of them, are counted from none."""
    chat = settings(server, timeout_s=30, api_key_env="")
    for unit_pairs in (1, 512):
        made = run(["honest 1", "honest 2", "honest 3"], chat, tmp_path, unit_pairs)
        assert made.manifest.extra["usage"]["new"] == 3
        shutil.rmtree(tmp_path / "judgments")
    assert sum(server.requests.values()) == 2 * 2 * 3


def test_what_is_missing_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match=r"needs --judging\.openai\.base-url"):
        check_endpoint(ChatEndpoint(model="m"))
    with pytest.raises(ValueError, match=r"needs --judging\.openai\.model"):
        check_endpoint(ChatEndpoint(base_url="http://127.0.0.1:1/v1"))
    chat = ChatEndpoint(base_url="http://127.0.0.1:1/v1", model="m")
    check_endpoint(chat)
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds no key"):
        check_key(chat)
    check_key(chat.replace(api_key_env=""))


def test_judgments_that_are_finished_need_no_key(
    server: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a variable that Ray's workers have, whichever test has started them.
    chat = settings(server, timeout_s=30, api_key_env="HOME")
    made = run(["honest 1", "honest 2"], chat, tmp_path)
    monkeypatch.delenv("HOME")
    assert run(["honest 1", "honest 2"], chat, tmp_path).manifest == made.manifest
    shutil.rmtree(tmp_path / "judgments")
    with pytest.raises(ValueError, match="HOME holds no key"):
        run(["honest 1", "honest 2"], chat, tmp_path)
    assert not (tmp_path / "judgments").exists()


@pytest.mark.parametrize(
    "header,seconds",
    [
        (None, None),
        ("3", 3),
        ("0.5", 0.5),
        ("-3", None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("Fri, 20 Nov 2026 12:00:30 GMT", 30),
        ("Fri, 20 Nov 2026 11:00:00 GMT", None),
    ],
)
def test_retry_after_in_both_forms(header: str | None, seconds: float | None) -> None:
    assert retry_after(header, datetime(2026, 11, 20, 12, tzinfo=UTC)) == seconds
