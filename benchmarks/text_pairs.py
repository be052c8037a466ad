"""Queries and documents of which lengths matter and nothing else."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

Pairs = Sequence[tuple[str, str]]


def pairs_of(data: str | None, count: int) -> Pairs:
    """Different pairs of different lengths, of a directory with `corpus.jsonl` or, without one, of
    Python's documentation. Raises ValueError when the corpus is too small."""
    found = from_corpus(Path(data)) if data else from_documentation(count)
    if len(found) < count:
        raise ValueError(f"{data} has {len(found)} documents, {count} are needed: take fewer")
    return [found[number] for number in np.random.default_rng(0).permutation(len(found))[:count]]


def from_corpus(directory: Path) -> Pairs:
    """A document's title, or opening words without one, and its text."""
    found: dict[str, str] = {}
    with open(directory / "corpus.jsonl") as lines:
        for line in lines:
            row = json.loads(line)
            text = " ".join(row["text"].split())
            query = " ".join((row.get("title") or text).split()[:12])
            if text and query:
                found.setdefault(query, text)
    by_text = {text: query for query, text in found.items()}
    return [(query, text) for text, query in by_text.items()]


def from_documentation(count: int) -> Pairs:
    """Spans of log-normal length."""
    from pydoc_data.topics import topics

    words = " ".join(topics[name] for name in sorted(topics)).split()
    draw = np.random.default_rng(1)
    lengths = np.clip(np.exp(draw.normal(np.log(60), 0.6, count)), 8, 400).astype(int)
    found = []
    for number, length in enumerate(lengths.tolist()):
        start = int(draw.integers(len(words) - 500))
        query = " ".join(words[start : start + int(draw.integers(3, 16))])
        found.append((f"{number} {query}", f"{number} {' '.join(words[start : start + length])}"))
    return found
