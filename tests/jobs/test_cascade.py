"""A cheap judge on all pairs, a strong one where it was unsure: one artefact, every row signed."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from bixse.artifacts import Artifact
from bixse.judging.settings import Cascade, Judging
from bixse.records import JUDGMENTS, REJECTED
from jobs.cascade import escalate, merge
from jobs.command import Run
from jobs.pipeline import Pipeline
from jobs.recipes.bixse import bixse
from jobs.verbs import main
from tests.artifacts import drafted
from tests.jobs.hostile import hostile, probs

SURE, UNSURE, TORN = [1.0, 0, 0, 0], [0.7, 0.1, 0.1, 0.1], [0.25] * 4


def judgments(
    at: Path,
    judge: str,
    probs_of: dict[str, list[float]],
    parts: int = 1,
    lost: str = "",
    **usage: float,
) -> Artifact:
    draft = drafted(at, "judgments")
    rows = [
        {"query_id": "q", "doc_id": doc_id, "grade_probs": found, "relevance": found[3],
         "judge": judge, "prompt": "", "origin": "llm", "disagreement": found[0] / 2}
        for doc_id, found in probs_of.items()
    ]  # fmt: skip
    rejected = [{"reason": "broken", "query_id": "q", "doc_id": lost}] if lost else []
    for number in range(parts):
        own = rows[number::parts]
        table = pa.Table.from_pylist(own, schema=JUDGMENTS)
        beside = pa.Table.from_pylist(rejected if number == 0 else [], schema=REJECTED)
        draft.write_part(number, table, beside)
    scale = {"name": "umbrela", "values": [0, 1, 2, 3]}
    return draft.finish(extra={"scale": scale, "usage": usage})


CHEAP = {"d0": SURE, "d1": TORN, "d2": UNSURE, "d3": SURE, "d4": UNSURE}


def test_the_strong_judge_sees_the_most_doubtful_and_replaces_them(tmp_path: Path) -> None:
    cheap = judgments(tmp_path / "cheap", "cheap", CHEAP, parts=2, lost="d9")
    chosen = escalate(cheap, Cascade(share=0.6), str(tmp_path / "chosen"))
    assert [(r["doc_id"], r["rank"], r["source"]) for r in chosen.table().to_pylist()] == [
        ("d1", 1, "cascade"),
        ("d2", 2, "cascade"),
        ("d4", 3, "cascade"),
    ]
    by_order = escalate(cheap, Cascade(share=0.4, by="disagreement"), str(tmp_path / "by-order"))
    assert by_order.table()["doc_id"].to_pylist() == ["d0", "d3"]

    strong = judgments(tmp_path / "strong", "strong", {"d1": SURE, "d4": TORN}, lost="d2")
    made = merge(cheap, strong, str(tmp_path / "merged"))
    found = {row["doc_id"]: (row["judge"], row["grade_probs"]) for row in made.table().to_pylist()}
    assert found == {
        "d0": ("cheap", SURE),
        "d1": ("strong", SURE),
        "d2": ("cheap", pytest.approx(UNSURE)),
        "d3": ("cheap", SURE),
        "d4": ("strong", TORN),
    }
    # Rows in are rows out and rejected; the strong judge's rejections stay where they are.
    assert (made.manifest.rows, made.manifest.rejected) == (5, 1)
    assert made.manifest.extra["judges"] == ["cheap", "strong"]
    assert made.manifest.extra["scale"]["values"] == [0, 1, 2, 3]
    assert made.manifest.extra["strong_rejected"] == 1
    assert merge(cheap, strong, str(tmp_path / "merged")).fingerprint == made.fingerprint

    other = judgments(tmp_path / "other", "strong", {"d7": SURE})
    with pytest.raises(ValueError, match="judges pairs that"):
        merge(cheap, other, str(tmp_path / "refused"))


def test_a_budget_of_nothing_is_said(tmp_path: Path) -> None:
    cheap = judgments(tmp_path / "cheap", "cheap", CHEAP)
    with pytest.raises(ValueError, match="the budget of the cascade is 0 of 5 pairs"):
        escalate(cheap, Cascade(share=0.1), str(tmp_path / "chosen"))


def test_the_strong_judge_may_cost_what_the_cheap_one_has_left(tmp_path: Path) -> None:
    limit = Judging(judge="cascade", max_cost=10.0, price_per_gpu_hour=2.0)
    pipeline = Pipeline(Run(recipe=bixse().replace(judging=limit), out=str(tmp_path)))
    assert pipeline.judging().max_cost == 10
    cheap = judgments(tmp_path / "cheap", "cheap", CHEAP, device_seconds=3 * 3600)
    pipeline.once("judge cheap", lambda: cheap)
    pipeline.once("escalate", lambda: escalate(cheap, Cascade(), str(tmp_path / "chosen")))
    assert pipeline.judging().max_cost == 4
    dear = judgments(tmp_path / "dear", "cheap", CHEAP, device_seconds=9 * 3600)
    pipeline.once("score", lambda: dear)
    assert pipeline.judging().max_cost == 0
    free = Pipeline(Run(recipe=bixse(), out=str(tmp_path)))
    free.once("judge cheap", lambda: cheap)
    assert free.judging().max_cost is None


def write_data(at: Path) -> Path:
    """Documents that a well-behaved endpoint grades as they say, and a few queries."""
    (at / "qrels").mkdir(parents=True)
    words = ["tea", "water", "coffee", "boiling", "leaves", "beans", "kettle", "cup"]
    corpus = [
        {"_id": f"d{n:02d}", "title": "", "text": f"honest {n % 4} {words[n % 8]} {words[n % 5]}"}
        for n in range(24)
    ]
    queries = [{"_id": f"q{n}", "text": f"{words[n]} {words[n + 1]}"} for n in range(4)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (at / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (at / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq3\td00\t1\n")
    return at


@pytest.mark.slow
def test_the_command_judges_twice_and_merges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """features on everything, an endpoint on the most doubtful fifth; a rerun asks nothing."""
    out = tmp_path / "run"
    with hostile() as server:
        argv = [
            "bixse", "--data", str(write_data(tmp_path / "data")), "--out", str(out), "--json",
            "--judging.judge", "cascade", "--judging.cascade.cheap", "features",
            "--judging.cascade.strong", "openai", "--judging.cascade.share", "0.2",
            "--judging.openai.base-url", server.url, "--judging.openai.model", "any",
            # No key: workers that Ray already runs have the environment of their start.
            "--judging.openai.api-key-env", "",
            "--candidates.bm25", "3", "--candidates.dense", "5", "--candidates.random", "0",
        ]  # fmt: skip
        main("judge", argv)
        asked = sum(server.requests.values())
        main("judge", argv)
        assert sum(server.requests.values()) == asked
    cheap, strong, made = (
        Artifact.open(f"{out}/{name}")
        for name in ("judgments-cheap", "judgments-strong", "judgments")
    )
    said = json.loads(capsys.readouterr().out.splitlines()[0])
    assert said["rows"] == cheap.manifest.rows == made.manifest.rows
    assert strong.manifest.rows == int(0.2 * cheap.manifest.rows) > 0
    texts = {f"d{n:02d}": n % 4 for n in range(24)}
    rows: dict[tuple[str, str], Any] = {
        (row["query_id"], row["doc_id"]): row for row in made.table().to_pylist()
    }
    for row in strong.table().to_pylist():
        merged = rows[row["query_id"], row["doc_id"]]
        assert merged["judge"].startswith("any@http")
        assert merged["grade_probs"] == pytest.approx(probs(texts[row["doc_id"]]), abs=1e-6)
    assert (
        sum(row["origin"] == "features" for row in rows.values())
        == len(rows) - strong.manifest.rows
    )
