"""Which passages and grades each side of TREC Deep Learning has."""

import json
from pathlib import Path

import pytest

from benchmarks.trec_dl import PREFERENCES, trec_dl

# (query, passage, grade); a passage that two years share stands in both corpora.
GPT4O = {
    "2019": [("q1", "a", 3), ("q1", "b", 0), ("q1", "c", 1)],
    "2020": [("q2", "a", 0), ("q2", "d", 2)],
    "2021": [("q3", "e", 1)],
}
NIST = {
    "2019": [("q1", "a", 1)],
    "2020": [("q2", "a", 1)],
    "2021": [("q3", "e", 2), ("q3", "f", 0)],
}
COMPARED = {"2019": ["q1\ta\tb\t0"], "2020": ["q2\td\ta\t0"], "2021": ["q3\te\tf\t0"]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for year in GPT4O:
        made = tmp_path / f"trec-dl-{year}"
        passages = {doc for grades in (GPT4O, NIST) for _, doc, _ in grades[year]} | {"unjudged"}
        queries = {query for query, _, _ in GPT4O[year]} | {"unasked"}
        for name, ids in (("corpus", passages), ("queries", queries)):
            path = made / f"{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            records = ({"_id": i, "title": "", "text": f"text of {i}"} for i in sorted(ids))
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        for qrels, grades in (("qrels_llm/gpt4o_umbrela.tsv", GPT4O), ("qrels/test.tsv", NIST)):
            lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, g)) for g in grades[year])]
            (made / qrels).parent.mkdir()
            (made / qrels).write_text("\n".join(lines) + "\n")
        lines = ["query-id\tpreferred-id\tother-id\tround", *COMPARED[year]]
        (made / "preferences_gpt4o.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def ids(path: Path) -> list[str]:
    return [json.loads(line)["_id"] for line in path.read_text().splitlines()]


def rows(path: Path) -> list[str]:
    return path.read_text().splitlines()[1:]


def test_it_trains_on_the_machine_s_grades_and_tests_on_people_s(data: Path) -> None:
    apart = trec_dl(data, data / "made", compared=False)
    assert sorted(ids(apart.training / "corpus.jsonl")) == ["a", "b", "c", "d"]
    assert ids(apart.training / "queries.jsonl") == ["q1", "q2"]
    grades = [("q1", "a", 3), ("q1", "b", 0), ("q1", "c", 1), ("q2", "a", 0), ("q2", "d", 2)]
    assert rows(apart.training / "qrels" / "train.tsv") == ["\t".join(map(str, g)) for g in grades]
    assert not (apart.training / PREFERENCES).exists()
    assert sorted(ids(apart.test / "corpus.jsonl")) == ["e", "f"]
    assert rows(apart.test / "qrels" / "test.tsv") == ["q3\te\t2", "q3\tf\t0"]


def test_compared_rows_are_those_that_a_preference_names_and_none_of_the_test_year(
    data: Path,
) -> None:
    apart = trec_dl(data, data / "made", compared=True)
    assert sorted(ids(apart.training / "corpus.jsonl")) == ["a", "b", "d"]
    assert rows(apart.training / "qrels" / "train.tsv") == [
        "q1\ta\t3", "q1\tb\t0", "q2\ta\t0", "q2\td\t2",
    ]  # fmt: skip
    assert rows(apart.training / PREFERENCES) == [*COMPARED["2019"], *COMPARED["2020"]]
    assert rows(apart.test / "qrels" / "test.tsv") == ["q3\te\t2", "q3\tf\t0"]
