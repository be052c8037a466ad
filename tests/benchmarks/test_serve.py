"""The serving benchmark's arithmetic, and its load against a server that counts."""

import asyncio
from typing import Any

from benchmarks.serve import summary
from benchmarks.serve_load import load


def test_medians_by_system_and_the_overhead_of_one_client() -> None:
    def column(rates: list[float], p50_ms: float) -> list[dict[str, float]]:
        row = {"one_p50_ms": p50_ms, "one_rested_p50_ms": p50_ms + 2, "recall": 0.5}
        return [{"qps": rate, **row} for rate in rates]

    turns = {"limit": column([9, 30, 10], 8.0), "replicate_fast": column([8, 7, 1], 11.5)}
    found = summary({**turns, "txtai": column([2], 0)})
    assert (found["limit_qps"], found["replicate_fast_qps"]) == (10, 7)
    assert found["peers"] == {"txtai": 2}
    assert (found["p50_overhead_ms"], found["p50_overhead_rested_ms"]) == (3.5, 1.5)
    assert found["recall@10"] == {"limit": 0.5, "replicate_fast": 0.5, "txtai": 0.5}


def test_the_load_asks_each_request_once_and_counts_refusals() -> None:
    asked: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            await reader.readline()
            asked.append(line.decode().split()[1])
            status = b"429" if asked[-1] == "/7" else b"200"
            writer.write(b"HTTP/1.1 " + status + b" X\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    async def run() -> dict[str, float]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            plan: dict[str, Any] = {"host": "127.0.0.1", "seconds": 30, "count": 20, "clients": 3}
            plan["port"] = server.sockets[0].getsockname()[1]
            plan["requests"] = [f"GET /{n} HTTP/1.1\r\n\r\n" for n in range(20)]
            return await load(plan)

    found = asyncio.run(run())
    assert sorted(asked) == sorted(f"/{n}" for n in range(20))
    assert found["failed"] == 1
    assert found["qps"] > 0
