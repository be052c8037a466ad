"""Tasks of `jobs.index` on the words of one shard: count them, then weigh them by all counts."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bixse.artifacts import Draft
from bixse.retrieval.settings import Lexical

if TYPE_CHECKING:
    from bixse.retrieval.lexical_shard import Statistics

LEXICAL_MARK = "lexical/lexical.json"
"""Written last: the mark that a shard's lexical part is whole."""


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
