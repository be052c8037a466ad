"""Written texts as labels: their grade, their text in training, and what is refused."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import jobs.supervision as supervision
from bixse.artifacts import Artifact, Draft, begin
from bixse.candidates.settings import Stratified
from bixse.judging.calibration import FILE, KIND, Calibration, Isotonic
from bixse.judging.settings import Verification
from bixse.records import CORPUS, DOCUMENTS, JUDGMENTS, PAIRS, QRELS, QUERIES
from jobs.labels import contrast, label, sample, verify, with_given
from jobs.supervision import read_labels
from tests.artifacts import drafted


def artifact(
    at: Path, kind: str, parts: list[list[dict[str, Any]]], schema: pa.Schema, **extra: Any
) -> Artifact:
    draft = begin(str(at), kind, config={}, inputs={})
    assert isinstance(draft, Draft)
    for number, rows in enumerate(parts):
        draft.write_part(number, pa.Table.from_pylist(rows, schema=schema))
    return draft.finish(extra=extra)


@pytest.fixture
def corpus(tmp_path: Path) -> Artifact:
    rows = [{"doc_id": f"d{n}", "title": "", "text": f"text {n}"} for n in range(3)]
    return artifact(tmp_path / "corpus", "corpus", [rows], CORPUS)


@pytest.fixture
def queries(tmp_path: Path) -> Artifact:
    rows = [{"query_id": f"q{n}", "text": f"query {n}", "origin": "given"} for n in range(2)]
    return artifact(tmp_path / "queries", "queries", [rows], QUERIES)


def documents(at: Path, doc_id: str = "written:{q}:{g}") -> Artifact:
    rows = [
        {
            "doc_id": doc_id.format(q=q, g=g), "title": "", "text": f"passage {q} {g}",
            "query_id": q, "target_grade": g,
        }
        for q in ("q0", "q1")
        for g in range(4)
    ]  # fmt: skip
    return artifact(at, "documents", [rows[:4], rows[4:]], DOCUMENTS, generator="m@1", prompt="p")


def test_written_documents_train_at_the_grade_they_were_written_at(
    tmp_path: Path, corpus: Artifact, queries: Artifact
) -> None:
    written = documents(tmp_path / "documents")
    made = label(None, written, str(tmp_path / "judgments"))
    rows = made.table().to_pylist()
    assert [row["relevance"] for row in rows[:4]] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert rows[2]["grade_probs"] == [0, 0, 1, 0]
    assert {(r["judge"], r["prompt"], r["origin"]) for r in rows} == {
        ("written:m@1", "p", "synthetic")
    }
    assert made.manifest.extra["scale"]["values"] == [0, 1, 2, 3]
    labels = read_labels(made, [queries], corpus, documents=written, aside=tmp_path)
    texts = labels.document_text_D.to_pylist()
    assert sorted(texts) == sorted(f"passage {q} {g}" for q in ("q0", "q1") for g in range(4))
    found = {texts[d]: r for d, r in zip(labels.document_P, labels.relevance_P, strict=True)}
    assert found["passage q1 2"] == pytest.approx(2 / 3)


def test_given_grades_stand_beside_what_was_written(
    tmp_path: Path, corpus: Artifact, queries: Artifact
) -> None:
    """Only of the train split, none of a held-out query, with the relevance that people gave."""
    made_up = [
        {"query_id": f"s{g}", "text": f"made up {g}", "origin": "synthetic", "seed_doc_id": "d0",
         "target_grade": g} for g in range(4)
    ]  # fmt: skip
    written = artifact(tmp_path / "made", "queries", [made_up], QUERIES, generator="m@1")
    of_people = {"grade_probs": [0, 1, 0], "judge": "people", "prompt": "", "origin": "human"}
    rows = [
        {"split": split, "query_id": q, "doc_id": d, "relevance": z, **of_people}
        for split, q, d, z in [
            ("train", "q0", "d1", 0.5), ("train", "q1", "d1", 1.0), ("test", "q0", "d2", 1.0),
        ]
    ]  # fmt: skip
    qrels = artifact(tmp_path / "qrels", "qrels", [rows[:1], rows[1:]], QRELS)
    judged = label(written, None, str(tmp_path / "written"))
    made = with_given(judged, qrels, frozenset({"q1"}), str(tmp_path / "judgments"))
    found = made.table().to_pylist()
    assert found[:4] == judged.table().to_pylist()
    assert [(row["query_id"], row["doc_id"], row["relevance"]) for row in found[4:]] == [
        ("q0", "d1", 0.5)
    ]
    assert found[4]["grade_probs"] == [0, 0.5, 0.5, 0]  # 1.5 of 3, on the scale of the others.
    assert (found[4]["judge"], found[4]["origin"]) == ("people", "human")
    assert made.manifest.extra["judges"] == ["people", "written:m@1"]
    assert made.manifest.extra["written_rows"] == 4
    labels = read_labels(made, [queries, written], corpus, aside=tmp_path)
    assert set(labels.query_text_Q.to_pylist()) == {*(f"made up {g}" for g in range(4)), "query 0"}
    with pytest.raises(ValueError, match="skipped queries"):
        with_given(judged, qrels, frozenset(), str(tmp_path / "judgments"))


def test_unjudged_candidates_are_irrelevant_and_no_copies(tmp_path: Path) -> None:
    texts = {"d0": "kept", "copy": "kept", **{f"d{n}": f"text {n}" for n in range(1, 6)}}
    rows = [{"doc_id": doc_id, "title": "", "text": text} for doc_id, text in texts.items()]
    corpus = artifact(tmp_path / "corpus", "corpus", [rows], CORPUS)
    grade = {"grade_probs": [0.0, 1.0], "judge": "people", "prompt": "", "origin": "human"}
    graded = [
        {"query_id": "q0", "doc_id": "d0", "relevance": 1.0, **grade},
        {"query_id": "q1", "doc_id": "d1", "relevance": 0.5, **grade},
    ]
    extra = {"scale": {"values": [0, 1]}, "judges": ["people"]}
    judged = artifact(tmp_path / "judgments", "judgments", [graded], JUDGMENTS, **extra)
    proposed = [
        {"query_id": q, "doc_id": doc_id, "source": "bm25", "rank": rank, "score": 1.0}
        for q in ("q0", "q1", "unjudged")
        for rank, doc_id in enumerate(texts, start=1)
    ]
    pairs = artifact(tmp_path / "pairs", "pairs", [proposed], PAIRS)
    asked = [{"query_id": q, "text": q, "origin": "given"} for q in ("q0", "q1", "unjudged")]
    queries = [artifact(tmp_path / "queries", "queries", [asked], QUERIES)]
    made = contrast(judged, pairs, queries, corpus, 3, 0, str(tmp_path / "contrasted"))
    found = made.table().to_pylist()
    assert [{**row, "disagreement": None} for row in graded] == found[:2]
    drawn = {q: [row["doc_id"] for row in found[2:] if row["query_id"] == q] for q in ("q0", "q1")}
    assert len(found) == 8
    assert [len(ids) for ids in drawn.values()] == [3, 3]
    assert not {"d0", "copy"} & set(drawn["q0"])
    assert "d1" not in drawn["q1"]
    assert {(row["relevance"], row["origin"]) for row in found[2:]} == {(0.0, "assumed")}
    assert all(row["grade_probs"] == [1, 0] for row in found[2:])
    every = contrast(judged, pairs, queries, corpus, 99, 0, str(tmp_path / "every"))
    assert every.manifest.rows == 2 + 5 + 6


def test_what_is_judged_under_another_id_of_the_query_is_no_negative(
    tmp_path: Path, corpus: Artifact
) -> None:
    """Training takes queries of equal text as one: a zero beside the grade halved it."""
    asked = [
        {"query_id": "q0", "text": "where to", "origin": "given"},
        {"query_id": "q1", "text": "Where  to", "origin": "given"},
    ]
    queries = artifact(tmp_path / "queries", "queries", [asked], QUERIES)
    grade = {"grade_probs": [0.0, 1.0], "judge": "people", "prompt": "", "origin": "human"}
    graded = [
        {"query_id": q, "doc_id": d, "relevance": 1.0, **grade}
        for q, d in (("q0", "d0"), ("q1", "d1"))
    ]
    extra = {"scale": {"values": [0, 1]}, "judges": ["people"]}
    judged = artifact(tmp_path / "judgments", "judgments", [graded], JUDGMENTS, **extra)
    proposed = [
        {"query_id": q, "doc_id": f"d{n}", "source": "bm25", "rank": n + 1, "score": 1.0}
        for q in ("q0", "q1")
        for n in range(3)
    ]
    pairs = artifact(tmp_path / "pairs", "pairs", [proposed], PAIRS)
    made = contrast(judged, pairs, [queries], corpus, 9, 0, str(tmp_path / "made"))
    labels = read_labels(made, [queries], corpus, aside=tmp_path)
    texts = labels.document_text_D.to_pylist()
    found = {texts[d]: r for d, r in zip(labels.document_P, labels.relevance_P, strict=True)}
    assert found == {"text 0": 1, "text 1": 1, "text 2": 0}


def test_without_the_documents_their_judgments_name_nothing(
    tmp_path: Path, corpus: Artifact, queries: Artifact
) -> None:
    made = label(None, documents(tmp_path / "documents"), str(tmp_path / "judgments"))
    with pytest.raises(ValueError, match="8 of 8 judgments name a document that the corpus lack"):
        read_labels(made, [queries], corpus, aside=tmp_path)


def test_a_written_document_may_not_take_the_id_of_another(
    tmp_path: Path, corpus: Artifact, queries: Artifact
) -> None:
    written = documents(tmp_path / "documents", doc_id="d{g}")
    made = label(None, written, str(tmp_path / "judgments"))
    with pytest.raises(ValueError, match="a written document has the id of another: 'd0'"):
        read_labels(made, [queries], corpus, documents=written, aside=tmp_path)


def test_nothing_written_is_said_with_the_commonest_reason(tmp_path: Path) -> None:
    from bixse.records import Rejection
    from jobs.parts import rejected_table

    draft = drafted(tmp_path / "queries", "queries")
    rejected = [Rejection("cut off: 9"), Rejection("cut off: 8"), Rejection("no word")]
    draft.write_part(0, QUERIES.empty_table(), rejected_table(rejected))
    with pytest.raises(ValueError, match=r"no written text is left .* 3 rejections.*\(cut off\)"):
        label(draft.finish(), None, str(tmp_path / "judgments"))
    with pytest.raises(ValueError, match="needs a recipe that writes"):
        label(None, None, str(tmp_path / "judgments"))
    assert not (tmp_path / "judgments").exists()


def judged_rows(*relevance: float) -> list[dict[str, Any]]:
    """Judgments of query `q` and documents `d0`, `d1`, ..."""
    return [
        {
            "query_id": "q", "doc_id": f"d{n}", "grade_probs": [1 - z, z], "relevance": z,
            "judge": "j", "prompt": "p", "origin": "llm",
        }
        for n, z in enumerate(relevance)
    ]  # fmt: skip


def test_verified_judgments_are_the_others_rejected(tmp_path: Path, corpus: Artifact) -> None:
    asked = [{"query_id": "q", "text": "t", "origin": "synthetic", "seed_doc_id": "d0"}]
    queries = artifact(tmp_path / "queries", "queries", [asked], QUERIES)
    rows = judged_rows(0.9, 0.3, 0.1)
    judged = artifact(tmp_path / "judged", "judgments", [rows[:2], rows[2:]], JUDGMENTS, scale="s")
    settings = Verification(near_duplicate=1.0)
    made = verify(judged, [queries], corpus, settings, str(tmp_path / "verified"))
    assert made.table().to_pylist() == [judged.table().to_pylist()[n] for n in (0, 2)]
    rejected = made.rejected()
    assert rejected is not None
    assert rejected["doc_id"].to_pylist() == ["d1"]
    assert made.manifest.extra == {"scale": "s", "unverified": {"neither answer nor none": 1}}
    again = verify(judged, [queries], corpus, settings, str(tmp_path / "verified"))
    assert again.fingerprint == made.fingerprint


def map_of(at: Path, judged: tuple[float, ...], human: tuple[float, ...]) -> Artifact:
    """A calibration map of what `judged_rows` are signed by."""
    kind = Isotonic(judged=judged, human=human)
    fitted = Calibration(map=kind, signed=(("j", "p"),), scale=(0, 1), pairs=3, queries=1)
    draft = drafted(at, KIND)
    draft.write_file(FILE, fitted.model_dump_json().encode())
    return draft.finish()


def test_judgments_are_verified_as_training_reads_them(tmp_path: Path, corpus: Artifact) -> None:
    """Through the map: what it makes neither answer nor none was kept, and trained as a negative of
    the answer."""
    asked = [{"query_id": "q", "text": "t", "origin": "synthetic", "seed_doc_id": "d0"}]
    queries = artifact(tmp_path / "queries", "queries", [asked], QUERIES)
    rows = judged_rows(0.9, 0.6, 0.3)
    scale = {"values": [0, 1]}
    judged = artifact(tmp_path / "judged", "judgments", [rows], JUDGMENTS, scale=scale)
    map_ = map_of(tmp_path / "map", judged=(0.3, 0.6, 0.9), human=(0.1, 0.4, 0.8))
    arguments = (judged, [queries], corpus, Verification(near_duplicate=1.0))
    made = verify(*arguments, str(tmp_path / "verified"), map_)
    assert made.table().to_pylist() == [judged.table().to_pylist()[n] for n in (0, 2)]
    stored = verify(*arguments, str(tmp_path / "stored"))
    assert stored.table()["doc_id"].to_pylist() == ["d0", "d1"]


def test_a_sample_covers_what_training_reads(tmp_path: Path) -> None:
    """Through the map: it covered the range of what the judge had said, of which the map makes one
    score and another."""
    judged_at = (*(n / 40 for n in range(21)), 0.625, 0.75, 0.875, 1.0)
    scale = {"values": [0, 1]}
    judged = artifact(
        tmp_path / "judged", "judgments", [judged_rows(*judged_at)], JUDGMENTS, scale=scale
    )
    # What the judge says from 0 to .5 people spread over the range, and the rest is its top.
    map_ = map_of(tmp_path / "map", judged=(0.0, 0.5, 1.0), human=(0.0, 1.0, 1.0))

    def documents(name: str, calibration: Artifact | None) -> set[int]:
        made = sample(judged, Stratified(documents=6), str(tmp_path / name), calibration)
        assert made.manifest.rows == 6
        return {int(doc_id[1:]) for doc_id in made.table()["doc_id"].to_pylist()}

    # Of five bins of a fifth each, and the best: the first is its document.
    mapped = {min(1.0, judged_at[n] * 2) for n in documents("mapped", map_)}
    assert {min(4, int(value * 5)) for value in mapped} == {0, 1, 2, 3, 4}
    stored = {judged_at[n] for n in documents("stored", None)}
    assert {min(4, int(value * 5)) for value in stored} == {0, 1, 2, 3, 4}


def test_a_part_whose_pairs_were_all_rejected_is_left_as_it_is(
    tmp_path: Path, corpus: Artifact, queries: Artifact
) -> None:
    """A unit of pairs that are too long for the judge becomes a part without rows."""
    row = {
        "query_id": "q0", "doc_id": "d0", "grade_probs": [0.0, 1.0], "relevance": 1.0,
        "judge": "j", "prompt": "p", "origin": "llm",
    }  # fmt: skip
    judged = artifact(tmp_path / "judged", "judgments", [[row], []], JUDGMENTS)
    verified = verify(judged, [queries], corpus, Verification(), str(tmp_path / "verified"))
    sampled = sample(judged, Stratified(), str(tmp_path / "sampled"))
    for made in (verified, sampled):
        assert [made.part(name).num_rows for name in made.parts()] == [1, 0]


def test_what_is_wanted_is_looked_up_and_not_gone_through(corpus: Artifact) -> None:
    """A batch costs its own rows, however many judgments there are."""
    asked: list[str] = []

    class Wanted:
        """Without an iterator: what goes through all of it fails."""

        def __contains__(self, name: object) -> bool:
            asked.append(str(name))
            return name == asked[0]

    rows = list(supervision._documents(corpus, None, Wanted(), {}, {}))
    doc_ids = corpus.table()["doc_id"].to_pylist()
    assert [doc_id for doc_id, _ in rows] == doc_ids[:1]
    assert asked == doc_ids
