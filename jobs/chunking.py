"""corpus -> chunks in groups, which a language model reads together.

Each part of the corpus becomes one part of the artefact, whatever the others hold: one is in memory
at a time, and a rerun makes those that are missing. Within a part documents are taken in an order
drawn by the seed, and copies of a chunk are left out; groups do not reach across parts, so that
copies in different ones are never read together. Each document's chunks, kept and rejected, and
each document without any are accounted for.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from bixse.artifacts import Artifact, begin, fingerprints, part_name
from bixse.reading.chats import load_tokenizer
from bixse.records import CHUNKS, CORPUS, Chunk, Rejection, document_text
from bixse.synthesis.chunk_groups import Chunker, grouped, once
from bixse.synthesis.queries import draw_order
from bixse.training.settings import Gated
from jobs.parts import progress, rejected_table

_TOKENISED = 2**20
"""Characters tokenised at a time, or one document: where each token stands takes a hundred times
its text."""
_WRITTEN = 256
"""Groups that become Arrow's at a time."""


def chunk(corpus: Artifact, settings: Gated, identity: str, out: str) -> Artifact:
    """The chunks of a corpus, in groups of at most `settings.group_size`.

    `settings` are pinned to the language model of this `identity` (`jobs.loading`). Raises
    ValueError when it has no tokenizer, or one that `Chunker` refuses.
    """
    config = settings.model_dump(mode="json", include={"chunk_tokens", "group_size", "seed"})
    inputs = {**fingerprints(corpus=corpus), "language_model": identity}
    assert settings.language_model is not None
    tokenizer = load_tokenizer(settings.language_model, settings.revision, "language model")
    chunker = Chunker(tokenizer, settings.chunk_tokens)
    draft = begin(out, "chunks", config=config, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    done = draft.parts_done()
    with progress("chunk", corpus.manifest.rows) as advance:
        for number, name in enumerate(corpus.parts()):
            if number in done:
                advance(corpus.part(name, ["doc_id"]).num_rows)
                continue
            table, rejected = _part(corpus.part(name, CORPUS.names), chunker, settings, advance)
            draft.write_part(number, table, rejected_table(rejected))
    groups = [draft.part(part_name(n), ["group"])["group"] for n in range(len(corpus.parts()))]
    extra = {
        "documents": corpus.manifest.rows,
        "groups": sum(part[-1].as_py() + 1 for part in groups if len(part)),
    }
    return draft.finish(extra=extra)


def _part(
    documents: pa.Table, chunker: Chunker, settings: Gated, advance: Callable[[int], None]
) -> tuple[pa.Table, list[Rejection]]:
    """The chunks of some documents, and what became none."""
    rejected: list[Rejection] = []
    kept = _kept(documents, chunker, settings.seed, rejected, advance)
    groups = enumerate(grouped(kept, settings.group_size))
    tables = [CHUNKS.empty_table()]
    while some := list(islice(groups, _WRITTEN)):
        # Of one chunk is at most the last.
        alone = [group[0] for _, group in some if len(group) == 1]
        rejected += [
            Rejection("has no other in its group", one.text, doc_id=one.doc_id) for one in alone
        ]
        rows = [(number, one) for number, group in some if len(group) > 1 for one in group]
        tables.append(pa.Table.from_pylist([_row(*row) for row in rows], schema=CHUNKS))
    return pa.concat_tables(tables).combine_chunks(), rejected


def _kept(
    documents: pa.Table,
    chunker: Chunker,
    seed: int,
    rejected: list[Rejection],
    advance: Callable[[int], None],
) -> Iterator[list[Chunk]]:
    """The chunks of each document, in the order of the draw; the others are put to the rejected."""
    doc_ids = documents["doc_id"].to_pylist()
    drawn = sorted(range(len(doc_ids)), key=lambda n: (draw_order(doc_ids[n], seed), doc_ids[n]))
    known: set[str] = set()
    lengths = pc.add(*(pc.utf8_length(documents[name]) for name in ("title", "text"))).to_pylist()
    for some in _batches(drawn, lengths):
        rows = documents.take(some).to_pylist()
        texts = [(row["doc_id"], document_text(row["title"], row["text"])) for row in rows]
        for made in chunker(texts):
            found = list(once(made, known))
            rejected += [one for one in found if isinstance(one, Rejection)]
            yield [one for one in found if isinstance(one, Chunk)]
        advance(len(rows))


def _batches(drawn: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows in their order, as many as `_TOKENISED` characters hold, or one."""
    some: list[int] = []
    characters = 0
    for row in drawn:
        if some and characters + lengths[row] > _TOKENISED:
            yield some
            some, characters = [], 0
        some.append(row)
        characters += lengths[row]
    if some:
        yield some


def _row(group: int, one: Chunk) -> dict[str, object]:
    columns = {name: getattr(one, name) for name in CHUNKS.names if name != "group"}
    return {"group": group, **columns}
