"""`--plan` from the command line: no model is asked, and what is not counted is named."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from bixse.artifacts import Artifact, Draft, begin
from bixse.records import QUERIES
from jobs.verbs import main
from tests.jobs.conftest import write_beir

ENDPOINT = [
    "--judging.judge", "openai", "--judging.openai.base-url", "http://127.0.0.1:1/v1",
    "--judging.openai.model", "any", "--judging.openai.api-key-env", "",
    "--candidates.bm25", "3", "--candidates.dense", "0", "--candidates.random", "0",
]  # fmt: skip
"""A judge that no plan asks: nobody listens there."""


@pytest.fixture(autouse=True)
def _nothing_is_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = ["writing.ask_documents", "writing.ask_queries", "tuning.tune_scorer", "prefer.prefer"]
    for name in stages:

        def ask(*_: Any, name: str = name, **__: Any) -> None:
            pytest.fail(f"the plan paid for {name}")

        monkeypatch.setattr(f"jobs.{name}", ask)


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    data = write_beir(tmp_path / "data", documents=12, queries=6)
    return ["--data", str(data), "--out", str(tmp_path / "out"), "--plan"]


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main("judge", argv)
    assert exit_.value.code == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    return said


@pytest.mark.parametrize(
    ("recipe", "folder"),
    [("customir", "synthetic-written"), ("promptodile", "synthetic-written"), ("ssra", "scorer")],
)
def test_texts_that_are_not_written_yet_are_not_paid_for(
    recipe: str, folder: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused([recipe, *flags, *ENDPOINT], capsys)
    assert f"{tmp_path}/out/{folder} is not finished" in said
    assert f"run python -m jobs.synthesise {recipe} first" in said


def test_pairs_of_finished_texts_are_counted(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def written(*_: Any) -> Artifact:
        draft = begin(str(tmp_path / "out" / "synthetic-written"), "queries", config={}, inputs={})
        if isinstance(draft, Draft):
            row = {"query_id": "s1", "text": "unheard of", "origin": "x", "seed_doc_id": "d00001"}
            draft.write_part(0, pa.Table.from_pylist([row], schema=QUERIES))
            draft = draft.finish()
        return draft

    monkeypatch.setattr("jobs.writing.ask_documents", written)
    written()
    main("judge", ["customir", *flags, *ENDPOINT, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["new"] == found["pairs"] > 0
    assert "not_counted" not in found


@pytest.mark.parametrize(
    ("recipe", "uncounted"),
    [
        ("sycl", "it asks for documents that Qwen/Qwen3-4B-Instruct-2507 writes"),
        ("promptagator", "it asks for queries that Qwen/Qwen3-4B-Instruct-2507 writes"),
        ("ssra", "writes; what tunes and sifts for them"),
        ("pairdistill", "up to 100 comparisons a query, each in both orders, by Qwen/Qwen3-4B"),
    ],
)
def test_what_no_plan_counts_is_not_called_free(
    recipe: str,
    uncounted: str,
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = refused([recipe, *flags], capsys)
    assert uncounted in said
    assert "costs nothing" not in said
    assert not (tmp_path / "out").exists()


def test_comparisons_are_named_beside_the_counts(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    no_key = ["--judging.openai.api-key-env", "NO_KEY_HERE"]  # Nor is any needed to count.
    main("judge", ["pairdistill", *flags, *ENDPOINT, *no_key, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["requests"] == 2 * found["pairs"] > 0
    assert found["not_counted"].startswith("up to 100 comparisons a query")


def test_given_grades_are_free(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main("judge", ["bixse", *flags, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["pairs"], found["known"], found["new"]) == (0, 0, 0)
    assert not (tmp_path / "out" / "judgments").exists()


@pytest.mark.parametrize(
    ("judge", "missing"),
    [
        (["--plan", "--judging.judge", "openai"], "needs --judging.openai.base-url"),
        (["--judging.judge", "openai"], "needs --judging.openai.base-url"),
        (["--judging.judge", "cascade", "--judging.cascade.strong", "openai"], "base-url"),
        (
            [*ENDPOINT[:6], "--judging.openai.api-key-env", "NO_KEY_HERE"],
            "NO_KEY_HERE holds no key",
        ),
    ],
)
def test_an_endpoint_without_address_or_key_is_refused_before_any_work(
    judge: list[str],
    missing: str,
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Pairs were made, queries written and a cascade's cheap judge asked first."""
    assert missing in refused(["bixse", *flags[:-1], *judge], capsys)
    assert not (tmp_path / "out").exists()
