"""The search page in a real browser."""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import httpx
import pytest

from serve.api import PAGE

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1000,900",
)  # fmt: skip


@pytest.fixture
def browser(tmp_path) -> Iterator["Chrome"]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


def test_a_search_is_typed_and_answered(served, browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select
    from selenium.webdriver.support.wait import WebDriverWait

    def all_of(selector: str) -> list:
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def status() -> str:
        return all_of("#status")[0].text

    wait = WebDriverWait(browser, 20)
    browser.get(served.url)
    query, key = all_of("#query")[0], all_of("#key")[0]
    assert browser.switch_to.active_element == query
    assert not key.is_displayed()
    query.send_keys("a heron that builds its nest", Keys.ENTER)
    wait.until(lambda _: "asks for a key" in status())
    assert key.is_displayed(), "asked for when it is needed"
    key.send_keys(served.search_key, Keys.ENTER)
    wait.until(lambda _: len(all_of("#hits li")) == 10)

    expected = served.search(query="a heron that builds its nest").json()["hits"]
    assert [e.text for e in all_of("#hits h2")] == [h["title"] for h in expected]
    assert [e.text for e in all_of("#hits .rank")] == [str(h["rank"]) for h in expected]
    assert all_of("#hits .text")[0].text == expected[0]["text"]
    assert all_of("#hits .score")[0].text == f"score {expected[0]['score']:.4f}"
    assert re.fullmatch(r"10 hits in \d+ ms, from 100 % of the documents", status())
    assert served.index.fingerprint in all_of("#trace")[0].text
    # Every field has a name that a screen reader says.
    assert [e.accessible_name for e in (query, key)] == ["Query", "Key"]
    mode = all_of("#mode")[0]
    assert mode.is_displayed(), "this index holds words too"
    assert mode.accessible_name == "Search by"
    Select(mode).select_by_visible_text("both")
    wait.until(lambda _: all_of("#hits .sides"))
    both = served.search(query="a heron that builds its nest", mode="hybrid").json()["hits"]
    assert [e.text for e in all_of("#hits h2")] == [h["title"] for h in both]
    shown = [e.text for e in all_of("#hits li:first-child .sides")]
    assert shown == [
        f"cosine {both[0]['dense']['score']:.4f} (rank {both[0]['dense']['rank']})",
        f"BM25 {both[0]['lexical']['score']:.2f} (rank {both[0]['lexical']['rank']})",
    ]
    if shots := os.environ.get("BIXSE_SCREENSHOTS"):
        browser.save_screenshot(f"{shots}/search.png")

    assert len(all_of("#hits .metadata")) == sum("metadata" in h for h in both)
    only = all_of("#filter")[0]
    assert only.is_displayed(), "the documents of this index have metadata"
    assert only.accessible_name == "Filter"
    assert all_of("#fields")[0].text == (
        "Fields: animal (text), number (number), seen (boolean), words (texts)"
    )
    only.send_keys('{"animal": "otter", "number": {"gte": 2}}', Keys.ENTER)
    wait.until(lambda _: all_of("#hits .metadata") and "otter" in all_of("#hits h2")[-1].text)
    said = {"animal": "otter", "number": {"gte": 2}}
    some = served.search(query="a heron that builds its nest", mode="hybrid", filter=said)
    assert [e.text for e in all_of("#hits h2")] == [h["title"] for h in some.json()["hits"]]
    first = some.json()["hits"][0]["metadata"]
    assert [e.text for e in all_of("#hits li:first-child .metadata div")] == [
        "animal otter",
        f"number {first['number']}",
        "seen true",
        f"words {', '.join(first['words'])}",
    ]
    if shots := os.environ.get("BIXSE_SCREENSHOTS"):
        browser.save_screenshot(f"{shots}/filter.png")

    def refused_by(sentence: str, _: object) -> bool:
        return sentence in all_of("#refusal")[0].text

    for wrong, sentence in (
        ('{"colour": "red"}', "no field 'colour' here: there are animal, number, seen, words"),
        ('{"animal": {"like": "o"}}', "must not hold 'like'"),
        ('{"animal": ', "The filter is not JSON"),
    ):
        only.clear()
        only.send_keys(wrong, Keys.ENTER)
        wait.until(partial(refused_by, sentence))
        assert only.get_dom_attribute("aria-invalid") == "true"
        assert not all_of("#hits li")
        assert "The filter" in status()
    if shots:
        browser.save_screenshot(f"{shots}/refused.png")
    only.clear()
    query.send_keys(Keys.ENTER)
    wait.until(lambda _: len(all_of("#hits li")) == 10)
    assert not all_of("#refusal")[0].text

    query.clear()
    query.send_keys(" ", Keys.ENTER)
    wait.until(lambda _: "must not be empty" in status())
    assert not all_of("#hits li")
    errors = [e["message"] for e in browser.get_log("browser") if "40" not in e["message"]]
    assert not [e for e in errors if "422" not in e], errors


def test_the_page_asks_nobody_else(served):
    reply = httpx.get(served.url)
    assert reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)=\"(?!data:)|https?://|@import|url\(", reply.text)
    assert "innerHTML" not in reply.text


class Slow(BaseHTTPRequestHandler):
    """The page, and hits that are called as the mode that was asked for; `dense` waits from its
    second time on for `hybrid`.
    """

    dense, answered = 0, threading.Event()

    def do_GET(self) -> None:
        self.reply(PAGE.read_bytes(), "text/html")

    def do_POST(self) -> None:
        mode = json.loads(self.rfile.read(int(self.headers["content-length"])))["mode"]
        if mode == "dense":
            Slow.dense += 1
            if Slow.dense > 1:
                Slow.answered.wait(20)
                time.sleep(0.5)
        body = {
            "hits": [{"doc_id": mode, "score": 1.0, "rank": 1}],
            "coverage": {"fraction": 1.0, "shards_ok": 1, "shards": 1, "degraded": []},
            "index": {"generation": 1, "fingerprint": "f", "modes": ["dense", "hybrid"]},
            "encoder": "e",
            "timing_ms": {"total": 1.0},
        }
        with suppress(OSError):
            self.reply(json.dumps(body).encode(), "application/json")
        if mode == "hybrid":
            Slow.answered.set()

    def reply(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *said: object) -> None:
        pass


def test_a_late_answer_does_not_replace_that_of_the_mode_chosen_since(browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select
    from selenium.webdriver.support.wait import WebDriverWait

    def shown() -> list[str]:
        return [element.text for element in browser.find_elements(By.CSS_SELECTOR, "#hits h2")]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        wait = WebDriverWait(browser, 20)
        browser.get(f"http://127.0.0.1:{server.server_port}/")
        query = browser.find_element(By.ID, "query")
        query.send_keys("otter", Keys.ENTER)
        wait.until(lambda _: shown() == ["dense"])
        query.send_keys("s", Keys.ENTER)
        wait.until(lambda _: Slow.dense == 2)
        Select(browser.find_element(By.ID, "mode")).select_by_value("hybrid")
        wait.until(lambda _: shown() == ["hybrid"])
        time.sleep(1.5)
        assert shown() == ["hybrid"]
        assert browser.find_element(By.ID, "ask").is_enabled()
        assert "1 hit" in browser.find_element(By.ID, "status").text
    finally:
        server.shutdown()
