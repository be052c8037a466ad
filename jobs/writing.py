"""corpus or queries -> queries, documents or comparisons that a language model writes.

What is wanted is written down first, one row a text (`<out>-requests`). Ray Data hands the rows out
in units, and each becomes a text or a rejection with what was received: rows and rejected of the
result add up to the requests. What is written is kept as it came; `jobs.sifting` chooses from it,
so that another filter costs no new text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa

from bixse.artifacts import Artifact, begin
from bixse.records import DOCUMENTS, QUERIES, Rejection, ids_hash
from bixse.synthesis import prompts
from bixse.synthesis.examples import GivenPair, choose, example_of
from bixse.synthesis.prompts import Example
from bixse.synthesis.reading import WrittenPassages, WrittenQuery
from bixse.synthesis.requests import (
    GRADES,
    Request,
    document_requests,
    draw,
    query_requests,
)
from bixse.synthesis.settings import (
    AsksDocuments,
    FewShot,
    Generator,
    GradedDocuments,
    GradedQueries,
    Styled,
)
from bixse.synthesis.tokens import ChatTokenizer
from bixse.synthesis.writing import (
    query_chat,
    write_documents,
    write_queries,
)
from jobs.generation import Writer, pin_generator
from jobs.parts import sorted_out
from jobs.recipe import Placement
from jobs.requests import (
    cut_documents,
    generator_config,
    run_requests,
    store_requests,
    yields,
)
from jobs.texts import DocumentTexts

TRAIN = "train"

_LEAST_SHOWN = 16
"""Tokens of an example's document: of less it cannot be told what its query asks for (ours)."""

_ELSEWHERE = {"near_duplicate", "round_trip", "tolerance", "log_queries", "with_given"}
"""Settings that shape what is made before the texts, or of them."""


def ask_documents(
    corpus: Artifact,
    given: Artifact,
    qrels: Artifact | None,
    settings: AsksDocuments,
    placement: Placement,
    out: str,
    skip_query_ids: frozenset[str] = frozenset(),
    writer: Callable[..., Any] = Writer,
) -> Artifact:
    """Queries written for drawn documents of the corpus, each with its `seed_doc_id`.

    Examples come from the train split of `qrels`, none of a query of `skip_query_ids`. Raises
    ValueError when few-shot writing has no given pair to show, or as `_fitted` and `pin_generator`.
    """
    generator, name = pin_generator(settings.generator, placement)
    pairs = _given_pairs(qrels, settings, skip_query_ids)
    examples = _fitted(_examples(pairs, given, corpus), settings, generator)
    schema = WrittenQuery.model_json_schema()
    shown = query_prompt_hash(settings, examples)
    draft = begin(
        out,
        "queries",
        config={"synthesis": _config(settings), "prompt": shown},
        inputs={"corpus": corpus.fingerprint, "generator": name},
    )
    if isinstance(draft, Artifact):
        return draft
    bound = settings.replace(generator=generator)
    wanted = store_requests(
        f"{out}-requests",
        {"corpus": corpus.fingerprint},
        _config(settings, generator=False),
        lambda: query_requests(
            draw(corpus.column("doc_id"), settings.documents, settings.seed), bound
        ),
    )
    arguments = (corpus, bound, examples, schema, writer)
    run_requests(draft, wanted, QueryUnit, arguments, generator.unit_requests, placement)
    extra = {"generator": name, "prompt": shown, "examples": [asdict(pair) for pair in pairs]}
    return draft.finish(
        device=placement.device,
        extra={**extra, **yields(draft, wanted, "seed_doc_id", "doc_id")},
    )


def ask_queries(
    queries: Artifact,
    settings: GradedDocuments,
    placement: Placement,
    out: str,
    skip_query_ids: frozenset[str] = frozenset(),
    writer: Callable[..., Any] = Writer,
) -> Artifact:
    """Documents (kind "documents") written at every grade for given queries.

    None for a query of `skip_query_ids`: those are held out. Raises ValueError when no query is
    left, or as `pin_generator`.
    """
    generator, name = pin_generator(settings.generator, placement)
    schema = WrittenPassages.model_json_schema()
    chats = [
        prompts.at_every_grade("{query}", length, difficulty)
        for length in prompts.LENGTHS
        for difficulty in prompts.DIFFICULTIES
    ]
    shown = prompts.prompt_hash(*chats, schema=schema)
    inputs = {"queries": queries.fingerprint, "skipped queries": ids_hash(skip_query_ids)}
    query_ids = [name for name in queries.column("query_id") if name not in skip_query_ids]
    if not query_ids:
        raise ValueError("no given query to write documents for: put queries beside the corpus")
    draft = begin(
        out,
        "documents",
        config={"synthesis": _config(settings), "prompt": shown},
        inputs={**inputs, "generator": name},
    )
    if isinstance(draft, Artifact):
        return draft
    bound = settings.replace(generator=generator)
    wanted = store_requests(
        f"{out}-requests",
        inputs,
        _config(settings, generator=False),
        lambda: document_requests(draw(query_ids, settings.queries, settings.seed)),
    )
    rows = -(-generator.unit_requests // len(GRADES)) * len(GRADES)  # A unit holds whole queries.
    run_requests(draft, wanted, DocumentUnit, (queries, bound, schema, writer), rows, placement)
    extra = {"generator": name, "prompt": shown}
    return draft.finish(
        device=placement.device, extra={**extra, **yields(draft, wanted, "query_id", "query_id")}
    )


class QueryUnit:
    """Reads: made_id, doc_id, style, target_grade. Adds: a query, or a rejection, for each."""

    def __init__(
        self,
        corpus: Artifact,
        settings: AsksDocuments,
        examples: Sequence[Example],
        schema: Mapping[str, Any],
        writer: Callable[..., Any],
    ) -> None:
        self._texts = DocumentTexts(corpus)
        self._settings = settings
        self._examples = examples
        self._writer = writer(settings.generator, schema)

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[Rejection]]:
        requests = [Request(**row) for row in rows.to_pylist()]
        shown = cut_documents(self._texts, [r.doc_id or "" for r in requests], self._writer.cut)
        made = write_queries(requests, shown, self._settings, self._examples, self._writer)
        return sorted_out(made, QUERIES)


class DocumentUnit:
    """Reads: made_id, query_id, target_grade. Adds: a document, or a rejection, for each."""

    def __init__(
        self,
        queries: Artifact,
        settings: GradedDocuments,
        schema: Mapping[str, Any],
        writer: Callable[..., Any],
    ) -> None:
        self._queries = dict(queries.rows("query_id", "text"))
        self._settings = settings
        self._writer = writer(settings.generator, schema)

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[Rejection]]:
        requests = [Request(**row) for row in rows.to_pylist()]
        attempts, seed = self._settings.generator.attempts, self._settings.seed
        made = write_documents(requests, self._queries, attempts, seed, self._writer)
        return sorted_out(made, DOCUMENTS)


def query_prompt_hash(settings: AsksDocuments, examples: Sequence[Example]) -> str:
    """The hash of every chat that the settings can ask, the examples included."""
    variants: list[Request] = [Request("")]
    if isinstance(settings, Styled):
        variants = [Request("", style=style) for style in settings.styles]
    elif isinstance(settings, GradedQueries):
        variants = [Request("", target_grade=grade) for grade in GRADES]
    chats = [query_chat(settings, variant, examples, "{document}") for variant in variants]
    return prompts.prompt_hash(*chats, schema=WrittenQuery.model_json_schema())


def _given_pairs(
    qrels: Artifact | None, settings: AsksDocuments, skip_query_ids: frozenset[str]
) -> list[GivenPair]:
    if isinstance(settings, Styled) or not settings.examples:
        return []
    pairs = [
        GivenPair(query_id, doc_id, relevance)
        for split, query_id, doc_id, relevance in (
            qrels.rows("split", "query_id", "doc_id", "relevance") if qrels else ()
        )
        if split == TRAIN and query_id not in skip_query_ids
    ]
    chosen = choose(pairs, settings)
    if not chosen and isinstance(settings, FewShot):
        raise ValueError(
            "few-shot writing shows given pairs and there is none: put queries and qrels/train.tsv "
            "with two to eight good pairs beside the corpus, or set --synthesis.examples 0"
        )
    return chosen


def _examples(pairs: Sequence[GivenPair], given: Artifact, corpus: Artifact) -> list[Example]:
    if not pairs:
        return []
    wanted = {pair.query_id for pair in pairs}
    queries = {
        query_id: text for query_id, text in given.rows("query_id", "text") if query_id in wanted
    }
    documents = DocumentTexts(corpus).get([pair.doc_id for pair in pairs])
    return [
        example_of(pair, queries[pair.query_id], document)
        for pair, document in zip(pairs, documents, strict=True)
    ]


def _fitted(
    examples: Sequence[Example], settings: AsksDocuments, generator: Generator
) -> Sequence[Example]:
    """The examples, their documents cut to what leaves room for the document that is asked about:
    eight of its length do not.

    Raises ValueError when they are too long without their documents.
    """
    if not examples:
        return examples
    tokens, room = ChatTokenizer.load(generator), generator.max_model_len - generator.max_tokens
    room -= generator.document_tokens or room // 2
    longest = generator.document_tokens or room
    request = Request("", target_grade=GRADES[0])
    while longest >= _LEAST_SHOWN:
        shown = [replace(e, document=tokens.cut(e.document, longest)) for e in examples]
        (prompt,) = tokens.encode([query_chat(settings, request, shown, "")])
        if len(prompt) <= room:
            return shown
        longest //= 2
    raise ValueError(
        f"{len(examples)} given pairs and a document are more than "
        f"{generator.max_model_len - generator.max_tokens} tokens: lower --synthesis.examples or "
        "--synthesis.generator.document-tokens, or raise --synthesis.generator.max-model-len"
    )


def _config(settings: AsksDocuments | GradedDocuments, generator: bool = True) -> dict[str, Any]:
    """What shapes the texts; the weights are an input, and filters come later."""
    shaping = settings.model_dump(mode="json", exclude=_ELSEWHERE | {"generator"})
    if generator:
        shaping["generator"] = generator_config(settings.generator)
    return shaping
