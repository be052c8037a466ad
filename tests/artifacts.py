"""Artefacts that a test makes in a line."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from bixse.artifacts import Artifact, Draft, begin


def drafted(at: Path | str, kind: str) -> Draft:
    """One that is begun, of no config and no input."""
    draft = begin(str(at), kind, config={}, inputs={})
    assert isinstance(draft, Draft)
    return draft


def artifact(
    at: Path | str, kind: str, rows: list[dict[str, Any]], schema: pa.Schema, **extra: Any
) -> Artifact:
    """One of one part; where one is finished already, that."""
    draft = begin(str(at), kind, config={}, inputs={})
    if isinstance(draft, Artifact):
        return draft
    draft.write_part(0, pa.Table.from_pylist(rows, schema=schema))
    return draft.finish(extra=extra)
