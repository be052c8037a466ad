"""What people were shown and clicked -> judgments: clicks without what their rank did to them.

    python -m jobs.train two_tower --data DIR --out DIR --judging.clicks.shown LOG

`jobs.shown` reads the log, and `bixse.judging.clicks` has the mathematics. Logs stream: memory
follows the ids of the corpus, the queries, the distinct (query, document, rank), and where clicks
stand in a table its rows and a number for each list. Each stage reads finished artefacts or the
log, and writes one:

    shown-queries   what was asked and is no query of --data
    clicks          impressions and clicks of a document at a rank, and what the rank does
    judgments       relevance of each document that was shown for a query
"""

import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bixse.artifacts import MANIFEST, Artifact, Draft, begin, fingerprints
from bixse.judging.clicks import RankBias, Shown, placement_weights, rank_bias, relevance_of
from bixse.judging.settings import Clicks
from bixse.place import Place
from bixse.records import (
    CLICKS,
    JUDGMENTS,
    QUERIES,
    Judgment,
    Query,
    Rejection,
    ids_hash,
    text_hash,
)
from bixse.scale import Scale, linear
from jobs.files import expanded, unchanged
from jobs.incoming import Parts
from jobs.parts import rejected_table, write_rows
from jobs.shown import ClickTable, ShownList, log_files, log_fingerprint, read_lists

PART_ROWS = 100_000
SCALE: Scale = linear(0, 1)
_WAITING = 1_000_000
"""Fewest impressions that are counted together."""


def shown_queries(settings: Clicks, given: Artifact, out: str) -> Artifact:
    """A query for each text that was asked and is none of `given`.

    Lines that cannot be read are rejected. Raises ValueError in one sentence when no log is named,
    it cannot be read or changes while it is, or no line of it is a list.
    """
    urls, config = log_files(settings), {"policies": sorted(settings.policies)}
    with unchanged(urls, _undoing(out)):
        inputs = {"shown": log_fingerprint(urls), **fingerprints(given=given)}
        draft = begin(out, "queries", config=config, inputs=inputs)
        if isinstance(draft, Artifact):
            return draft
        known, lists = set(map(text_hash, given.column("text"))), 0
        parts = Parts(draft, QUERIES, PART_ROWS)
        for one in read_lists(settings, parts.reject):
            lists += 1
            key = text_hash(one.query)
            if key not in known:
                known.add(key)
                parts.keep(asdict(Query(f"shown:{key}", one.query)))
    if not lists:
        draft.place.clear()
        first = parts.first_rejection
        why = f": {first.source} line {first.line}: {first.reason}" if first else ""
        of_policies = " under the policies that are named" if settings.policies else ""
        raise ValueError(f"--judging.clicks.shown holds no list of documents{of_policies}{why}")
    parts.close()
    return draft.finish(extra={"lists": lists, "rejected_for": parts.rejected_for})


def import_clicks(
    settings: Clicks,
    queries: Sequence[Artifact],
    corpus: Artifact,
    held_out: frozenset[str],
    out: str,
) -> Artifact:
    """Impressions and clicks by query, document and rank, of queries that may be trained on.

    Rejected are documents that the corpus lacks, clicks on what was not shown, lists of a request
    that was read before, and ranks of which nothing says what they do. Raises ValueError in one
    sentence when that leaves rank 1 alone, nobody clicked on anything, or the log changes.
    """
    inputs = {**fingerprints(corpus=corpus, queries=queries), "skipped queries": ids_hash(held_out)}
    log, clicked = log_files(settings), expanded(settings.clicked)
    rejected: list[Rejection] = []
    with unchanged([*log, *clicked], _undoing(out)):
        inputs["shown"] = log_fingerprint(log)
        if clicked:
            inputs["clicked"] = log_fingerprint(clicked)
        if any(
            one.manifest.inputs.get("shown", inputs["shown"]) != inputs["shown"] for one in queries
        ):
            raise _changed()
        draft = begin(out, "clicks", config=_config(settings), inputs=inputs)
        if isinstance(draft, Artifact):
            return draft
        counted = _counted(settings, queries, corpus, held_out, rejected)
    _refuse_unclicked(counted.shown, rejected)
    bias = _bias(settings, counted.shown)
    kept_O = bias.known_K[counted.shown.rank_O - 1]
    if bias.known_K.sum() < 2 and not settings.rank_bias:
        raise ValueError(
            "nothing tells what a rank does from what a document is worth: no document was shown "
            "at rank 1 and at another for the same query, and clicked at one of the two and not at "
            "the other; log lists that change (serve.app --swap-share), or name what ranks do with "
            "--judging.clicks.rank-bias"
        )
    rejected += counted.rejections(~kept_O)
    _refuse_unclicked(counted.shown.where(kept_O), rejected)
    weight_O = np.ones(len(kept_O))
    if settings.placement_weights:
        shown, of_query_O = counted.shown, counted.lists_of_query_O
        weight_O = placement_weights(shown.impressions_O, of_query_O, settings.largest_weight)
        if (shown.impressions_O == of_query_O).all():
            print("every query was always shown one list: placement weights are 1", file=sys.stderr)
    _write(draft, counted, bias, weight_O, kept_O, rejected)
    return draft.finish(
        extra={
            "lists": counted.lists,
            "held_out_lists": counted.held_out,
            "impressions": counted.impressions,
            "deeper_impressions": counted.deeper,
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


def _undoing(out: str) -> Callable[[], None]:
    """Takes away what is begun at `out` from here on."""
    place = Place(out)
    return (lambda: None) if place.exists(MANIFEST) else place.clear


def _changed() -> ValueError:
    return ValueError(
        "what was shown has changed since its queries were read: name a log that nobody writes to, "
        "a copy of it or its older files, and another --out"
    )


def _config(settings: Clicks) -> dict[str, Any]:
    """What shapes the clicks of a log: nothing that another setting leaves unread."""
    config: dict[str, Any] = {"policies": sorted(settings.policies), "ranks": settings.ranks}
    if settings.rank_bias:
        config["rank_bias"] = list(settings.rank_bias)
    else:
        config["rank_deviation"] = settings.rank_deviation
    if settings.placement_weights:
        config["largest_weight"] = settings.largest_weight
    return config


def _refuse_unclicked(shown: Shown, rejected: Sequence[Rejection]) -> None:
    if shown.clicks_O.any():
        return
    why = f", first: {rejected[0].reason}" if rejected else ""
    raise ValueError(
        f"nobody clicked on any of {shown.impressions_O.sum()} documents that were shown for a "
        f"query to train on ({len(rejected)} rows are left out{why})"
    )


class _Tally:
    """Impressions and clicks of whole numbers, counted as they come."""

    def __init__(self) -> None:
        self._waiting, self._clicked = array("q"), array("b")
        self._key_O = np.zeros(0, np.int64)
        self._count_O2 = np.zeros((0, 2), np.int64)

    def add(self, key: int, clicked: bool) -> None:
        self._waiting.append(key)
        self._clicked.append(clicked)
        # As many as there are keys: all are sorted again each time.
        if len(self._waiting) >= max(_WAITING, len(self._key_O)):
            self.counted()

    def counted(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The keys so far, rising, and [impressions, clicks] of each."""
        keys = np.concatenate([self._key_O, np.frombuffer(self._waiting, np.int64)])
        clicked = np.frombuffer(self._clicked, np.int8)
        more = np.stack([np.ones(len(clicked), np.int64), clicked], axis=1)
        counts = np.concatenate([self._count_O2, more])
        self._key_O, inverse = np.unique(keys, return_inverse=True)
        sums = [np.bincount(inverse, column, len(self._key_O)) for column in counts.T]
        self._count_O2 = np.stack(sums, axis=1).astype(np.int64)
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
    deeper: int
    """Impressions below the deepest rank that is read."""

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
    clicked = ClickTable.read(settings.clicked, rejected)
    ranks, tally, number = settings.ranks, _Tally(), dict[str, int]()
    lists_Q, held, deeper = array("q"), 0, 0
    unknown: dict[tuple[str, str], Rejection] = {}
    for one in read_lists(settings, lambda _: None):  # `shown_queries` has rejected them.
        key = text_hash(one.query)
        if key not in names:
            raise _changed()
        if clicked.again(one, key):
            rejected.append(_left_out("a request that was read before", one, names[key]))
            continue
        if names[key] in held_out:
            held += 1
            for doc_id, _, _ in one.shown:
                clicked.holds(one, key, doc_id)
            continue
        query = number.setdefault(names[key], len(number))
        if query == len(lists_Q):
            lists_Q.append(0)
        lists_Q[query] += 1
        for doc_id, rank, click in one.shown:
            row = row_of.get(doc_id)
            hit = clicked.holds(one, key, doc_id) or click
            if row is None:
                if (names[key], doc_id) not in unknown:
                    found = _left_out("unknown doc_id", one, names[key], doc_id)
                    unknown[names[key], doc_id] = found
            elif rank <= ranks:
                tally.add((query * len(doc_ids) + row) * ranks + rank - 1, hit)
            else:
                deeper += 1
    of_policies = " under these policies" if settings.policies else ""
    rejected += clicked.rejections(f"a click on what was not shown{of_policies}")
    rejected += unknown.values()
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
        deeper,
    )


def _left_out(why: str, one: ShownList, query_id: str, doc_id: str | None = None) -> Rejection:
    """Without the line itself, which may be long, and stand here for each of its documents."""
    return Rejection(
        why, source=one.row.source, line=one.row.line, query_id=query_id, doc_id=doc_id
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
