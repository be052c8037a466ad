"""A corpus and a language model to an encoder: chunks, training by Ray, the command, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bixse.artifacts import Artifact
from bixse.models.encoder import Encoder
from bixse.records import CORPUS
from bixse.training.settings import Gated
from jobs.chunking import chunk
from jobs.command import parse
from jobs.gated import read_groups, train_gated
from jobs.loading import pin_language_model
from jobs.recipe import Placement
from jobs.verbs import main
from tests.artifacts import artifact, drafted
from tests.conftest import save_tiny_llm
from tests.encoders import save_tiny_encoder, texts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder, a tiny language model, and a corpus in BEIR layout for them."""
    path = tmp_path_factory.mktemp("gated")
    save_tiny_encoder(path / "start", {"query": "ask: ", "document": "tell: "})
    save_tiny_llm(path / "llm")
    (path / "data" / "qrels").mkdir(parents=True)
    rows = documents(60)
    lines = [{"_id": row["doc_id"], "title": "", "text": row["text"]} for row in rows]
    asked = [{"_id": f"q{n}", "text": rows[n]["text"].split(".")[1]} for n in range(6)]
    for name, made in (("corpus", lines), ("queries", asked)):
        (path / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, made)))
    grades = [f"q{n}\td{n:02}\t1" for n in range(6)]
    header = "query-id\tcorpus-id\tscore"
    (path / "data" / "qrels" / "test.tsv").write_text("\n".join([header, *grades]))
    return path


def documents(count: int) -> list[dict[str, str]]:
    """Documents of one to five sentences of their own."""
    sentences = iter(texts(5 * count, seed=4))
    return [
        {
            "doc_id": f"d{n:02}",
            "title": "",
            "text": ". ".join(next(sentences) for _ in range(1 + n % 5)) + ". and more.",
        }
        for n in range(count)
    ]


def settings(place: Path, **more: Any) -> tuple[Gated, str]:
    small = {"chunk_tokens": 60, "group_size": 4, "batch_size": 4, "temperature": 0.05}
    made = Gated(language_model=str(place / "llm"), learning_rate=1e-3, **{**small, **more})
    return pin_language_model(made)


def corpus(at: Path, rows: list[dict[str, str]]) -> Artifact:
    return artifact(at / "corpus", "corpus", rows, CORPUS)


def test_every_chunk_is_accounted_for_and_copies_are_left_out(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = documents(40)
    rows[30]["text"] = rows[29]["text"].upper()
    rows += [{"doc_id": "nothing", "title": " ", "text": ""}]
    pinned, identity = settings(place)
    made = chunk(corpus(tmp_path, rows), pinned, identity, str(tmp_path / "chunks"))
    rejected = made.rejected()
    assert rejected is not None
    reasons = dict(zip(rejected["doc_id"].to_pylist(), rejected["reason"].to_pylist(), strict=True))
    assert reasons.pop("nothing") == "has no text"
    # Of a document and its copy whichever the draw has first stays.
    (copy,) = {"d29", "d30"} & reasons.keys()
    assert reasons[copy] == "equals another chunk"
    table = made.table().to_pylist()
    by_group: dict[int, list[str]] = {}
    for row in table:
        by_group.setdefault(row["group"], []).append(row["doc_id"])
        assert 2 <= len(row["token_ids"]) <= 60
    assert [row["group"] for row in table] == sorted(row["group"] for row in table)
    assert len(by_group) == made.manifest.extra["groups"]
    assert all(2 <= len(group) <= 4 for group in by_group.values())
    assert {d for group in by_group.values() for d in group} | reasons.keys() == {
        row["doc_id"] for row in rows
    } - {"nothing"}
    # Texts of a document follow each other, and are all of it.
    text = " ".join(row["text"] for row in table if row["doc_id"] == "d04")
    assert text.replace(" ", "") == rows[4]["text"].replace(" ", "")
    # Equal again, however many documents are tokenised at a time; another seed, another order.
    monkeypatch.setattr("jobs.chunking._TOKENISED", 100)
    again = chunk(corpus(tmp_path, rows), pinned, identity, str(tmp_path / "again"))
    assert again.fingerprint == made.fingerprint
    other, _ = settings(place, seed=1)
    drawn = chunk(corpus(tmp_path, rows), other, identity, str(tmp_path / "other"))
    assert drawn.table(["doc_id"]) != made.table(["doc_id"])
    assert drawn.manifest.rows + drawn.manifest.rejected == (
        made.manifest.rows + made.manifest.rejected
    )


def test_a_part_is_made_whatever_the_others_hold_and_not_twice(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its first part, chunking makes the second alone, and the same artefact."""
    rows = documents(40)
    pinned, identity = settings(place)
    draft = drafted(tmp_path / "two", "corpus")
    for number, some in enumerate((rows[:25], rows[25:])):
        draft.write_part(number, CORPUS.empty_table().from_pylist(some, schema=CORPUS))
    both = draft.finish()
    whole = chunk(both, pinned, identity, str(tmp_path / "whole"))
    first = corpus(tmp_path, rows[:25])
    alone = chunk(first, pinned, identity, str(tmp_path / "alone"))
    assert whole.part("part-00000.parquet") == alone.table()

    import jobs.chunking as module

    cut = module._part
    calls: list[int] = []

    def once(documents: Any, *more: Any) -> Any:
        if calls:
            raise KeyboardInterrupt
        calls.append(documents.num_rows)
        return cut(documents, *more)

    # An end between two parts, where a signal would come a moment too soon or too late.
    monkeypatch.setattr(module, "_part", once)
    with pytest.raises(KeyboardInterrupt):
        chunk(both, pinned, identity, str(tmp_path / "killed"))
    calls.clear()
    resumed = chunk(both, pinned, identity, str(tmp_path / "killed"))
    assert calls == [15]
    assert resumed.fingerprint == whole.fingerprint


def test_groups_are_read_as_they_were_written(place: Path, tmp_path: Path) -> None:
    rows = documents(40)
    pinned, identity = settings(place)
    draft = drafted(tmp_path / "two", "corpus")
    for number, some in enumerate((rows[:25], rows[25:])):
        draft.write_part(number, CORPUS.empty_table().from_pylist(some, schema=CORPUS))
    made = chunk(draft.finish(), pinned, identity, str(tmp_path / "chunks"))
    groups = read_groups(made, tmp_path)
    expected: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for name in made.parts():
        for row in made.part(name).to_pylist():
            expected.setdefault((name, row["group"]), []).append(row)
    assert len(groups) == len(expected) == made.manifest.extra["groups"]
    for number, group in enumerate(expected.values()):
        found = groups.group(number)
        assert found.wholes == [row["text"] for row in group]
        assert found.halves == [row["text"][: row["half"]] for row in group]
        assert [ids.tolist() for ids in found.ids] == [row["token_ids"] for row in group]


def test_too_few_chunks_are_refused(place: Path, tmp_path: Path) -> None:
    pinned, identity = settings(place)
    start = str(place / "start" / "encoder")
    for count, groups in ((1, 0), (2, 1)):
        at = tmp_path / str(count)
        made = chunk(corpus(at, documents(5)[:count]), pinned, identity, f"{at}/chunks")
        with pytest.raises(
            ValueError, match=f"makes {groups} groups of chunks, and training needs 2"
        ):
            train_gated(made, pinned, identity, start, Placement(), f"{at}/encoder")
        assert not (at / "encoder").exists()


@pytest.mark.parametrize(
    "model, more, sentence",
    [
        (None, {}, "--gated.language-model names the causal language model"),
        ("nowhere", {}, "no language model 'nowhere'"),
        ("start/bert", {}, "is no causal language model: its config.json says BertModel"),
        ("data", {}, "data is no causal language model"),
        ("llm", {"chunk_tokens": 3000}, "reads 2048 tokens, and chunks may have 3000"),
    ],
)
def test_what_is_no_language_model_is_refused_before_anything_is_read(
    model: str | None, more: dict[str, Any], sentence: str, place: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    # In this process too, which has read the variable: no hub is asked for what is nowhere.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags = ["--data", str(place / "data"), "--out", str(tmp_path / "out")]
    if model is not None:
        there = place / model
        flags += ["--gated.language-model", str(there) if there.exists() else model]
    for name, value in more.items():
        flags += [f"--gated.{name.replace('_', '-')}", str(value)]
    with pytest.raises(SystemExit):
        main("train", ["revela", *flags])
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "verb, flags, sentence",
    [
        ("judge", [], "revela learns from the corpus alone: judge is of judgments"),
        ("pipeline", ["--plan"], "revela learns from the corpus alone: --plan is of judgments"),
        ("train", ["--training.epochs", "2"], "has no use for a flag of `training`"),
        ("train", ["--gated.group-size", "1"], "--gated.group-size"),
    ],
)
def test_flags_and_verbs_of_other_recipes_are_refused(
    verb: str, flags: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(verb, ["revela", "--out", str(tmp_path / "out"), *flags])
    assert sentence in capsys.readouterr().err


def test_the_recipe_is_one_of_the_command_line() -> None:
    run = parse("train", ["revela", "--out", "x", "--gated.language-model", "y"])
    assert run.recipe.gated == Gated(language_model="y")


@pytest.mark.slow
def test_the_command_makes_encoder_report_and_index(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = str(place / "start" / "encoder")
    flags = ["--data", str(place / "data"), "--out", str(tmp_path / "out"), "--start", start]
    flags += ["--gated.language-model", str(place / "llm"), "--gated.chunk-tokens", "60"]
    flags += ["--gated.group-size", "4", "--gated.batch-size", "4", "--gated.epochs", "2"]
    flags += ["--gated.learning-rate", "1e-3", "--gated.temperature", "0.05", "--json"]
    main("pipeline", ["revela", *flags])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["ndcg@10"].keys() == {"bm25", "base", "trained"}
    out = tmp_path / "out"
    made = {path.parent.name for path in out.rglob("manifest.json")}
    assert made >= {"corpus", "chunks", "encoder", "embeddings", "report", "index"}
    assert not made & {"pairs", "judgments"}
    assert not (out / "encoder-checkpoints").exists()
    encoder = Artifact.open(str(out / "encoder"), "encoder")
    lines = [json.loads(line) for line in encoder.place.read("training.jsonl").splitlines()]
    assert len(lines) == encoder.manifest.extra["steps"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["attended"] >= 1 for line in lines)
    assert encoder.manifest.rows == Artifact.open(str(out / "chunks"), "chunks").manifest.rows
    assert encoder.manifest.extra["encoder"] == Encoder.load(encoder.url, "cpu").fingerprint
    before = Encoder.load(start, "cpu").encode(["one"], "query")
    assert not np.allclose(Encoder.load(encoder.url, "cpu").encode(["one"], "query"), before)
    # The language model is not kept.
    assert not [name for name in encoder.manifest.files if "llm" in name]
    # Finished: the same command does nothing, another rate is refused.
    main("train", ["revela", *flags])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main("train", ["revela", *flags, "--gated.learning-rate", "1e-4"])
    assert "learning_rate" in capsys.readouterr().err
