"""A cross-encoder as a judge: query and passage read together, logits -> a distribution.

One logit is log-odds of being relevant, on a scale of two grades, after a map that was fitted on
human grades (Platt 1999); the identity where none was. K logits are K grades in rising order:

    p(relevant) = sigmoid(slope * logit + intercept)
    p_k         = exp(logit_k) / sum_j exp(logit_j)

Pairs become tokens as the model was trained: `tokenizer(query, passage)`. A pair that does not fit
is rejected; documents are cut only where `document_tokens` says so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bixse.judging.asked import Verdict
from bixse.judging.settings import CrossEncoder
from bixse.reading.chats import Plain, first_tokens, load_tokenizer
from bixse.records import Judgment, Rejection
from bixse.scale import Scale, linear


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """The tokens of a pair; `second` is where the second segment begins, if the model tells."""

    ids: list[int]
    second: int | None


class PairTokenizer:
    """The tokenizer of a cross-encoder; no engine needed."""

    def __init__(self, tokenizer: Any, document_tokens: int = 0) -> None:
        """`document_tokens` cuts longer passages; 0 cuts none."""
        self._tokenizer = tokenizer
        self._plain = Plain(tokenizer)
        self._document_tokens = document_tokens

    @classmethod
    def load(cls, settings: CrossEncoder) -> "PairTokenizer":
        """Raises ValueError when there is no such tokenizer."""
        tokenizer = load_tokenizer(settings.model, settings.revision, "cross-encoder")
        return cls(tokenizer, settings.document_tokens)

    def encode(self, queries: Sequence[str], passages: Sequence[str]) -> list[EncodedPair]:
        if not queries:
            return []
        first, second = list(map(self._plain, queries)), list(map(self._plain, passages))
        second = first_tokens(self._tokenizer, second, self._document_tokens)
        found = self._tokenizer(first, second, truncation=False, verbose=False)
        types = found.get("token_type_ids") or [[]] * len(queries)
        return [
            EncodedPair(ids, kinds.index(1) if 1 in kinds else None)
            for ids, kinds in zip(found["input_ids"], types, strict=True)
        ]


def classes(settings: CrossEncoder) -> int:
    """How many logits the model gives. Raises ValueError when it is no such model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(settings.model, revision=settings.revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no cross-encoder {settings.model!r}: {reason}") from None
    architectures = config.architectures or []
    if not any("SequenceClassification" in name for name in architectures):
        raise ValueError(
            f"{settings.model} is no cross-encoder: a sequence-classification model is needed, "
            f"found {', '.join(architectures) or 'no architecture'}"
        )
    count = int(config.num_labels)
    if count > 1 and (settings.slope, settings.intercept) != (1, 0):
        raise ValueError(f"slope and intercept map one logit, {settings.model} has {count}")
    return count


def scale_of(logits: int) -> Scale:
    """0 and 1 for one logit, 0 .. K - 1 for K of them."""
    return linear(0, max(1, logits - 1))


def probs_of(logits: Sequence[float], slope: float, intercept: float) -> tuple[float, ...]:
    """The distribution over `scale_of(len(logits))`; the logits must be finite."""
    if len(logits) == 1:
        odds = slope * logits[0] + intercept
        low = 1 / (1 + math.exp(min(odds, 700.0)))
        high = 1 / (1 + math.exp(min(-odds, 700.0)))
        return low, high
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    return tuple(weight / sum(weights) for weight in weights)


def verdict(
    query_id: str,
    doc_id: str,
    logits: Sequence[float],
    wanted: int,
    settings: CrossEncoder,
    judge: str,
) -> Verdict:
    """A judgment, or a rejection when one of `wanted` logits is missing or not finite."""
    if len(logits) != wanted or not all(map(math.isfinite, logits)):
        return Rejection(
            reason=f"{wanted} finite logits are needed",
            response=str(list(logits)),
            query_id=query_id,
            doc_id=doc_id,
        )
    probs = probs_of(logits, settings.slope, settings.intercept)
    return Judgment(
        query_id=query_id,
        doc_id=doc_id,
        grade_probs=probs,
        relevance=scale_of(wanted).relevance(probs),
        judge=judge,
        prompt="",
        origin="cross_encoder",
    )
