"""Somebody else's grades as judgments, and training that reads judgments through a map."""

import json
from pathlib import Path

import numpy as np
import pytest

from bixse.artifacts import Artifact, Draft, begin
from bixse.judging.calibration import FILE, Calibration, Isotonic
from bixse.judging.settings import Given, Judging, config
from bixse.records import JUDGMENTS
from jobs.grades import import_grades
from jobs.ingest import Ingested, ingest
from jobs.recipe import Ingest
from jobs.supervision import read_labels
from jobs.verbs import main

GRADES = "query-id\tcorpus-id\tscore\nq000\td00000\t3\nq000\td00005\t0\nq001\td00001\t1.5\n"


@pytest.fixture(scope="module")
def data(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Ingested:
    return ingest(str(beir), Ingest(), str(tmp_path_factory.mktemp("ingested")))


def imported(data: Ingested, tmp_path: Path, lines: str = GRADES, **changes: object) -> Artifact:
    file = tmp_path / "gpt4o_umbrela.tsv"
    file.write_text(lines)
    given = Given(file=str(file), **changes)
    settings = config(Judging(judge="given", given=given))
    return import_grades([data.queries], data.corpus, given, settings, str(tmp_path / "judgments"))


def test_grades_are_judgments_under_their_judges_name(data: Ingested, tmp_path: Path) -> None:
    made = imported(data, tmp_path)
    table = made.table()
    assert table.schema == JUDGMENTS
    assert table["grade_probs"].to_pylist() == [[0, 0, 0, 1], [1, 0, 0, 0], [0, 0.5, 0.5, 0]]
    assert table["relevance"].to_pylist() == pytest.approx([1, 0, 0.5])
    assert set(table["judge"].to_pylist()) == {"gpt4o_umbrela"}
    assert set(table["origin"].to_pylist()) == {"llm"}
    assert made.manifest.extra["scale"]["values"] == [0, 1, 2, 3]
    assert imported(data, tmp_path).fingerprint == made.fingerprint


def test_a_file_is_the_same_however_a_path_leads_to_it(
    data: Ingested, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = imported(data, tmp_path)
    monkeypatch.chdir(tmp_path)
    for file in ("gpt4o_umbrela.tsv", "./gpt4o_umbrela.tsv"):
        settings = config(Judging(judge="given", given=Given(file=file)))
        again = import_grades([data.queries], data.corpus, Given(file=file), settings, made.url)
        assert again.fingerprint == made.fingerprint


def test_the_same_grades_under_another_name_are_another_judge(
    data: Ingested, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, other = imported(data, tmp_path / "a", judge="a"), imported(data, tmp_path / "b")
    assert one.fingerprint != other.fingerprint
    assert set(one.table()["judge"].to_pylist()) == {"a"}


def test_trec_lines_and_every_bad_line_with_its_reason(data: Ingested, tmp_path: Path) -> None:
    lines = (
        "q000 0 d00000 3\nq000 0 nowhere 1\nnobody 0 d00000 1\nq000 0 d00000 2\n"
        "q001 0 d00001 nan\nq001 0 d00001\nq002 0 d00002 7\nq001 d00001\n"
    )
    made = imported(data, tmp_path, lines, grade_max=3.0)
    assert made.manifest.rows == 1
    rejected = made.rejected()
    assert rejected is not None
    reasons = dict(zip(rejected["line"].to_pylist(), rejected["reason"].to_pylist(), strict=True))
    assert reasons == {
        2: "unknown doc_id",
        3: "unknown query_id",
        4: "judged twice",
        5: "the grade is not a number",
        6: "the grade is not a number",
        7: "grade 7 is outside the scale",
        8: "expected 3 or 4 columns, found 2",
    }
    assert made.manifest.rows + made.manifest.rejected == len(lines.splitlines())


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("", "holds no grade"),
        ("q000\td00000\t0\n", "no grade above 0"),
        ("q0\td00000\t1\n", "no grade of a known pair.*line 1: unknown query_id"),
    ],
)
def test_a_file_of_nothing_is_refused(
    data: Ingested, tmp_path: Path, lines: str, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        imported(data, tmp_path, lines)
    assert not (tmp_path / "judgments").exists()


def test_no_file_says_which_flag(data: Ingested, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set --judging\.given\.file"):
        import_grades([data.queries], data.corpus, Given(), {}, str(tmp_path / "out"))


def fitted(out: Path, judge: str = "gpt4o_umbrela") -> Artifact:
    draft = begin(str(out), "calibration", config={"judge": judge}, inputs={})
    assert isinstance(draft, Draft)
    map_ = Isotonic(judged=(0, 0.5, 1), human=(0.05, 0.2, 0.7))
    one = Calibration(map=map_, signed=((judge, ""),), scale=(0, 1, 2, 3), pairs=3, queries=2)
    draft.write_file(FILE, one.model_dump_json().encode())
    return draft.finish(rows=3)


def test_training_reads_through_the_map_and_the_judgments_stay(
    data: Ingested, tmp_path: Path
) -> None:
    judgments = imported(data, tmp_path)
    plain = read_labels(judgments, [data.queries], data.corpus, aside=tmp_path)
    assert plain.relevance_P == pytest.approx([1, 0, 0.5])
    through = read_labels(
        judgments, [data.queries], data.corpus, fitted(tmp_path / "map"), aside=tmp_path
    )
    assert through.relevance_P == pytest.approx([0.7, 0.05, 0.2])
    assert through.relevance_P.dtype == np.float32
    assert Artifact.open(judgments.url).fingerprint == judgments.fingerprint


def test_a_map_of_another_judge_is_refused(data: Ingested, tmp_path: Path) -> None:
    judgments = imported(data, tmp_path)
    with pytest.raises(ValueError, match="fitted on llama"):
        read_labels(
            judgments,
            [data.queries],
            data.corpus,
            fitted(tmp_path / "map", "llama"),
            aside=tmp_path,
        )


def test_the_whole_line_judges_and_names_the_map_among_trainings_inputs(
    beir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to Ray, which has nothing to do with the map: the claim stands before it starts."""
    file = tmp_path / "gpt4o_umbrela.tsv"
    file.write_text(GRADES)
    out, map_ = tmp_path / "out", fitted(tmp_path / "map")
    flags = ["bixse", "--data", str(beir), "--out", str(out), "--judging.judge", "given"]
    flags += ["--judging.given.file", str(file), "--judging.calibration", str(tmp_path / "map")]
    main("judge", [*flags, "--json"])
    assert json.loads(capsys.readouterr().out)["rows"] == 3

    def stop(*_: object) -> None:
        raise ValueError("stopped before Ray")

    monkeypatch.setattr("jobs.train.run_workers", stop)
    with pytest.raises(SystemExit):
        main("train", flags)
    assert "stopped before Ray" in capsys.readouterr().err
    begun = json.loads((out / "encoder" / "begun.json").read_text())
    assert begun["inputs"]["calibration"] == map_.fingerprint


def test_grades_of_the_evaluations_queries_are_not_trained_on(
    beir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpt4o_umbrela.tsv"
    file.write_text(GRADES + "q030\td00030\t2\n")  # q030 is of the test split
    flags = ["bixse", "--data", str(beir), "--out", str(tmp_path / "out")]
    flags += ["--judging.judge", "given", "--judging.given.file", str(file)]
    main("judge", flags)  # Judged, for the audit;
    with pytest.raises(SystemExit):
        main("train", flags)  # and not learned from.
    assert "1 of the 3 queries in --judging.given.file stand in dev or test, first 'q030'" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out" / "encoder").exists()
