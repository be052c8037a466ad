"""A worker that dies is replaced; a unit that kills whoever takes it ends the stage."""

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from bixse.artifacts import Artifact
from bixse.judging.asked import Answers, Asked
from bixse.place import Place
from bixse.records import PAIRS, Rejection
from jobs.judges.trying import DEATHS, unblamed
from jobs.judges.unit import JudgeUnit
from jobs.parts import RESTARTS, Made, row_units, run_units
from tests.artifacts import artifact, drafted
from tests.jobs.test_store import LengthJudge, corpus_of, judge_of, queries_of


def pairs(at: Path, count: int) -> Artifact:
    draft = drafted(at, "pairs")
    row = {"doc_id": "d", "source": "bm25", "rank": 1, "score": 1.0}
    rows = [{"query_id": f"q{n}", **row} for n in range(count)]
    draft.write_part(0, pa.Table.from_pylist(rows, schema=PAIRS))
    return draft.finish()


class Stillborn:
    """Cannot be built."""

    def __init__(self) -> None:
        raise ValueError("no such model")

    def __call__(self, rows: pa.Table) -> Made:
        raise AssertionError("there is none")


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    given = pairs(tmp_path / "pairs", 1)
    draft = drafted(tmp_path / "out", "pairs")
    with pytest.raises(ValueError, match=r"^no such model$"):
        run_units(
            draft, row_units(given, 1), Stillborn, (), label="judge", actors=1, cpus=1, gpus=0
        )


class Refusing:
    """Meets a row that a person must hear of."""

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[Rejection]]:
        raise ValueError("the judge model does not follow the prompt")


def test_a_refusal_crosses_from_the_worker_as_its_sentence(tmp_path: Path) -> None:
    given = pairs(tmp_path / "pairs", 3)
    draft = drafted(tmp_path / "out", "pairs")
    with pytest.raises(ValueError, match=r"^the judge model does not follow the prompt$"):
        run_units(draft, row_units(given, 1), Refusing, (), label="judge", actors=1, cpus=1, gpus=0)
    assert not draft.parts_done()


class Failing:
    """Meets what torch or an engine cannot do."""

    def __init__(self, at_once: bool) -> None:
        if at_once:
            self(pa.table({}))

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[Rejection]]:
        raise RuntimeError("no kernel for this processor")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_failure_below_our_code_names_its_cause(at_once: bool, tmp_path: Path) -> None:
    """Ray Data's own sentence is of retries, and does not."""
    given = pairs(tmp_path / "pairs", 1)
    draft = drafted(tmp_path / "out", "pairs")
    work = row_units(given, 1), Failing, (at_once,)
    with pytest.raises(ValueError, match=r"^RuntimeError: no kernel for this processor$"):
        run_units(draft, *work, label="judge", actors=1, cpus=1, gpus=0)


class Counting:
    """Says how many threads its mathematics has."""

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[Rejection]]:
        import torch

        raise ValueError(f"{torch.get_num_threads()} threads")


@pytest.mark.parametrize("actors", [1, 2])
def test_actors_share_the_cores_of_a_machine_of_our_own(
    tmp_path: Path, actors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # Whoever sets it is heeded.
    given = pairs(tmp_path / "pairs", 1)
    draft = drafted(tmp_path / "out", "pairs")
    with pytest.raises(ValueError, match=r"threads$") as said:
        run_units(
            draft, row_units(given, 1), Counting, (), label="judge", actors=actors, cpus=0.1, gpus=0
        )
    cores = int(ray.cluster_resources()["CPU"])
    assert str(said.value) == f"{max(1, cores // actors)} threads"


class Mortal:
    """Kills its process on q2, for as many times as there are `lives`."""

    def __init__(self, deaths: str, lives: int) -> None:
        self._deaths, self._lives = Path(deaths), lives

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[Rejection]]:
        if rows["query_id"][0].as_py() == "q2":
            died = len(list(self._deaths.iterdir()))
            if died < self._lives:
                (self._deaths / str(died)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return rows, []


class PoisonedJudge(LengthJudge):
    """Dies of one passage, whatever stands beside it."""

    def __call__(self, asked: Sequence[Asked]) -> Answers:
        if any("poison" in pair.passage for pair in asked):
            with open(f"{self._log}-deaths", "a") as handle:
                handle.write(f"{len(asked)}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(asked)


class RelapsingJudge(PoisonedJudge):
    """Fails on that passage, and dies when it is asked it alone once more.

    Of `poison twice` it fails then too, and dies of whatever comes next.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._failed = 0

    def __call__(self, asked: Sequence[Asked]) -> Answers:
        passages = " ".join(pair.passage for pair in asked)
        if "poison" in passages:
            self._failed += len(asked) == 1
            if len(asked) > 1 or self._failed <= 1 + ("twice" in passages):
                raise RuntimeError("device-side assert")
        elif self._failed == 2:
            asked = [replace(asked[0], passage="poison")]
        return super().__call__(asked)


@pytest.mark.parametrize(
    ("kind", "poison", "deaths"),
    [
        # Once with its unit, twice by itself.
        (PoisonedJudge, "poison", ["4", "1", "1"]),
        pytest.param(RelapsingJudge, "poison", ["1", "1"], marks=pytest.mark.slow),
        pytest.param(RelapsingJudge, "poison twice", ["1", "1"], marks=pytest.mark.slow),
    ],
)
def test_a_pair_that_kills_every_judge_is_rejected_and_the_rest_judged(
    tmp_path: Path, kind: type[PoisonedJudge], poison: str, deaths: list[str]
) -> None:
    """The other units' grades are as ever."""
    texts = {f"d{n}": poison if n == 6 else "word " * n for n in range(12)}
    corpus, queries = (
        corpus_of(tmp_path / "corpus", texts),
        queries_of(tmp_path / "q", {"q": "tea"}),
    )
    rows = [
        {"query_id": "q", "doc_id": d, "source": "bm25", "rank": 1, "score": 1.0} for d in texts
    ]
    given = artifact(tmp_path / "pairs", "pairs", rows, PAIRS)
    draft = drafted(tmp_path / "out", "judgments")
    judge = replace(judge_of(tmp_path / "log"), build=kind)
    store, trying = str(tmp_path / "labels"), str(tmp_path / "trying")
    run_units(
        draft, row_units(given, 4), JudgeUnit, (queries, corpus, judge, store, None, trying),
        label="judge", actors=1, cpus=1, gpus=0, in_flight=2,
    )  # fmt: skip
    made = draft.finish()
    # The empty passage is refused by the judge itself.
    assert {row["doc_id"]: row["reason"] for row in made.rejected().to_pylist()} == {
        "d0": "nothing to read",
        "d6": "the judge died 2 times while it was asked this pair alone",
    }
    assert made.table()["doc_id"].to_pylist() == [d for d in texts if d not in ("d0", "d6")]
    assert (tmp_path / "log-deaths").read_text().split() == deaths
    assert 1 + DEATHS <= RESTARTS  # Or it would not have come to the rejection.
    # A death may come while another thread writes its note: what is half-written counts for none.
    left = [path.name for path in Path(trying).iterdir() if path.suffix != ".tmp"]
    assert not [name for name in left if name.startswith("unit")]


class Refuses:
    """A judge that lives, and says no."""

    def __call__(self, asked: Sequence[Asked]) -> Answers:
        raise ValueError(f"no to {len(asked)}")


def test_a_refusal_is_no_death(tmp_path: Path) -> None:
    """The next try asks everything together again."""
    corpus = corpus_of(tmp_path / "corpus", {"d0": "a", "d1": "b"})
    queries = queries_of(tmp_path / "queries", {"q": "tea"})
    rows = pa.table({"query_id": ["q", "q"], "doc_id": ["d0", "d1"]})
    judge = replace(judge_of(tmp_path / "log"), build=Refuses, arguments=())
    unit = JudgeUnit(queries, corpus, judge, None, None, str(tmp_path / "trying"))
    for _ in range(3):
        with pytest.raises(ValueError, match="no to 2"):
            unit(rows)
    assert not list((tmp_path / "trying").iterdir())


class FailingJudge(LengthJudge):
    """Fails on one passage, whatever stands beside it, and lives on."""

    def __call__(self, asked: Sequence[Asked]) -> Answers:
        if any("poison" in pair.passage for pair in asked):
            raise RuntimeError("device-side assert\nand much else")
        return super().__call__(asked)


def asked_of(texts: dict[str, str], tmp_path: Path) -> Made:
    """What a judge that fails on poison makes of a unit of these passages."""
    corpus = corpus_of(tmp_path / "corpus", texts)
    queries = queries_of(tmp_path / "queries", {"q": "tea"})
    judge = replace(judge_of(tmp_path / "log"), build=FailingJudge)
    unit = JudgeUnit(queries, corpus, judge, None, None, str(tmp_path / "trying"))
    return unit(pa.table({"query_id": ["q"] * len(texts), "doc_id": list(texts)}))


@pytest.mark.parametrize("last", [False, True])
def test_a_pair_that_the_judge_fails_on_is_rejected_and_the_rest_judged(
    tmp_path: Path, last: bool
) -> None:
    texts = {"d0": "a", "d1": "b", "d2": "poison"} | ({} if last else {"d3": "c"})
    table, rejected, *_ = asked_of(texts, tmp_path)
    assert table["doc_id"].to_pylist() == [d for d in texts if d != "d2"]
    (refused,) = rejected
    assert refused.doc_id == "d2"
    assert refused.reason == "the judge failed twice on this pair alone: device-side assert"
    assert not list((tmp_path / "trying").iterdir())


def test_a_judge_that_answers_nothing_is_broken_and_no_pair_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="device-side assert"):
        asked_of({"d0": "poison", "d1": "more poison"}, tmp_path)
    assert not list((tmp_path / "trying").iterdir())


@pytest.mark.parametrize("ends", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_who_interrupts_a_job_blames_no_pair(tmp_path: Path, ends: type[BaseException]) -> None:
    """Interrupted twice while an endpoint hung on it, a pair was rejected: "the judge died"."""
    place = Place(str(tmp_path / "trying"))

    def job() -> None:
        with unblamed(place):
            place.write("pair-1-0", b"")
            raise ends

    with pytest.raises(ends):
        job()
    assert place.names() == (["pair-1-0"] if ends is RuntimeError else [])


@pytest.mark.parametrize("lives", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_deaths_are_outlived_up_to_a_bound(tmp_path: Path, lives: int) -> None:
    (tmp_path / "deaths").mkdir()
    given = pairs(tmp_path / "pairs", 4)
    draft = drafted(tmp_path / "out", "pairs")

    def run() -> None:
        run_units(
            draft, row_units(given, 1), Mortal, (str(tmp_path / "deaths"), lives),
            label="judge", actors=1, cpus=1, gpus=0,
        )  # fmt: skip

    if lives <= RESTARTS:
        run()
        assert draft.finish().table() == given.table()
    else:
        with pytest.raises(RuntimeError, match="judge: a worker died 4 times: The actor is dead"):
            run()
        assert 2 not in draft.parts_done()
        assert len(list((tmp_path / "deaths").iterdir())) == RESTARTS + 1
