"""SIGTERM: nothing new is begun, what is under way is answered, and the program ends well."""

import signal
import threading

import httpx
import pytest


@pytest.mark.slow
def test_a_request_under_way_is_answered_after_sigterm(
    tmp_path, run_app, index, corpus, wait_until
):
    flags = {"max-timeout-ms": 120_000, "drain-within-s": 120}
    with run_app(tmp_path / "drained", index, corpus, **flags) as served:
        shard = served.replica("shard-00001")
        answered: list[httpx.Response] = []

        def ask() -> None:
            request = {"query": "otter", "timeout_ms": 100_000, "allow_partial": False}
            answered.append(served.client.post("/search", json=request, timeout=120))

        def in_flight() -> bool:
            return "bixse_in_flight 1.0" in served.client.get("/metrics").text

        def draining(reply: httpx.Response) -> bool:
            return reply.status_code == 503 and reply.json()["error"]["type"] == "draining"

        shard.send_signal(signal.SIGSTOP)
        try:
            asking = threading.Thread(target=ask)
            asking.start()
            wait_until(in_flight, 30)
            served.process.send_signal(signal.SIGTERM)
            wait_until(lambda: draining(served.client.get("/readyz")), 60)
            late = served.search(query="heron")
            assert draining(late)
            assert late.headers["retry-after"] == "1"
            assert served.client.get("/livez").status_code == 200
            assert served.process.poll() is None
            assert answered == []
        finally:
            shard.send_signal(signal.SIGCONT)
        asking.join(60)
        assert answered[0].status_code == 200
        assert answered[0].json()["coverage"]["fraction"] == 1.0
        assert served.process.wait(60) == 0
        assert "stopping with requests" not in served.log.read_text()
