"""A log of what was shown, and a table of clicks: lines as they come -> lists that can be counted.

The log is JSON lines as `--request-log` of the server writes them; of each only these are read:

    {"request_id", "policy", "results": [{"query", "shown": [{"doc_id", "rank", "click"?}]}]}

A click stands in the line itself (`"click": true`), or in a table with the columns `request_id` and
`doc_id` and, where a request asked several queries, `query`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from bixse.judging.settings import Clicks
from bixse.records import Rejection, ids_hash, text_hash
from jobs.files import expanded, file_fingerprint
from jobs.formats import Row, check_columns, read_all

_OF_A_LINE = ("request_id", "policy", "results", "query", "shown")
_OF_A_CLICK = ("request_id", "doc_id", "query")


@dataclass(frozen=True, slots=True)
class ShownList:
    """What was shown for one query."""

    row: Row
    request_id: str | None
    query: str
    shown: list[tuple[str, int, bool]]
    """`doc_id`, rank, and whether the line itself says that it was clicked."""


def log_files(settings: Clicks) -> list[str]:
    """Raises ValueError when no log is named, or none is there."""
    if not settings.shown:
        raise ValueError("--judging.judge clicks needs what was shown: set --judging.clicks.shown")
    return expanded(settings.shown)


def log_fingerprint(urls: Sequence[str]) -> str:
    """Of the files' content and own names: where a log lies is no part of what it says."""
    return ids_hash(map(file_fingerprint, urls))


def read_lists(settings: Clicks, reject: Callable[[Rejection], object]) -> Iterator[ShownList]:
    """What the log holds of the policies that count; a line that is no list is rejected whole."""
    for row in read_all(log_files(settings), "", _OF_A_LINE):
        if row.problem:
            reject(row.reject(row.problem))
            continue
        if settings.policies and row.fields.get("policy") not in settings.policies:
            continue
        try:
            found = _lists_of(row)
        except ValueError as problem:
            reject(row.reject(str(problem)))
            continue
        yield from found


def _lists_of(row: Row) -> list[ShownList]:
    """The lists of a line. Raises ValueError, which says what is not as it should be."""
    request_id, results = row.fields.get("request_id"), row.fields.get("results")
    if not (request_id is None or isinstance(request_id, str)):
        raise ValueError("a request_id that is no text")
    if results is None:
        results = [row.fields]
    if not isinstance(results, list):
        raise ValueError("results that are no list")
    found = []
    for result in results:
        query = result.get("query") if isinstance(result, dict) else None
        shown = result.get("shown") if isinstance(result, dict) else None
        if not isinstance(shown, list):
            raise ValueError("no list of what was shown")
        if not _is_text(query) or not query.strip():
            raise ValueError("no query, or none that is text")
        found.append(ShownList(row, request_id or None, query, [_place(one) for one in shown]))
    return found


def _place(shown: Any) -> tuple[str, int, bool]:
    """`doc_id`, rank, and whether it was clicked. Raises ValueError."""
    if not isinstance(shown, dict) or not _is_text(shown.get("doc_id")):
        raise ValueError("a document without a doc_id that is text")
    rank, click = shown.get("rank"), shown.get("click")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError("a rank that is no whole number from 1")
    if click is not None and click not in (0, 1):
        raise ValueError("a click that is neither true nor false")
    return shown["doc_id"], rank, bool(click)


def _is_text(value: Any) -> TypeGuard[str]:
    """Half of a surrogate pair is none."""
    return isinstance(value, str) and value == value.encode("utf-8", "replace").decode()


@dataclass
class ClickTable:
    """The clicks of a table, and which of them have been met in what was shown."""

    rows: dict[tuple[str, str | None, str], Row] = field(default_factory=dict)
    met: set[tuple[str, str | None, str]] = field(default_factory=set)
    lists: set[int] = field(default_factory=set)

    @classmethod
    def read(cls, urls: Sequence[str], rejected: list[Rejection]) -> "ClickTable":
        """Raises ValueError for a table without the columns."""
        found = cls()
        for row in read_all(expanded(urls), "", _OF_A_CLICK):
            if not row.problem:
                check_columns(row, ("request_id",), ("doc_id",))
            request_id, doc_id, query = (row.fields.get(name) for name in _OF_A_CLICK)
            if row.problem or request_id in (None, "") or doc_id in (None, ""):
                rejected.append(row.reject(row.problem or "no request_id or no doc_id"))
                continue
            asked = None if query in (None, "") else text_hash(str(query))
            found.rows[str(request_id), asked, str(doc_id)] = row
        return found

    def holds(self, one: ShownList, key: str, doc_id: str) -> bool:
        if one.request_id is None:
            return False
        hit = False
        for asked in (None, key):
            click = (one.request_id, asked, doc_id)
            if click in self.rows:
                self.met.add(click)
                hit = True
        return hit

    def again(self, one: ShownList, key: str) -> bool:
        """Whether this list was read before: its clicks can be of one of the two only."""
        if not self.rows or one.request_id is None:
            return False
        # A hash: the ids themselves are not held.
        read = hash((one.request_id, key))
        if read in self.lists:
            return True
        self.lists.add(read)
        return False

    def rejections(self, why: str) -> Iterator[Rejection]:
        for click, row in self.rows.items():
            if click not in self.met:
                yield row.reject(why, doc_id=click[2])
