"""A reranker through the verbs: what it saves, what it is measured by, what it refuses."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from bixse.artifacts import Artifact
from bixse.models.reranker import Reranker, load_reranker
from bixse.reading.chunks import Texts, tokenise
from bixse.training.gather import World
from bixse.training.loop import Trained
from bixse.training.objective_settings import LCE, PairBCE
from bixse.training.scoring import RerankerScoring
from bixse.training.settings import Training
from jobs.recipes.bixse import bixse
from jobs.recipes.reranking import lce
from jobs.train import export
from jobs.verbs import main
from tests.encoders import (
    WORDS,
    save_tiny_chat_reranker,
    save_tiny_cross_encoder,
    save_tiny_encoder,
    texts,
)
from tests.jobs.conftest import write_beir


@pytest.mark.parametrize("objective", [LCE(), PairBCE()], ids=["lce", "pair_bce"])
def test_sentence_transformers_loads_what_is_saved(
    objective: LCE | PairBCE, tmp_path: Path
) -> None:
    from sentence_transformers import CrossEncoder

    model = load_reranker(str(save_tiny_cross_encoder(tmp_path / "start", logits=1)), "cpu")
    settings = Training(objective=objective, docs_per_query=2)
    out = tmp_path / "reranker"
    export(
        model,
        settings,
        Trained(1.0, 0.0, (), [{"step": 1, "loss": 0.5, "seconds": 2.0}], [], 1),
        out,
    )
    names = {path.name for path in out.rglob("*") if path.is_file()}
    assert {"model.safetensors", "modules.json", "training.jsonl"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl"))}
    assert "scale_bias.json" not in names

    query, *documents = texts(20, seed=1)
    ours = Reranker.load(str(out), "cpu").score(query, documents)
    theirs = CrossEncoder(str(out), device="cpu").predict([(query, text) for text in documents])
    wanted = ours if isinstance(objective, LCE) else 1 / (1 + np.exp(-ours))
    np.testing.assert_allclose(theirs, wanted, atol=1e-6)
    assert theirs.std() > 0.01


def test_what_is_saved_reads_as_much_as_in_training(tmp_path: Path) -> None:
    """Texts are cut at the same token when it is served; a start of a lower limit keeps that."""
    from sentence_transformers import CrossEncoder

    start = str(save_tiny_cross_encoder(tmp_path / "start", logits=1))
    settings = Training(
        objective=LCE(), docs_per_query=2, query_tokens=6, document_tokens=12, precision="float32"
    )
    trained = Trained(1.0, 0.0, (), [{"step": 1, "loss": 0.5, "seconds": 2.0}], [], 1)
    query, *documents = texts(24, seed=1, longest=40)
    pairs = [(query, document) for document in documents]
    model = load_reranker(start, "cpu").eval()
    module = RerankerScoring(model, settings.objective, World(), settings.precision)
    read = tokenise(model, [Texts(pairs, "pair", module.longest(model, settings), len(pairs))])
    wanted = module.ordered(torch.cat(list(module.made(read))), read.sides[0]).detach().squeeze(1)

    export(model, settings, trained, tmp_path / "reranker")
    saved = Reranker.load(str(tmp_path / "reranker"), "cpu")
    np.testing.assert_allclose(saved.score(query, documents), wanted, atol=1e-5)
    plain = CrossEncoder(str(tmp_path / "reranker"), device="cpu")
    np.testing.assert_allclose(plain.predict(pairs), wanted, atol=1e-5)
    assert max(saved.lengths(pairs)) == 18
    whole = Reranker.load(start, "cpu")
    assert max(whole.lengths(pairs)) > 18
    assert np.abs(whole.score(query, documents) - wanted.numpy()).max() > 0.01

    longer = Training(**{**settings.model_dump(), "document_tokens": 48})
    export(load_reranker(str(tmp_path / "reranker"), "cpu"), longer, trained, tmp_path / "again")
    assert max(Reranker.load(str(tmp_path / "again"), "cpu").lengths(pairs)) == 18


def test_a_chat_template_takes_nothing_from_the_texts(tmp_path: Path) -> None:
    """Its 11 tokens were taken from what may be read of a pair: 6 of a query and 12 more."""
    start = str(save_tiny_chat_reranker(tmp_path / "start"))
    settings = Training(
        objective=LCE(), docs_per_query=2, query_tokens=6, document_tokens=12, precision="float32"
    )
    trained = Trained(1.0, 0.0, (), [{"step": 1, "loss": 0.5, "seconds": 2.0}], [], 1)
    model = load_reranker(start, "cpu").eval()
    module = RerankerScoring(model, settings.objective, World(), settings.precision)
    query = texts(1, seed=1, longest=4)[0]
    longest = module.longest(model, settings)
    assert longest == 18 + 11
    room = 18 - len(query.split())
    long = " ".join(WORDS[:30])
    pairs = [(query, " ".join(WORDS[:count])) for count in (room - 1, room)] + [(query, long)]
    read = tokenise(model, [Texts(pairs, "pair", longest, len(pairs))])
    (chunk,) = (features for _, features in read.chunks)
    assert sorted(chunk["attention_mask"].sum(dim=1).tolist()) == [28, 29, 29]
    wanted = module.ordered(torch.cat(list(module.made(read))), read.sides[0]).detach().squeeze(1)
    export(model, settings, trained, tmp_path / "reranker")
    saved = Reranker.load(str(tmp_path / "reranker"), "cpu")
    np.testing.assert_allclose(saved.logits(pairs), wanted, atol=1e-5)
    assert saved.lengths(pairs).tolist() == [28, 29, 29]
    # As much of the document is read as fits, whatever else there is of it.
    assert wanted[1] == pytest.approx(wanted[2].item(), abs=1e-5)


def test_negatives_come_from_no_source_that_is_turned_off(tmp_path: Path) -> None:
    data, out = write_beir(tmp_path / "beir", documents=60, queries=16), tmp_path / "out"
    main("judge", ["lce", "--data", str(data), "--out", str(out), "--candidates.dense", "0"])
    assert set(Artifact.open(str(out / "pairs")).table()["source"].to_pylist()) == {"bm25"}
    assert Artifact.open(str(out / "judgments-contrasted")).manifest.extra["negatives"] > 0
    assert not (out / "embeddings-base").exists()


@pytest.mark.slow
def test_the_pipeline_trains_and_measures_a_reranker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_beir(tmp_path / "beir", documents=60, queries=16), tmp_path / "out"
    start = str(save_tiny_encoder(tmp_path))
    flags = ["--start", start, "--reranking.start", start, "--reranking.depth", "5"]
    # Of a query's two grades the lower is then a negative.
    flags += ["--training.objective.threshold", "0.75"]
    flags += ["--training.epochs", "1", "--training.batch-size", "4"]
    main("pipeline", ["lce", "--data", str(data), "--out", str(out), "--json", *flags])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["reranker"] == str(out / "reranker")
    report = json.loads((out / "report" / "report.json").read_text())
    assert list(report["ndcg@10"]) == ["bm25", "base", "bm25+reranker", "base+reranker"]
    assert list(report["differences"]) == ["base+reranker-base", "bm25+reranker-bm25", "base-bm25"]
    # The order changes, and nothing below the depth.
    runs = {
        name: [line.split()[2] for line in (out / "report/runs" / f"{name}.trec").open()]
        for name in ("base", "base+reranker")
    }
    first, again = (runs[name][:60] for name in ("base", "base+reranker"))
    assert sorted(first[:5]) == sorted(again[:5])
    assert first[5:] == again[5:]
    assert runs["base"] != runs["base+reranker"]
    assert "Training loss" in (out / "report" / "report.html").read_text()
    assert not (out / "index").exists()
    # What it learnt what is irrelevant from.
    given = Artifact.open(str(out / "judgments"), "judgments").table()
    contrasted = Artifact.open(str(out / "judgments-contrasted"), "judgments")
    rows = contrasted.table().to_pylist()
    assert rows[: given.num_rows] == given.to_pylist()
    judged = {(row["query_id"], row["doc_id"]) for row in given.to_pylist()}
    drawn = [(row["query_id"], row["doc_id"]) for row in rows[given.num_rows :]]
    assert len(drawn) == contrasted.manifest.extra["negatives"] == len(set(drawn)) > 0
    assert not judged.intersection(drawn)
    assert {row["relevance"] for row in rows[given.num_rows :]} == {0}
    assert max(Counter(query_id for query_id, _ in drawn).values()) <= 8
    trained = json.loads((out / "reranker" / "manifest.json").read_text())
    assert trained["inputs"]["judgments"] == contrasted.fingerprint
    manifest = json.loads((out / "reranker" / "manifest.json").read_text())
    assert manifest["kind"] == "reranker"
    assert manifest["extra"]["reranker"] == Reranker.load(str(out / "reranker")).fingerprint


@pytest.mark.parametrize("verb", ["embed", "index"])
def test_a_reranker_has_no_vectors(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_beir(tmp_path / "beir", documents=60, queries=16)
    with pytest.raises(SystemExit):
        main(verb, ["lce", "--data", str(data), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: recipe lce trains a reranker, which makes no vectors")
    assert len(error.splitlines()) == 1


def test_a_recipe_trains_one_kind_of_model() -> None:
    with pytest.raises(ValueError, match="needs both"):
        bixse().replace(training=Training(objective=PairBCE()))
    with pytest.raises(ValueError, match="needs both"):
        lce().replace(training=Training())
