"""Foreign files: where they lie, which of them is what, and their bytes.

What cannot be found, listed or opened raises ValueError in one sentence.
"""

import contextlib
import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

FORMATS = {
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "csv": (".csv", ".tsv"),
    "text": (".txt", ".md"),
}

GZIP = ".gz"
"""May stand behind any of these but Parquet's, which is compressed in itself."""

_TABLE_LIKE = (".json", ".trec", ".qrels", GZIP, ".bz2", ".xz", ".zst", ".zip")
"""Suffixes of tables that are not read."""


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
        _refuse_queries_as_documents(corpus, root)
    _refuse_unread(names, {*corpus, *queries, *qrels}, root)
    texts, asked, graded = (
        [_url(fs, f"{root}/{name}") for name in group] for group in (corpus, queries, qrels)
    )
    return Files(_url(fs, root), texts, asked, graded, described)


def expanded(urls: Sequence[str]) -> list[str]:
    """The files that are named, and those in the directories that are named, in their order, each
    once.

    Raises ValueError where there is none, or a directory cannot be listed.
    """
    found: list[str] = []
    for url in urls:
        fs, path = _resolved(url)
        if not fs.exists(path):
            raise ValueError(f"no file at {short_name(url)}")
        names = [path] if fs.isfile(path) else _names_below(fs, path.rstrip("/"))
        if not names:
            raise ValueError(f"{short_name(url)} is an empty directory")
        found += [_url(fs, name) for name in names]
    return list(dict.fromkeys(found))


def _names_below(fs: Any, root: str) -> list[str]:
    return sorted(_files_below(fs, root, lambda folder: not _leads_back(fs, folder, root)))


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


def _refuse_queries_as_documents(corpus: Sequence[str], root: str) -> None:
    """Of a dataset in a directory below, or one directory a table, queries have an id and a text
    as documents have, and would be found among them for ever."""
    tables = (*FORMATS["jsonl"], *FORMATS["parquet"], *FORMATS["csv"])
    for name in corpus:
        folders = name.lower().split("/")
        called = {*folders[:-1], folders[-1].partition(".")[0]} & {"queries", "qrels"}
        if called and unzipped(name).endswith(tables):
            raise ValueError(
                f"{short_name(f'{root}/{name}')} would be read as documents: --data names the "
                "directory that corpus, queries and qrels stand in, as files beside each other"
            )


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


@contextlib.contextmanager
def unchanged(urls: Sequence[str], undo: Callable[[], object]) -> Iterator[None]:
    """Around the reading of files that are read twice, for their fingerprint and for their rows.

    Raises ValueError where one has changed meanwhile, somebody still writing it; what was made of
    it, under the fingerprint of something else, is undone.
    """
    before = stamps(urls)
    yield
    after = stamps(urls)
    changed = next((url for url in urls if after[url] != before[url]), None)
    if changed is not None:
        undo()
        raise ValueError(
            f"{short_name(changed)} changed while it was read: run again when nobody writes it"
        )


def file_fingerprint(url: str) -> str:
    """Fingerprint of one file by its content and name, however a path leads to it."""
    return fingerprint([url], url[: url.rfind("/") + 1])


def short_name(url: str) -> str:
    """A path as people write it, in UTF-8; bytes that are not are escaped."""
    name = url.removeprefix("file://").removeprefix("local://")
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
