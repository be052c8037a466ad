"""What every settings section is: typed, frozen, complete, and light to import."""

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
