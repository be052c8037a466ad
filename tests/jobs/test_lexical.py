"""A corpus that BM25 cannot read as words, told from its own texts."""

import logging
from pathlib import Path

import pyarrow as pa
import pytest

from bixse.artifacts import Artifact
from bixse.candidates.settings import Pools
from bixse.records import CORPUS, QUERIES
from bixse.retrieval.settings import Lexical
from jobs import lexical
from jobs.lexical import SAMPLED, warn_of_script
from jobs.pair import pair
from jobs.rankings import by_words
from tests.artifacts import artifact, drafted

ENGLISH, CHINESE = "tea from the high mountains", "云南高山绿茶"


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is warned of a corpus once, and all tests are one process."""
    monkeypatch.setattr(lexical, "_told", set())


def corpus(at: Path, *texts: str) -> Artifact:
    rows = [{"doc_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(texts)]
    return artifact(at / "corpus", "corpus", rows, CORPUS)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_words_of_a_script_without_spaces_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By whichever stage comes first; the next says nothing, and bigrams nothing at all."""
    documents = corpus(tmp_path, *[CHINESE] * 4, ENGLISH)
    asked = [{"query_id": "q", "text": CHINESE, "origin": "given"}]
    queries = artifact(tmp_path / "queries", "queries", asked, QUERIES)
    bigrams = Lexical(language="bigrams")
    by_words(documents, {"q": CHINESE}, bigrams, 3, frozenset())
    assert not warnings(caplog)
    pools = Pools(bm25=3, dense=0, random=0)
    pair([queries], documents, None, "", pools, Lexical(), str(tmp_path / "pairs"))
    (said,) = warnings(caplog)
    assert "51 % of the letters" in said
    assert "--lexical.language bigrams" in said
    by_words(documents, {"q": CHINESE}, Lexical(), 3, frozenset())
    assert len(warnings(caplog)) == 1


def test_a_name_here_and_there_is_nothing_to_warn_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_script(corpus(tmp_path, *[ENGLISH] * 9, f"{ENGLISH} {CHINESE}"), Lexical())
    assert not warnings(caplog)


def test_documents_of_several_parts_are_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose texts may be of several sources."""
    draft = drafted(tmp_path / "parts", "corpus")
    for part, text in enumerate([ENGLISH] * 9 + [CHINESE] * 9):
        rows = [{"doc_id": f"{part} {n}", "title": "", "text": text} for n in range(SAMPLED)]
        draft.write_part(part, pa.Table.from_pylist(rows, schema=CORPUS))
    warn_of_script(draft.finish(), Lexical())
    (said,) = warnings(caplog)
    assert said.startswith("21 % of the letters")
