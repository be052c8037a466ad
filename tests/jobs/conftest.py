"""A corpus in BEIR layout that is made on the spot, and the end of Ray."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.encoders import texts


def write_beir(folder: Path, documents: int, queries: int = 40, seed: int = 1) -> Path:
    """Sentences of invented words; a query is half of a document, which is graded 2, the next 1."""
    (folder / "qrels").mkdir(parents=True)
    bodies = texts(documents, seed=seed)
    corpus = [{"_id": f"d{n:05d}", "title": "", "text": text} for n, text in enumerate(bodies)]
    asked = [{"_id": f"q{n:03d}", "text": bodies[n].split(" ", 1)[1]} for n in range(queries)]
    for name, rows in (("corpus", corpus), ("queries", asked)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    for split, numbers in (("train", range(queries // 2)), ("test", range(queries // 2, queries))):
        grades = [f"q{n:03d}\td{n:05d}\t2\nq{n:03d}\td{n + 1:05d}\t1\n" for n in numbers]
        (folder / "qrels" / f"{split}.tsv").write_text(
            "query-id\tcorpus-id\tscore\n" + "".join(grades)
        )
    return folder


@pytest.fixture(scope="session")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 documents, 40 queries, two splits."""
    return write_beir(tmp_path_factory.mktemp("beir"), documents=3000)


@pytest.fixture(autouse=True, scope="package")
def _ray_ends() -> Iterator[None]:
    """The Ray that the stages start in this process takes part of a core for as long as it runs."""
    yield
    import ray

    ray.shutdown()
