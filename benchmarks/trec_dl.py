"""TREC Deep Learning as a pair of sets in BEIR layout: an LLM's grades of two years to train on,
people's grades of a third to test on, each with the passages that were judged."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PREFERENCES = "preferences.tsv"
"""Beside a set's corpus, where a pairwise judge compared its documents; the preferred one first."""


@dataclass(frozen=True)
class Apart:
    """Directories in BEIR layout: one to train on, one to test on."""

    training: Path
    test: Path


def trec_dl(data: Path, out: Path, compared: bool) -> Apart:
    """GPT-4o's grades of 2019 and 2020; NIST's of 2021. Each corpus holds its judged passages.

    With `compared` the grades are those of passages that GPT-4o also compared with another one for
    the query, and its preferences are there too.
    """
    years = [data / f"trec-dl-{year}" for year in ("2019", "2020", "2021")]
    made = out / "data-training"
    preferences: list[str] = []
    if compared:
        for year in years[:2]:
            header, *lines = (year / "preferences_gpt4o.tsv").read_text().splitlines()
            preferences += lines
        made.mkdir(parents=True, exist_ok=True)
        (made / PREFERENCES).write_text("\n".join([header, *preferences]) + "\n")
    training = judged_only(
        {year: year / "qrels_llm" / "gpt4o_umbrela.tsv" for year in years[:2]},
        made, "train", pairs_of(preferences) if compared else None,
    )  # fmt: skip
    test = judged_only({years[2]: years[2] / "qrels" / "test.tsv"}, out / "data-test", "test")
    return Apart(training, test)


def pairs_of(preferences: list[str]) -> set[tuple[str, str]]:
    """(query, document) of lines that start with a query and two documents."""
    split = (line.split("\t") for line in preferences)
    return {(query_id, doc_id) for query_id, *doc_ids in split for doc_id in doc_ids[:2]}


def judged_only(
    grades: Mapping[Path, Path], made: Path, split: str, only: set[tuple[str, str]] | None = None
) -> Path:
    """Sets and a file of grades of each, put together: all that these grades judge, or of these
    (query, document) pairs `only` some."""
    (made / "qrels").mkdir(parents=True, exist_ok=True)
    judgments: list[str] = []
    records: dict[str, dict[str, str]] = {"corpus": {}, "queries": {}}
    for source, path in grades.items():
        header, *lines = path.read_text().splitlines()
        if only is not None:
            lines = [line for line in lines if tuple(line.split("\t")[:2]) in only]
        judgments += lines
        ids = {
            "queries": {line.split("\t")[0] for line in lines},
            "corpus": {line.split("\t")[1] for line in lines},
        }
        for name, found in records.items():
            for line in (source / f"{name}.jsonl").read_text().splitlines():
                row_id = str(json.loads(line)["_id"])
                if row_id in ids[name]:
                    found.setdefault(row_id, line)
    for name, found in records.items():
        (made / f"{name}.jsonl").write_text("\n".join(found.values()) + "\n")
    (made / "qrels" / f"{split}.tsv").write_text("\n".join([header, *judgments]) + "\n")
    return made
