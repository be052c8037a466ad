"""The audit of a made-up set, from the command line, and the published grades of trec-dl."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.judge_agreement import EXPECTED, YEARS, agreement_of, rotation, sets
from bixse.artifacts import Artifact
from bixse.candidates.settings import Stratified
from bixse.judging.settings import Audit
from bixse.records import DOCUMENTS, PAIRS, Pair
from jobs.audit import audit, tables
from jobs.calibration import refuse_in_sample
from jobs.cascade import merge
from jobs.ingest import ingest
from jobs.labels import contrast, label, sample
from jobs.parts import rows_of
from jobs.recipe import Ingest
from jobs.verbs import main
from tests.artifacts import artifact, drafted

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_grades(path: Path, grades: Mapping[tuple[str, str], float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (f"{query_id}\t{doc_id}\t{grade:g}\n" for (query_id, doc_id), grade in grades.items())
    path.write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents and 3 copies (7.5 %) of relevant ones; a judge that is one grade too kind."""
    at = tmp_path_factory.mktemp("data")
    documents = [{"_id": f"d{n:02d}", "text": f"passage {n} " + "word " * n} for n in range(40)]
    documents += [{"_id": f"copy{n}", "text": documents[n]["text"].upper()} for n in range(3)]
    questions = [{"_id": f"q{n:02d}", "text": f"what stands in passage {n}"} for n in range(20)]
    questions.append({"_id": "q20", "text": "what stands in passage 11?"})  # nearly q11, in train
    write_lines(at / "corpus.jsonl", documents)
    write_lines(at / "queries.jsonl", questions)
    human = {(f"q{n:02d}", f"d{n + k:02d}"): max(0, 2 - k) for n in range(20) for k in range(13)}
    llm = {pair: grade + 1 for pair, grade in human.items()}
    llm["q00", "copy0"] = 0  # the text of d00, which is graded 3
    split = {"train": range(12), "test": range(12, 20)}
    for name, numbers in split.items():
        of_split = {pair: g for pair, g in human.items() if int(pair[0][1:]) in numbers}
        write_grades(at / "qrels" / f"{name}.tsv", of_split)
    with open(at / "qrels" / "test.tsv", "a") as qrels:
        qrels.write("q20\td11\t2\n")
    write_grades(at / "llm" / "kind.tsv", llm)
    write_grades(at / "llm" / "again.tsv", {pair: max(g - 1, 0) for pair, g in llm.items()})
    return at


def flags(data: Path, out: Path, file: str = "kind.tsv") -> list[str]:
    return [
        "bixse", "--data", str(data), "--out", str(out), "--ingest.grade-max", "3",
        "--judging.judge", "given", "--judging.given.file", str(data / "llm" / file),
        "--judging.given.grade-max", "3", "--audit.bootstrap", "20",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def audited(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audited")
    main("judge", flags(data, out / "again", "again.tsv"))
    again = str(out / "again" / "judgments")
    main("audit", [*flags(data, out), "--audit.fit", "isotonic", "--audit.rejudged", again])
    return out


@pytest.fixture(scope="module")
def report(audited: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((audited / "audit-calibrated" / "report.json").read_text())
    return found


def test_agreement_before_and_after_a_map_fitted_on_the_other_split(report: dict[str, Any]) -> None:
    test = report["agreement"]["test"]
    assert (test["pairs"], test["queries"], test["in_sample"]) == (104, 8, False)
    assert report["agreement"]["train"]["in_sample"] is True
    before, after = (test[side]["measures"] for side in ("judged", "calibrated"))
    assert before["over_rating"]["value"] == pytest.approx(1 / 3)
    assert before["ece"]["value"] == pytest.approx(1 / 3)
    assert after["ece"]["value"] == pytest.approx(0, abs=1e-6)
    assert after["kappa"]["value"] == pytest.approx(1)
    counts = test["judged"]["confusion"]
    assert [counts[0][1], counts[1][2], counts[2][3]] == [88, 8, 8]
    assert sum(b["pairs"] for b in test["judged"]["reliability"]["mass"]) == 104


def test_the_map_names_what_it_was_fitted_on(audited: Path) -> None:
    made = Artifact.open(str(audited / "calibration"), "calibration")
    judgments = Artifact.open(str(audited / "judgments"), "judgments")
    assert made.manifest.inputs["judgments-0"] == judgments.fingerprint
    assert made.manifest.config == {"map": "isotonic", "split": "train"}
    assert made.manifest.rows == 156
    report = Artifact.open(str(audited / "audit-calibrated"), "audit")
    assert report.manifest.inputs["calibration"] == made.fingerprint


@pytest.mark.parametrize("kind", ["isotonic", "temperature"])
def test_no_map_is_fitted_on_one_grade(
    kind: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of qrels that hold positives alone, as most of BEIR's do, it made every pair a positive."""
    positives = tmp_path / "data"
    shutil.copytree(data, positives)
    for name, numbers in (("train", range(12)), ("test", range(12, 20))):
        pairs = {(f"q{n:02d}", f"d{n:02d}"): 1.0 for n in numbers}
        write_grades(positives / "qrels" / f"{name}.tsv", pairs)
    with pytest.raises(SystemExit) as exit_:
        main("audit", [*flags(positives, tmp_path / "out"), "--audit.fit", kind])
    assert exit_.value.code == 1
    assert "all 12 judged pairs of split train one grade" in capsys.readouterr().err
    assert not (tmp_path / "out" / "calibration").exists()


@pytest.mark.parametrize("kind", ["isotonic", "temperature"])
def test_no_isotonic_map_is_fitted_on_a_few_pairs(
    kind: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two pairs made a map. A temperature is one number, but of single grades there is none."""
    few = tmp_path / "data"
    shutil.copytree(data, few)
    write_grades(few / "qrels" / "train.tsv", {("q00", "d00"): 2.0, ("q00", "d05"): 0.0})
    with pytest.raises(SystemExit) as exit_:
        main("audit", [*flags(few, tmp_path / "out"), "--audit.fit", kind])
    assert exit_.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    if kind == "isotonic":
        assert "judge and people have both graded 2 pairs of split train" in said
        assert "--audit.fit temperature" not in said
    else:
        assert "no temperature changes it" in said
    assert not (tmp_path / "out" / "calibration").exists()


def test_an_audit_is_made_without_a_map_and_then_with_one(data: Path, tmp_path: Path) -> None:
    """In either order, each with its own report: the second was refused after its map was made."""
    plain, fitted = flags(data, tmp_path), [*flags(data, tmp_path), "--audit.fit", "isotonic"]
    made = Artifact.open
    main("audit", plain)
    before = made(str(tmp_path / "audit"), "audit").fingerprint
    main("audit", fitted)
    main("audit", plain)
    assert made(str(tmp_path / "audit"), "audit").fingerprint == before
    map_ = made(str(tmp_path / "calibration"), "calibration")
    through = made(str(tmp_path / "audit-calibrated"), "audit")
    assert through.manifest.inputs["calibration"] == map_.fingerprint
    main("audit", [*plain, "--judging.calibration", map_.url])
    assert made(through.url, "audit").fingerprint == through.fingerprint


def test_copies_of_positives_are_named(report: dict[str, Any]) -> None:
    assert report["duplicates"]["documents"]["rows"] == 6
    hidden = report["positives_among_negatives"]
    assert hidden["judged_low"] == 1
    low, *unjudged = hidden["examples"]
    assert (low["query_id"], low["doc_id"], low["copy_doc_id"]) == ("q00", "d00", "copy0")
    assert {one["copy_doc_id"] for one in unjudged} == {"copy1", "copy2"}


def test_leakage_by_id_and_nearly(report: dict[str, Any]) -> None:
    """Grades were given for the test queries too, and q20 is q11 with a question mark."""
    leakage = report["leakage"]
    assert leakage["by_id"]["queries"] == 8
    assert leakage["by_text"]["queries"] == 0
    near = {one["query_id"]: one["training_query_id"] for one in leakage["near"]["examples"]}
    assert near["q20"] == "q11"


def test_grades_by_judge_and_the_second_answers(report: dict[str, Any]) -> None:
    assert report["grades"]["judge"] == {"kind": [1, 220, 20, 20]}
    rejudged = report["rejudged"]
    assert rejudged["pairs"] == 261
    assert rejudged["flips"] == 260
    assert rejudged["largest_change"] == 1
    assert report["unknown"] == {
        name: {"rows": 0, "ids": 0, "examples": []} for name in ("query_id", "doc_id")
    }


def test_the_checks_are_in_the_summary_and_a_rerun_is_none(
    data: Path, audited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = str(audited / "again" / "judgments")
    line = [*flags(data, audited), "--audit.fit", "isotonic", "--audit.rejudged", again, "--json"]
    main("audit", line)
    captured = capsys.readouterr()
    assert json.loads(captured.out)["checks"]["evaluation queries that are judged too"] == 8
    assert "calibrated" in captured.err


def test_a_fit_and_a_map_together_are_refused(
    data: Path, audited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ["--audit.fit", "isotonic", "--judging.calibration", str(audited / "calibration")]
    with pytest.raises(SystemExit):
        main("audit", [*flags(data, audited), *both])
    assert "choose" in capsys.readouterr().err


def test_a_map_fitted_on_what_a_run_is_measured_by_is_no_way_to_train(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Test grades would reach the labels. On another split it is a map like any."""
    main("audit", [*flags(data, tmp_path), "--audit.fit", "isotonic", "--audit.fit-split", "test"])
    grades = (data / "llm" / "kind.tsv").read_text().splitlines(keepends=True)
    train = [line for line in grades if not "q12" <= line < "q20\t"]
    file = tmp_path / "kind.tsv"  # The judge's name is the file's.
    file.write_text("".join(train))
    line = [*flags(data, tmp_path / "trained"), "--judging.given.file", str(file)]
    line += ["--judging.calibration", str(tmp_path / "calibration")]
    with pytest.raises(SystemExit):
        main("train", line)
    assert "fitted on people's grades of the test split" in capsys.readouterr().err
    assert not (tmp_path / "trained" / "judgments").exists()
    fitted = Artifact.open(str(tmp_path / "calibration"), "calibration")
    refuse_in_sample(fitted, Artifact.open(str(tmp_path / "qrels"), "qrels"), "dev")


def test_single_grades_have_no_temperature_to_fit(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main("audit", [*flags(data, tmp_path), "--audit.fit", "temperature"])
    assert "fit isotonic instead" in capsys.readouterr().err
    assert not (tmp_path / "calibration").exists()


def test_a_cascade_on_two_scales_is_counted_on_the_scale_of_the_qrels(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its manifest has no scale of its own; what needs one is refused in a sentence."""
    cheap, strong = tmp_path / "cheap", tmp_path / "strong"
    main("judge", flags(data, cheap))
    main("judge", [*flags(data, strong), "--judging.given.grade-max", "4"])
    first, second = (Artifact.open(str(out / "judgments"), "judgments") for out in (cheap, strong))
    mixed = merge(first, second, str(tmp_path / "mixed"))
    assert mixed.manifest.extra["scale"]["values"] == []

    line = [*flags(data, tmp_path / "out"), "--audit.judgments", mixed.url]
    main("audit", line)
    found = json.loads((tmp_path / "out" / "audit" / "report.json").read_text())["grades"]
    assert (found["scale"], found["scale_of"]) == ([0, 1, 2, 3], "qrels")
    # Three of four steps are nearest to two of three.
    assert found["judge"] == {"kind": [1, 220, 40, 0]}
    assert "the judges are on several" in " ".join(capsys.readouterr().out.split())
    for more in (["--audit.fit", "isotonic"], ["--audit.rejudged", first.url]):
        with pytest.raises(SystemExit) as exit_:
            main("audit", [*line, "--out", str(tmp_path / more[0]), *more])
        assert exit_.value.code == 1
        assert "on several: name the judgments of one of them" in capsys.readouterr().err


def test_human_grades_are_not_measured_against_themselves(data: Path, tmp_path: Path) -> None:
    line = ["bixse", "--data", str(data), "--out", str(tmp_path), "--audit.bootstrap", "20"]
    main("audit", line)
    found = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert found["agreement"] is None
    assert found["leakage"]["by_id"]["queries"] == 0


def test_written_documents_are_known_though_the_corpus_lacks_them(
    data: Path, tmp_path: Path
) -> None:
    found = ingest(str(data), Ingest(), str(tmp_path / "in"))
    rows = [
        {"doc_id": f"written:q00:{n}", "title": "", "text": f"text {n}", "query_id": "q00",
         "target_grade": n} for n in range(4)
    ]  # fmt: skip
    documents = artifact(tmp_path / "documents", "documents", rows, DOCUMENTS)
    judged = label(None, documents, str(tmp_path / "judgments"))
    given = (found.corpus, [found.queries], found.qrels, judged, None, None, None)
    made = audit(*given, Audit(), 0.5, str(tmp_path / "audit"), documents)
    assert made.manifest.extra["checks"]["judgments of an unknown document"] == 0
    assert made.manifest.inputs["documents"] == documents.fingerprint


def test_grades_of_a_long_scale_are_shown_in_ranges(data: Path, tmp_path: Path) -> None:
    line = ["bixse", "--data", str(data), "--out", str(tmp_path), "--audit.bootstrap", "20"]
    main("audit", [*line, "--ingest.grade-max", "100"])
    found = Artifact.open(str(tmp_path / "audit"), "audit")
    (grades,) = (shown for shown in tables(found) if shown.title == "grades")
    assert [column.header for column in grades.columns] == [
        "judgments by", "0 to 20", "21 to 41", "42 to 62", "63 to 83", "84 to 100",
    ]  # fmt: skip
    assert [list(column.cells) for column in grades.columns] == [
        ["judge given"], ["156"], ["0"], ["0"], ["0"], ["0"],
    ]  # fmt: skip


def contrasted(data: Path, out: Path) -> Artifact:
    """The judgments of a run, and candidates of them that nobody judged."""
    names = ("judgments", "queries", "corpus")
    judged, queries, corpus = (Artifact.open(str(out / name), name) for name in names)
    rows = [Pair(f"q{n:02d}", f"d{n + 20:02d}", "bm25", 1, 1.0) for n in range(12)]
    draft = drafted(out / "pairs", "pairs")
    draft.write_part(0, rows_of(rows, PAIRS))
    pairs = draft.finish()
    return contrast(judged, pairs, [queries], corpus, 1, 0, str(out / "made"))


def test_what_is_made_of_human_grades_is_not_measured_against_them(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["bixse", "--data", str(data), "--out", str(tmp_path), "--audit.bootstrap", "20"]
    main("judge", line)
    human = Artifact.open(str(tmp_path / "judgments"), "judgments")
    sampled = sample(human, Stratified(documents=2), str(tmp_path / "sampled"))
    for number, made in enumerate((sampled, contrasted(data, tmp_path))):
        out = tmp_path / str(number)
        main("audit", [*line, "--out", str(out), "--audit.judgments", made.url])
        found = json.loads((out / "audit" / "report.json").read_text())
        assert found["agreement"] is None
    with pytest.raises(SystemExit):
        main("audit", [*line, "--out", str(tmp_path / "map"), "--audit.fit", "isotonic"])
    assert "these are the grades that people gave" in capsys.readouterr().err
    assert not (tmp_path / "map" / "calibration").exists()


def test_a_map_is_fitted_beside_candidates_that_nobody_judged(data: Path, tmp_path: Path) -> None:
    main("judge", flags(data, tmp_path))
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    main("audit", [*flags(data, alone), "--audit.fit", "isotonic"])
    line = [*flags(data, beside), "--audit.fit", "isotonic"]
    main("audit", [*line, "--audit.judgments", contrasted(data, tmp_path).url])
    at = Path("audit-calibrated", "report.json")
    reports = [json.loads((out / at).read_text()) for out in (alone, beside)]
    assert reports[0]["agreement"] == reports[1]["agreement"]
    assert reports[1]["judgments"]["rows"] == reports[0]["judgments"]["rows"] + 12


@pytest.fixture(scope="module")
def trec_dl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not all((SHARED / f"trec-dl-{year}").is_dir() for year in YEARS):
        pytest.skip("needs ../shared/data, the TREC Deep Learning judgments with LLM grades beside")
    return sets(SHARED, tmp_path_factory.mktemp("trec-dl"), list(EXPECTED))


def test_published_grades_agree_with_people_as_published(trec_dl: dict[str, Any]) -> None:
    for judge, by_year in EXPECTED.items():
        for year, expected in by_year.items():
            found = agreement_of(trec_dl[judge][year])
            for name, value in expected.items():
                assert found[name] == pytest.approx(value, abs=0.0006), (judge, year, name)


@pytest.mark.parametrize("held_out", YEARS)
def test_a_map_of_two_years_corrects_the_third(
    trec_dl: dict[str, Any], held_out: int, tmp_path: Path
) -> None:
    for judge, by_year in trec_dl.items():
        if len(by_year) == len(YEARS):
            before, after = rotation(by_year, held_out, tmp_path / judge)
            assert after["ece"] < before["ece"], (judge, held_out)
            assert after["squared_error"] < before["squared_error"], (judge, held_out)
