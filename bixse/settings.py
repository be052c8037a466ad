"""What every settings section is: typed, frozen, complete, and light to import."""

import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

Precision = Literal["auto", "float32", "bfloat16"]
"""Of matrix products; auto is bfloat16 where the device has instructions for it."""


class Settings(BaseModel):
    """A frozen section of a recipe: unknown fields and wrong types are errors.

    The text under a field becomes its `--help` line.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    def replace(self, **changes: Any) -> Self:
        """A validated copy. (pydantic's `model_copy(update=...)` accepts anything.)"""
        return type(self).model_validate({**dict(self), **changes})


_REFUSED = re.compile(
    r"(?:Error parsing (?:[A-Z]\w*|(?:recipe\.)?([\w.]+)): )?\d+ validation errors? for \w+ "
    r"(?:([a-z][\w.]*) )?(Value error, )?(.+?) \[type=\w+, input_value=(.*?), input_type=\w+\]"
)
"""pydantic's complaint in one line: section, field, whether the words are ours, words, value."""


def plain_refusal(sentence: str) -> str:
    """What pydantic says is wrong, on one line, with the flag it is about and without its types."""
    refused = _REFUSED.search(sentence)
    if refused is None:
        return sentence
    section, field, ours, why, found = refused.groups()
    if field is None:
        return why
    flag = ".".join(filter(None, (section, field))).replace("_", "-")
    return f"--{flag}: {why}" if ours else f"--{flag}: {why}, found {found}"
