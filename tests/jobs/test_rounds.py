"""Each recipe whose text a language model writes, once from corpus to report, on the real engine.

The models have random weights: they write noise that is held to a schema and grade at random. What
is tested is that every row is accounted for and that the parts fit.
"""

import importlib.util
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bixse.artifacts import Artifact
from bixse.candidates.settings import Pools
from bixse.judging.settings import Judging, Pointwise, Verification
from bixse.synthesis.logs import Graded, of_several_grades
from bixse.synthesis.settings import Generator, RoundTrip
from bixse.training.settings import Tuning
from jobs.command import RECIPES, Run
from jobs.pipeline import Pipeline
from jobs.recipe import Recipe
from tests.encoders import save_tiny_encoder, texts
from tests.jobs.conftest import write_beir

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beir(tmp_path_factory.mktemp("data"), documents=60, queries=20)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def generator(tiny_writer: str) -> Generator:
    return Generator(
        model=tiny_writer, dtype="float32", max_model_len=2048, max_tokens=500, unit_requests=16,
        document_tokens=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def scorer(tiny_llm: str) -> Pointwise:
    return Pointwise(model=tiny_llm, dtype="float32", max_model_len=2048, min_grade_mass=1e-6)


def run(recipe: Recipe, start: str, data: Path, out: Path) -> tuple[dict[str, Any], Pipeline]:
    training = recipe.training.replace(batch_size=4, epochs=1)
    recipe = recipe.replace(start=start, training=training)
    pipeline = Pipeline(Run(recipe=recipe, out=str(out), data=str(data)))
    return pipeline.report().manifest.extra, pipeline


def accounted(out: Path, name: str, before: int) -> Artifact:
    """An artefact whose rows and rejected add up to the rows it came from."""
    made = Artifact.open(str(out / name))
    assert made.manifest.rows + made.manifest.rejected == before
    return made


def check(recipe: Recipe, start: str, data: Path, out: Path) -> None:
    """Report and all; a rerun makes nothing again."""
    extra, _ = run(recipe, start, data, out)
    assert set(extra["ndcg@10"]) == {"bm25", "base", "trained"}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    run(recipe, start, data, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_promptagator(data: Path, encoder: str, generator: Generator, tmp_path: Path) -> None:
    recipe = RECIPES["promptagator"]()
    synthesis = recipe.synthesis.replace(
        generator=generator, documents=20, queries_per_document=2, examples=2,
        round_trip=RoundTrip(retriever="trained", k=30),
    )  # fmt: skip
    check(recipe.replace(synthesis=synthesis), encoder, data, tmp_path)
    written = accounted(tmp_path, "synthetic-written", 40)
    unlike = accounted(tmp_path, "synthetic-unlike", written.manifest.rows)
    kept = accounted(tmp_path, "synthetic", unlike.manifest.rows)
    assert 0 < kept.manifest.rows < written.manifest.rows
    assert [count["filter"] for count in kept.manifest.extra["filters"]] == [
        "repeated", "round trip",
    ]  # fmt: skip
    first = Artifact.open(str(tmp_path / "encoder-first")).manifest.extra["encoder"]
    trained = Artifact.open(str(tmp_path / "encoder")).manifest
    assert trained.inputs["start"] == first != trained.extra["encoder"]
    # Train, filter, train: made again, the same.
    names = ("encoder-first", "synthetic", "encoder")
    before = {name: Artifact.open(str(tmp_path / name)).fingerprint for name in names}
    for name in names:
        shutil.rmtree(tmp_path / name)
    run(recipe.replace(synthesis=synthesis), encoder, data, tmp_path)
    assert {name: Artifact.open(str(tmp_path / name)).fingerprint for name in names} == before


def test_customir(
    data: Path, encoder: str, generator: Generator, scorer: Pointwise, tmp_path: Path
) -> None:
    recipe = RECIPES["customir"]()
    recipe = recipe.replace(
        synthesis=recipe.synthesis.replace(generator=generator, documents=8),
        candidates=recipe.candidates.replace(dense=4),
        judging=Judging(judge="vllm", vllm=scorer),
        # Random grades lie near the middle: the margin stands there too.
        verification=Verification(positive=0.5, negative=0.5),
    )
    check(recipe, encoder, data, tmp_path)
    written = accounted(tmp_path, "synthetic-written", 40)
    kept = accounted(tmp_path, "synthetic", written.manifest.rows)
    pairs = Artifact.open(str(tmp_path / "pairs")).table().to_pylist()
    own = {row["query_id"]: row["doc_id"] for row in pairs if row["source"] == "seed"}
    seeds = kept.table(["query_id", "seed_doc_id"]).to_pylist()
    assert own == {row["query_id"]: row["seed_doc_id"] for row in seeds}
    judged = accounted(tmp_path, "judgments", len(pairs))
    verified = accounted(tmp_path, "judgments-verified", judged.manifest.rows)
    assert sum(verified.manifest.extra["unverified"].values()) == verified.manifest.rejected


def test_sycl(data: Path, encoder: str, generator: Generator, tmp_path: Path) -> None:
    recipe = RECIPES["sycl"]()
    generator = generator.replace(max_tokens=900, max_model_len=2048)
    recipe = recipe.replace(synthesis=recipe.synthesis.replace(generator=generator))
    check(recipe, encoder, data, tmp_path)
    documents = accounted(tmp_path, "documents", 40)  # 10 queries of the train split
    assert documents.manifest.rows > 0
    rows = documents.table().to_pylist()
    assert {int(row["query_id"][1:]) for row in rows} <= set(range(10))
    grades = {row["doc_id"]: row["target_grade"] for row in rows}
    judged = Artifact.open(str(tmp_path / "judgments")).table().to_pylist()
    assert {row["doc_id"]: pytest.approx(row["relevance"] * 3) for row in judged} == grades
    _, pipeline = run(recipe, encoder, data, tmp_path)
    checks = pipeline.audit().manifest.extra["checks"]
    assert checks["judgments of an unknown document"] == 0


def test_ssra(
    data: Path, encoder: str, generator: Generator, scorer: Pointwise, tmp_path: Path
) -> None:
    recipe = RECIPES["ssra"]()
    recipe = recipe.replace(
        synthesis=recipe.synthesis.replace(
            generator=generator, documents=16, first_documents=6, rounds=2, log_queries=4
        ),
        candidates=Pools(bm25=3, dense=0, random=2),
        tuning=Tuning(batch_size=4, epochs=1, learning_rate=1e-3, held_out=0.3),
        judging=Judging(judge="written", vllm=scorer),
    )
    data = with_a_log(data, tmp_path / "data")
    tmp_path = tmp_path / "out"
    check(recipe, encoder, data, tmp_path)
    tuned = {name: Artifact.open(str(tmp_path / name)) for name in MODELS}
    for name, artifact in tuned.items():
        extra = artifact.manifest.extra
        assert extra["after"]["log_prob"] > extra["before"]["log_prob"], name
    # Round 2 learns from what stayed of round 1, from where round 1 began.
    first, second = (tuned[name].manifest for name in ("generator-1", "generator"))
    stayed = accounted_graded(tmp_path, "-1", 6 * 6)
    log = Artifact.open(str(tmp_path / "log-pairs")).table().to_pylist()
    assert {row["query_id"] for row in log} < {f"log{n}" for n in range(6)}
    scored = accounted(tmp_path, "log-scores", len(log)).table().to_pylist()
    learnt = of_several_grades(
        Graded.surest(row["query_id"], row["doc_id"], row["grade_probs"]) for row in scored
    )
    assert (second.rows, first.rows) == (20 + len(learnt) + stayed, 20 + len(learnt))
    assert second.inputs["start"] == first.inputs["start"]
    # Training reads what was written and what people have graded.
    judged = Artifact.open(str(tmp_path / "judgments"))
    origins = Counter(row["origin"] for row in judged.table().to_pylist())
    kept = Artifact.open(str(tmp_path / "synthetic")).manifest.rows
    assert origins == {"synthetic": kept, "human": 20}
    accounted_graded(tmp_path, "", 16 * 6)
    scores = Artifact.open(str(tmp_path / "scores")).manifest
    assert scores.inputs["judge"] != tuned["scorer"].manifest.inputs["start"]


def test_pairdistill_trains_on_what_the_judge_prefers(
    data: Path, encoder: str, scorer: Pointwise, tmp_path: Path
) -> None:
    recipe = RECIPES["pairdistill"]()
    judging = recipe.judging.replace(vllm=scorer)
    recipe = recipe.replace(judging=judging, training=recipe.training.replace(docs_per_query=2))
    check(recipe, encoder, data, tmp_path)
    pairings = Artifact.open(str(tmp_path / "pairings")).manifest.rows
    preferred = accounted(tmp_path, "judged-preferences", pairings)
    assert preferred.manifest.rows > 0
    trained = Artifact.open(str(tmp_path / "encoder")).manifest
    assert trained.inputs["preferences"] == preferred.fingerprint


def test_ssra_with_models_as_they_come(
    data: Path, encoder: str, generator: Generator, scorer: Pointwise, tmp_path: Path
) -> None:
    recipe = RECIPES["ssra"]()
    recipe = recipe.replace(
        synthesis=recipe.synthesis.replace(generator=generator, documents=16, examples=1, rounds=0),
        judging=Judging(judge="written", vllm=scorer),
    )
    check(recipe, encoder, data, tmp_path)
    assert accounted_graded(tmp_path, "", 16 * 6) > 0
    assert not any((tmp_path / name).exists() for name in MODELS)


def with_a_log(data: Path, folder: Path) -> Path:
    """The same data, and six queries that nobody has graded."""
    shutil.copytree(data, folder)
    bodies = texts(60, seed=1)
    with open(folder / "queries.jsonl", "a", encoding="utf-8") as lines:
        for n in range(6):
            lines.write(json.dumps({"_id": f"log{n}", "text": bodies[40 + n]}) + "\n")
    return folder


MODELS = ("scorer", "generator-1", "generator")


def accounted_graded(out: Path, suffix: str, requests: int) -> int:
    """Every step of a round accounts for every row of the one before; how many stayed."""
    written = accounted(out, f"synthetic-written{suffix}", requests)
    unlike = accounted(out, f"synthetic-unlike{suffix}", written.manifest.rows)
    accounted(out, f"scores{suffix}", unlike.manifest.rows)
    agreed = accounted(out, f"synthetic-agreed{suffix}", unlike.manifest.rows)
    kept = accounted(out, f"synthetic{suffix}", agreed.manifest.rows)
    compared = Artifact.open(str(out / f"comparisons{suffix}")).manifest
    assert compared.rows + compared.rejected == compared.extra["comparisons"]
    assert [count["filter"] for count in kept.manifest.extra["filters"]] == [
        "repeated", "agreement", "contradiction", "balance",
    ]  # fmt: skip
    return kept.manifest.rows
