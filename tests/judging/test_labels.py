"""The label store: found by content, shared without loss, and never read when damaged."""

import hashlib
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.judging import labels as labels_module
from bixse.judging.labels import (
    LEFT_S,
    Label,
    Labels,
    label_key,
    normalised,
    signature_hash,
)
from bixse.place import Place
from bixse.records import Judgment

SIGNATURE = {"model": "tiny@1", "prompt": "umbrela", "orders": 2}


def label(number: int, relevance: float = 0.5) -> Label:
    key = hashlib.sha256(str(number).encode()).digest()
    return Label(key, (1 - relevance, relevance), relevance, "tiny", "hash", "llm", 0.125)


def keys(count: int) -> list[bytes]:
    return [label(number).key for number in range(count)]


def test_what_was_added_is_found_again_by_any_job(tmp_path: Path) -> None:
    first, second = Labels(str(tmp_path), SIGNATURE), Labels(str(tmp_path), SIGNATURE)
    first.add([label(n) for n in range(5)])
    assert second.find(keys(5)) == [None] * 5
    second.refresh()
    assert second.find(keys(6)) == [*[label(n) for n in range(5)], None]
    assert Labels(str(tmp_path), SIGNATURE).find(keys(1)) == [label(0)]
    assert Labels(str(tmp_path), {**SIGNATURE, "orders": 1}).find(keys(1)) == [None]


def test_a_label_becomes_the_judgment_of_whichever_pair_has_its_texts() -> None:
    judgment = Judgment("q", "d", (0.25, 0.75), 0.75, "tiny", "hash", "llm", 0.5)
    kept = Label.of(b"k" * 32, judgment)
    assert kept.judgment("q", "d") == judgment
    assert kept.judgment("other", "d").query_id == "other"


@pytest.mark.parametrize(
    "a,b,same",
    [
        (("tea", "leaf"), (" tea\n", "leaf "), True),
        (("cafe\u0301", "x  y"), ("caf\u00e9", "x\ty"), True),
        (("it", "leaf"), ("IT", "leaf"), False),
        (("ab", "c"), ("a", "bc"), False),
        (("a", "b"), ("b", "a"), False),
        (("", "a"), ("a", ""), False),
    ],
)
def test_equal_texts_have_equal_keys(a: tuple[str, str], b: tuple[str, str], same: bool) -> None:
    assert (label_key(SIGNATURE, *a) == label_key(SIGNATURE, *b)) is same


def test_every_part_of_the_signature_enters_the_key() -> None:
    found = {label_key({**SIGNATURE, name: "other"}, "q", "d") for name in [*SIGNATURE, "dtype"]}
    assert len(found | {label_key(SIGNATURE, "q", "d")}) == 5
    reordered = dict(reversed(SIGNATURE.items()))
    assert signature_hash(reordered) == signature_hash(SIGNATURE)


def test_the_key_is_pinned() -> None:
    """Another key, and every label that was paid for is lost without a word."""
    assert signature_hash(SIGNATURE) == "f5165a0b747a95ee218aa48eb39a00ed"
    found = label_key(SIGNATURE, "what is tea", "A leaf, caf\u00e9.").hex()
    assert found == "254fab22d10df56df7c9ee0d7727c7c2c5c2d7c4c3700adfa0b79a965d42c518"


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


def test_parts_are_never_overwritten_and_equal_ones_are_one(tmp_path: Path) -> None:
    for _ in range(2):
        Labels(str(tmp_path), SIGNATURE).add([label(1), label(2)])
    Labels(str(tmp_path), SIGNATURE).add([label(1, relevance=0.25)])
    parts = list(tmp_path.rglob("labels-*.parquet"))
    assert len(parts) == 2
    # Two jobs answered at the same moment: one of the answers, not a mixture.
    assert Labels(str(tmp_path), SIGNATURE).find(keys(2))[1] in (label(1), label(1, 0.25))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_part_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    Labels(str(tmp_path), SIGNATURE).add([label(n) for n in range(100)])
    (part,) = tmp_path.rglob("labels-*.parquet")
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes({"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[damage])
    with pytest.raises(ValueError, match=rf"damaged: {part.name} differs .* remove that file"):
        Labels(str(tmp_path), SIGNATURE)
    part.unlink()
    assert Labels(str(tmp_path), SIGNATURE).find(keys(1)) == [None]


def test_many_runs_answer_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the rows are cut into runs and merged, each is found once, none twice."""
    monkeypatch.setattr(labels_module, "RUN_ROWS", 8)
    monkeypatch.setattr(labels_module, "SMALL_RUNS", 3)
    store = Labels(str(tmp_path), SIGNATURE)
    for number in range(0, 60, 3):
        store.add([label(number + n) for n in range(3)])
        store.refresh()
        assert sum(len(run) < 8 for run in store._runs) < 3
    assert len(store) == 60
    assert store.find(keys(61)) == [*[label(n) for n in range(60)], None]
    # Read at once, a run is full as soon as a part has filled it.
    assert max(map(len, Labels(str(tmp_path), SIGNATURE)._runs)) == 9


def test_keys_with_an_equal_head_are_told_apart(tmp_path: Path) -> None:
    heads = [b"\0" * 8 + bytes([n]) * 24 for n in range(4)]
    store = Labels(str(tmp_path), SIGNATURE)
    store.add([Label(key, (1.0,), n / 4, "j", "p", "llm") for n, key in enumerate(heads[:3])])
    store.refresh()
    found = store.find(heads)
    assert [entry and entry.relevance for entry in found] == [0.0, 0.25, 0.5, None]


def test_an_object_store_will_do() -> None:
    url = "memory://labels-test"
    Labels(url, SIGNATURE).add([label(1)])
    assert Labels(url, SIGNATURE).find(keys(2)) == [None, label(1)]


def test_small_parts_are_put_together_while_others_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels_module, "SMALL_PARTS", 5)
    monkeypatch.setattr(labels_module, "RUN_ROWS", 8)
    writer, reader = Labels(str(tmp_path), SIGNATURE), Labels(str(tmp_path), SIGNATURE)
    for number in range(0, 12, 3):
        writer.add([label(number + n) for n in range(3)])
    writer.compact()
    assert len(list(tmp_path.rglob("labels-*.parquet"))) == 4  # Too few to be worth it.
    writer.add([label(n) for n in range(12, 21)])
    writer.add([label(21)])
    reader.refresh()
    writer.compact()
    names = sorted(path.name.split("-")[1] for path in tmp_path.rglob("labels-*.parquet"))
    assert sum(map(int, names)) == 22
    assert len(names) == 3
    reader.refresh()
    for one in (reader, Labels(str(tmp_path), SIGNATURE)):
        assert one.find(keys(23)) == [*[label(n) for n in range(22)], None]


def test_jobs_that_put_the_same_parts_together_leave_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower of two jobs that end at once finds that everything it has listed is gone."""
    monkeypatch.setattr(labels_module, "SMALL_PARTS", 3)
    slower, faster = (Labels(str(tmp_path), SIGNATURE) for _ in range(2))
    for number in range(4):
        faster.add([label(number)])
    listed = slower._place.names()
    faster.compact()
    going_on = Labels(str(tmp_path), SIGNATURE)
    with monkeypatch.context() as patched:
        patched.setattr(type(slower._place), "names", lambda place: listed)
        slower.compact()
    assert len(list(tmp_path.rglob("labels-*.parquet"))) == 1
    # A store that already has an empty part is read.
    going_on._write(labels_module.LABELS.empty_table())
    going_on.refresh()
    assert going_on.find(keys(4)) == [label(n) for n in range(4)]


def test_parts_that_are_put_together_while_they_are_listed_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were passed over until the next look, and their pairs paid for again."""
    monkeypatch.setattr(labels_module, "SMALL_PARTS", 3)
    writer = Labels(str(tmp_path), SIGNATURE)
    for number in range(4):
        writer.add([label(number)])
    read, reader = Place.read, Labels(str(tmp_path), SIGNATURE, load=False)

    def compacted_first(place: Place, name: str) -> bytes:
        monkeypatch.setattr(Place, "read", read)
        writer.compact()
        return read(place, name)

    monkeypatch.setattr(Place, "read", compacted_first)
    reader.refresh()
    assert reader.find(keys(4)) == [label(n) for n in range(4)]
    assert len(reader) == 4


def test_what_killed_writers_left_goes_after_a_day(tmp_path: Path) -> None:
    """Every killed job left up to a part behind for good; a writer of now is let alone."""
    labels = Labels(str(tmp_path), SIGNATURE)
    labels.add([label(1)])
    (folder,) = tmp_path.iterdir()
    old, new = (
        folder / "labels-1-a.parquet.0f257f5b.tmp",
        folder / "labels-1-b.parquet.00000000.tmp",
    )
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, time.time() - LEFT_S - 60))
    labels.compact()
    assert (old.exists(), new.exists()) == (False, True)
    assert len(Labels(str(tmp_path), SIGNATURE)) == 1
