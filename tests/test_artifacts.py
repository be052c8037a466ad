"""Complete or absent, one flipped byte is noticed, another config is refused."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from bixse.artifacts import (
    MANIFEST,
    Artifact,
    ArtifactError,
    Draft,
    UnderWay,
    begin,
    fingerprints,
)
from bixse.place import Place
from bixse.records import CORPUS, REJECTED
from tests.artifacts import drafted


def rows(start: int, count: int) -> pa.Table:
    return pa.table(
        {
            "doc_id": [f"d{n}" for n in range(start, start + count)],
            "title": [""] * count,
            "text": [f"text {n}" for n in range(start, start + count)],
        },
        schema=CORPUS,
    )


def rejections(count: int) -> pa.Table:
    row = {"reason": "empty text", "response": "", "source": "a.jsonl", "line": 3}
    return pa.Table.from_pylist([row] * count, schema=REJECTED)


def make(url: str, **config: object) -> Artifact:
    draft = begin(url, "corpus", config=config, inputs={"data": "abc"})
    assert isinstance(draft, Draft)
    draft.write_part(0, rows(0, 5), rejections(2))
    draft.write_part(1, rows(5, 3))
    return draft.finish(extra={"described": "eight rows"})


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "corpus")
    return f"memory://{tmp_path.name}/corpus"


def test_what_is_written_reads_back(url: str) -> None:
    made = make(url)
    read = Artifact.open(url, "corpus")
    assert read.fingerprint == made.fingerprint
    assert read.table().equals(pa.concat_tables([rows(0, 5), rows(5, 3)]))
    assert (read.manifest.rows, read.manifest.rejected) == (8, 2)
    rejected = read.rejected()
    assert rejected is not None
    assert rejected["reason"].to_pylist() == ["empty text"] * 2
    assert [b.num_rows for b in read.batches(["doc_id"], rows=2)] == [2, 2, 1, 2, 1]
    assert list(read.rows("text", "doc_id")) == [(f"text {n}", f"d{n}") for n in range(8)]
    assert list(read.column("doc_id")) == [f"d{n}" for n in range(8)]
    assert (read.local_directory() / MANIFEST).exists()


def test_a_hundred_thousand_parts_and_more_are_in_order(url: str) -> None:
    numbers = [9_999, 10_000, 10_001, 99_999, 100_000, 100_001]
    draft = drafted(url, "corpus")
    for number in reversed(numbers):
        draft.write_part(number, rows(number, 1))
    assert draft.parts_done() == set(numbers)
    made = draft.finish()
    assert made.table()["doc_id"].to_pylist() == [
        row["doc_id"] for number in numbers for row in rows(number, 1).to_pylist()
    ]


def test_a_remote_one_is_copied_piece_by_piece(tmp_path: Path, monkeypatch) -> None:
    """A shard was held in memory whole while it was copied, beside the one that was served."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    draft = drafted(f"memory://{tmp_path.name}/index", "index")
    draft.write_file("shard-00000/index.faiss", bytes(64 << 20))
    made = draft.finish(rows=1)
    tracemalloc.start()
    try:
        local = made.local_directory()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        draft.place.clear()
    assert peak < 32 << 20
    Artifact(Place(str(local)), made.manifest).verify()


def test_a_copy_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    place = Place(f"memory://{tmp_path.name}/corpus")
    with pytest.raises(FileNotFoundError):
        place.get("absent", tmp_path / "copy")
    assert not list(tmp_path.iterdir())


def test_the_same_content_has_the_same_fingerprint(tmp_path: Path) -> None:
    assert make(str(tmp_path / "a")).fingerprint == make(str(tmp_path / "b")).fingerprint
    assert make(str(tmp_path / "c"), x=1).fingerprint != make(str(tmp_path / "a2")).fingerprint


OLDER = """{
 "fingerprint": "e685c8e19e903f7c5de7b563272dbb5b",
 "sha256": "117f41f8e9cda951f251b9d8a19426c4e0849eed88f3f8dafb939951484400fd",
 "kind": "notes",
 "schema_version": 1,
 "rows": 3,
 "rejected": 0,
 "files": {"notes.txt": {
  "sha256": "a9f74d1ec36ebdeb2da3f6e5868090cd2a2d20b3dcca7b62f60304b1d3d9ef42", "bytes": 3}},
 "inputs": {"corpus": "abc"},
 "config": {"seed": 0},
 "versions": {"pyarrow": "26.0.1"},
 "seconds": 1.5,
 "device": "cpu",
 "extra": {"leaves": 3}
}"""


def test_an_artefact_of_an_older_build_opens(tmp_path: Path) -> None:
    """Whatever enters its hashes anew, all that was made before would be damaged."""
    (tmp_path / "notes.txt").write_bytes(b"tea")
    (tmp_path / MANIFEST).write_text(OLDER)
    assert Artifact.open(str(tmp_path), "notes").manifest.extra == {"leaves": 3}


def test_inputs_are_named_and_several_are_numbered(tmp_path: Path) -> None:
    corpus, first, second = (make(str(tmp_path / name), x=name) for name in "abc")
    assert fingerprints(corpus=corpus, queries=[first, second], preferences=None) == {
        "corpus": corpus.fingerprint,
        "queries-0": first.fingerprint,
        "queries-1": second.fingerprint,
    }


def test_rows_are_the_same_whatever_stands_beside_them(tmp_path: Path) -> None:
    made = make(str(tmp_path / "a"))
    draft = begin(str(tmp_path / "b"), "corpus", config={"x": 1}, inputs={"data": "other"})
    assert isinstance(draft, Draft)
    draft.write_file("metadata/part-00000.parquet", b"beside")
    draft.write_part(0, rows(0, 5))
    draft.write_part(1, rows(5, 3))
    same = draft.finish()
    assert same.rows_fingerprint == made.rows_fingerprint
    assert same.fingerprint != made.fingerprint
    draft = drafted(tmp_path / "c", "corpus")
    draft.write_part(0, rows(0, 8))
    assert draft.finish().rows_fingerprint != made.rows_fingerprint, "parts are units of work"


def test_without_a_manifest_it_does_not_exist(url: str) -> None:
    draft = drafted(url, "corpus")
    draft.write_part(0, rows(0, 5))
    with pytest.raises(ArtifactError, match=r"manifest.json is missing"):
        Artifact.open(url)
    again = drafted(url, "corpus")
    assert again.parts_done() == {0}


def test_a_finished_artefact_is_not_made_again(url: str) -> None:
    make(url)
    assert isinstance(begin(url, "corpus", config={}, inputs={"data": "abc"}), Artifact)


def test_another_input_or_config_is_refused_by_name(url: str) -> None:
    make(url, size=1)
    with pytest.raises(ArtifactError, match=r'inputs.data = "abc", now inputs.data = "xyz"'):
        begin(url, "corpus", config={"size": 1}, inputs={"data": "xyz"})
    with pytest.raises(ArtifactError, match=r"config.size = 1, now config.size = 2"):
        begin(url, "corpus", config={"size": 2}, inputs={"data": "abc"})
    with pytest.raises(ArtifactError, match=r"expected queries at .*, found corpus"):
        Artifact.open(url, "queries")


def test_a_half_made_one_of_another_config_is_refused(url: str) -> None:
    begin(url, "corpus", config={"size": 0}, inputs={})
    # Nothing was made of the first yet.
    draft = begin(url, "corpus", config={"size": 1}, inputs={})
    assert isinstance(draft, Draft)
    draft.write_part(0, rows(0, 5))
    with pytest.raises(ArtifactError, match=r"was begun with config.size = 1"):
        begin(url, "corpus", config={"size": 2}, inputs={})


def test_a_file_is_asked_for_once_and_not_whether_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make("memory://counted/corpus")
    asked: Counter[str] = Counter()
    for method in ("exists", "open"):
        plain = getattr(Place, method)

        def counted(place: Place, name: str, plain: Any = plain) -> Any:
            asked[name] += 1
            return plain(place, name)

        monkeypatch.setattr(Place, method, counted)
    made.verify()
    assert asked == Counter(made.manifest.files.keys())
    made.place.remove("part-00001.parquet")
    with pytest.raises(ArtifactError, match=r"part-00001\.parquet is missing"):
        made.verify()


class Remembering(MemoryFileSystem):
    """Answers from the listings that it has seen, as the filesystems of object stores do (s3fs)."""

    protocol = "remembering"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.removeprefix("remembering://"))
        return stripped

    def find(self, path: str, *arguments: Any, **more: Any) -> Any:
        found = super().find(path, *arguments, **more)
        names = found if isinstance(found, list) else list(found)
        self.dircache.setdefault(self._strip_protocol(path), [{"name": name} for name in names])
        return found

    def info(self, path: str, **more: Any) -> Any:
        path = self._strip_protocol(path)
        listed = self.dircache.get(path.rpartition("/")[0], None)
        if listed is not None and path not in [entry["name"] for entry in listed]:
            raise FileNotFoundError(path)
        return super().info(path, **more)

    def exists(self, path: str, **more: Any) -> bool:
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True


def test_what_another_process_has_written_is_there(tmp_path: Path) -> None:
    """On S3 every stage whose workers wrote parts ended with the first of them "missing"."""
    fsspec.register_implementation("remembering", Remembering, clobber=True)
    draft = drafted(f"remembering://{tmp_path.name}/corpus", "corpus")
    assert draft.parts_done() == set()
    worker = Draft(Place(f"memory://{tmp_path.name}/corpus"), "corpus", {}, {})
    worker.write_part(0, rows(0, 5))
    assert draft.place.exists("part-00000.parquet")
    assert draft.parts_done() == {0}
    assert draft.finish().manifest.rows == 5


HOLDER = """
import sys
import time
from bixse.artifacts import begin
begin(sys.argv[1], "corpus", config={}, inputs={"data": "abc"})
print("begun", flush=True)
time.sleep(60)
"""


def test_two_at_once_do_not_make_the_same(tmp_path: Path) -> None:
    """The second overwrote parts that the first had hashed. One that was killed holds nothing."""
    url = str(tmp_path / "corpus")
    root = Path(__file__).resolve().parent.parent
    line = [sys.executable, "-c", HOLDER, url]
    with subprocess.Popen(line, cwd=root, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "begun\n"
            # By whatever path.
            (tmp_path / "link").symlink_to(tmp_path)
            for path in (url, f"file://{url}", str(tmp_path / "link" / "corpus")):
                with pytest.raises(UnderWay, match="another process is making"):
                    begin(path, "corpus", config={}, inputs={"data": "abc"})
            make(str(tmp_path / "another"))
        finally:
            holder.kill()
    made = make(url)
    # Nor does one that has finished, or was refused: the next process is not kept out.
    with pytest.raises(ArtifactError, match=r"inputs\.data"):
        begin(url, "corpus", config={}, inputs={"data": "xyz"})
    again = f"from bixse.artifacts import begin; print(begin({url!r}, 'corpus', config={{}}, "
    again += "inputs={'data': 'abc'}).fingerprint)"
    found = subprocess.run([sys.executable, "-c", again], cwd=root, capture_output=True, text=True)
    assert found.stdout.strip() == made.fingerprint, found.stderr


def test_a_removed_directory_is_begun_anew_by_the_same_process(tmp_path: Path) -> None:
    url = tmp_path / "corpus"
    begin(str(url), "corpus", config={}, inputs={"data": "abc"})
    Place(str(url)).clear()
    make(str(url))
    draft = begin(str(tmp_path / "other"), "corpus", config={}, inputs={"data": "abc"})
    assert isinstance(draft, Draft)
    draft.place.clear()
    begin(str(tmp_path / "other"), "corpus", config={}, inputs={"data": "abc"})
    held = subprocess.run(
        [sys.executable, "-c", HOLDER, str(tmp_path / "other")],
        cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert "UnderWay" in held.stderr


def test_somebody_elses_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(ArtifactError, match=r"letters.txt, which bixse did not make"):
        begin(str(tmp_path), "corpus", config={}, inputs={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["letters.txt"]


def test_any_flipped_byte_and_any_truncation_is_noticed(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    make(str(root))
    rng = random.Random(0)
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.name != "begun.json"):
        good = path.read_bytes()
        where = {0, len(good) // 2, len(good) - 1, *(rng.randrange(len(good)) for _ in range(40))}
        for position in sorted(where):
            flipped = bytes([good[position] ^ (1 << rng.randrange(8))])
            path.write_bytes(good[:position] + flipped + good[position + 1 :])
            with pytest.raises(ArtifactError, match=r"damaged|schema version"):
                Artifact.open(str(root))
        path.write_bytes(good[:-1])
        with pytest.raises(ArtifactError, match="damaged"):
            Artifact.open(str(root))
        path.unlink()
        with pytest.raises(ArtifactError, match="missing"):
            Artifact.open(str(root))
        path.write_bytes(good)
    Artifact.open(str(root))


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    with pytest.raises(TypeError):
        place.write("a/b.bin", "not bytes")  # type: ignore[arg-type]
    assert place.names() == [] or all(not n.endswith("b.bin") for n in place.names())
    with pytest.raises(FileNotFoundError):
        place.put(tmp_path / "absent", "c.bin")
    assert not place.exists("c.bin")


WRITER = """
import sys
import tests_rows
from bixse.artifacts import Artifact, begin
draft = begin(sys.argv[1], "corpus", config={}, inputs={})
if isinstance(draft, Artifact):
    sys.exit()  # an earlier run was killed after its last line
for number in range(200):
    if number not in draft.parts_done():
        draft.write_part(number, tests_rows.rows(number * 3, 3))
draft.finish()
"""

ROWS = """
import pyarrow as pa
from bixse.records import CORPUS
def rows(start, count):
    ids = [f"d{n}" for n in range(start, start + count)]
    return pa.table({"doc_id": ids, "title": ids, "text": ids}, schema=CORPUS)
"""


def test_what_a_killed_writer_left_goes_when_the_rest_is_made(tmp_path: Path) -> None:
    """Pieces of shards, of gigabytes each, stayed beside the finished ones."""
    url = tmp_path / "corpus"
    begin(str(url), "corpus", config={}, inputs={"data": "abc"})
    left = [url / "part-00000.parquet.0f257f5b.tmp", url / "rejected" / "a.json.00000000.tmp"]
    (url / "rejected").mkdir()
    for path in (*left, url / "notes.tmp"):
        path.write_bytes(b"half")
    made = make(str(url))
    assert not any(path.exists() for path in left)
    assert (url / "notes.tmp").exists(), "it is none of ours"
    assert Artifact.open(str(url)).fingerprint == made.fingerprint
    assert made.manifest.rows == 8


def test_killed_at_any_moment_and_rerun_it_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "tests_rows.py").write_text(ROWS)
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": f"{root}:{tmp_path}"}

    def run(out: str, kill_after: float | None = None) -> None:
        writer = subprocess.Popen([sys.executable, "-c", WRITER, out], env=env)
        if kill_after is not None:
            time.sleep(kill_after)
            writer.send_signal(signal.SIGKILL)
        assert writer.wait(60) == 0 or kill_after is not None

    run(str(tmp_path / "whole"))
    rng = random.Random(1)
    out = str(tmp_path / "killed")
    for _ in range(4):
        run(out, kill_after=0.3 + rng.random() * 0.7)
    run(out)
    whole, killed = Artifact.open(str(tmp_path / "whole")), Artifact.open(out)
    assert killed.fingerprint == whole.fingerprint
    assert killed.manifest.rows == 600
