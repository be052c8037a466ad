"""Requests in, queries and documents or rejections out; the language model is a function.

Everything but the model itself is here: which chat a request becomes, how its answer is read, when
it is asked again. `Complete` is the seam: jobs put an engine there, tests a function.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from bixse.reading.chats import Messages
from bixse.records import Query, Rejection
from bixse.synthesis import prompts
from bixse.synthesis.prompts import DIFFICULTIES, LENGTHS, TASKS, Example
from bixse.synthesis.reading import Unreadable, read_better, read_passages, read_query
from bixse.synthesis.requests import Request, chance
from bixse.synthesis.settings import AsksDocuments, FewShot, Styled

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back; `problem` says why it is no answer (cut off, a prompt too long)."""

    text: str
    problem: str = ""


Complete = Callable[[Sequence[Messages], Sequence[int]], Sequence[Completion]]
"""Chats and a sampling seed for each -> one completion for each, in order."""


@dataclass(frozen=True, slots=True)
class Asked(Generic[T]):
    """A chat, what its answer means, and the key that its sampling seeds come from."""

    key: str
    messages: Messages
    read: Callable[[str], T]
    """Raises Unreadable."""


@dataclass(frozen=True, slots=True)
class Refused:
    """No readable answer in any attempt: the last reason and the last words received."""

    reason: str
    response: str


@dataclass(frozen=True, slots=True)
class WrittenDocument:
    """A document that a model wrote for a query at a grade."""

    doc_id: str
    title: str
    text: str
    query_id: str
    target_grade: float


def ask(
    asked: Sequence[Asked[T]], complete: Complete, attempts: int, seed: int
) -> list[T | Refused]:
    """Every answer, in order; what cannot be read is asked again with another seed.

    Raises RuntimeError when `complete` returns another number of completions.
    """
    found: dict[int, T | Refused] = {}
    waiting = list(range(len(asked)))
    for attempt in range(attempts):
        seeds = [sampling_seed(asked[row].key, seed, attempt) for row in waiting]
        completions = complete([asked[row].messages for row in waiting], seeds) if waiting else []
        if len(completions) != len(waiting):
            raise RuntimeError(f"{len(waiting)} chats were asked, {len(completions)} came back")
        for row, completion in zip(waiting, completions, strict=True):
            try:
                if completion.problem:
                    raise Unreadable(completion.problem)
                found[row] = asked[row].read(completion.text)
            except Unreadable as error:
                found[row] = Refused(str(error), completion.text)
        waiting = [row for row in waiting if isinstance(found[row], Refused)]
    return [found[row] for row in range(len(asked))]


def sampling_seed(key: str, seed: int, attempt: int) -> int:
    """31 bits of the key, the run's seed and the attempt: engines take no more."""
    return chance(f"{seed}:{attempt}:{key}") >> 33


def write_queries(
    requests: Sequence[Request],
    documents: Mapping[str, str],
    settings: AsksDocuments,
    examples: Sequence[Example],
    complete: Complete,
) -> list[Query | Rejection]:
    """A query or a rejection for each request. `documents` holds the text of each document."""

    def asked(request: Request) -> Asked[str]:
        text = documents[request.doc_id or ""]
        chat = query_chat(settings, request, examples, text)
        return Asked(request.made_id, chat, lambda response: read_query(response, text))

    generator = settings.generator
    answers = ask([asked(r) for r in requests], complete, generator.attempts, settings.seed)
    return [_query(request, answer) for request, answer in zip(requests, answers, strict=True)]


def query_chat(
    settings: AsksDocuments, request: Request, examples: Sequence[Example], text: str
) -> Messages:
    """The chat of one request for a query."""
    if isinstance(settings, FewShot):
        return prompts.few_shot(TASKS[settings.task], examples, text)
    if isinstance(settings, Styled):
        style = next(name for name in settings.styles if name == request.style)
        return prompts.styled(style, text)
    assert request.target_grade is not None
    return prompts.at_grade(request.target_grade, examples, text)


def write_documents(
    requests: Sequence[Request],
    queries: Mapping[str, str],
    attempts: int,
    seed: int,
    complete: Complete,
) -> list[WrittenDocument | Rejection]:
    """A document or a rejection for each request; all requests of a query stand in `requests`.

    One answer holds the documents of all grades of a query: they are written together, or all
    rejected. `queries` holds the text of each query.
    """
    query_ids = list(dict.fromkeys(request.query_id or "" for request in requests))

    def asked(query_id: str) -> Asked[dict[int, str]]:
        query = queries[query_id]
        length = LENGTHS[chance(f"{seed}:length:{query_id}") % len(LENGTHS)]
        words = DIFFICULTIES[chance(f"{seed}:difficulty:{query_id}") % len(DIFFICULTIES)]
        chat = prompts.at_every_grade(query, length, words)
        return Asked(query_id, chat, lambda response: read_passages(response, query))

    answers = ask([asked(query_id) for query_id in query_ids], complete, attempts, seed)
    answer_of = dict(zip(query_ids, answers, strict=True))
    return [_document(request, answer_of[request.query_id or ""]) for request in requests]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two queries of one document, `query_id_high` written at the higher grade."""

    doc_id: str
    query_id_high: str
    query_id_low: str


Verdict = str
"""Of a comparison: "high", "low", or "undecided" when the two presentation orders disagree."""


def compare(
    comparisons: Sequence[Comparison],
    queries: Mapping[str, str],
    documents: Mapping[str, str],
    attempts: int,
    seed: int,
    complete: Complete,
) -> list[Verdict | Rejection]:
    """Which query of each comparison the document answers better, asked in both orders."""
    asked = []
    for comparison in comparisons:
        text = documents[comparison.doc_id]
        high, low = queries[comparison.query_id_high], queries[comparison.query_id_low]
        key = f"{comparison.query_id_high}|{comparison.query_id_low}"
        asked.append(Asked(f"{key}|0", prompts.closer(text, high, low), read_better))
        asked.append(Asked(f"{key}|1", prompts.closer(text, low, high), read_better))
    answers = ask(asked, complete, attempts, seed)
    return [
        _verdict(comparison, answers[2 * row], answers[2 * row + 1])
        for row, comparison in enumerate(comparisons)
    ]


def _verdict(
    comparison: Comparison, high_first: str | Refused, low_first: str | Refused
) -> Verdict | Rejection:
    if isinstance(high_first, Refused) or isinstance(low_first, Refused):
        refused = high_first if isinstance(high_first, Refused) else low_first
        assert isinstance(refused, Refused)
        return Rejection(
            refused.reason,
            refused.response,
            query_id=comparison.query_id_high,
            doc_id=comparison.doc_id,
        )
    said = {("first", "second"): "high", ("second", "first"): "low"}
    return said.get((high_first, low_first), "undecided")


def _query(request: Request, answer: str | Refused) -> Query | Rejection:
    if isinstance(answer, Refused):
        return Rejection(
            answer.reason, answer.response, query_id=request.made_id, doc_id=request.doc_id
        )
    grade = None if request.target_grade is None else float(request.target_grade)
    return Query(request.made_id, answer, "synthetic", request.doc_id, grade)


def _document(request: Request, answer: dict[int, str] | Refused) -> WrittenDocument | Rejection:
    if isinstance(answer, Refused):
        return Rejection(
            answer.reason, answer.response, query_id=request.query_id, doc_id=request.made_id
        )
    assert request.target_grade is not None
    assert request.query_id is not None
    text = answer[request.target_grade]
    return WrittenDocument(request.made_id, "", text, request.query_id, float(request.target_grade))
