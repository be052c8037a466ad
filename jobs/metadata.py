"""What a raw row says beside its text -> metadata of one kind a field, or why it is none.

    --ingest.metadata brand price:number    of the `metadata` object of JSON lines, or of columns
    --ingest.metadata all                   every field of that object

Without a name nothing is read: objects that no filter can hold are no reason to lose a document.

The first document that has a field says its kind for all; a name with `:kind` says it beforehand,
and is how numbers and true or false are read from CSV, where all is text.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, cast, get_args

import pyarrow as pa

from bixse.artifacts import Draft, parquet_bytes, part_name
from bixse.records import EXACT_INTEGERS, METADATA, METADATA_DIR, Kind, Metadata
from jobs.files import FORMATS, unzipped
from jobs.formats import Row, check_columns

MOST_FIELDS = 100
"""The most fields that a corpus may have: each is a column of every shard."""
OPERATORS = ("not", "or")
"""Words of the filter language, which no field can be called."""

_ALL = ("all",)

_BOOLEANS = {"true": True, "false": False}
_SAID: dict[Kind, str] = {
    "text": "a string",
    "number": "a number",
    "boolean": "true or false",
    "texts": "a list of strings",
}


class Reader:
    """Reads the metadata of one corpus row by row; knows the fields so far and their kinds."""

    def __init__(self, names: Sequence[str]) -> None:
        """`names` as in `--ingest.metadata`. Raises ValueError for one that cannot be."""
        self.kinds: dict[str, Kind] = {}
        self._all = tuple(names) == _ALL
        self._names = {} if self._all else dict(_named(name) for name in names)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of a table that `read` may ask for."""
        return ("metadata", *self._names) if self._names else ()

    def read(self, row: Row) -> Metadata | None:
        """The metadata of a row, None where it has none.

        Raises Rejected with the reason when a value cannot be held, ValueError when a table lacks a
        named column, or there are too many fields.
        """
        found: Metadata = {}
        kinds: dict[str, Kind] = {}
        for name, value in self._given(row).items():
            if value is not None:
                asked = self.kinds.get(name) or self._names.get(name)
                found[name], kinds[name] = _held(name, value, asked)
        self.kinds |= kinds
        if len(self.kinds) > MOST_FIELDS:
            raise ValueError(
                f"the metadata of {row.source} has more than {MOST_FIELDS} fields: name those to "
                "keep with --ingest.metadata"
            )
        return found or None

    def check_found(self) -> None:
        """Raises ValueError for a named field that no row had."""
        missing = [name for name in self._names if name not in self.kinds]
        if missing:
            raise ValueError(
                f"no document has {missing[0]!r}, which --ingest.metadata names: found "
                f"{', '.join(sorted(self.kinds)) or 'none of them'}"
            )

    def _given(self, row: Row) -> dict[str, Any]:
        """Values by field, before they are looked at."""
        own = row.fields.get("metadata")
        if self._all:
            if own is None or not unzipped(row.source).endswith(FORMATS["jsonl"]):
                return {}
            if not isinstance(own, dict):
                raise Rejected("metadata is not an object")
            return own
        inside = own if isinstance(own, dict) else {}
        given = {}
        for name in self._names:
            if name not in inside:
                check_columns(row, (name,))
            given[name] = inside.get(name, row.fields.get(name))
        if unzipped(row.source).endswith(FORMATS["csv"]):
            # An empty cell is how a table says that there is nothing.
            return {name: value or None for name, value in given.items()}
        return given


class Rejected(Exception):
    """Raised for a row whose metadata cannot be held; says why."""


def write_metadata(draft: Draft, number: int, documents: Sequence[tuple[str, Metadata]]) -> None:
    """Write the metadata of a part of the corpus, by `doc_id`; without any, nothing."""
    if not documents:
        return
    rows = [
        {"doc_id": doc_id, "metadata": json.dumps(found, sort_keys=True, ensure_ascii=False)}
        for doc_id, found in documents
    ]
    table = pa.Table.from_pylist(rows, schema=METADATA)
    draft.write_file(f"{METADATA_DIR}/{part_name(number)}", parquet_bytes(table))


def _named(name: str) -> tuple[str, Kind | None]:
    field, colon, kind = name.rpartition(":")
    if not colon:
        return name, None
    if kind not in get_args(Kind):
        raise ValueError(
            f"--ingest.metadata {name}: a field is one of {', '.join(get_args(Kind))}, not {kind!r}"
        )
    return field, cast("Kind", kind)


def _held(name: str, value: Any, asked: Kind | None) -> tuple[Any, Kind]:
    """A value as it is kept, and its kind, which must be the one asked for. Raises Rejected."""
    if name in ("", *OPERATORS) or not _is_text(name):
        raise Rejected(f"metadata field {name!r} cannot be called so")
    if isinstance(value, str) and asked in ("number", "boolean"):
        value = _parsed(value, asked)
    kind = _kind(value)
    if kind is None:
        raise Rejected(
            f"metadata {name} is not a string, a number that a double holds, true, false or a list "
            "of strings: --ingest.metadata names the fields to keep"
        )
    if asked is not None and asked != kind:
        raise Rejected(f"metadata {name} is {_SAID[kind]}, expected {_SAID[asked]}")
    return value, kind


def _parsed(value: str, kind: Kind | None) -> Any:
    """What a cell says; the cell itself where it does not."""
    if kind == "boolean":
        return _BOOLEANS.get(value.strip().lower(), value)
    try:
        return float(value)
    except ValueError:
        return value


def _kind(value: Any) -> Kind | None:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "text" if _is_text(value) else None
    if isinstance(value, int):
        return "number" if abs(value) <= EXACT_INTEGERS else None
    if isinstance(value, float):
        return "number" if math.isfinite(value) else None
    if isinstance(value, list) and all(isinstance(one, str) and _is_text(one) for one in value):
        return "texts"
    return None


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
