"""Texts that training reads, in Arrow files: written once, memory-mapped by every worker.

What is held of a text is a row number; its bytes are pages of a file, which all workers of a node
share and the kernel may drop. Files are named after their content.
"""

import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bixse.copies import copies
from bixse.place import Place

Ints = npt.NDArray[np.int64]

FOLDER = "texts/"
"""Directory of the texts within a run's place for checkpoints."""

_SCHEMA = pa.schema([("text", pa.large_string())])
_BATCH = 4096


@dataclass(frozen=True)
class TextFile:
    """Texts by row."""

    place: Place
    name: str

    @cached_property
    def _column(self) -> pa.ChunkedArray:
        return pa.ipc.open_file(pa.memory_map(self._local())).read_all()["text"]

    def text(self, row: int) -> str:
        # One value at a time: `take` copies every chunk of a memory-mapped column first.
        return str(self._column[row].as_py())

    def put(self, place: Place) -> "TextFile":
        """The same file at another place."""
        if not place.exists(self.name):
            place.put(Path(self._local()), self.name)
        return TextFile(place, self.name)

    def _local(self) -> str:
        """A path of this node; a file elsewhere is copied to it once."""
        if self.place.is_local:
            return self.place.path(self.name)
        path = copies() / self.name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
            with self.place.open(self.name) as source, open(aside, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            aside.replace(path)
        return str(path)

    def __getstate__(self) -> dict[str, object]:
        return {"place": self.place, "name": self.name}


@dataclass(frozen=True)
class MappedTexts:
    """Texts by number; behaves as the Arrow array of them, where training reads one."""

    file: TextFile
    row_N: Ints

    def __len__(self) -> int:
        return len(self.row_N)

    def take(self, numbers: Ints) -> pa.Array:
        rows = self.row_N[numbers].tolist()
        return pa.array([self.file.text(row) for row in rows], pa.large_string())

    def to_pylist(self) -> list[str]:
        return [self.file.text(row) for row in self.row_N.tolist()]

    def put(self, place: Place) -> "MappedTexts":
        """The same texts, their file at another place."""
        return replace(self, file=self.file.put(place))


def store(texts: Iterable[str], folder: Path) -> TextFile:
    """Write texts to a file in `folder`, a batch in memory at a time."""
    aside = folder / f"{uuid.uuid4().hex}.tmp"
    texts = iter(texts)
    with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        while some := list(islice(texts, _BATCH)):
            column = pa.array(some, pa.large_string())
            writer.write_batch(pa.record_batch([column], schema=_SCHEMA))
    place = Place(str(folder))
    name = f"{FOLDER}{place.entry(aside.name).sha256}.arrow"
    (folder / FOLDER).mkdir(exist_ok=True)
    aside.replace(folder / name)
    return TextFile(place, name)


class StoredTexts(Mapping[str, str]):
    """Texts by id: ids in memory, texts in a file."""

    def __init__(self, rows: Iterable[tuple[str, str]], folder: Path) -> None:
        """Write texts, given with their ids, to a file in `folder`."""
        self._row: dict[str, int] = {}
        self._file = store(self._noted(rows), folder)

    def _noted(self, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
        for row, (name, text) in enumerate(rows):
            self._row[name] = row
            yield text

    def __getitem__(self, name: str) -> str:
        return self._file.text(self._row[name])

    def __contains__(self, name: object) -> bool:
        return name in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def column(self, names: Sequence[str]) -> MappedTexts:
        """The texts of some ids, by their number."""
        return MappedTexts(self._file, np.asarray([self._row[name] for name in names], np.int64))


def column(texts: Mapping[str, str], names: Sequence[str]) -> "pa.Array | MappedTexts":
    """The texts of some ids, by their number: those that are stored stay where they are."""
    if isinstance(texts, StoredTexts):
        return texts.column(names)
    return pa.array([texts[name] for name in names], pa.large_string())
