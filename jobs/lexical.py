"""What stages share that read words: tasks of `jobs.index` on those of one shard, which count them
and then weigh them by all counts; and a warning where a corpus has none.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bixse.artifacts import Artifact, Draft
from bixse.records import document_text
from bixse.retrieval.settings import Lexical

if TYPE_CHECKING:
    from bixse.retrieval.lexical_shard import Statistics

LEXICAL_MARK = "lexical/lexical.json"
"""Written last: the mark that a shard's lexical part is whole."""

SAMPLED = 512
"""Documents whose beginnings say what script a corpus is in: as many of each of up to eight parts,
the first ones (ours)."""
_PARTS = 8
_CHARACTERS = 500

WARNED_FROM = 0.1
"""Share of letters in scripts without spaces from which stages warn (ours): names in an English
text stay below it, and Chinese beside Latin code, which needs more letters for as much, above."""

_log = logging.getLogger(__name__)
_told: set[tuple[str, str]] = set()
"""(corpus, language) that this process has looked at: a run has many stages that read words."""


def warn_of_script(corpus: Artifact, settings: Lexical) -> None:
    """Warn, once a process, of a corpus that is read as words and puts no spaces between them."""
    seen = corpus.fingerprint, settings.language
    if settings.language == "bigrams" or seen in _told:
        return
    _told.add(seen)
    from bixse.retrieval.lexical import unspaced_share

    if (share := unspaced_share(_sample(corpus))) >= WARNED_FROM:
        _log.warning(
            "%.0f %% of the letters of %s (a sample) are of scripts without spaces between words, "
            "and BM25 takes a whole clause of them for a word: --lexical.language bigrams reads "
            "pairs of characters",
            *(100 * share, corpus.url),
        )


def _sample(corpus: Artifact) -> Iterator[str]:
    """The beginnings of the first documents of some parts, spread over all."""
    parts = corpus.parts()
    chosen = parts[:: -(-len(parts) // _PARTS)] if parts else []
    for name in chosen:
        rows = SAMPLED // len(chosen)
        batch = next(corpus.batches(["title", "text"], rows, [name]), None)
        if batch is not None:
            for row in batch.to_pylist():
                yield document_text(row["title"], row["text"])[:_CHARACTERS]


def count_words(draft: Draft, name: str, settings: Lexical) -> "Statistics":
    from bixse.retrieval.lexical_shard import Statistics, texts_of

    with _documents(draft, name) as path:
        return Statistics.of(texts_of(path), settings.language)


def build_words(draft: Draft, name: str, whole: "Statistics", settings: Lexical) -> None:
    from bixse.retrieval.lexical_shard import build_lexical, texts_of

    with tempfile.TemporaryDirectory() as folder, _documents(draft, name) as path:
        build_lexical(Path(folder) / "lexical", texts_of(path), whole, settings)
        mark = (Path(folder) / LEXICAL_MARK).read_bytes()
        (Path(folder) / LEXICAL_MARK).unlink()
        draft.add_directory(Path(folder), under=f"{name}/")
        draft.write_file(f"{name}/{LEXICAL_MARK}", mark)


@contextmanager
def _documents(draft: Draft, name: str) -> Iterator[Path]:
    """The stored fields of a shard as a local file."""
    file = f"{name}/documents.arrow"
    if draft.place.is_local:
        yield Path(draft.place.path(file))
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "documents.arrow"
        draft.place.get(file, copy)
        yield copy
