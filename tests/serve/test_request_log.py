"""Lists that were shown are written down where that is wished, and nowhere else."""

import json
import resource
import stat
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bixse.judging.settings import Clicks
from bixse.records import QUERIES
from jobs.clicks import shown_queries
from serve.client import Client
from serve.gateway import _Ingress
from serve.request_log import RequestLog, made, request_id_of
from tests.artifacts import artifact


def lines_of(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files_of(place) for line in file.read_text().splitlines()]


def files_of(place: Path) -> list[Path]:
    return sorted(place.glob("*.jsonl"))


def test_every_line_is_written_in_order_for_its_owner_only(tmp_path):
    place = tmp_path / "deep" / "log"
    log = RequestLog(str(place), most_bytes=1 << 20, most_files=2)
    for number in range(1000):
        log.put({"request_id": str(number), "query": "Größe 水獭"})
    log.close()
    assert [line["request_id"] for line in lines_of(place)] == [str(n) for n in range(1000)]
    assert lines_of(place)[0]["query"] == "Größe 水獭"
    assert stat.S_IMODE(files_of(place)[0].stat().st_mode) == 0o600
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_the_oldest_files_go(tmp_path):
    for round_ in range(6):
        log = RequestLog(str(tmp_path), most_bytes=1, most_files=3)
        log.put({"round": round_})
        log.close()
    # Each file was full with its first line; the next one stands before it is written to.
    assert [line["round"] for line in lines_of(tmp_path)] == [4, 5]


def test_a_start_makes_room_too(tmp_path):
    """Only a file that was full made room: restarts kept all that people had ever asked."""
    for start in range(6):
        log = RequestLog(str(tmp_path), most_bytes=1 << 20, most_files=3)
        assert len(files_of(tmp_path)) <= 2
        log.put({"start": start})
        log.close()
    assert [line["start"] for line in lines_of(tmp_path)] == [3, 4, 5]


def test_a_disk_that_waits_costs_lines_and_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr("serve.request_log._WAITING", 3)
    # No disk here waits at command: the write is held, and all around it is real.
    inside, gate, lost = threading.Event(), threading.Event(), []
    log = RequestLog(str(tmp_path), most_bytes=1 << 20, most_files=2, lost=lost.append)
    write = log._write

    def slow(lines: list[str]) -> None:
        inside.set()
        gate.wait(60)
        write(lines)

    monkeypatch.setattr(log, "_write", slow)
    log.put({"n": 0})
    assert inside.wait(60)
    for number in range(1, 200):
        log.put({"n": number})
    assert sum(lost) == 196, "one is being written, three wait"
    gate.set()
    log.close()
    assert [line["n"] for line in lines_of(tmp_path)] == [0, 1, 2, 3]


def test_what_waits_when_a_replica_ends_is_written(tmp_path, monkeypatch):
    """Serve ends the process of a replica without a word to its threads."""
    log = RequestLog(str(tmp_path), most_bytes=1 << 20, most_files=2)
    gate, write = threading.Event(), log._write

    def slow(lines: list[str]) -> None:
        gate.wait(60)
        write(lines)

    monkeypatch.setattr(log, "_write", slow)
    # Serve's own wrapper of a replica calls this; the rest of one needs an application.
    ended = _Ingress()
    ended._request_log = log
    for number in range(1000):
        log.put({"n": number})
    threading.Timer(0.1, gate.set).start()
    ended.__del__()
    assert [line["n"] for line in lines_of(tmp_path)] == list(range(1000))


def test_what_cannot_be_written_is_counted(tmp_path):
    lost: list[int] = []
    log = RequestLog(str(tmp_path / "log"), most_bytes=1 << 20, most_files=2, lost=lost.append)
    (tmp_path / "log").rmdir()
    log.put({"n": 1})
    log.close()
    assert lost == [1]


def test_a_line_that_was_written_in_part_spoils_no_other(tmp_path):
    """The first line after a disk had been full was added to it: no JSON, and not counted."""
    lost = threading.Event()
    log = RequestLog(str(tmp_path), 1 << 20, 9, lost=lambda lines: lost.set())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        log.put({"n": 1, "query": "x" * 200})
        assert lost.wait(60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.put({"n": 2})
    log.close()
    assert lines_of(tmp_path) == [{"n": 2}]


def test_a_place_that_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot keep a request log at"):
        made(str(tmp_path / "file"))


@pytest.mark.parametrize("offered", [None, "", "a b", "x" * 129, "a\nb", "é"])
def test_an_id_that_is_none_is_replaced(offered):
    new = request_id_of(offered)
    assert new != offered
    assert len(new) == 32
    assert request_id_of("4bf92f35-77b3:4d.a6") == "4bf92f35-77b3:4d.a6"


@pytest.mark.slow
def test_the_application_writes_what_it_shows(tmp_path, run_app, index, corpus):
    place = tmp_path / "log"
    flags = {"topology": "replicate", "request-log": place, "policy": "arm-b", "swap-share": 1}
    with run_app(tmp_path / "logged", index, corpus, **flags) as served:
        headers = {"X-Request-Id": "mine-1"}
        one = served.client.post("/search", json={"query": "otter", "k": 3}, headers=headers)
        assert one.json()["request_id"] == one.headers["x-request-id"] == "mine-1"
        two = served.search(queries=["a heron", "a lynx"], k=2).json()
        assert len(two["request_id"]) >= 16
        with Client(served.url, served.search_key) as client:
            assert client.search("a toad", filter={"animal": "toad"}).request_id
        assert served.search(query="").status_code == 422
    first, second, third = lines_of(place)
    assert first["results"] == [
        {
            "query": "otter",
            "shown": [{n: h[n] for n in ("doc_id", "rank", "score")} for h in one.json()["hits"]],
            "swapped": first["results"][0]["swapped"],
        }
    ]
    scores = [hit["score"] for hit in one.json()["hits"]]
    falls = [rank for rank, pair in enumerate(pairwise(scores), start=1) if pair[0] < pair[1]]
    assert falls == [first["results"][0]["swapped"]]
    none = artifact(tmp_path / "none", "queries", [], QUERIES)
    read = shown_queries(Clicks(shown=(str(place),)), none, str(tmp_path / "shown-queries"))
    assert set(read.column("text")) == {"otter", "a heron", "a lynx", "a toad"}
    assert read.manifest.rejected == 0
    assert (first["request_id"], first["policy"], first["k"]) == ("mine-1", "arm-b", 3)
    assert first["mode"] == "dense"
    assert (first["filter"], third["filter"]) == (None, {"animal": {"eq": "toad"}})
    assert (first["generation"], first["index"]) == (1, index.fingerprint)
    assert (first["encoder"], first["coverage"]) == (two["encoder"], 1.0)
    assert second["request_id"] == two["request_id"]
    assert [len(result["shown"]) for result in second["results"]] == [2, 2]
    assert third["results"][0]["query"] == "a toad"
    written = "".join(file.read_text() for file in files_of(place))
    assert served.search_key not in written
