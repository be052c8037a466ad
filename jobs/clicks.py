"""What people were shown and clicked -> judgments: clicks without what their rank did to them.

    python -m jobs.train two_tower --data DIR --out DIR --judging.clicks.shown LOG

`shown` are JSON lines as `--request-log` of the server writes them; of each only these are read:

    {"request_id", "policy", "results": [{"query", "shown": [{"doc_id", "rank", "click"?}]}]}

A click stands in the line itself (`"click": true`), or in `clicked`, a table with the columns
`request_id` and `doc_id` and, where a request asked several queries, `query`. Logs stream: memory
follows the distinct (query, document, rank), and the clicks of a table. Each stage reads finished
artefacts or the log, and writes one (`bixse.judging.clicks` has the mathematics):

    shown-queries   what was asked and is no query of --data
    clicks          impressions and clicks of a document at a rank, and what the rank does
    judgments       relevance of each document that was shown for a query
"""

import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bixse.artifacts import Artifact, Draft, begin, fingerprints
from bixse.judging.clicks import RankBias, Shown, placement_weights, rank_bias, relevance_of
from bixse.judging.settings import Clicks
from bixse.records import CLICKS, JUDGMENTS, QUERIES, Judgment, Query, Rejection, text_hash
from bixse.scale import Scale, linear
from jobs.files import expanded, fingerprint
from jobs.formats import Row, check_columns, read_all
from jobs.parts import rejected_table, write_rows

PART_ROWS = 100_000
SCALE: Scale = linear(0, 1)
_OF_A_CLICK = ("request_id", "doc_id", "query")
_WAITING = 1_000_000
"""Impressions that are counted together."""


@dataclass(frozen=True, slots=True)
class _List:
    """What was shown for one query."""

    row: Row
    request_id: str | None
    query: str
    shown: list[tuple[str, int, bool]]
    """`doc_id`, rank, and whether the line itself says that it was clicked."""


def shown_queries(settings: Clicks, given: Artifact, out: str) -> Artifact:
    """A query for each text that was asked and is none of `given`.

    Lines that cannot be read are rejected. Raises ValueError in one sentence when no log is named,
    it cannot be read, or no line of it is a list.
    """
    inputs = {**_log_inputs(settings), **fingerprints(given=given)}
    draft = begin(out, "queries", config={"policies": list(settings.policies)}, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    known = set(map(text_hash, given.column("text")))
    found: dict[str, Query] = {}
    rejected: list[Rejection] = []
    lists = 0
    for one in _lists(settings, rejected):
        lists += 1
        key = text_hash(one.query)
        if key not in known and key not in found:
            found[key] = Query(f"shown:{key}", one.query)
    if not lists:
        why = [f": {one.source} line {one.line}: {one.reason}" for one in rejected[:1]]
        raise ValueError(f"--judging.clicks.shown holds no list of documents{''.join(why)}")
    write_rows(draft, found.values(), QUERIES, PART_ROWS, rejected)
    return draft.finish(extra={"lists": lists})


def import_clicks(
    settings: Clicks,
    queries: Sequence[Artifact],
    corpus: Artifact,
    held_out: frozenset[str],
    out: str,
) -> Artifact:
    """Impressions and clicks by query, document and rank, of queries that may be trained on.

    Rejected are documents that the corpus lacks, clicks on what was not shown, and ranks of which
    nothing says what they do. Raises ValueError in one sentence when that leaves rank 1 alone, or
    nobody clicked on anything.
    """
    inputs = {**_log_inputs(settings), **fingerprints(corpus=corpus, queries=queries)}
    config = settings.model_dump(mode="json", exclude={"shown", "clicked", "prior_deviation"})
    draft = begin(out, "clicks", config=config, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    rejected: list[Rejection] = []
    counted = _counted(settings, queries, corpus, held_out, rejected)
    if not counted.shown.clicks_O.sum():
        why = f", first {rejected[0].reason}" if rejected else ""
        raise ValueError(
            f"nobody clicked on any of {counted.impressions} documents that were shown for a query "
            f"to train on ({len(rejected)} rows are left out{why})"
        )
    bias = _bias(settings, counted.shown)
    kept_O = bias.known_K[counted.shown.rank_O - 1]
    if bias.known_K.sum() < 2 and not settings.rank_bias:
        raise ValueError(
            "no document was shown at two ranks for the same query and clicked at either, so that "
            "nothing tells what a rank does from what a document is worth: log lists that change "
            "(serve.app --swap-share), or name what ranks do with --judging.clicks.rank-bias"
        )
    rejected += counted.rejections(~kept_O)
    weight_O = np.ones(len(kept_O))
    if settings.placement_weights:
        shown, of_query_O = counted.shown, counted.lists_of_query_O
        weight_O = placement_weights(shown.impressions_O, of_query_O, settings.largest_weight)
        if (weight_O == 1).all():
            print("every query was always shown one list: placement weights are 1", file=sys.stderr)
    _write(draft, counted, bias, weight_O, kept_O, rejected)
    return draft.finish(
        extra={
            "lists": counted.lists,
            "held_out_lists": counted.held_out,
            "impressions": counted.impressions,
            "rank_bias": _rounded(bias.theta_K),
            "rank_bias_error": _rounded(bias.error_K),
        }
    )


def judge_clicks(clicks: Artifact, settings: Clicks, out: str) -> Artifact:
    """The relevance of each document that was shown: how probably it is clicked at rank 1."""
    config = {"prior_deviation": settings.prior_deviation}
    draft = begin(out, "judgments", config=config, inputs=fingerprints(clicks=clicks))
    if isinstance(draft, Artifact):
        return draft
    table = clicks.table(CLICKS.names)
    ids = list(zip(table["query_id"].to_pylist(), table["doc_id"].to_pylist(), strict=True))
    number: dict[tuple[str, str], int] = {}
    pair_O = np.array([number.setdefault(key, len(number)) for key in ids], np.int64)
    columns = (table[name].to_numpy() for name in ("rank", "impressions", "clicks"))
    shown = Shown(pair_O, *columns)
    relevance_P = relevance_of(shown, table["rank_bias"].to_numpy(), settings.prior_deviation)
    judge = f"clicks:{clicks.fingerprint[:12]}"
    found = (
        Judgment(*key, SCALE.grade_probs(z), z, judge, "", "clicks")
        for key, z in zip(number, relevance_P.tolist(), strict=True)
    )
    write_rows(draft, found, JUDGMENTS, PART_ROWS)
    told = {"rank_bias": clicks.manifest.extra["rank_bias"]}
    extra = {"scale": SCALE.record, "origin": "clicks", "judges": [judge], **told}
    return draft.finish(extra=extra)


def _log_inputs(settings: Clicks) -> dict[str, str]:
    if not settings.shown:
        raise ValueError("--judging.judge clicks needs what was shown: set --judging.clicks.shown")
    found = {"shown": fingerprint(expanded(settings.shown))}
    if settings.clicked:
        found["clicked"] = fingerprint(expanded(settings.clicked))
    return found


def _lists(settings: Clicks, rejected: list[Rejection]) -> Iterator[_List]:
    """What the log holds of the policies that count; a line that is no list is rejected whole."""
    for row in read_all(expanded(settings.shown), "", ()):
        counts = not settings.policies or row.fields.get("policy") in settings.policies
        if not row.problem and not counts:
            continue
        found = [] if row.problem else _lists_of(row)
        if found is None or row.problem:
            rejected.append(row.reject(row.problem or "no list of what was shown"))
            continue
        yield from found


def _lists_of(row: Row) -> list[_List] | None:
    """The lists of a line, or None where it is not what it should be."""
    request_id, results = row.fields.get("request_id"), row.fields.get("results", [row.fields])
    if not isinstance(results, list) or not (request_id is None or isinstance(request_id, str)):
        return None
    found = []
    for result in results:
        query = result.get("query") if isinstance(result, dict) else None
        shown = result.get("shown") if isinstance(result, dict) else None
        if not isinstance(query, str) or not query.strip() or not isinstance(shown, list):
            return None
        places = [_place(one) for one in shown]
        if any(place is None for place in places):
            return None
        found.append(_List(row, request_id, query, [place for place in places if place]))
    return found


def _place(shown: Any) -> tuple[str, int, bool] | None:
    if not isinstance(shown, dict):
        return None
    doc_id, rank, click = shown.get("doc_id"), shown.get("rank"), shown.get("click", False)
    if not isinstance(doc_id, str) or click not in (0, 1):
        return None
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        return None
    return doc_id, rank, bool(click)


@dataclass
class _Clicked:
    """The clicks of a table, and which of them have been met in what was shown."""

    rows: dict[tuple[str, str | None, str], Row] = field(default_factory=dict)
    met: set[tuple[str, str | None, str]] = field(default_factory=set)

    @classmethod
    def read(cls, urls: Sequence[str], rejected: list[Rejection]) -> "_Clicked":
        """Raises ValueError for a table without the columns."""
        found = cls()
        for row in read_all(expanded(urls), "", _OF_A_CLICK):
            if not row.problem:
                check_columns(row, ("request_id",), ("doc_id",))
            request_id, doc_id, query = (row.fields.get(name) for name in _OF_A_CLICK)
            if row.problem or request_id is None or doc_id is None:
                rejected.append(row.reject(row.problem or "no request_id or no doc_id"))
                continue
            asked = None if query in (None, "") else text_hash(str(query))
            found.rows[str(request_id), asked, str(doc_id)] = row
        return found

    def holds(self, one: _List, key: str, doc_id: str) -> bool:
        if one.request_id is None:
            return False
        hit = False
        for asked in (None, key):
            click = (one.request_id, asked, doc_id)
            if click in self.rows:
                self.met.add(click)
                hit = True
        return hit

    def rejections(self) -> Iterator[Rejection]:
        for click, row in self.rows.items():
            if click not in self.met:
                yield row.reject("a click on what was not shown", doc_id=click[2])


class _Tally:
    """Impressions and clicks of whole numbers, counted as they come."""

    def __init__(self) -> None:
        self._waiting, self._clicked = array("q"), array("b")
        self._key_O = np.zeros(0, np.int64)
        self._count_O2 = np.zeros((0, 2), np.int64)

    def add(self, key: int, clicked: bool) -> None:
        self._waiting.append(key)
        self._clicked.append(clicked)
        if len(self._waiting) == _WAITING:
            self.counted()

    def counted(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The keys so far, rising, and [impressions, clicks] of each."""
        keys = np.concatenate([self._key_O, np.frombuffer(self._waiting, np.int64)])
        clicked = np.frombuffer(self._clicked, np.int8)
        more = np.stack([np.ones(len(clicked), np.int64), clicked], axis=1)
        counts = np.concatenate([self._count_O2, more])
        self._key_O, inverse = np.unique(keys, return_inverse=True)
        self._count_O2 = np.zeros((len(self._key_O), 2), np.int64)
        np.add.at(self._count_O2, inverse, counts)
        self._waiting, self._clicked = array("q"), array("b")
        return self._key_O, self._count_O2


@dataclass(frozen=True)
class _Counted:
    """What a log comes to."""

    shown: Shown
    query_ids: list[str]
    doc_ids: list[str]
    """Of each observation."""
    lists_of_query_O: npt.NDArray[np.int64]
    lists: int
    held_out: int
    """Lists of queries of dev and test."""

    @property
    def impressions(self) -> int:
        return int(self.shown.impressions_O.sum())

    def rejections(self, out_O: npt.NDArray[np.bool_]) -> list[Rejection]:
        """Of observations at ranks of which nothing is known."""
        return [
            Rejection(
                f"nothing says what rank {self.shown.rank_O[at]} does",
                query_id=self.query_ids[at],
                doc_id=self.doc_ids[at],
            )
            for at in np.flatnonzero(out_O).tolist()
        ]


def _counted(
    settings: Clicks,
    queries: Sequence[Artifact],
    corpus: Artifact,
    held_out: frozenset[str],
    rejected: list[Rejection],
) -> _Counted:
    """Impressions and clicks of the log, in the order of query, document and rank."""
    names = _names(queries)
    doc_ids = sorted(corpus.column("doc_id"))
    row_of = {doc_id: row for row, doc_id in enumerate(doc_ids)}
    clicked = _Clicked.read(settings.clicked, rejected)
    ranks, tally, number = settings.ranks, _Tally(), dict[str, int]()
    lists_Q, held = array("q"), 0
    unread: list[Rejection] = []  # The queries have them.
    unknown: dict[tuple[str, str], Row] = {}
    for one in _lists(settings, unread):
        key = text_hash(one.query)
        if names[key] in held_out:
            held += 1
            continue
        query = number.setdefault(names[key], len(number))
        if query == len(lists_Q):
            lists_Q.append(0)
        lists_Q[query] += 1
        for doc_id, rank, click in one.shown:
            row = row_of.get(doc_id)
            hit = clicked.holds(one, key, doc_id) or click
            if row is None:
                unknown.setdefault((names[key], doc_id), one.row)
            elif rank <= ranks:
                tally.add((query * len(doc_ids) + row) * ranks + rank - 1, hit)
    rejected += clicked.rejections()
    rejected += [
        row.reject("unknown doc_id", query_id=query_id, doc_id=doc_id)
        for (query_id, doc_id), row in unknown.items()
    ]
    keys, counts = tally.counted()
    pair_O, rank_O = keys // ranks, keys % ranks + 1
    query_O, query_ids = pair_O // len(doc_ids), list(number)
    return _Counted(
        Shown(np.unique(pair_O, return_inverse=True)[1], rank_O, counts[:, 0], counts[:, 1]),
        [query_ids[one] for one in query_O.tolist()],
        [doc_ids[one] for one in (pair_O % len(doc_ids)).tolist()],
        np.frombuffer(lists_Q, np.int64)[query_O],
        sum(lists_Q),
        held,
    )


def _names(queries: Sequence[Artifact]) -> dict[str, str]:
    """The first `query_id` of each text."""
    found: dict[str, str] = {}
    for artifact in queries:
        for query_id, text in artifact.rows("query_id", "text"):
            found.setdefault(text_hash(text), query_id)
    return found


def _bias(settings: Clicks, shown: Shown) -> RankBias:
    """What ranks do: as the settings say, beside rank 1, or found in the log."""
    deepest = int(shown.rank_O.max())
    if not settings.rank_bias:
        return rank_bias(shown, deepest, settings.rank_deviation)
    theta_K = np.full(max(deepest, len(settings.rank_bias)), np.nan)
    theta_K[: len(settings.rank_bias)] = settings.rank_bias
    return RankBias(theta_K - theta_K[0], np.zeros_like(theta_K))


def _write(
    draft: Draft,
    counted: _Counted,
    bias: RankBias,
    weight_O: npt.NDArray[np.float64],
    kept_O: npt.NDArray[np.bool_],
    rejected: Sequence[Rejection],
) -> None:
    shown = counted.shown
    columns = {
        "query_id": counted.query_ids,
        "doc_id": counted.doc_ids,
        "rank": shown.rank_O,
        "impressions": shown.impressions_O,
        "clicks": shown.clicks_O,
        "rank_bias": bias.theta_K[shown.rank_O - 1],
        "weight": weight_O,
    }
    arrays = [pa.array(columns[name]).cast(CLICKS.field(name).type) for name in CLICKS.names]
    table = pa.table(arrays, schema=CLICKS).filter(pa.array(kept_O))
    for number, start in enumerate(range(0, max(1, len(table)), PART_ROWS)):
        beside = rejected_table(rejected if number == 0 else ())
        draft.write_part(number, table.slice(start, PART_ROWS), beside)


def _rounded(values: npt.NDArray[np.float64]) -> list[float | None]:
    return [round(float(v), 4) if np.isfinite(v) else None for v in values]
