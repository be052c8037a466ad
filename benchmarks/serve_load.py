"""Closed-loop HTTP load, in a process of its own: raw asyncio, keep-alive, one request a client.

    python -m benchmarks.serve_load plan.json

`plan.json` holds host, port, requests (whole HTTP requests as text), clients, seconds, count. One
JSON object comes out: requests a second, median and 99th percentile in ms, failures, and the share
of one core that this process took.
"""

import asyncio
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Connection:
    """One keep-alive connection, made again when the server has closed it."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> int:
        """The status of the reply. Raises ValueError when it does not say its length."""
        for left in reversed(range(3)):
            reader, writer = self._streams or await asyncio.open_connection(*self._address)
            self._streams = (reader, writer)
            try:
                writer.write(request)
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                length = re.search(r"\ncontent-length: *(\d+)", head)
                if length is None:
                    raise ValueError(f"a reply without Content-Length: {head!r}")
                await reader.readexactly(int(length[1]))
            except (asyncio.IncompleteReadError, ConnectionError):
                # HAProxy closes kept connections each time that Ray changes its configuration.
                self.close()
                if not left:
                    raise
                continue
            if "\nconnection: close" in head:
                self.close()
            return int(head.split(" ", 2)[1])
        raise AssertionError("the last try returns or raises")

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def client(plan: dict[str, Any], requests: Iterator[bytes], until: float) -> list[float]:
    """Seconds of each answer, minus 1 for one that was not 200."""
    connection, took = Connection(plan["host"], plan["port"]), []
    for request in requests:
        start = time.perf_counter()
        if start > until:
            break
        status = await connection.ask(request)
        took.append(time.perf_counter() - start if status == 200 else -1.0)
    connection.close()
    return took


async def load(plan: dict[str, Any]) -> dict[str, float]:
    """Run the plan; clients share one stream of requests."""
    every = [request.encode() for request in plan["requests"]]
    stream = itertools.islice(itertools.cycle(every), plan["count"])
    start, cpu = time.perf_counter(), time.process_time()
    until = start + plan["seconds"]
    columns = await asyncio.gather(*(client(plan, stream, until) for _ in range(plan["clients"])))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    took = [one for column in columns for one in column]
    good = sorted(one * 1e3 for one in took if one >= 0)
    return {
        "qps": len(good) / seconds,
        "p50_ms": statistics.median(good) if good else float("nan"),
        "p99_ms": good[int(0.99 * (len(good) - 1))] if good else float("nan"),
        "failed": len(took) - len(good),
        "load_cores": cpu / seconds,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(json.loads(Path(sys.argv[1]).read_text())))))
