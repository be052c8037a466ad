"""Retrieved, lexical and random candidates of a query, merged; equal text once."""

import random
from collections.abc import Collection, Mapping, Sequence

from bixse.records import Hit, Pair


def pool(
    query_id: str, rankings: Mapping[str, Sequence[Hit]], text_hashes: Mapping[str, str]
) -> list[Pair]:
    """One pair a document, in the order of the rankings' names and ranks.

    A document that several sources propose keeps its first source, and so does a text that stands
    under several ids (`text_hashes` of every proposed `doc_id`): judging it twice costs twice.
    """
    pairs, seen = [], set()
    for source, hits in rankings.items():
        for hit in hits:
            text = text_hashes[hit.doc_id]
            if text not in seen:
                seen.add(text)
                pairs.append(Pair(query_id, hit.doc_id, source, hit.rank, hit.score))
    return pairs


def random_hits(query_id: str, doc_ids: Sequence[str], count: int, seed: int) -> list[Hit]:
    """`count` documents drawn without replacement: a function of seed and query alone; score 0."""
    rng = random.Random(f"{seed}:{query_id}")
    drawn = rng.sample(range(len(doc_ids)), min(count, len(doc_ids)))
    return [Hit(doc_ids[row], 0.0, rank) for rank, row in enumerate(drawn, start=1)]


def head_negatives(
    query_id: str, hits: Sequence[Hit], positives: Collection[str], top: int, count: int, seed: int
) -> list[Hit]:
    """`count` of the best `top` hits that are no positives: what LCE sets beside one positive.

    Localised (arXiv 2101.08751): never random documents, but those of the retriever that a reranker
    will follow; fewer where there are fewer. In the order of the ranking; a function of seed and
    query alone.
    """
    head = [hit for hit in hits[:top] if hit.doc_id not in positives]
    rng = random.Random(f"{seed}:{query_id}")
    return [head[place] for place in sorted(rng.sample(range(len(head)), min(count, len(head))))]
