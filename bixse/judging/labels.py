"""The label store: what judges have said of two texts, found again by content.

A label is filed under what its answer depends on, not under ids:

    key = sha256(signature, normalised query, normalised passage)

where the signature is the judge's own (model and revision, prompt, scale, orders, cuts), so that a
new corpus version, another round of mining or the same text under another id finds what was paid
for. Normalised is: Unicode NFC, runs of white space as one space. Case counts: "it" is not "IT".

    STORE/<hash of the signature>/signature.json         what the hash stands for, for people
    STORE/<hash of the signature>/labels-<rows>-<sha256>.parquet

A part is named by the hash of its bytes, is written once and never changed: any number of jobs may
add to one store on any filesystem, none overwrites another, and a damaged part is noticed when it
is read. `compact` puts many small parts into few, each written before those it replaces go.
Rejections are not stored: a pair without a readable answer is asked again by the next job.

`Labels` is one job's view of a store. It brings each part once from the store into local files,
sorted by key and mapped into memory, `RUN_ROWS` rows a file: memory follows that number, not the
size of the store. `refresh` adds what other jobs have written since.
"""

import hashlib
import json
import re
import tempfile
import threading
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bixse.artifacts import parquet_bytes
from bixse.place import Place
from bixse.records import JUDGMENTS, Judgment

_SAID = tuple(name for name in JUDGMENTS.names if name not in ("query_id", "doc_id"))
"""What a judgment says beside the ids of its pair."""

LABELS = pa.schema([("key", pa.binary(32)), *(JUDGMENTS.field(name) for name in _SAID)])

RUN_ROWS = 1 << 19
"""Labels sorted and mapped together: about 60 MB."""

SMALL_RUNS = 32
"""Runs from which those that are not full are merged."""

SMALL_PARTS = 256
"""Parts from which those that are not full are written together."""

LEFT_S = 24 * 3600.0
"""Age of an unfinished part whose writer is no more: one takes seconds to write."""


@dataclass(frozen=True, slots=True)
class Label:
    """A judgment without the ids of its pair."""

    key: bytes
    grade_probs: tuple[float, ...]
    relevance: float
    judge: str
    prompt: str
    origin: str
    disagreement: float | None = None

    @classmethod
    def of(cls, key: bytes, judgment: Judgment) -> "Label":
        return cls(key, **{name: getattr(judgment, name) for name in _SAID})

    def judgment(self, query_id: str, doc_id: str) -> Judgment:
        return Judgment(query_id, doc_id, **{name: getattr(self, name) for name in _SAID})


def normalised(text: str) -> str:
    """What texts share that differ only in Unicode composition or white space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def signature_hash(signature: Mapping[str, Any]) -> str:
    """128 bits of a judge's signature, as hexadecimal digits."""
    return hashlib.sha256(_canonical(signature)).hexdigest()[:32]


def label_key(signature: Mapping[str, Any], query: str, passage: str) -> bytes:
    """The 32 bytes under which the label of two texts by one judge is filed."""
    digest = hashlib.sha256(bytes.fromhex(signature_hash(signature)))
    for text in (query, passage):
        # Its own digest first: "ab", "c" is not "a", "bc".
        encoded = normalised(text).encode("utf-8", "surrogatepass")
        digest.update(hashlib.sha256(encoded).digest())
    return digest.digest()


class Labels:
    """The labels of one judge in one store. Safe to use from several threads of a process."""

    def __init__(self, store: str, signature: Mapping[str, Any], *, load: bool = True) -> None:
        """Raises ValueError when a part of the store is damaged, naming it.

        Without `load` there is nothing to find before the first `refresh`.
        """
        self._place = Place(f"{store.rstrip('/')}/{signature_hash(signature)}")
        self._signature = signature
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._runs: list[_Run] = []
        self._folder = Path(tempfile.gettempdir())
        if load:
            self.refresh()

    def refresh(self) -> None:
        """Take in the parts that were added since. Raises ValueError for a damaged one."""
        with self._lock:
            # What another job puts together meanwhile stands in a part that was not listed yet.
            while not self._take_in():
                pass
            self._merge_small()

    def _take_in(self) -> bool:
        """The parts that are listed now; whether all of them were still there."""
        names = [n for n in self._place.names() if n.startswith("labels-")]
        waiting: list[pa.Table] = []
        rows, all_there = 0, True
        for name in sorted(set(names) - self._seen):
            self._seen.add(name)
            table = self._part(name)
            all_there = all_there and table is not None
            if table is None or not table.num_rows:  # An empty file cannot be mapped.
                continue
            waiting.append(table)
            rows += table.num_rows
            if rows >= RUN_ROWS:
                self._runs.append(_Run.of(pa.concat_tables(waiting), self._folder))
                waiting, rows = [], 0
        if waiting:
            self._runs.append(_Run.of(pa.concat_tables(waiting), self._folder))
        return all_there

    def find(self, keys: Sequence[bytes]) -> list[Label | None]:
        """For each key its label, or None."""
        found: list[Label | None] = [None] * len(keys)
        with self._lock:
            runs = list(self._runs)
        for run in runs:
            missing = [at for at, label in enumerate(found) if label is None]
            if not missing:
                break
            for at, label in zip(missing, run.find([keys[at] for at in missing]), strict=True):
                found[at] = label
        return found

    def add(self, labels: Sequence[Label]) -> None:
        """Write labels as one part. Equal labels make the same part, however often added."""
        if not labels:
            return
        if not self._place.exists("signature.json"):
            self._place.write("signature.json", json.dumps(self._signature, indent=1).encode())
        columns = {name: [getattr(row, name) for row in labels] for name in LABELS.names}
        self._write(pa.table(columns, schema=LABELS))

    def compact(self) -> None:
        """Put parts that are not full together, if there are many; jobs may go on meanwhile.

        Whoever is killed in between leaves some labels in two parts, which is one label. What
        writers that were killed long ago have left goes.
        """
        self._place.tidy(older_than_s=LEFT_S)
        small = [n for n in self._place.names() if n.startswith("labels-") and _rows(n) < RUN_ROWS]
        if len(small) < SMALL_PARTS:
            return
        waiting: dict[str, pa.Table] = {}
        for name in small:
            table = self._part(name)
            if table is not None:
                waiting[name] = table
            full = sum(t.num_rows for t in waiting.values()) >= RUN_ROWS or name == small[-1]
            # Nothing waits where another job has just put all of them together.
            if full and waiting:
                merged = self._write(pa.concat_tables([LABELS.empty_table(), *waiting.values()]))
                for done in set(waiting) - {merged}:
                    self._place.remove(done)
                waiting = {}

    def _write(self, table: pa.Table) -> str:
        data = parquet_bytes(_sorted(table))
        name = _part_name(data, table.num_rows)
        self._place.write(name, data)
        return name

    def __len__(self) -> int:
        """Labels at hand; one that two jobs made at the same moment counts twice."""
        return sum(len(run) for run in self._runs)

    def _part(self, name: str) -> pa.Table | None:
        """None when another job has just put it together with others."""
        try:
            data = self._place.read(name)
        except FileNotFoundError:
            return None
        if _part_name(data, _rows(name)) != name:
            raise ValueError(
                f"label store {self._place.url} is damaged: {name} differs from the sha256 in its "
                "name; remove that file, and its pairs are judged again"
            )
        return pq.read_table(pa.BufferReader(data)).select(LABELS.names).cast(LABELS)

    def _merge_small(self) -> None:
        """Many small parts, of a job that goes on, become one run."""
        small = [run for run in self._runs if len(run) < RUN_ROWS]
        if len(small) < SMALL_RUNS:
            return
        self._runs = [run for run in self._runs if len(run) >= RUN_ROWS]
        waiting: list[pa.Table] = []
        for run in small:
            waiting.append(run.table)
            if sum(table.num_rows for table in waiting) >= RUN_ROWS:
                self._runs.append(_Run.of(pa.concat_tables(waiting), self._folder))
                waiting = []
        if waiting:
            self._runs.append(_Run.of(pa.concat_tables(waiting), self._folder))


@dataclass(frozen=True)
class _Run:
    """Labels sorted by key in a file that is mapped, not loaded."""

    table: pa.Table
    heads: npt.NDArray[np.uint64]
    """The first eight bytes of each key as a number, rising: what is searched."""

    @classmethod
    def of(cls, table: pa.Table, folder: Path) -> "_Run":
        table = _sorted(table)
        # The files are unlinked as soon as they are mapped: gone with the process, however it ends.
        with tempfile.NamedTemporaryFile(dir=folder, prefix="bixse-labels-") as handle:
            with pa.OSFile(handle.name, "wb") as sink, pa.ipc.new_file(sink, LABELS) as writer:
                writer.write_table(table)
            mapped = pa.ipc.open_file(pa.memory_map(handle.name)).read_all()
        with tempfile.TemporaryFile(dir=folder) as handle:
            handle.write(_heads(table["key"].to_pylist()).tobytes())
            handle.flush()
            heads = np.memmap(handle, np.uint64, "r", shape=(table.num_rows,))
        return cls(mapped, heads)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def find(self, keys: Sequence[bytes]) -> list[Label | None]:
        starts = np.searchsorted(self.heads, _heads(keys))
        return [self._at(int(start), key) for start, key in zip(starts, keys, strict=True)]

    def _at(self, row: int, key: bytes) -> Label | None:
        column = self.table["key"]
        while row < len(self) and self.heads[row] == int.from_bytes(key[:8], "big"):
            if column[row].as_py() == key:
                values = {name: self.table[name][row].as_py() for name in LABELS.names}
                return Label(**{**values, "grade_probs": tuple(values["grade_probs"])})
            row += 1
        return None


def _heads(keys: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(b"".join(key[:8] for key in keys), ">u8").astype(np.uint64)


def _sorted(table: pa.Table) -> pa.Table:
    return table.take(pc.sort_indices(table["key"])).combine_chunks()


def _part_name(data: bytes, rows: int) -> str:
    return f"labels-{rows}-{hashlib.sha256(data).hexdigest()[:40]}.parquet"


def _rows(name: str) -> int:
    """How many labels a part of this name has. Raises ValueError for a name that is none of ours"""
    found = re.fullmatch(r"labels-(\d+)-[0-9a-f]{40}\.parquet", name)
    if found is None:
        raise ValueError(f"{name} in a label store is no part of it: remove that file")
    return int(found[1])


def _canonical(signature: Mapping[str, Any]) -> bytes:
    return json.dumps(signature, sort_keys=True, separators=(",", ":")).encode()
