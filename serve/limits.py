"""What one request may ask for. All of these raise ApiError 422, naming the field."""

import asyncio
from collections.abc import Sequence

from serve.errors import ApiError, invalid
from serve.messages import RefusedText
from serve.settings import ServeArgs, ServedReranker


class Limits:
    """The bounds of `ServeArgs` on one request."""

    def __init__(self, args: ServeArgs) -> None:
        self._args = args

    def deadline(self, timeout_ms: int | None) -> float:
        """When an answer is due, as a time of the running loop."""
        if timeout_ms is not None and timeout_ms > self._args.max_timeout_ms:
            most = self._args.max_timeout_ms
            raise invalid(f"must be at most {most}", "timeout_ms")
        budget_ms = self._args.default_timeout_ms if timeout_ms is None else timeout_ms
        return asyncio.get_running_loop().time() + budget_ms / 1e3

    def check_texts(self, texts: Sequence[str], field: str) -> None:
        """Whether so many texts, of such lengths, may be asked about."""
        if len(texts) > self._args.max_queries:
            raise invalid(f"must hold at most {self._args.max_queries} texts", field)
        if any(len(text) > self._args.max_text_length for text in texts):
            most = self._args.max_text_length
            raise invalid(f"a text may have at most {most} characters", field)

    def check_k(self, k: int, queries: int, field: str) -> None:
        """Whether so many hits may be asked for."""
        most = min(self._args.max_k, self._args.max_hits // queries)
        if k > most:
            raise invalid(f"must be at most {most} for {queries} queries", field)

    def check_rerank(
        self, rerank: int, k: int, queries: int, reranker: ServedReranker | None
    ) -> None:
        """Whether so many documents of each query may be reranked, for `k` hits."""
        if reranker is None:
            raise invalid(
                "this application has no reranker: start it with --reranker PATH, a directory or "
                "URL that `python -m jobs.train lce …` has made, or any trained CrossEncoder",
                "rerank",
            )
        if rerank < k:
            message = f"must be at least k, which is {k}: hits come from what was reranked"
            raise invalid(message, "rerank")
        most = min(self._args.max_k, min(self._args.max_rerank, self._args.max_hits) // queries)
        if rerank > most:
            raise invalid(f"must be at most {most} for {queries} queries", "rerank")


def refused(error: RefusedText, field: str, many: bool) -> ApiError:
    """The answer that names the one text of a request that cannot be encoded."""
    param = f"{field}.{error.position}" if many else field
    return invalid(f"cannot be encoded: {error.reason}", param)
