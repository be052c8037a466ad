"""What was shown to those who searched: a JSON line a request, for click models.

    {"request_id", "time", "policy", "k", "mode", "filter", "generation", "index", "encoder",
     "reranker", "feedback", "coverage",
     "results": [{"query", "shown": [{"doc_id", "rank", "score"}], "swapped"}]}

Off unless `--request-log` names a directory, since queries are personal data: they are what people
write. Files are readable by their owner only, nothing else of a request (key, address) is written,
and the oldest files go when there are more than `--request-log-files`. Join clicks by `request_id`:
`python -m jobs.train two_tower` learns from both. `swapped` is the rank whose document changed
places with the next (`--swap-share`), or null.
"""

import json
import logging
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serve.fanout import Answer
from serve.generation import Generation
from serve.schema import SearchRequest

_WAITING = 4096
"""Lines that may wait to be written; a disk that is slower than this loses lines, not requests."""
_BATCH = 256
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

_logger = logging.getLogger("bixse")


class RequestLog:
    """Lines go to a thread that writes them, so that no request waits for a disk."""

    def __init__(
        self,
        directory: str,
        most_bytes: int,
        most_files: int,
        lost: Callable[[int], object] = lambda lines: None,
    ) -> None:
        """A file of about `most_bytes` is followed by the next; `lost` is told of lines unwritten.

        Raises ValueError when the directory cannot be made or written to.
        """
        self._directory = made(directory)
        self._most_bytes, self._most_files, self._lost = most_bytes, most_files, lost
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_WAITING)
        self._path = self._next_path()
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    def put(self, line: dict[str, Any]) -> None:
        """Have a line written, or lost when too many wait. Never blocks."""
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self._lost(1)

    def close(self) -> None:
        """Write what waits, and stop."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        batch: list[dict[str, Any] | None] = []
        while None not in batch:
            batch = [self._queue.get()]
            while len(batch) < _BATCH and not self._queue.empty():
                batch.append(self._queue.get())
            lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in batch if line]
            try:
                self._write(lines)
            except OSError as error:
                self._lost(len(lines))
                _logger.warning("%d lines of the request log are lost: %s", len(lines), error)

    def _write(self, lines: list[str]) -> None:
        # Opened anew each time: another replica may have deleted the file as the oldest.
        with open(self._path, "ab", buffering=0, opener=_for_its_owner) as out:
            start, left = out.tell(), memoryview("".join(lines).encode())
            try:
                while left:
                    left = left[out.write(left) :]
            except OSError:
                # Half a line would spoil the next one, too.
                out.truncate(start)
                raise
            full = out.tell() >= self._most_bytes
        if full:
            self._path = self._next_path()

    def _next_path(self) -> Path:
        """Where the next file will be, once the oldest have made room for it."""
        for old in sorted(self._directory.glob("shown-*.jsonl"))[: 1 - self._most_files]:
            try:
                old.unlink(missing_ok=True)
            except OSError as error:
                _logger.warning("%s of the request log cannot be removed: %s", old.name, error)
        # Sorted as they were begun, and none shared by two replicas.
        return self._directory / f"shown-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.jsonl"


def made(directory: str) -> Path:
    """The directory, made if need be. Raises ValueError when it cannot be written to."""
    path = Path(directory)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot keep a request log at {directory}: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"cannot keep a request log at {directory}: it is not writable")
    return path


def request_id_of(offered: str | None) -> str:
    """The caller's own id, or that of Ray's proxy, if it is one; else a new one."""
    return offered if offered and _ID.fullmatch(offered) else uuid.uuid4().hex


def line_of(
    request_id: str,
    texts: list[str],
    request: SearchRequest,
    answer: Answer,
    served: Generation,
    policy: str,
    swapped: Sequence[int | None],
) -> dict[str, Any]:
    """What the log says of one request."""
    results = [
        {
            "query": text,
            "shown": [{"doc_id": h.doc_id, "rank": h.rank, "score": h.score} for h in found.hits],
            "swapped": rank,
        }
        for text, found, rank in zip(texts, answer.results, swapped, strict=True)
    ]
    return {
        "request_id": request_id,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "policy": policy,
        "k": request.k,
        "mode": answer.mode,
        "filter": None if request.filter is None else request.filter.spelt_out,
        "generation": served.number,
        "index": served.index.fingerprint,
        "encoder": served.index.encoder,
        "reranker": answer.reranker,
        "feedback": None if answer.feedback is None else asdict(answer.feedback),
        "coverage": answer.coverage.fraction,
        "results": results,
    }


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
