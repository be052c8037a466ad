"""What a model writes on Ray: every request accounted for, sifted, resumed, and never a leak.

The models are functions (`tests.synthesis.stubs`); the last tests are of the real engine.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bixse.artifacts import MANIFEST, Artifact, ArtifactError, part_name
from bixse.candidates.settings import Pools
from bixse.records import JUDGMENTS, QUERIES, Query, text_hash
from bixse.retrieval.settings import Lexical
from bixse.synthesis.prompts import TASKS, Example, few_shot
from bixse.synthesis.reading import WrittenQuery
from bixse.synthesis.settings import FewShot, Generator, RoundTrip, Styled
from bixse.synthesis.tokens import ChatTokenizer
from jobs.ingest import Ingested, ingest
from jobs.labels import label
from jobs.pair import pair
from jobs.parts import rows_of
from jobs.recipe import Ingest, Placement
from jobs.sifting import drop_repeats, keep_returned
from jobs.verbs import main
from jobs.writing import _fitted, ask_documents
from tests.artifacts import drafted
from tests.synthesis.stubs import StubWriter

ROOT = Path(__file__).resolve().parent.parent.parent
PLACEMENT = Placement()
CHILD = """
import sys
from bixse.artifacts import Artifact
from bixse.synthesis.settings import FewShot
from jobs.recipe import Placement
from jobs.writing import ask_documents
from tests.synthesis.stubs import StubWriter
corpus, queries, qrels, out, settings = sys.argv[1:]
inputs = [Artifact.open(url) for url in (corpus, queries, qrels)]
settings = FewShot.model_validate_json(settings)
ask_documents(*inputs, settings, Placement(), out, writer=StubWriter)
"""
FEW_SHOT = FewShot(documents=100, queries_per_document=3, examples=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory that stands for the weights; the stubs need no more than a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokens = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Ingested:
    return ingest(str(beir), Ingest(), str(tmp_path_factory.mktemp("ingested")))


def write(data: Ingested, settings: Any, model: str, out: Path, **changes: Any) -> Artifact:
    generator = settings.generator.replace(model=model, unit_requests=64)
    settings = settings.replace(generator=generator)
    arguments = {"skip_query_ids": frozenset(), "writer": StubWriter, **changes}
    return ask_documents(
        data.corpus, data.queries, data.qrels, settings, PLACEMENT, str(out), **arguments
    )


@pytest.fixture(scope="module")
def written(data: Ingested, model: str, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write(data, FEW_SHOT, model, tmp_path_factory.mktemp("w") / "written")


def test_each_request_is_one_query_or_one_rejection(written: Artifact) -> None:
    requests = Artifact.open(f"{written.url}-requests", "requests").table().to_pylist()
    assert len(requests) == 300
    rejected = written.rejected()
    assert rejected is not None
    made = written.table()["query_id"].to_pylist()
    lost = rejected["query_id"].to_pylist()
    assert sorted(made + lost) == sorted(row["made_id"] for row in requests)
    assert (written.manifest.rows, written.manifest.rejected) == (len(made), len(lost))
    assert set(rejected["response"].to_pylist()) == {"I would rather not"}
    extra = written.manifest.extra
    assert extra["requests"] == 300
    assert extra["written_from"] == 100
    assert sum(extra["texts_each"].values()) == 100
    assert sum(int(n) * count for n, count in extra["texts_each"].items()) == len(made)
    assert extra["rejections"] == {"not the JSON that was asked for": len(lost)}


def test_the_examples_are_of_the_train_split_and_not_held_out(
    data: Ingested, model: str, written: Artifact, tmp_path: Path
) -> None:
    shown = {example["query_id"] for example in written.manifest.extra["examples"]}
    assert len(shown) == 4
    assert all(int(query_id[1:]) < 20 for query_id in shown)
    other = write(
        data, FEW_SHOT.replace(documents=1), model, tmp_path / "w", skip_query_ids=frozenset(shown)
    )
    assert not shown & {example["query_id"] for example in other.manifest.extra["examples"]}
    everyone = frozenset(f"q{n:03d}" for n in range(40))
    with pytest.raises(ValueError, match=r"shows given pairs and there is none: .*examples 0"):
        write(data, FEW_SHOT, model, tmp_path / "none", skip_query_ids=everyone)
    assert not (tmp_path / "none").exists()


def test_long_examples_leave_room_for_the_document(tiny_writer: str) -> None:
    """Eight documents of 512 tokens do not fit into 4,096."""
    generator = Generator(model=tiny_writer)
    tokens, settings = ChatTokenizer.load(generator), FewShot(generator=generator)
    documents = [f"{number}" * 2000 for number in range(9)]
    examples = [Example("q", document) for document in documents[:8]]
    shown = _fitted(examples, settings, generator)
    (asked,) = tokens.encode([few_shot(TASKS["search"], shown, documents[8][:512])])
    assert 3000 < len(asked) <= 4096 - 256
    assert [example.query for example in shown] == ["q"] * 8
    assert all(e.document == d[: len(e.document)] for e, d in zip(shown, documents, strict=False))
    # A few that fit are cut no further than the document that is asked about.
    assert [len(e.document) for e in _fitted(examples[:3], settings, generator)] == [512] * 3
    with pytest.raises(ValueError, match=r"8 given pairs and a document .*lower --synthesis\.exam"):
        _fitted([Example("q" * 600, "d")] * 8, settings, generator)


def test_a_rerun_writes_only_what_is_missing(
    data: Ingested, model: str, written: Artifact, tmp_path: Path
) -> None:
    out = tmp_path / "written"
    first = write(data, FEW_SHOT, model, out)
    assert first.fingerprint == written.fingerprint  # The same texts, part for part.
    for name in (MANIFEST, part_name(1), part_name(3)):
        (out / name).unlink()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    again = write(data, FEW_SHOT, model, out)
    assert again.fingerprint == first.fingerprint
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert len(after) == 5
    assert {name: after[name] for name in before} == before
    with pytest.raises(ArtifactError, match=r"config\.prompt"):
        write(data, FEW_SHOT.replace(task="claim"), model, out)


def test_another_filter_writes_nothing_again(data: Ingested, model: str, written: Artifact) -> None:
    looser = FEW_SHOT.replace(near_duplicate=1.0, round_trip=None)
    assert write(data, looser, model, Path(written.url)).fingerprint == written.fingerprint


def test_a_query_that_equals_a_held_out_one_is_dropped(
    data: Ingested, written: Artifact, tmp_path: Path
) -> None:
    """Leakage: texts of the given queries, test split included, never come back as synthetic."""
    stolen = written.table().to_pylist()[:3]
    texts = [f"  {row['text'].upper()}" for row in stolen[:2]]
    texts.append(" ".join(reversed(stolen[2]["text"].split())))
    draft = drafted(tmp_path / "given", "queries")
    rows = [Query(f"test-{n}", text) for n, text in enumerate(texts)]
    draft.write_part(0, rows_of(rows, QUERIES))
    made = drop_repeats(written, draft.finish(), 0.8, str(tmp_path / "out"))
    rejected = {row["query_id"]: row["reason"] for row in made.rejected().to_pylist()}
    for row in stolen:
        assert "given query" in rejected[row["query_id"]]
    assert made.manifest.rows + made.manifest.rejected == written.manifest.rows
    assert made.manifest.extra["filters"][0]["dropped"] == made.manifest.rejected
    assert not {text_hash(text) for text in texts} & {
        text_hash(text) for text in made.table()["text"].to_pylist()
    }


def test_the_round_trip_drops_what_asks_about_something_else(
    data: Ingested, written: Artifact, tmp_path: Path
) -> None:
    """The stub strays in a ninth of its queries; BM25 on 3,000 documents finds out."""
    documents = {row["doc_id"]: row["text"] for row in data.corpus.table().to_pylist()}
    trip = RoundTrip(retriever="bm25", k=1)
    arguments = (data.corpus, None, "", trip, Lexical(language="none"))
    made = keep_returned(written, *arguments, str(tmp_path / "kept"))
    strays = {
        row["query_id"]
        for row in written.table().to_pylist()
        if not set(row["text"].split()) <= set(documents[row["seed_doc_id"]].split())
    }
    assert 10 < len(strays) < 60
    kept = set(made.table()["query_id"].to_pylist())
    good = set(written.table()["query_id"].to_pylist()) - strays
    assert not kept & strays
    assert len(kept) >= 0.9 * len(good)
    counts = {"filter": "round trip", "in": written.manifest.rows}
    assert made.manifest.extra["filters"] == [{**counts, "dropped": made.manifest.rejected}]
    assert {row["reason"] for row in made.rejected().to_pylist()} == {
        "does not find its document in the first 1"
    }
    (tmp_path / "kept" / MANIFEST).unlink()
    again = keep_returned(written, *arguments, str(tmp_path / "kept"))
    assert again.manifest.extra == made.manifest.extra
    assert again.fingerprint == made.fingerprint


def test_a_written_query_is_worth_its_document(written: Artifact, tmp_path: Path) -> None:
    made = label(written, None, str(tmp_path / "judgments"))
    table = made.table()
    assert table.schema == JUDGMENTS
    assert table["query_id"].to_pylist() == written.table()["query_id"].to_pylist()
    assert table["doc_id"].to_pylist() == written.table()["seed_doc_id"].to_pylist()
    row = table.to_pylist()[0]
    assert (row["grade_probs"], row["relevance"], row["origin"]) == ([0, 1], 1.0, "synthetic")
    assert row["judge"].startswith("written:")
    assert row["prompt"] == written.manifest.extra["prompt"]


def test_the_document_that_a_query_was_written_from_is_a_candidate(
    data: Ingested, written: Artifact, tmp_path: Path
) -> None:
    pools = Pools(bm25=2, dense=0, random=0, written_from=True)
    arguments = (data.corpus, None, "", pools, Lexical(language="none"))
    made = pair([data.queries, written], *arguments, str(tmp_path / "pairs"))
    rows = made.table().to_pylist()
    own = {row["query_id"]: row["doc_id"] for row in rows if row["source"] == "seed"}
    asked = written.table(["query_id", "seed_doc_id"]).to_pylist()
    assert own == {row["query_id"]: row["seed_doc_id"] for row in asked}
    assert len({(row["query_id"], row["doc_id"]) for row in rows}) == len(rows)


def test_styles_stand_in_the_mix_that_was_asked(data: Ingested, model: str, tmp_path: Path) -> None:
    settings = Styled(styles=("question", "keywords", "claim"), documents=40)
    made = write(data, settings, model, tmp_path / "written")
    requests = Artifact.open(f"{made.url}-requests").table()["style"].to_pylist()
    assert Counter(requests) == {"question": 40, "keywords": 40, "claim": 40}
    assert made.manifest.extra["examples"] == []


@pytest.mark.slow
def test_killed_with_minus_nine_no_accepted_row_is_lost(
    data: Ingested, model: str, written: Artifact, tmp_path: Path
) -> None:
    """Driver and workers die as soon as a part stands; the rerun keeps it and ends the same."""
    out = tmp_path / "written"
    generator = FEW_SHOT.generator.replace(model=model, unit_requests=64)
    settings = FEW_SHOT.replace(generator=generator).model_dump_json()
    urls = [data.corpus.url, data.queries.url, data.qrels.url, str(out)]
    line = [sys.executable, "-c", CHILD, *urls, settings]
    with open(tmp_path / "log", "wb") as log:
        child = subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    wait_until = time.monotonic() + 600
    while not any(out.glob("part-*.parquet")):
        assert child.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert time.monotonic() < wait_until
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait(60)
    assert not (out / MANIFEST).exists()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert before
    again = write(data, FEW_SHOT, model, out)
    assert again.fingerprint == written.fingerprint
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert {name: after[name] for name in before} == before


def test_a_scorer_on_another_scale_is_refused_before_it_is_tuned(
    beir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its scores are read last, when both models have been tuned and queries written."""
    line = ["ssra", "--data", str(beir), "--out", str(tmp_path)]
    for rounds in ("0", "2"):
        more = ["--judging.vllm.prompt", "lightblue", "--synthesis.rounds", rounds]
        with pytest.raises(SystemExit):
            main("synthesise", [*line, *more])
        assert "the scorer must grade 0 to 3" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_real_engine_answers_in_the_form_of_the_schema(tiny_llm: str) -> None:
    """Random weights write noise, but JSON; what is cut off or too long says so."""
    from jobs.generation import Writer

    settings = Generator(model=tiny_llm, dtype="float32", max_model_len=512, max_tokens=300)
    schema = WrittenQuery.model_json_schema()
    schema["properties"]["query"]["maxLength"] = 20
    writer = Writer(settings, schema)
    chats = [[{"role": "user", "content": f"tea {n}"}] for n in range(12)]
    chats.append([{"role": "user", "content": "water " * 400}])
    found = writer(chats, list(range(13)))
    assert found[12].text == ""
    assert found[12].problem.startswith("the prompt is too long: ")
    ended = [completion for completion in found[:12] if not completion.problem]
    assert len(ended) >= 6
    assert all('"query"' in c.text and c.text.rstrip().endswith("}") for c in ended)
    assert all(c.problem.startswith("the answer was cut off: 300") for c in found[:12] if c.problem)
    assert len({completion.text for completion in ended}) == len(ended)
    assert [c.text for c in writer(chats[:12], list(range(12)))] == [c.text for c in found[:12]]
    assert writer([], []) == []
    # More than the engine reads at a step, which on a CPU is 4,096 tokens.
    many = [[{"role": "user", "content": f"{n} " + "tea leaf " * 40}] for n in range(60)]
    assert not any("too long" in completion.problem for completion in writer(many, range(60)))
    assert writer.cut("tea leaf water " * 400) != "tea leaf water " * 400
