"""Foreign files as raw rows: where they lie, what they are, one row at a time.

Every reader streams. A line that cannot be read becomes a `Row` with a problem, which ingest
rejects; a file that is not what its name says raises ValueError in one sentence.
"""

import contextlib
import csv
import gzip
import hashlib
import io
import json
import math
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from bixse.records import Rejection

FORMATS = {
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "csv": (".csv", ".tsv"),
    "text": (".txt", ".md"),
}

GZIP = ".gz"
"""May stand behind any of these but Parquet's, which is compressed in itself."""

_TABLE_LIKE = (".json", ".trec", ".qrels", GZIP, ".bz2", ".xz", ".zst", ".zip")
"""Of tables that are not read."""


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


@dataclass(frozen=True)
class Files:
    """URLs of what `--data` holds, and how the corpus is described to a person."""

    root: str
    corpus: list[str]
    queries: list[str]
    qrels: list[str]
    described: str


def find_files(data: str, source: str, out: str) -> Files:
    """What `--data` holds; `source` is a format or `auto`.

    Links to directories are followed; names that begin with a dot and what stands under `out`,
    where a run puts what it makes, are left out. Raises ValueError where there is nothing, a
    directory cannot be read, queries or qrels stand in a form that is not read, or `out` is the
    directory of the data itself.
    """
    fs, root = _resolved(data)
    if not fs.exists(root):
        raise ValueError(f"no data at {data}")
    alone = None
    if fs.isfile(root):
        root, _, alone = root.rpartition("/")
    root = root.rstrip("/")
    made = _identity(*_resolved(out))
    if alone is None and _identity(fs, root) == made:
        raise ValueError(f"--out is the directory of --data, {data}: choose another, or one in it")

    def enters(folder: str) -> bool:
        if alone is not None:
            return folder == f"{root}/qrels"
        return _identity(fs, folder) != made and not _leads_back(fs, folder, root)

    names = sorted(path[len(root) + 1 :] for path in _files_below(fs, root, enters))
    queries = [n for n in names if _is_table(n, "queries") and n != alone]
    qrels = [
        n
        for n in names
        if unzipped(n) == "qrels.tsv" or (n.startswith("qrels/") and unzipped(n).endswith(".tsv"))
    ]
    if alone is not None:
        corpus, described = [alone], f"the file {data}"
    else:
        rest = [n for n in names if n not in queries and n not in qrels]
        corpus, described = _corpus_names(rest, source, data)
    _refuse_unread(names, {*corpus, *queries, *qrels}, root)
    texts, asked, graded = (
        [_url(fs, f"{root}/{name}") for name in group] for group in (corpus, queries, qrels)
    )
    return Files(_url(fs, root), texts, asked, graded, described)


def _files_below(fs: Any, root: str, enters: Callable[[str], bool]) -> Iterator[str]:
    """Paths of the files in `root` and in the directories below it that are entered."""
    pending = [root]
    while pending:
        for path, is_directory in _listed(fs, pending.pop()):
            if path.rpartition("/")[2].startswith("."):
                continue
            if not is_directory:
                yield path
            elif enters(path):
                pending.append(path)


def _listed(fs: Any, folder: str) -> list[tuple[str, bool]]:
    """Path of each entry of a directory, and whether it is one too. Raises ValueError."""
    try:
        if isinstance(fs, LocalFileSystem):
            # fsspec's own listing takes a link to a directory for a file.
            with os.scandir(folder or "/") as found:
                return [(f"{folder}/{entry.name}", entry.is_dir()) for entry in found]
        entries = fs.ls(folder, detail=True)
    except OSError as error:
        name = short_name(error.filename or folder or "/")
        raise ValueError(f"cannot list {name}: {error.strerror or error}") from None
    paths = [(entry["name"].rstrip("/"), entry["type"] == "directory") for entry in entries]
    return [(path, is_directory) for path, is_directory in paths if path != folder]


def _identity(fs: Any, folder: str) -> str:
    """One name for a directory, however a path leads to it."""
    return os.path.realpath(folder or "/") if isinstance(fs, LocalFileSystem) else _url(fs, folder)


def _leads_back(fs: Any, folder: str, root: str) -> bool:
    """Whether it is a link to one of the directories on the way to it from `root`."""
    if not isinstance(fs, LocalFileSystem) or not os.path.islink(folder):
        return False
    above = folder
    while len(above) > len(root):
        above = above.rpartition("/")[0]
        if os.path.samefile(above or "/", folder):
            return True
    return False


def _corpus_names(names: list[str], source: str, data: str) -> tuple[list[str], str]:
    if source in ("auto", "beir"):
        beir = [n for n in names if _is_table(n, "corpus")]
        if beir:
            return beir, f"BEIR layout in {data}"
        if source == "beir":
            raise ValueError(f"{data} is not in BEIR layout: corpus.jsonl is missing")
    wanted = FORMATS if source == "auto" else {source: FORMATS[source]}
    found = {
        form: matching
        for form, suffixes in wanted.items()
        if (matching := [n for n in names if unzipped(n).endswith(suffixes)])
    }
    if not found:
        suffixes = " ".join(s for group in wanted.values() for s in group)
        raise ValueError(f"no corpus in {data}: found none of {suffixes}")
    if len(found) > 1:
        raise ValueError(
            f"{data} holds {' and '.join(found)} files: say which with --ingest.source"
        )
    form, matching = next(iter(found.items()))
    return matching, f"{len(matching)} {form} files in {data}"


def _refuse_unread(names: Sequence[str], read: Collection[str], root: str) -> None:
    """Grades or queries that are called so and not read would be missed by nobody until the end."""
    suffixes = (*(s for group in FORMATS.values() for s in group if s != ".md"), *_TABLE_LIKE)
    for name in names:
        called = name.startswith("qrels/") or name.lower().partition(".")[0] in ("queries", "qrels")
        if called and name not in read and name.lower().endswith(suffixes):
            raise ValueError(
                f"{short_name(f'{root}/{name}')} would not be read: queries are read from "
                "queries.jsonl, .parquet, .csv or .tsv, grades from qrels.tsv or "
                "qrels/<train|dev|test>.tsv (BEIR's three columns or TREC's four), all but "
                "Parquet with or without .gz"
            )


def _is_table(name: str, stem: str) -> bool:
    """Whether a name at the top of the data is `stem` with the suffix of a table."""
    suffixes = (*FORMATS["jsonl"], *FORMATS["parquet"], *FORMATS["csv"])
    return unzipped(name) in {f"{stem}{suffix}" for suffix in suffixes}


def unzipped(name: str) -> str:
    """A name in lower case, without the suffix of gzip: it says what the file holds."""
    lower = name.lower()
    inner = lower.removesuffix(GZIP)
    return lower if inner.endswith(FORMATS["parquet"]) else inner


def _resolved(url: str) -> tuple[Any, str]:
    """The filesystem that a path or URL is of, and the path there.

    fsspec takes `::` for a chain of URLs, which it is not in the name of a local file.
    """
    if "://" not in url or url.startswith(("file://", "local://")):
        fs = fsspec.filesystem("file")
        return fs, fs._strip_protocol(url)
    fs, path = fsspec.core.url_to_fs(url)
    return fs, path


def _url(fs: Any, path: str) -> str:
    return str(fs.unstrip_protocol(path))


@contextlib.contextmanager
def open_bytes(url: str, *, stored: bool = False) -> Iterator[Any]:
    """A reader of bytes, unzipped unless they are wanted as `stored`.

    Raises ValueError, one sentence, for a file that cannot be opened, or is not whole gzip.
    """
    zipped = not stored and url.lower().endswith(GZIP)
    try:
        fs, path = _resolved(url)
        handle = fs.open(path, "rb", compression="gzip" if zipped else None)
    except OSError as error:
        raise ValueError(f"cannot read {short_name(url)}: {error.strerror or error}") from None
    with handle:
        try:
            yield handle
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise ValueError(f"{short_name(url)} is no gzip file, or not all of one") from None


def fingerprint(urls: Sequence[str], root: str = "") -> str:
    """sha256 over the files: their content, and their names below `root`, which mean something."""
    digest = hashlib.sha256()
    for url in sorted(urls):
        digest.update(url.removeprefix(root).encode("utf-8", "surrogateescape"))
        with open_bytes(url, stored=True) as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
        digest.update(b"\0")
    return digest.hexdigest()[:32]


def stamps(urls: Sequence[str]) -> dict[str, str | None]:
    """What changes when a file does, as far as its filesystem says: size and time, or a checksum;
    None for one that is gone."""
    return {url: _stamp(url) for url in urls}


def _stamp(url: str) -> str | None:
    fs, path = _resolved(url)
    try:
        if isinstance(fs, LocalFileSystem):
            found = os.stat(path)
            return f"{found.st_size} {found.st_mtime_ns}"
        return str(fs.ukey(path))
    except FileNotFoundError:
        return None


def file_fingerprint(url: str) -> str:
    """Of one file by its content and name, however a path leads to it."""
    return fingerprint([url], url[: url.rfind("/") + 1])


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


def short_name(url: str) -> str:
    """A path as people write it, in UTF-8; bytes that are not are escaped."""
    name = url.removeprefix("file://").removeprefix("local://")
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


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
    if not columns or not row.source.lower().endswith((*FORMATS["csv"], *FORMATS["parquet"])):
        return
    for names in needed:
        if not any(name in columns for name in names):
            found = ", ".join(columns)
            others = f" (or {', '.join(names[1:])})" if names[1:] else ""
            raise ValueError(f"{row.source} has no column {names[0]}{others}: found {found}")
