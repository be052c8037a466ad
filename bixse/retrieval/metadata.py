"""What a shard knows of its documents beside their text, in columns that filters read.

`metadata.arrow` has a column a field and a row a document, in the order of the shard's other files:

    text     dictionary of strings, each word once and in order
    number   float64
    boolean  bit
    texts    list of such a dictionary

It is memory-mapped: a filter reads the columns that it names and nothing else. All shards of an
index have the same fields, whether or not one of their documents has them. A row is null where the
document has no such field.

Shapes: N documents.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bixse.records import EXACT_INTEGERS, Kind, Metadata
from bixse.retrieval.filters import Filter, Mask, matches

T = TypeVar("T")

METADATA_FILE = "metadata.arrow"

_KEPT = 64
"""Filters whose rows are remembered, at a bit a document each."""

FEW = 20_000
"""Up to so many rows that a filter keeps, all are compared with every query, so that nothing can be
missed: 120 to 190 ns a row of 384 float32 numbers on one core (`benchmarks.filtered`), 700 where
they must be fetched or converted."""

_WORD = pa.large_string()
_WORDS = pa.dictionary(pa.int32(), _WORD)
_TYPES: dict[Kind, pa.DataType] = {
    "text": _WORDS,
    "number": pa.float64(),
    "boolean": pa.bool_(),
    "texts": pa.list_(_WORDS),
}


@dataclass(frozen=True)
class Kept:
    """The rows of a shard that meet a filter."""

    bits: npt.NDArray[np.uint8]
    """A bit a row, the lowest first, as FAISS reads them."""
    size: int
    """Rows of the shard, N."""
    count: int

    @classmethod
    def of(cls, mask_N: Mask) -> "Kept":
        return cls(np.packbits(mask_N, bitorder="little"), len(mask_N), int(mask_N.sum()))

    @property
    def few(self) -> bool:
        """Whether to compare them all."""
        return self.count <= FEW

    @property
    def mask(self) -> Mask:
        """Which rows, [N]."""
        return np.unpackbits(self.bits, count=self.size, bitorder="little").view(np.bool_)

    def holds(self, rows: npt.NDArray[np.int64]) -> Mask:
        """Whether it keeps each of these rows, in their shape; a row -1 stands for the last."""
        held: Mask = (self.bits[rows >> 3] >> (rows & 7) & 1).astype(np.bool_)
        return held

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        return np.flatnonzero(self.mask)


def write_metadata(
    directory: Path, documents: Sequence[Metadata | None], kinds: Mapping[str, Kind]
) -> None:
    """Write the metadata of documents in the order of `doc_id`; without fields, nothing."""
    if not kinds:
        return
    rows = [document or {} for document in documents]
    columns = {
        field: _column([row.get(field) for row in rows], kinds[field]) for field in sorted(kinds)
    }
    batch = pa.RecordBatch.from_pydict(columns)
    path = str(directory / METADATA_FILE)
    # One batch: a column is one array, and a dictionary is read once.
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _column(values: Sequence[Any], kind: Kind) -> pa.Array:
    if kind == "text":
        return _words(values)
    if kind != "texts":
        return pa.array(values, _TYPES[kind])
    strings = _words(list(chain.from_iterable(value or () for value in values)))
    ends = np.cumsum([0, *(len(value or ()) for value in values)]).astype(np.int32)
    none = pa.array([value is None for value in values], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(ends), strings, mask=none)


def _words(values: Sequence[str | None]) -> pa.DictionaryArray:
    words = sorted({value for value in values if value is not None})
    place = {word: number for number, word in enumerate(words)}
    places = [None if value is None else place[value] for value in values]
    return pa.DictionaryArray.from_arrays(pa.array(places, pa.int32()), pa.array(words, _WORD))


class Remembered(Generic[T]):
    """What was found for the last filters, given by their canonical text."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, T] = OrderedDict()

    def get(self, text: str, find: Callable[[str], T]) -> T:
        found = self._found.pop(text, None)
        if found is None:
            found = find(text)
        self._found[text] = found
        if len(self._found) > _KEPT:
            self._found.popitem(last=False)
        return found


class Fields:
    """The loaded metadata of a shard; safe for one search at a time."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        self._rows = int(batch.num_rows)
        self._kept: Remembered[Kept] = Remembered()

    def __len__(self) -> int:
        """Documents of the shard."""
        return self._rows

    @classmethod
    def load(cls, directory: Path) -> "Fields":
        """Map what `write_metadata` has written; the file must have been verified."""
        file = pa.ipc.open_file(pa.memory_map(str(directory / METADATA_FILE)))
        return cls(file.get_batch(0))

    def kept(self, text: str) -> Kept:
        """The rows that meet a filter, given by its canonical text; it must have been checked."""
        return self._kept.get(text, self._matching)

    def at(self, row: int) -> Metadata:
        """What the document in this row has, nothing where it has none."""
        values = ((field, column[row].as_py()) for field, column in self._columns.items())
        return {field: _shown(value) for field, value in values if value is not None}

    def _matching(self, text: str) -> Kept:
        return Kept.of(matches(Filter.of(text), self._columns))


def _shown(value: Any) -> Any:
    """Whole numbers without a fraction: JSON does not tell 5.0 from 5."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= EXACT_INTEGERS:
        return int(value)
    return value
