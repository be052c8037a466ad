"""A cross-encoder through vLLM's pooling: one pass a pair."""

import time
from collections.abc import Sequence
from typing import Any

from bixse.judging.asked import Answers, Asked, Cost, Usage
from bixse.judging.cross_encoder import PairTokenizer, classes, scale_of, verdict
from bixse.judging.pointwise import too_long, unreadable
from bixse.judging.settings import CrossEncoder
from bixse.scale import Scale
from jobs.judges.seam import Judge
from jobs.loading import pin
from jobs.pooling import Pooling


def cross_encoder(settings: CrossEncoder) -> Judge:
    """Raises ValueError when there is no such model, or it is no classifier of pairs."""
    pinned, identity = pin(settings)
    count = classes(pinned)
    scale = scale_of(count)
    PairTokenizer.load(pinned)
    return Judge(
        build=CrossEncoderJudge,
        arguments=(pinned, identity, count),
        scale=scale,
        origin="cross_encoder",
        inputs={"judge": identity},
        signature=signature(pinned, identity, scale),
        plan=CrossEncoderPlan,
        planned=("prompt_tokens",),
    )


class CrossEncoderJudge:
    """Tokens, one pass each, and what the logits say."""

    def __init__(self, settings: CrossEncoder, identity: str, count: int) -> None:
        self._settings = settings
        self._count = count
        self._tokens = PairTokenizer.load(settings)
        self._engine = Pooling(settings)
        self._name = cross_encoder_name(settings, identity, self._engine.dtype)

    def __call__(self, asked: Sequence[Asked]) -> Answers:
        pairs = self._tokens.encode([p.query for p in asked], [p.passage for p in asked])
        limit = self._settings.max_model_len
        fitting = [row for row, pair in enumerate(pairs) if len(pair.ids) <= limit]
        started = time.monotonic()
        found = self._engine.logits([pairs[row] for row in fitting])
        seconds = time.monotonic() - started
        logits = dict(zip(fitting, found, strict=True))
        read = {
            row: verdict(
                asked[row].query_id, asked[row].doc_id, of_pair, self._count, self._settings,
                self._name,
            )
            for row, of_pair in logits.items()
        }  # fmt: skip
        verdicts = [
            read[row]
            if row in read
            else too_long(pair.query_id, pair.doc_id, len(pairs[row].ids), limit)
            for row, pair in enumerate(asked)
        ]
        tokens = sum(len(pairs[row].ids) for row in fitting)
        usage = Usage(len(fitting), tokens, seconds=seconds)
        return Answers(verdicts, usage, unreadable(read.values()))


class CrossEncoderPlan:
    """Counts what `CrossEncoderJudge` would read, token for token; no two pairs share a prefix."""

    def __init__(self, settings: CrossEncoder, identity: str, count: int) -> None:
        self._tokens = PairTokenizer.load(settings)
        self._limit = settings.max_model_len

    def __call__(self, asked: Sequence[Asked]) -> list[Cost]:
        pairs = self._tokens.encode([p.query for p in asked], [p.passage for p in asked])
        lengths = [len(pair.ids) for pair in pairs]
        return [Cost(n) if n <= self._limit else Cost(fits=False) for n in lengths]


def signature(settings: CrossEncoder, identity: str, scale: Scale) -> dict[str, Any]:
    """What labels are filed under."""
    cut = {"document_tokens": settings.document_tokens} if settings.document_tokens else {}
    return {
        "judge": "cross_encoder",
        "model": identity,
        "scale": scale.record,
        "dtype": settings.dtype,
        "slope": settings.slope,
        "intercept": settings.intercept,
        **cut,
    }


def cross_encoder_name(settings: CrossEncoder, identity: str, dtype: str) -> str:
    """Who judged: the model's name, its weights, and the settings that change an answer."""
    name = settings.model.rstrip("/").rpartition("/")[2]
    cut = f":document_tokens={settings.document_tokens}" if settings.document_tokens else ""
    return f"{name}@{identity[:12]}:{dtype}:{settings.slope:g}*logit{settings.intercept:+g}{cut}"
