"""Raw data that tests ingest, and what became of it."""

import csv
import json
from pathlib import Path
from typing import Any

from jobs.ingest import Ingested, ingest
from jobs.recipe import Ingest

DOCS = [
    {"_id": "1", "title": "Tea", "text": "Tea is brewed from leaves."},
    {"_id": "2", "title": "", "text": "Coffee, 'brewed' from \"beans\"."},
    {"_id": "3", "title": "Água 水 🫖", "text": "Plain water; \u202eevery plane \U0010fffd."},
]


def jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def table(path: Path, rows: list[dict[str, str]], delimiter: str) -> None:
    with open(path, "w", newline="") as handle:
        plain: dict[str, Any] = {"quoting": csv.QUOTE_NONE, "quotechar": None}
        quoted = plain if delimiter == "\t" else {}
        writer = csv.DictWriter(handle, list(rows[0]), delimiter=delimiter, **quoted)
        writer.writeheader()
        writer.writerows(rows)


def graded(data: Path, lines: str, name: str = "test", encoding: str = "utf-8") -> None:
    """The documents, one query `a`, and these lines of grades."""
    (data / "qrels").mkdir(parents=True)
    jsonl(data / "corpus.jsonl", DOCS)
    jsonl(data / "queries.jsonl", [{"_id": "a", "text": "tea"}])
    (data / "qrels" / f"{name}.tsv").write_text(lines, encoding=encoding)


def run(data: Path | None, out: Path, **changes: Any) -> Ingested:
    return ingest(str(data) if data else None, Ingest(**changes), str(out))


def rejected(ingested: Ingested, kind: str = "corpus") -> list[tuple[Any, ...]]:
    found = getattr(ingested, kind).rejected()
    if found is None:
        return []
    rows = found.select(["line", "reason"]).to_pylist()
    return [(row["line"], row["reason"]) for row in rows]
