"""The grammar of filters: which documents a search is over, by their metadata.

    {"brand": "acme", "price": {"gte": 5, "lt": 10}}        both must hold
    {"tags": {"any": ["new", "sale"]}, "or": [{"brand": "acme"}, {"price": {"lt": 3}}]}
    {"not": {"brand": {"in": ["acme", "apex"]}}}

A document without a field meets no condition on it but `{"exists": false}`; `not` turns that round
as it does everything else. Texts compare by code points, so that dates as `2026-11-27` compare as
dates do.

A filter travels as one canonical text (`Filter.text`, `Filter.of`), which is what equal filters
share. `check` compares it with the fields of an index, `matches` with the rows of a shard.

Shapes: N documents, L strings in all lists of a column, W words of its dictionary.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    model_validator,
)

from bixse.records import EXACT_INTEGERS, Kind

MOST_CONDITIONS = 64
"""The most conditions in a filter, nested ones included: each is a pass over a shard's rows."""
MOST_VALUES = 1000
"""The most values in one list of a condition."""
DEEPEST = 8
"""The deepest nesting of `not` and `or`."""

_OPERATORS_OF_ALL = ("eq", "in", "gte", "gt", "lte", "lt", "any", "all", "exists")
_MAY_HOLD = (
    f"a field has a value or operators ({' '.join(_OPERATORS_OF_ALL)}); fields side by side must "
    "all hold, and not and or are the only words beside fields"
)

Scalar = bool | int | float | str
Mask = npt.NDArray[np.bool_]


class FilterError(ValueError):
    """A filter that asks for what an index does not have; `path` is the field of the request."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path


def _scalar(value: object) -> Scalar:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("must not hold half of a surrogate pair") from None
        return value
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) <= EXACT_INTEGERS:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError("must be a string, true, false, or a number that a double holds exactly")


def _spelt_out(value: object) -> object:
    if isinstance(value, dict):
        # Alone: each unknown operator would be an error of its own.
        unknown = next((name for name in value if name not in _OPERATORS_OF_ALL), None)
        if unknown is not None:
            raise ValueError(f"must not hold {str(unknown)[:50]!r}: {_MAY_HOLD}")
    if isinstance(value, list):
        raise ValueError(f"must not be a list: {_MAY_HOLD}")
    return value if isinstance(value, dict | Condition) else {"eq": value}


def _given(value: object) -> object:
    """None says that nothing was given; a null that was given is as wrong as another value."""
    if value is None:
        raise ValueError("must not be null")
    return value


Value = Annotated[Scalar, PlainValidator(_scalar, json_schema_input_type=Scalar)]
Values = Annotated[list[Value], Field(fail_fast=True, min_length=1, max_length=MOST_VALUES)]
MaybeValue = Annotated[Scalar | None, PlainValidator(_scalar, json_schema_input_type=Scalar)]
MaybeValues = Annotated[Values | None, BeforeValidator(_given, json_schema_input_type=Values)]
MaybeTruth = Annotated[bool | None, BeforeValidator(_given, json_schema_input_type=bool)]


class Condition(BaseModel):
    """Of one field. Of several operators all must hold."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )

    eq: MaybeValue = None
    """Equal; a plain value in place of the condition means this."""
    in_: MaybeValues = Field(default=None, alias="in")
    """Equal to one of these."""
    gte: MaybeValue = None
    gt: MaybeValue = None
    lte: MaybeValue = None
    lt: MaybeValue = None
    any: MaybeValues = None
    """Of a list: holds at least one of these."""
    all: MaybeValues = None
    """Of a list: holds all of these."""
    exists: MaybeTruth = None
    """Whether the document has the field."""

    @model_validator(mode="after")
    def _says_something(self) -> "Condition":
        if not self.model_dump(exclude_none=True):
            raise ValueError(f"a condition needs an operator: {' '.join(_OPERATORS_OF_ALL)}")
        return self

    def operators(self) -> Iterator[tuple[str, Any]]:
        yield from self.model_dump(by_alias=True, exclude_none=True).items()


FieldCondition = Annotated[
    Condition, BeforeValidator(_spelt_out, json_schema_input_type=Condition | Scalar)
]


class Filter(BaseModel):
    """Conditions by field, all of which must hold, and `not` and `or` of other filters."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[str, FieldCondition]

    not_: Annotated["Filter | None", BeforeValidator(_given, json_schema_input_type="Filter")] = (
        Field(default=None, alias="not")
    )
    or_: Annotated["Filters | None", BeforeValidator(_given, json_schema_input_type="Filters")] = (
        Field(default=None, alias="or")
    )

    @property
    def conditions(self) -> dict[str, Condition]:
        return self.__pydantic_extra__

    @property
    def spelt_out(self) -> dict[str, Any]:
        """As JSON holds it, every condition with its operator."""
        return self.model_dump(by_alias=True, exclude_none=True)

    @property
    def text(self) -> str:
        """The canonical text: equal filters have equal ones, however their fields are ordered."""
        return json.dumps(self.spelt_out, sort_keys=True, separators=(",", ":"))

    @classmethod
    def of(cls, text: str) -> "Filter":
        return cls.model_validate_json(text)


Filters = Annotated[list[Filter], Field(fail_fast=True, min_length=1)]


def bounded(said: object) -> object:
    """What was said itself, a filter or what may become one: looked at before it is validated, so
    that a large one costs nothing more.

    Raises ValueError when answering it would take too long.
    """
    count, level = 0, [said.spelt_out if isinstance(said, Filter) else said]
    for _ in range(DEEPEST + 1):
        filters = [one for one in level if isinstance(one, dict)]
        count += len(level) + sum(len(one) - ("not" in one) - ("or" in one) for one in filters)
        if count > MOST_CONDITIONS:
            raise ValueError(f"may hold at most {MOST_CONDITIONS} conditions and filters")
        level = [below for one in filters for below in _within(one)]
    if level:
        raise ValueError(f"not and or may stand in each other {DEEPEST} deep")
    return said


def _within(said: dict[object, object]) -> list[object]:
    """What stands where filters do."""
    either = said.get("or")
    alone = [said["not"]] if "not" in said else []
    return [*either, *alone] if isinstance(either, list) else alone


def check(found: Filter, kinds: Mapping[str, Kind], path: str = "filter") -> None:
    """Whether an index whose fields are of these kinds can answer.

    Raises FilterError naming the field there is not, or the value that is of another kind.
    """
    if not kinds:
        raise FilterError(path, "the documents of this index have no metadata")
    for field, condition in found.conditions.items():
        if field not in kinds:
            there_are = ", ".join(sorted(kinds))
            raise FilterError(f"{path}.{field}", f"no field {field!r} here: there are {there_are}")
        for name, value in condition.operators():
            wrong = _wrong(kinds[field], name, value)
            if wrong:
                raise FilterError(
                    f"{path}.{field}", f"{field!r} holds {_SAID[kinds[field]]}: {wrong}"
                )
    if found.not_ is not None:
        check(found.not_, kinds, f"{path}.not")
    for number, one in enumerate(found.or_ or ()):
        check(one, kinds, f"{path}.or.{number}")


_SAID: dict[Kind, str] = {
    "text": "strings",
    "number": "numbers",
    "boolean": "true or false",
    "texts": "lists of strings",
}
_OPERATORS: dict[Kind, tuple[str, ...]] = {
    "text": ("eq", "in", "gte", "gt", "lte", "lt"),
    "number": ("eq", "in", "gte", "gt", "lte", "lt"),
    "boolean": ("eq",),
    "texts": ("any", "all"),
}
_TYPES: dict[Kind, type | tuple[type, ...]] = {
    "text": str,
    "number": (int, float),
    "boolean": bool,
    "texts": str,
}


def _wrong(kind: Kind, operator: str, value: Any) -> str | None:
    """Why a field of this kind cannot be asked so, or None."""
    if operator == "exists":
        return None
    if operator not in _OPERATORS[kind]:
        return f"ask with {' '.join((*_OPERATORS[kind], 'exists'))}, not {operator}"
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, _TYPES[kind]) or (kind == "number" and isinstance(one, bool)):
            return f"{operator} is given {json.dumps(one)}"
    return None


def matches(found: Filter, columns: Mapping[str, pa.Array]) -> Mask:
    """Which rows meet the filter, [N]. `columns` are those of `retrieval/metadata.py`.

    The filter must have passed `check`.
    """
    rows = len(next(iter(columns.values())))
    mask = np.ones(rows, np.bool_)
    for field, condition in found.conditions.items():
        for operator, value in condition.operators():
            mask &= _holds(columns[field], operator, value)
    if found.not_ is not None:
        mask &= ~matches(found.not_, columns)
    if found.or_ is not None:
        any_of = np.zeros(rows, np.bool_)
        for one in found.or_:
            any_of |= matches(one, columns)
        mask &= any_of
    return mask


def _holds(column: pa.Array, operator: str, value: Any) -> Mask:
    if operator == "exists":
        return _mask(column.is_valid() if value else column.is_null())
    if operator in ("any", "all"):
        return _of_lists(column, operator, value)
    if pa.types.is_dictionary(column.type):
        return _of_words(column, operator, value)
    return _mask(_compared(column, operator, value).fill_null(False))


def _of_lists(column: pa.ListArray, operator: str, wanted: list[str]) -> Mask:
    """Which lists hold any, or all, of the wanted strings, [N]: one pass, however many they are."""
    wanted_L = _of_words(column.values, "in", wanted)
    # How many of the strings so far, at both ends of each list.
    counts_L = np.concatenate([[0], np.cumsum(wanted_L)])
    ends_N = column.offsets.to_numpy()
    counts_N = counts_L[ends_N[1:]] - counts_L[ends_N[:-1]]
    least = 1 if operator == "any" else len(set(wanted))
    enough_N = np.asarray(counts_N >= least)
    if least == 1 or not enough_N.any():
        return enough_N
    # A list may hold a string twice: of those with enough strings, the different ones are counted.
    lists_L = np.repeat(np.arange(len(column)), np.diff(ends_N))
    places = np.flatnonzero(wanted_L & enough_N[lists_L])
    words = column.values.indices.to_numpy()[places]
    pairs = np.sort(lists_L[places] * len(column.values.dictionary) + words)
    new = pairs[np.diff(pairs, prepend=-1) > 0]
    different_N = np.bincount(new // len(column.values.dictionary), minlength=len(column))
    return np.asarray(different_N == least)


def _of_words(column: pa.DictionaryArray, operator: str, value: Any) -> Mask:
    """Each word of the dictionary is compared once; rows without one stand at its end."""
    words_W = _mask(_compared(column.dictionary, operator, value))
    places = column.indices.fill_null(len(words_W)).to_numpy()
    return np.asarray(np.append(words_W, False)[places], np.bool_)


def _compared(column: pa.Array, operator: str, value: Any) -> pa.Array:
    if operator == "in":
        # Arrow tells -0.0 from 0 here, and in no other comparison.
        either = [*value, 0.0, -0.0] if 0 in value else value
        return pc.is_in(column, value_set=pa.array(either, column.type))
    compare = {
        "eq": pc.equal,
        "gte": pc.greater_equal,
        "gt": pc.greater,
        "lte": pc.less_equal,
        "lt": pc.less,
    }[operator]
    return compare(column, pa.scalar(value, column.type))


def _mask(found: pa.BooleanArray) -> Mask:
    return np.asarray(found.to_numpy(zero_copy_only=False), np.bool_)
