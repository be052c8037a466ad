"""The quickstart's data: documentation of this Python, questions and their grades."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bixse.records import Document, text_hash
from jobs.recipes.python_docs import documents, evaluation_files


@pytest.fixture(scope="module")
def docs() -> list[Document]:
    return list(documents())


@pytest.fixture(scope="module")
def questions() -> dict[str, str]:
    with open(evaluation_files()[0], encoding="utf-8") as handle:
        rows = [json.loads(line) for line in handle]
    assert all(set(row) == {"_id", "text"} for row in rows)
    assert len({row["_id"] for row in rows}) == len(rows)
    return {row["_id"]: row["text"] for row in rows}


@pytest.fixture(scope="module")
def grades() -> list[tuple[str, str, int]]:
    with open(evaluation_files()[1], encoding="utf-8", newline="") as handle:
        rows = csv.DictReader(handle, delimiter="\t")
        assert rows.fieldnames == ["query-id", "corpus-id", "score"]
        return [(row["query-id"], row["corpus-id"], int(row["score"])) for row in rows]


def test_thousands_of_documents_each_once_and_none_empty(docs: list[Document]) -> None:
    assert len(docs) > 4500
    assert len({d.doc_id for d in docs}) == len(docs)
    assert all(d.doc_id and d.title and d.text.strip() == d.text != "" for d in docs)


def test_names_that_users_know(docs: list[Document]) -> None:
    found = {d.doc_id: d for d in docs}
    for doc_id in ("json", "json.dumps", "str.join", "open", "itertools.chain", "asyncio.run",
                   "os.path.join", "os.path.isfile", "socket.socket.connect",
                   "random.random", "random.randint", "pathlib.PurePath.suffix",
                   "dict.setdefault", "io.IOBase.readlines"):  # fmt: skip
        assert doc_id in found, doc_id
    assert found["json.dumps"].title.startswith("json.dumps(obj, *, skipkeys=False")
    assert found["str.join"].text.startswith("Concatenate any number of strings.")
    assert found["topic:for"].title == 'The "for" statement'
    assert found["topic:for"].text.startswith('The "for" statement is used to iterate')


def test_what_is_exported_twice_stands_once(docs: list[Document]) -> None:
    found = {d.doc_id for d in docs}
    for doc_id in ("asyncio.runners.run", "posixpath.join", "builtins.open", "io.open",
                   "json.decoder.JSONDecoder", "OSError.IOError", "IOError", "bisect.insort",
                   "random.Random.randint", "socket.SocketType.connect", "topic:else"):  # fmt: skip
        assert doc_id not in found, doc_id
    topics = Counter(d.text for d in docs if d.doc_id.startswith("topic:"))
    assert max(topics.values()) == 1


def test_every_reading_gives_the_same(
    docs: list[Document], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")  # would strip every docstring
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the user was imported')")
    assert list(documents()) == docs


def test_nothing_of_this_machine_is_documented(
    docs: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Default values can hold the environment (`cgi.parse`) or paths (`platform.architecture`).
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}{os.pathsep}/secret-of-the-environment")
    # Debian's own words in `pydoc` name /usr, which is no secret.
    prefixes = {sys.prefix, sys.base_prefix} - {"/usr"}
    secrets = ("secret-of-the-environment", *prefixes, str(Path.home()) + "/")
    for document in documents():
        for secret in secrets:
            assert secret not in document.title + document.text, document.doc_id
        assert " at 0x" not in document.title


def test_reading_imports_nothing_here() -> None:
    code = (
        "import sys; from jobs.recipes.python_docs import documents; list(documents());"
        "assert not {'poplib', 'imaplib', 'curses', 'mailbox'} & set(sys.modules)"
    )
    root = Path(__file__).resolve().parent.parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_about_a_hundred_questions_each_another(questions: dict[str, str]) -> None:
    assert 90 <= len(questions) <= 120
    assert len({text_hash(text) for text in questions.values()}) == len(questions)
    assert all(text == " ".join(text.split()) and len(text) > 15 for text in questions.values())


def test_every_question_has_answers_and_each_grade_is_given_once(
    questions: dict[str, str], grades: list[tuple[str, str, int]]
) -> None:
    assert {query_id for query_id, _, _ in grades} == set(questions)
    assert len({(query_id, doc_id) for query_id, doc_id, _ in grades}) == len(grades)
    assert {grade for _, _, grade in grades} == {0, 1, 2, 3}
    answered = {query_id for query_id, _, grade in grades if grade >= 2}
    assert answered == set(questions)
    assert sum(grade == 3 for _, _, grade in grades) >= len(questions)


def test_every_graded_document_is_one_of_this_python(
    docs: list[Document], grades: list[tuple[str, str, int]]
) -> None:
    known = {d.doc_id for d in docs}
    missing = {doc_id for _, doc_id, _ in grades} - known
    if (3, 11, 7) <= sys.version_info < (3, 12):
        assert not missing
    # Earlier ones lack docstrings, later ones modules; no question may lose its answers.
    answered = {query_id for query_id, doc_id, grade in grades if grade >= 2 and doc_id in known}
    assert answered == {query_id for query_id, _, _ in grades}
    assert len(missing) < 100


def test_a_question_does_not_name_its_answer(
    questions: dict[str, str], grades: list[tuple[str, str, int]]
) -> None:
    named = [
        (query_id, doc_id)
        for query_id, doc_id, grade in grades
        if grade == 3 and "." in doc_id and doc_id.lower() in questions[query_id].lower()
    ]
    assert named == []
