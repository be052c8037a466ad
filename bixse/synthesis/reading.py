"""What a generator answered -> the texts in it, strictly: an answer that breaks a rule is none.

The pydantic models are both the JSON schema that the engine holds an answer to and what reads it.
"""

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from bixse.records import count_words, text_hash, words
from bixse.synthesis.prompts import WRITTEN, key_of

MAX_QUERY_CHARACTERS = 400
MAX_PASSAGE_CHARACTERS = 2000
COPIED_WORDS = 6
"""So many words or more that stand in the document as they are, are a copy of it (ours)."""


class Unreadable(ValueError):
    """An answer that holds no text to keep; its sentence is the reason of the rejection."""


class WrittenQuery(BaseModel):
    """The answer to every prompt that asks for a query."""

    model_config = ConfigDict(extra="forbid", strict=True)
    query: str = Field(min_length=1, max_length=MAX_QUERY_CHARACTERS)


class Better(BaseModel):
    """The answer to a comparison of two queries."""

    model_config = ConfigDict(extra="forbid", strict=True)
    better: Literal["first", "second"]


_Passage = Field(min_length=1, max_length=MAX_PASSAGE_CHARACTERS)
_GRADES = tuple(int(value) for value in reversed(WRITTEN.values))
_FIELDS: dict[str, Any] = {key_of(grade): (str, _Passage) for grade in _GRADES}
WrittenPassages = create_model(
    "WrittenPassages", __config__=ConfigDict(extra="forbid", strict=True), **_FIELDS
)
"""One passage a grade, the best first."""

# What models put before the words of the query though nobody asked for it.
_PREFIX = re.compile(
    r"(?i)^(?:\W*(?:search )?(?:query|question|claim|title|keywords|argument)\s*[:\uff1a]\**|"
    r"(?:[-*•]|\d{1,2}[.)])\s)"
)
_QUOTES = "\"'`\u201c\u201d\u2018\u2019\u00ab\u00bb"
_GRADE_NAMED = re.compile(
    r"(?i)\b(?:perfectly|highly)[ -]relevant\b|\birrelevant (?:passage|to the query)|"
    r"\b(?:grade|relevance)[ _:]*[0-3]\b"
)


def read_query(response: str, document: str) -> str:
    """The query of an answer, freed of prefixes and quotes.

    Raises Unreadable when the answer is not the JSON that was asked for or was cut off, when
    nothing with a letter or digit is left, or when the query is a copy of `document` or of a
    stretch of it.
    """
    text = _read(WrittenQuery, response).query
    _refuse_cut("the query", text, MAX_QUERY_CHARACTERS)
    text = " ".join(text.split())
    while (freed := _PREFIX.sub("", _unquoted(text)).strip()) != text:
        text = freed
    if not any(c.isalnum() for c in text):
        raise Unreadable("the query has no word")
    if is_copy(text, document):
        raise Unreadable("the query is copied from the document")
    return text


def _refuse_cut(what: str, text: str, most: int) -> None:
    """Raises Unreadable for a text as long as may be: the engine, which holds an answer to the
    schema, closes a string there and goes on, in the middle of a word or not."""
    if len(text) >= most:
        raise Unreadable(f"{what} was cut off: {most} characters")


def _unquoted(text: str) -> str:
    """The text without the quotes around all of it; those around a word of it stay."""
    first, inside, last = text[:1], text[1:-1], text[-1:]
    around = first in _QUOTES and last in _QUOTES and not {first, last} & set(inside)
    return inside.strip() if around else text


def is_copy(query: str, document: str) -> bool:
    """Whether the query is the whole document, or a stretch of it of `COPIED_WORDS` words or more.

    Case, punctuation, white space and Unicode form aside.
    """
    asked, said = words(query), words(document)
    if asked == said:
        return True
    return count_words(asked) >= COPIED_WORDS and f" {' '.join(asked)} " in f" {' '.join(said)} "


def read_passages(response: str, query: str) -> dict[int, str]:
    """grade -> passage, every grade of `WRITTEN` once.

    Raises Unreadable when the answer is not the JSON that was asked for, or when a passage was cut
    off, is empty, equals another, holds the whole query or names its grade.
    """
    answer = _read(WrittenPassages, response)
    for grade in _GRADES:
        _refuse_cut("a passage", getattr(answer, key_of(grade)), MAX_PASSAGE_CHARACTERS)
    found = {grade: " ".join(getattr(answer, key_of(grade)).split()) for grade in _GRADES}
    if len({text_hash(text) for text in found.values()}) < len(found):
        raise Unreadable("two grades have the same passage")
    asked = words(query)
    whole = f" {' '.join(asked)} "
    for grade, text in found.items():
        if not any(c.isalnum() for c in text):
            raise Unreadable(f"a passage has no word: grade {grade}")
        if _GRADE_NAMED.search(text):
            raise Unreadable(f"a passage names its grade: grade {grade}")
        if count_words(asked) >= 3 and whole in f" {' '.join(words(text))} ":
            raise Unreadable(f"a passage repeats the query: grade {grade}")
    return found


def read_better(response: str) -> Literal["first", "second"]:
    """Which query is better. Raises Unreadable."""
    better: Literal["first", "second"] = _read(Better, response).better
    return better


def _read(model: type[BaseModel], response: str) -> Any:
    try:
        return model.model_validate_json(response)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        detail = f"{where} {first['msg']}" if where else first["msg"]
        raise Unreadable(f"not the JSON that was asked for: {detail}") from None
