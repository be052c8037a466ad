"""Foreign files as raw rows, one at a time.

Every reader streams. A line that cannot be read becomes a `Row` with a problem, which ingest
rejects; a file that is not what its name says raises ValueError in one sentence.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bixse.records import Rejection
from jobs.files import FORMATS, open_bytes, short_name, unzipped


@dataclass(frozen=True)
class Row:
    """One raw row: its fields, or why it has none."""

    source: str
    line: int | None
    fields: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    raw: str = ""
    columns: Sequence[str] = ()
    """All columns of the file, where `fields` holds only those that were asked for."""

    def reject(self, reason: str, **ids: str) -> Rejection:
        raw = self.raw or json.dumps(self.fields, ensure_ascii=True, default=str)
        return Rejection(
            reason=reason, response=raw[:2000], source=self.source, line=self.line, **ids
        )


def read_all(urls: Sequence[str], root: str, names: Sequence[str]) -> Iterator[Row]:
    for url in urls:
        yield from read_file(url, names, root)


def read_file(url: str, names: Sequence[str], root: str = "") -> Iterator[Row]:
    """Rows of one file, by its suffix; a text file is one row, named by its path below `root`.

    Of Parquet only the columns in `names` are read: another may be large, or hold what Python
    cannot. Raises ValueError for a file that cannot be read, or is not what its name says.
    """
    suffix = "." + unzipped(url).rsplit(".", 1)[-1]
    form = next((form for form, suffixes in FORMATS.items() if suffix in suffixes), None)
    if form is None:
        raise ValueError(
            f"cannot read {short_name(url)}: not one of jsonl, parquet, csv, tsv, txt, md, nor "
            "one of them but parquet with .gz"
        )
    readers: dict[str, Callable[[str, Any], Iterator[Row]]] = {
        "jsonl": _read_jsonl, "csv": _read_csv,
        "parquet": lambda url, handle: _read_parquet(url, handle, names),
        "text": lambda url, handle: _read_text(url, handle, root),
    }  # fmt: skip
    with open_bytes(url) as handle:
        yield from readers[form](url, handle)


def _read_jsonl(url: str, handle: Any) -> Iterator[Row]:
    for number, raw in enumerate(handle, start=1):
        if not raw.strip():
            continue
        source, shown = short_name(url), raw[:2000].decode("utf-8", "replace")
        try:
            fields = json.loads(raw.decode("utf-8-sig"))
        except UnicodeDecodeError:
            yield Row(source, number, problem="not UTF-8", raw=shown)
        except ValueError:
            yield Row(source, number, problem="broken JSON", raw=shown)
        except RecursionError:
            yield Row(source, number, problem="nested too deeply", raw=shown)
        else:
            if isinstance(fields, dict):
                yield Row(source, number, fields)
            else:
                yield Row(source, number, problem="not a JSON object", raw=shown)


def _read_parquet(url: str, handle: Any, names: Sequence[str]) -> Iterator[Row]:
    source, number = short_name(url), 0
    try:
        file = pq.ParquetFile(handle)
        columns = file.schema_arrow.names
    except pa.ArrowInvalid:
        raise ValueError(f"{source} is not a Parquet file") from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {source}: {_first_line(error)}") from None
    try:
        for batch in file.iter_batches(4096, columns=[n for n in columns if n in names]):
            for fields in batch.to_pylist():
                number += 1
                yield Row(source, number, fields, columns=columns)
    # The last two are of values that Python has none for: text that is not UTF-8, the year 10,000.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        why = f"after row {number}: {_first_line(error)}"
        raise ValueError(f"cannot read {source} {why}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _read_csv(url: str, handle: Any) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if unzipped(url).endswith(".tsv") else ","
    text = io.TextIOWrapper(handle, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(
        text,
        delimiter=delimiter,
        # Tabs need no quotes, and BEIR's files have bare ones.
        quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
        # Otherwise a quote that is never closed takes the rest of the file for one cell.
        strict=delimiter == ",",
    )
    read = 0
    try:
        if reader.fieldnames:
            read = reader.line_num
        for fields in reader:
            read = reader.line_num
            # csv puts what has no header under the key None, which its types do not know.
            spare = fields.pop(None, None)
            row = Row(short_name(url), reader.line_num, dict(fields))
            if spare or None in fields.values():
                row = Row(row.source, row.line, problem="another number of columns than the header")
            yield row
    except UnicodeDecodeError:
        raise ValueError(f"{short_name(url)} is not UTF-8 text") from None
    except csv.Error as error:
        raise ValueError(f"{short_name(url)} is not CSV from line {read + 1} on: {error}") from None
    finally:
        text.detach()  # the file is closed by who opened it


def _read_text(url: str, handle: Any, root: str) -> Iterator[Row]:
    name = url.removeprefix(root).lstrip("/")
    if (shown := short_name(name)) != name:
        # The name would be the doc_id, and say what the document is called.
        yield Row(shown, None, problem="the name of the file is not UTF-8")
        return
    try:
        text = handle.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        yield Row(name, None, problem="not UTF-8")
        return
    first, _, rest = text.lstrip().partition("\n")
    if first.startswith("#"):
        title, text = first.lstrip("#").strip(), rest
    else:
        shown = name.rsplit("/", 1)[-1]
        title = shown[: len(unzipped(shown))].rsplit(".", 1)[0]
    fields = {"doc_id": name, "title": title if text.strip() else "", "text": text}
    yield Row(name, None, fields)


def read_grades(url: str) -> Iterator[tuple[Row, tuple[str, str], float | None]]:
    """(row, (query_id, doc_id), grade) of BEIR's three columns under a header, or TREC's four.

    Of a line that cannot be read the grade is None and the row says why.
    """
    with open_bytes(url) as handle:
        for number, raw in enumerate(handle, start=1):
            # Windows puts a mark before the first line, which is no part of its query_id.
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8", "replace").strip()
            columns = line.split("\t") if "\t" in line else line.split()
            if not line or (number == 1 and columns[-1] in ("score", "relevance", "grade")):
                continue
            row = Row(short_name(url), number, raw=line)
            if len(columns) == 4:
                columns = [columns[0], columns[2], columns[3]]
            if len(columns) != 3:
                problem = f"expected 3 or 4 columns, found {len(columns)}"
                yield replace(row, problem=problem), ("", ""), None
                continue
            try:
                value = float(columns[2])
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                yield replace(row, problem="the grade is not a number"), ("", ""), None
                continue
            yield row, (columns[0].strip(), columns[1].strip()), value


def value_of(row: Row, names: tuple[str, ...]) -> str | None:
    """The first of the named fields as text; None when absent or null. Raises ValueError."""
    for name in names:
        value = row.fields.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(f"{name} is not text")
        text = str(value)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} is not valid Unicode") from None
        return text.strip()
    return None


def check_columns(row: Row, *needed: tuple[str, ...]) -> None:
    """In a table a missing column is a wrong file, in JSON lines a missing field is a bad row."""
    columns = row.columns or list(row.fields)
    if not columns or not unzipped(row.source).endswith((*FORMATS["csv"], *FORMATS["parquet"])):
        return
    for names in needed:
        if not any(name in columns for name in names):
            found = ", ".join(columns)
            others = f" (or {', '.join(names[1:])})" if names[1:] else ""
            raise ValueError(f"{row.source} has no column {names[0]}{others}: found {found}")
