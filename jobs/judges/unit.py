"""What a judging worker does with a unit of pairs: read, look up, ask, file, answer."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from bixse.artifacts import Artifact
from bixse.judging.asked import Answers, Asked, PairJudge, Refused, Usage, Verdict
from bixse.judging.labels import Label, Labels, label_key
from bixse.judging.pointwise import refuse_unreadable
from bixse.records import JUDGMENTS, Judgment, Rejection
from jobs.judges.seam import Judge
from jobs.judges.trying import Trying
from jobs.parts import Refusal, Unfinished, sorted_out
from jobs.texts import DocumentTexts, QueryTexts

_UNTOLD = (
    "the endpoint does not say how many tokens it has read, and nothing would stop at "
    "--judging.max-cost: --judging.max-pairs limits what is asked"
)

REFRESH_SHARE = 0.1
"""The most of a worker's time that goes into looking for labels that other jobs have added."""


class JudgeUnit:
    """Reads: query_id, doc_id. Adds: the rest of a judgment.

    Pairs whose texts this judge has graded before, here or in another job, are answered from the
    label store; equal texts in a unit are asked once. The judge itself is loaded when the first
    pair must be asked. Called by several threads.
    """

    def __init__(
        self,
        queries: Sequence[Artifact],
        corpus: Artifact,
        judge: Judge,
        store: str | None,
        budget: Any = None,
        trying: str | None = None,
        prices: tuple[float, float] | None = None,
    ) -> None:
        """`budget` is an actor (`jobs.judges.budget`); None asks without end. At `trying` stands
        what workers died of (`jobs.judges.trying`); None keeps no such notes. `prices` are those of
        a prompt token and an output token, where the budget is of money for them.
        """
        self._queries = QueryTexts(queries)
        self._texts = DocumentTexts(corpus)
        self._signature = judge.signature or {}
        notes = None if trying is None else Trying(trying)
        self._ask = _Budgeted(_Once(judge.build, judge.arguments), budget, notes, prices)
        self._known = None
        if store is not None and judge.signature is not None:
            self._known = _Known(Labels(store, judge.signature))

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[Rejection], dict[str, float]]:
        asked = asked_pairs(rows, self._queries, self._texts)
        verdicts: Sequence[Verdict]
        if self._known is None:
            try:
                answers = self._ask(asked)
            except Refused as refused:
                raise _refusal(refused, len(refused.verdicts), refused.usage) from None
            _refuse(answers, [])
            verdicts, counts = answers.verdicts, _counts(len(answers.verdicts), 0, answers.usage)
            if len(verdicts) < len(asked):
                raise Unfinished(counts)
        else:
            verdicts, counts = self._through_store(asked, self._known)
        return *sorted_out(verdicts, JUDGMENTS), counts

    def _through_store(
        self, asked: Sequence[Asked], known: "_Known"
    ) -> tuple[list[Verdict], dict[str, float]]:
        keys = [label_key(self._signature, pair.query, pair.passage) for pair in asked]
        found = known.find(keys)
        # Equal texts under several ids are one question.
        firsts: dict[bytes, Asked] = {}
        for key, label, pair in zip(keys, found, asked, strict=True):
            if label is None:
                firsts.setdefault(key, pair)
        try:
            answers = self._ask(list(firsts.values()))
        except Refused as refused:
            # Paid for: the next run finds them.
            some = list(firsts)
            _file(known, {some[row]: verdict for row, verdict in refused.verdicts.items()})
            raise _refusal(refused, len(refused.verdicts), refused.usage) from None
        _refuse(answers, found)
        fresh = dict(zip(firsts, answers.verdicts, strict=False))
        _file(known, fresh)
        counts = _counts(len(fresh), len(asked) - len(firsts), answers.usage)
        if len(fresh) < len(firsts):
            raise Unfinished({**counts, "known": 0})
        verdicts = [
            label.judgment(pair.query_id, pair.doc_id)
            if label is not None
            else replace(fresh[key], query_id=pair.query_id, doc_id=pair.doc_id)
            for key, label, pair in zip(keys, found, asked, strict=True)
        ]
        return verdicts, counts


def asked_pairs(rows: pa.Table, queries: QueryTexts, texts: DocumentTexts) -> list[Asked]:
    """The pairs with what stands under their ids."""
    query_ids, doc_ids = rows["query_id"].to_pylist(), rows["doc_id"].to_pylist()
    found = zip(query_ids, doc_ids, queries.get(query_ids), texts.get(doc_ids), strict=True)
    return [Asked(*pair) for pair in found]


def _file(known: "_Known", verdicts: Mapping[bytes, Verdict]) -> None:
    known.labels.add(
        [Label.of(key, new) for key, new in verdicts.items() if isinstance(new, Judgment)]
    )


def _refuse(answers: Answers, known: Sequence[Label | None]) -> None:
    """Raises Refusal where `refuse_unreadable` refuses a unit without a grade.

    Labels count: rejections are not filed, so that a unit may ask nothing but hard pairs.
    """
    if any(known) or any(isinstance(one, Judgment) for one in answers.verdicts):
        return
    try:
        refuse_unreadable(answers.unreadable)
    except ValueError as error:
        raise _refusal(error, len(answers.verdicts), answers.usage) from None


def _refusal(error: ValueError, asked: int, usage: Usage) -> Refusal:
    """The end of the stage, with what the pairs that were asked have taken."""
    return Refusal(str(error), _counts(asked, 0, usage))


def _counts(new: int, known: int, usage: Usage) -> dict[str, float]:
    return {
        "new": new,
        "known": known,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
        "engine_seconds": usage.seconds,
        "flops": usage.flops,
        "peak_flops": usage.peak_flops,
    }


class _Once:
    """Builds the judge at the first call, whichever thread makes it."""

    def __init__(self, build: Callable[..., PairJudge], arguments: tuple[Any, ...]) -> None:
        self._build, self._arguments = build, arguments
        self._lock = threading.Lock()
        self._judge: PairJudge | None = None

    def __call__(self) -> PairJudge:
        with self._lock:
            if self._judge is None:
                self._judge = self._build(*self._arguments)
            return self._judge


class _Budgeted:
    """Asks as many of the pairs as the budget allows, in their order.

    Pairs that a worker has died of, or the judge has failed on, are asked one at a time.
    """

    def __init__(
        self,
        judge: _Once,
        budget: Any,
        trying: Trying | None,
        prices: tuple[float, float] | None,
    ) -> None:
        self._judge, self._budget, self._trying, self._prices = judge, budget, trying, prices

    def __call__(self, asked: Sequence[Asked]) -> Answers:
        if self._trying is None or not asked:
            return self._within_budget(asked, self._together)
        with self._trying.unit(asked) as died:
            return self._within_budget(asked, self._one_by_one if died else self._in_parts)

    def _together(self, asked: Sequence[Asked]) -> Answers:
        return self._judge()(asked)

    def _in_parts(self, asked: Sequence[Asked]) -> Answers:
        try:
            return self._together(asked)
        except (ValueError, OSError):
            # An error for the user to see, or one that may not come again (`PairJudge`).
            raise
        except Exception:  # noqa: BLE001
            # An engine may raise anything, and a single pair may be the cause.
            return self._one_by_one(asked)

    def _one_by_one(self, asked: Sequence[Asked]) -> Answers:
        assert self._trying is not None
        found: dict[int, Verdict] = {}
        failed: list[int] = []
        usage, unreadable = Usage(), list[str]()
        for row, pair in enumerate(asked):
            with self._trying.pair(pair) as fatal:
                try:
                    answers = Answers([fatal]) if fatal else self._judge()([pair])
                except ValueError as error:
                    raise _after(found, row, usage, error) from None
                except OSError:
                    raise
                except Exception:  # noqa: BLE001
                    # Not swallowed: `_once_more` answers, rejects or raises it.
                    failed.append(row)
                    continue
            (found[row],) = answers.verdicts
            usage += answers.usage
            unreadable += answers.unreadable
        well = next((asked[row] for row, one in found.items() if isinstance(one, Judgment)), None)
        for row in failed:
            answers = self._once_more(asked[row], well)
            (found[row],) = answers.verdicts
            usage += answers.usage
            unreadable += answers.unreadable
        return Answers([found[row] for row in range(len(asked))], usage, unreadable)

    def _once_more(self, pair: Asked, well: Asked | None) -> Answers:
        """Of a pair that the judge failed on alone: an answer, or a rejection where it fails again
        and still answers `well`. Raises what it failed with where the judge is what is broken."""
        assert self._trying is not None
        # Noted until `well` is answered: the pair may leave the judge in a state that kills it.
        with self._trying.pair(pair) as fatal:
            try:
                return Answers([fatal]) if fatal else self._judge()([pair])
            except (ValueError, OSError):
                raise
            except Exception as error:
                # Only if the judge still answers another pair is this one known to be the cause.
                if well is None:
                    raise
                spent = self._judge()([well]).usage
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
                reason = f"the judge failed twice on this pair alone: {said}"
                refused = Rejection(reason, query_id=pair.query_id, doc_id=pair.doc_id)
                return Answers([refused], spent)

    def _within_budget(
        self, asked: Sequence[Asked], ask: Callable[[Sequence[Asked]], Answers]
    ) -> Answers:
        verdicts: list[Verdict] = []
        usage, unreadable = Usage(), list[str]()
        while len(verdicts) < len(asked):
            rest = asked[len(verdicts) :]
            allowed = self._take(len(rest))
            if not allowed:
                break
            try:
                answers = ask(rest[:allowed])
                cost = self._cost(answers)
            except ValueError as error:
                raise _after(dict(enumerate(verdicts)), len(verdicts), usage, error) from None
            verdicts += answers.verdicts
            usage += answers.usage
            unreadable += answers.unreadable
            if self._budget is not None:
                self._budget.settle.remote(allowed, cost)
        return Answers(verdicts, usage, unreadable)

    def _cost(self, answers: Answers) -> float:
        if self._prices is None:
            return 0.0
        if not answers.usage.prompt_tokens and len(answers.unreadable) < len(answers.verdicts):
            raise Refused(_UNTOLD, dict(enumerate(answers.verdicts)), answers.usage)
        return answers.usage.cost(self._prices)

    def _take(self, wanted: int) -> int:
        if self._budget is None:
            return wanted
        import ray

        return int(ray.get(self._budget.take.remote(wanted)))


def _after(found: Mapping[int, Verdict], start: int, usage: Usage, error: ValueError) -> ValueError:
    """What ends the asking of the pairs from row `start` on, with the verdicts on those before."""
    if isinstance(error, Refused):
        late = {start + row: verdict for row, verdict in error.verdicts.items()}
        return Refused(str(error), {**found, **late}, usage + error.usage)
    return Refused(str(error), found, usage) if found else error


class _Known:
    """Labels, looked at again before each unit as long as that takes little of the time."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self._lock = threading.Lock()
        self._ended, self._took = time.monotonic(), 0.0

    def find(self, keys: Sequence[bytes]) -> list[Label | None]:
        with self._lock:
            started = time.monotonic()
            if started - self._ended >= self._took / REFRESH_SHARE:
                self.labels.refresh()
                self._ended = time.monotonic()
                self._took = self._ended - started
        return self.labels.find(keys)
