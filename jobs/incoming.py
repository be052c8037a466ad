"""Rows and rejections of what was ingested, on their way into parts of a draft."""

from collections import Counter
from typing import Any

import pyarrow as pa

from bixse.artifacts import Draft
from bixse.records import Metadata, Rejection
from jobs.metadata import write_metadata
from jobs.parts import rejected_table

_HELD_ROWS = 8192
"""Rows of a part that are held as dictionaries before they are put into a table."""


class Parts:
    """Rows and rejections on their way into parts of a draft."""

    def __init__(self, draft: Draft, schema: pa.Schema, rows: int) -> None:
        self._draft, self._schema, self._rows = draft, schema, rows
        self._kept: list[dict[str, Any]] = []
        self._tables: list[pa.Table] = []
        self._held = 0
        self._metadata: list[tuple[str, Metadata]] = []
        self._rejected: list[Rejection] = []
        self._number = 0
        self.total = 0
        self.first_rejection: Rejection | None = None
        self._reasons: Counter[str] = Counter()

    def keep(self, row: dict[str, Any]) -> None:
        self._kept.append(row)
        self._held += 1
        self.total += 1
        if len(self._kept) == _HELD_ROWS:
            self._fold()
        self._flush_if(self._rows)

    def describe(self, doc_id: str, metadata: Metadata) -> None:
        """The metadata of the document that is kept next."""
        self._metadata.append((doc_id, metadata))

    def reject(self, rejection: Rejection) -> None:
        self.first_rejection = self.first_rejection or rejection
        self._reasons[rejection.reason] += 1
        self._rejected.append(rejection)
        self._flush_if(self._rows)

    @property
    def rejected_for(self) -> dict[str, int]:
        """Rejections of the five commonest reasons, for the manifest."""
        return dict(self._reasons.most_common(5))

    def refuse_none(self, what: str, described: str) -> None:
        """Raises ValueError, with the first reason, where nothing was kept."""
        if self.total:
            return
        why = self.first_rejection
        reason = f": {why.source} line {why.line}: {why.reason}" if why else ""
        raise ValueError(f"no valid {what} in {described}{reason}")

    def close(self) -> None:
        if self._held or self._rejected or not self._number:
            self._flush_if(0)

    def _fold(self) -> None:
        """Rows in a table are a tenth of what they are as dictionaries."""
        self._tables.append(pa.Table.from_pylist(self._kept, schema=self._schema))
        self._kept = []

    def _flush_if(self, full: int) -> None:
        if self._held >= full or len(self._rejected) >= max(full, 1):
            self._fold()
            table = pa.concat_tables(self._tables)
            write_metadata(self._draft, self._number, self._metadata)
            self._draft.write_part(self._number, table, rejected_table(self._rejected))
            self._number += 1
            self._tables, self._rejected, self._metadata = [], [], []
            self._held = 0
