"""A small graded set of invented words, with preferences, in BEIR layout; and an encoder for it."""

import json
import random
from pathlib import Path

from benchmarks.trec_dl import PREFERENCES

NAME = "topics"


def make_set(out: Path) -> Path:
    """Topics of three words at `out/topics`; a document's grade is the words it shares with the
    query. The directory of an encoder that knows the words."""
    from tests.encoders import WORDS, save_tiny_encoder

    draw = random.Random(0)
    topics = [draw.sample(WORDS, 3) for _ in range(60)]
    corpus, queries, rows = [], [], {"train": [], "test": []}
    preferences = ["query-id\tpreferred-id\tother-id"]
    for number, topic in enumerate(topics):
        query_id = f"q{number}"
        queries.append({"_id": query_id, "text": " ".join(topic)})
        for grade in (3, 2, 1, 0):
            doc_id = f"d{number}-{grade}"
            words = topic[:grade] + draw.choices(WORDS, k=8 - grade)
            draw.shuffle(words)
            corpus.append({"_id": doc_id, "title": "", "text": " ".join(words)})
            rows["train" if number % 3 else "test"].append(f"{query_id}\t{doc_id}\t{grade}")
            preferences += [f"{query_id}\t{doc_id}\td{number}-{low}" for low in range(grade)]
    made = out / NAME
    (made / "qrels").mkdir(parents=True, exist_ok=True)
    for name, records in (("corpus", corpus), ("queries", queries)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (made / f"{name}.jsonl").write_text(lines)
    (made / PREFERENCES).write_text("\n".join(preferences) + "\n")
    for split, grades in rows.items():
        text = "query-id\tcorpus-id\tscore\n" + "".join(f"{line}\n" for line in grades)
        (made / "qrels" / f"{split}.tsv").write_text(text)
    encoder = out / "tiny" / "encoder"
    if not encoder.exists():
        save_tiny_encoder(out / "tiny")
    return encoder
