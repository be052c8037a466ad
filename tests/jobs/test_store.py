"""Nothing is paid for twice: what a worker asks, what the store answers, where a budget ends."""

import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from bixse.artifacts import Artifact, Draft
from bixse.judging.asked import Answers, Asked, Cost, Usage
from bixse.judging.pointwise import BROKEN, unreadable
from bixse.records import CORPUS, PAIRS, QUERIES, Judgment, Rejection
from bixse.scale import UMBRELA
from jobs.judges.budget import FIRST, Budget
from jobs.judges.seam import Judge
from jobs.judges.spending import Spending
from jobs.judges.unit import JudgeUnit
from jobs.parts import (
    Unfinished,
    begin_counted,
    progress,
    row_units,
    run_units,
    trying_place,
    usage,
    usage_place,
)
from tests.artifacts import artifact

PAIR = pa.schema([("query_id", pa.string()), ("doc_id", pa.string())])


class LengthJudge:
    """Grades by the length of the passage and keeps what it was asked; refuses empty ones."""

    def __init__(self, log: str) -> None:
        self._log = Path(log)

    def __call__(self, asked: Sequence[Asked]) -> Answers:
        with open(self._log, "a") as handle:
            handle.writelines(f"{pair.query}\t{pair.passage}\n" for pair in asked)
        verdicts = [self._verdict(pair) for pair in asked]
        return Answers(verdicts, Usage(requests=len(asked)), unreadable(verdicts))

    def _verdict(self, pair: Asked) -> Judgment | Rejection:
        if not pair.passage:
            return Rejection("nothing to read", query_id=pair.query_id, doc_id=pair.doc_id)
        share = min(1.0, len(pair.passage) / 64)
        probs = (1 - share, 0.0, 0.0, share)
        return Judgment(pair.query_id, pair.doc_id, probs, share, "length", "", "llm")


class WordPlan:
    """A token a word."""

    def __init__(self, log: str) -> None:
        pass

    def __call__(self, asked: Sequence[Asked]) -> list[Cost]:
        return [Cost(len(f"{p.query} {p.passage}".split()), 0, 1) for p in asked]


def judge_of(log: Path) -> Judge:
    return Judge(
        build=LengthJudge,
        arguments=(str(log),),
        scale=UMBRELA,
        origin="llm",
        signature={"judge": "length"},
        plan=WordPlan,
        planned=("prompt_tokens",),
    )


def asked_in(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def corpus_of(at: Path, texts: dict[str, str]) -> Artifact:
    rows = [{"doc_id": doc_id, "title": "", "text": text} for doc_id, text in texts.items()]
    return artifact(at, "corpus", rows, CORPUS)


def queries_of(at: Path, texts: dict[str, str]) -> list[Artifact]:
    rows = [{"query_id": q, "text": text, "origin": "given"} for q, text in texts.items()]
    return [artifact(at, "queries", rows, QUERIES)]


def rows(*pairs: tuple[str, str]) -> pa.Table:
    return pa.Table.from_pylist([{"query_id": q, "doc_id": d} for q, d in pairs], schema=PAIR)


@pytest.fixture
def worker(tmp_path: Path) -> Any:
    corpus = corpus_of(tmp_path / "corpus", {f"d{n}": "word " * n for n in range(6)})
    queries = queries_of(tmp_path / "queries", {"q0": "tea", "q1": "water"})

    def build(budget: Any = None) -> JudgeUnit:
        store = str(tmp_path / "labels")
        return JudgeUnit(queries, corpus, judge_of(tmp_path / "log"), store, budget)

    return build


def test_only_new_pairs_are_asked(tmp_path: Path, worker: Any) -> None:
    """A second job with one new pair in ten asks that one; its rows are those of one job."""
    pairs = [(f"q{n % 2}", f"d{1 + n // 2}") for n in range(10)]
    first, _, counts = worker()(rows(*pairs[:9]))
    assert (counts["new"], counts["known"]) == (9, 0)
    again, _, counts = worker()(rows(*pairs))
    assert (counts["new"], counts["known"]) == (1, 9)
    assert len(asked_in(tmp_path / "log")) == 10
    assert again.slice(0, 9) == first
    assert again["query_id"].to_pylist() == [query_id for query_id, _ in pairs]


def test_hard_pairs_alone_are_asked_again_without_blaming_the_judge(tmp_path: Path) -> None:
    """Rejections are not filed: what a second job asks of a unit may be nothing else."""
    corpus = corpus_of(tmp_path / "corpus", {"easy": "word", "empty": ""})
    # Equal texts are one question.
    queries = queries_of(tmp_path / "queries", {f"q{n}": f"query {n}" for n in range(BROKEN)})
    hard = [(f"q{n}", "empty") for n in range(BROKEN)]

    def worker() -> JudgeUnit:
        return JudgeUnit(queries, corpus, judge_of(tmp_path / "log"), str(tmp_path / "labels"))

    with pytest.raises(ValueError, match=f"none of {BROKEN} answers was a grade .nothing to read"):
        worker()(rows(*hard))
    for known in (0, 1):
        kept, rejected, counts = worker()(rows(("q0", "easy"), *hard))
        assert (kept.num_rows, len(rejected)) == (1, BROKEN)
        assert counts["known"] == known


def test_equal_texts_under_other_ids_are_known(tmp_path: Path, worker: Any) -> None:
    worker()(rows(("q0", "d1"), ("q1", "d2")))
    corpus = corpus_of(tmp_path / "other", {"x": " word", "y": "word  word", "z": "word word"})
    queries = queries_of(tmp_path / "asked", {"a": "tea ", "b": "water", "c": "coffee"})
    log = tmp_path / "log"
    unit = JudgeUnit(queries, corpus, judge_of(log), str(tmp_path / "labels"))
    # The last two are one question of equal texts that nobody has asked before.
    table, _, counts = unit(rows(("a", "x"), ("b", "y"), ("c", "y"), ("c", "z")))
    assert (counts["new"], counts["known"]) == (1, 3)
    assert table["doc_id"].to_pylist() == ["x", "y", "y", "z"]
    assert table["query_id"].to_pylist() == ["a", "b", "c", "c"]
    assert len(asked_in(log)) == 3


def test_rejections_are_not_stored(tmp_path: Path, worker: Any) -> None:
    for _ in range(2):
        table, rejected, _ = worker()(rows(("q0", "d0"), ("q0", "d1")))
        assert table["doc_id"].to_pylist() == ["d1"]
        assert [(r.query_id, r.doc_id, r.reason) for r in rejected] == [
            ("q0", "d0", "nothing to read")
        ]
    assert len(asked_in(tmp_path / "log")) == 3


def test_two_jobs_at_once_see_what_the_other_has_finished(tmp_path: Path, worker: Any) -> None:
    one, other = worker(), worker()
    one(rows(("q0", "d1"), ("q0", "d2")))
    _, _, counts = other(rows(("q0", "d2"), ("q0", "d3")))
    assert (counts["new"], counts["known"]) == (1, 1)
    _, _, counts = one(
        rows(
            ("q0", "d3"),
        )
    )
    assert counts["new"] == 0


def test_a_known_unit_loads_no_judge(tmp_path: Path, worker: Any) -> None:
    first, _, _ = worker()(rows(("q0", "d1")))
    corpus = corpus_of(tmp_path / "again", {"d1": "word"})
    queries = queries_of(tmp_path / "asked", {"q0": "tea"})
    none = Judge(
        build=lambda: pytest.fail("loaded"), arguments=(), scale=UMBRELA, origin="llm",
        signature={"judge": "length"},
    )  # fmt: skip
    table, _, _ = JudgeUnit(queries, corpus, none, str(tmp_path / "labels"))(rows(("q0", "d1")))
    assert table == first


class Method:
    """`actor.method.remote(...)`, here and now."""

    def __init__(self, call: Any) -> None:
        self.remote = call


class Granting:
    """A budget asked as an actor is asked."""

    def __init__(self, budget: Budget) -> None:
        self.take, self.settle = Method(budget.take), Method(budget.settle)


def test_what_a_budget_cuts_off_is_not_lost(
    tmp_path: Path, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of five pairs are asked and filed; with more money the other two are."""
    import ray

    monkeypatch.setattr(ray, "get", lambda value: value)
    five = rows(*(("q0", f"d{n}") for n in range(1, 6)))
    with pytest.raises(Unfinished) as stop:
        worker(Granting(Budget(pairs=3)))(five)
    assert stop.value.counts["new"] == 3
    assert len(asked_in(tmp_path / "log")) == 3
    table, _, counts = worker(Granting(Budget(pairs=2)))(five)
    assert (counts["new"], table.num_rows) == (2, 5)
    assert len(set(asked_in(tmp_path / "log"))) == 5


def test_counts_are_of_the_draft_that_they_were_made_for(tmp_path: Path) -> None:
    """A resume keeps them, even before its first part; what begins anew has none."""
    out = tmp_path / "judgments"

    def counted(prompt: str) -> Draft:
        draft = begin_counted(str(out), "judgments", config={"prompt": prompt}, inputs={})
        assert isinstance(draft, Draft)
        return draft

    def ask(draft: Draft) -> None:
        usage_place(draft).write("cut-1.json", b'{"new": 3}')

    ask(counted("one"))
    assert usage(counted("one"))["new"] == 3
    assert usage(counted("another"))["new"] == 0
    ask(counted("another"))
    shutil.rmtree(out)
    assert usage(counted("another"))["new"] == 0
    ask(counted("another"))
    counted("another").write_part(0, pa.table({"query_id": ["q"]}))
    assert usage(counted("another"))["new"] == 3


def test_notes_of_deaths_are_of_the_draft_that_they_were_made_for(tmp_path: Path) -> None:
    """Judgments that were removed left them: whoever began anew rejected pairs unasked."""
    out = tmp_path / "judgments"

    def noted(prompt: str) -> list[str]:
        draft = begin_counted(str(out), "judgments", config={"prompt": prompt}, inputs={})
        assert isinstance(draft, Draft)
        found = trying_place(draft).names()
        trying_place(draft).write("pair-1-0", b"")
        return found

    assert noted("one") == []
    assert noted("one") == ["pair-1-0"]
    assert noted("another") == []
    shutil.rmtree(out)
    assert noted("another") == []


class DiesOnce(JudgeUnit):
    """Killed when it has asked, filed and counted, and before its part stands."""

    def __init__(self, mark: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._mark = Path(mark)

    def __call__(self, rows: pa.Table) -> Any:
        if not self._mark.exists():
            self._mark.touch()
            Draft.write_part = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        return super().__call__(rows)


@pytest.mark.slow
def test_what_a_killed_worker_paid_for_is_counted(tmp_path: Path) -> None:
    """Its successor finds the labels, and said that nothing had been asked: a budget forgot it."""
    corpus = corpus_of(tmp_path / "corpus", {f"d{n}": "word " * n for n in range(1, 6)})
    queries = queries_of(tmp_path / "queries", {"q": "tea"})
    keys = [{"query_id": "q", "doc_id": f"d{n}", "source": "bm25", "rank": n} for n in range(1, 6)]
    pairs = artifact(tmp_path / "pairs", "pairs", [{**k, "score": 0.0} for k in keys], PAIRS)
    draft = begin_counted(str(tmp_path / "out"), "judgments", config={}, inputs={})
    assert isinstance(draft, Draft)
    judge, store = judge_of(tmp_path / "log"), str(tmp_path / "labels")
    run_units(
        draft, row_units(pairs, 5), DiesOnce,
        (str(tmp_path / "mark"), queries, corpus, judge, store),
        label="judge", actors=1, cpus=1, gpus=0,
    )  # fmt: skip
    assert (tmp_path / "mark").exists()
    assert len(asked_in(tmp_path / "log")) == 5
    assert usage(draft)["new"] == 5
    assert draft.finish().manifest.rows == 5


def test_money_so_far_stands_in_the_progress_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Of all sessions: 100 s earlier, now 50 s on two devices, at 3.60 an hour."""
    spent = Spending(2.0, 3.6, earlier=100.0, _started=time.monotonic() - 50)
    assert spent.cost == pytest.approx(0.2, abs=0.01)
    assert spent.note() == "cost 0.20"
    assert Spending(1.0, None).note() == ""
    assert Spending(1.0, 3.6, limit=1234.0).note() == "cost 0.00 of 1,234.00"
    with progress("judge", 10, spent.note) as advance:
        advance(10)
    line = capsys.readouterr().err
    assert "10/10" in line
    assert "cost 0.20" in line


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_of_time_ends_before_it_is_overdrawn() -> None:
    """10 pairs/s after 5 s of loading, 20 s in all: about 150 pairs, the last within the time."""
    clock = Clock()
    budget = Budget(seconds=20, clock=clock)
    clock.now = 5.0
    asked = 0
    while allowed := budget.take(64):
        asked += allowed
        clock.now += allowed / 10
        budget.settle(allowed)
    assert clock.now <= 20
    assert 140 <= asked <= 150
    assert budget.take(1) == 0


def test_a_budget_of_money_buys_what_it_can() -> None:
    """Pairs of 1 and 3 cents in turn, two workers: of 10 in all, at most one grant too many."""
    budget, asked, spent = Budget(money=10.0), 0, 0.0
    grants = [budget.take(8), budget.take(8)]
    while grants:
        pairs = grants.pop(0)
        cost = sum(0.01 if (asked + n) % 2 else 0.03 for n in range(pairs))
        asked, spent = asked + pairs, spent + cost
        budget.settle(pairs, cost)
        if allowed := budget.take(8):
            grants.append(allowed)
    assert 490 <= asked <= 500
    assert 9.8 <= spent <= 10.02
    assert budget.take(1) == 0


def test_before_the_rate_is_known_little_is_granted() -> None:
    assert Budget(money=1.0).take(10_000) == FIRST
    assert Budget(money=0.0).take(1) == 0
    budget = Budget(seconds=100, clock=Clock())
    assert budget.take(10_000) == FIRST
    assert Budget(pairs=7).take(10_000) == 7
    assert Budget().take(10_000) == 10_000
    assert Budget(pairs=-1).take(1) == 0
