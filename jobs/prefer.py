"""judgments -> preferences: near ranks of each query's list compared by a pairwise judge.

Documents of a query are ranked by the relevance that they were judged to have; pairs within a
window of that ranking are asked in both presentation orders (`bixse.judging.pairwise`), by the
model that `judging.vllm` names.
"""

import hashlib
from collections.abc import Sequence

import pyarrow as pa

from bixse.artifacts import Artifact, begin, fingerprints
from bixse.candidates.strata import window_pairs
from bixse.judging.pairwise import PAIRWISE, PairwiseTokenizer, preference, rejected
from bixse.judging.pointwise import refuse_unreadable
from bixse.judging.settings import Pointwise, Preferring
from bixse.records import JUDGED_PREFERENCES, PAIRINGS, Preference, Rejection
from jobs.engine import Engine, judge_name
from jobs.loading import pin
from jobs.parts import row_units, run_units, sorted_out
from jobs.recipe import Placement
from jobs.supervision import read_rows
from jobs.texts import DocumentTexts

PART_ROWS = 100_000


def pairings(
    judgments: Artifact, preferring: Preferring, out: str, calibration: Artifact | None = None
) -> Artifact:
    """Which documents to compare: those near to each other as training reads the judgments, through
    the map that `calibration` holds, if any.

    Raises ValueError when no query has two judged documents.
    """
    shaping = preferring.model_dump(include={"window", "pairs_per_query", "seed"})
    inputs = fingerprints(judgments=judgments, calibration=calibration)
    draft = begin(out, "pairings", config=shaping, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    ranked: dict[str, dict[str, float]] = {}
    for query_id, doc_id, relevance in read_rows(judgments, calibration):
        ranked.setdefault(query_id, {})[doc_id] = relevance
    found = []
    for query_id, judged in sorted(ranked.items()):
        doc_ids = sorted(judged, key=lambda doc_id: (-judged[doc_id], doc_id))
        # A seed for each query, so that the draw does not depend on the other queries.
        seed = hashlib.blake2b(f"{preferring.seed}\0{query_id}".encode(), digest_size=8).digest()
        chosen = window_pairs(
            len(doc_ids),
            preferring.window,
            preferring.pairs_per_query,
            int.from_bytes(seed, "big"),
        )
        found += [
            {"query_id": query_id, "doc_id_a": doc_ids[a], "doc_id_b": doc_ids[b]}
            for a, b in chosen
        ]
    if not found:
        raise ValueError("no query has two judged documents to compare")
    for number, start in enumerate(range(0, len(found), PART_ROWS)):
        some = found[start : start + PART_ROWS]
        draft.write_part(number, pa.Table.from_pylist(some, schema=PAIRINGS))
    return draft.finish(extra={"queries": len(ranked)})


def prefer(
    pairings: Artifact,
    queries: Sequence[Artifact],
    corpus: Artifact,
    preferring: Preferring,
    model: Pointwise,
    placement: Placement,
    out: str,
) -> Artifact:
    """A preference or a rejection for each pairing. Raises ValueError when there is no such model,
    or its tokenizer cannot answer the prompt, before anything is written; and, as
    `refuse_unreadable`, when it does not answer.
    """
    pinned, identity = pin(model)
    PairwiseTokenizer.load(pinned)
    inputs = {
        **fingerprints(pairings=pairings, corpus=corpus, queries=queries),
        "judge": identity,
    }
    shaping = {
        "prompt": PAIRWISE.hash,
        "unit_pairs": preferring.unit_pairs,
        "dtype": pinned.dtype,
        "max_model_len": pinned.max_model_len,
        "document_tokens": pinned.document_tokens,
        "min_grade_mass": pinned.min_grade_mass,
    }
    draft = begin(out, "preferences", config=shaping, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    run_units(
        draft,
        row_units(pairings, preferring.unit_pairs),
        PreferenceUnit,
        (list(queries), corpus, pinned, identity),
        label="prefer",
        actors=placement.judge_actors,
        cpus=placement.cpus_per_actor,
        gpus=placement.gpus_per_actor,
    )
    return draft.finish(device=placement.device, extra={"pairings": pairings.manifest.rows})


class PreferenceUnit:
    """Reads: query_id, doc_id_a, doc_id_b. Adds: prob_a, judge, prompt, disagreement."""

    def __init__(
        self, queries: Sequence[Artifact], corpus: Artifact, settings: Pointwise, identity: str
    ) -> None:
        self._queries = dict(row for some in queries for row in some.rows("query_id", "text"))
        self._texts = DocumentTexts(corpus)
        self._settings = settings
        self._tokens = PairwiseTokenizer.load(settings)
        self._engine = Engine(settings)
        # Both orders are always asked.
        both = settings.replace(orders=2)
        judge = judge_name(both, identity, self._engine.dtype)
        self._signature = (self._tokens.prompt, judge, settings.min_grade_mass)

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[Rejection]]:
        keys: list[tuple[str, str, str]] = list(
            zip(*(rows[name].to_pylist() for name in PAIRINGS.names), strict=True)
        )
        queries = [self._queries[query_id] for query_id, _, _ in keys]
        a, b = (self._texts.get([key[place] for key in keys]) for place in (1, 2))
        orders = [self._tokens.encode(queries, a, b), self._tokens.encode(queries, b, a)]
        lengths = [max(map(len, both)) for both in zip(*orders, strict=True)]
        limit = self._settings.max_model_len - 1  # The answer takes a token too.
        fitting = [row for row, length in enumerate(lengths) if length <= limit]
        sent = [of_order[row] for of_order in orders for row in fitting]
        answers = self._engine.logprobs(sent, self._tokens.label_ids).logprobs
        verdicts: list[Preference | Rejection] = [
            rejected(*key, f"the prompt has {length} tokens, the judge reads {limit}")
            for key, length in zip(keys, lengths, strict=True)
        ]
        for at, row in enumerate(fitting):
            ab, ba = answers[at], answers[at + len(fitting)]
            verdicts[row] = preference(*keys[row], ab, ba, *self._signature)
        read = [verdicts[row] for row in fitting]
        reasons = [verdict.reason for verdict in read if isinstance(verdict, Rejection)]
        if len(reasons) == len(read):
            refuse_unreadable(reasons, "a preference")
        return sorted_out(verdicts, JUDGED_PREFERENCES)


if __name__ == "__main__":
    from jobs.verbs import program

    program("prefer")
