"""Preferences on the real vLLM engine, exact, and the same both ways round."""

import importlib.util
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from bixse.artifacts import Artifact
from bixse.judging.asked import Usage
from bixse.judging.calibration import FILE, KIND, Calibration, Temperature
from bixse.judging.pairwise import PAIRWISE, PairwiseTokenizer
from bixse.judging.pointwise import BROKEN
from bixse.judging.settings import Pointwise, Preferring
from bixse.records import CORPUS, JUDGED_PREFERENCES, JUDGMENTS, PAIRINGS, QUERIES, Rejection
from jobs.command import parse
from jobs.engine import Replies
from jobs.judging import compares
from jobs.prefer import PreferenceUnit, pairings
from jobs.trackers import _TRACKERS
from jobs.verbs import main
from tests.artifacts import artifact, drafted
from tests.jobs.conftest import write_beir

TEXTS = {
    "d0": "Tea is brewed from leaves.",
    "d1": "Water boils at 100 degrees.",
    "d2": "Coffee is brewed from beans.",
    "d3": "word " * 800,
    "d4": "水は透明な液体である",
}
QUERIES_ = {"q0": "how is tea made", "q1": "boiling point"}


def judged(at: Path, relevance: dict[tuple[str, str], float]) -> Artifact:
    rows = [
        {"query_id": q, "doc_id": d, "grade_probs": [1 - z, z], "relevance": z, "judge": "x",
         "prompt": "", "origin": "human"}
        for (q, d), z in relevance.items()
    ]  # fmt: skip
    return artifact(at, "judgments", rows, JUDGMENTS)


def test_pairings_are_neighbours_in_the_judged_order(tmp_path: Path) -> None:
    """Ranked by relevance, ties by `doc_id`; a query with one document has none."""
    relevance = {("q0", "d2"): 0.9, ("q0", "d0"): 0.2, ("q0", "d1"): 0.2, ("q1", "d0"): 1.0}
    made = pairings(
        judged(tmp_path / "judgments", relevance), Preferring(window=1), str(tmp_path / "out")
    )
    assert made.table().to_pylist() == [
        {"query_id": "q0", "doc_id_a": "d2", "doc_id_b": "d0"},
        {"query_id": "q0", "doc_id_a": "d0", "doc_id_b": "d1"},
    ]
    alone = judged(tmp_path / "alone", {("q1", "d0"): 1.0})
    with pytest.raises(ValueError, match="no query has two judged documents"):
        pairings(alone, Preferring(), str(tmp_path / "none"))


def test_the_order_is_that_of_what_training_reads(tmp_path: Path) -> None:
    """Through the map: the windows were of the order in which the judge itself had them."""
    probs = {"d0": [0.45, 0.1, 0.45], "d1": [0.1, 0.5, 0.4], "d2": [0.4, 0.0, 0.6]}
    rows = [
        {"query_id": "q0", "doc_id": doc_id, "grade_probs": p, "relevance": p[1] / 2 + p[2],
         "judge": "j", "prompt": "p", "origin": "llm"}
        for doc_id, p in probs.items()
    ]  # fmt: skip
    draft = drafted(tmp_path / "judgments", "judgments")
    draft.write_part(0, pa.Table.from_pylist(rows, schema=JUDGMENTS))
    stored = draft.finish(extra={"scale": {"values": [0, 1, 2]}})
    # From .5, .65 and .6 to .5, .62 and .88: of sharper distributions the last has one grade.
    sharp = Calibration(
        map=Temperature(temperature=0.2), signed=(("j", "p"),), scale=(0, 1, 2), pairs=1, queries=1
    )
    draft = drafted(tmp_path / "map", KIND)
    draft.write_file(FILE, sharp.model_dump_json().encode())
    map_, window = draft.finish(), Preferring(window=1)

    def compared(name: str, calibration: Artifact | None) -> list[tuple[str, str]]:
        made = pairings(stored, window, str(tmp_path / name), calibration)
        return [(row["doc_id_a"], row["doc_id_b"]) for row in made.table().to_pylist()]

    assert compared("as stored", None) == [("d1", "d2"), ("d2", "d0")]
    assert compared("mapped", map_) == [("d2", "d1"), ("d1", "d0")]


@pytest.mark.parametrize(("verb", "recipe"), [("train", "pairdistill"), ("prefer", "bixse")])
@pytest.mark.parametrize(
    ("flag", "more"),
    [("--judging.max-pairs", []), ("--judging.max-cost", ["--judging.price-per-gpu-hour", "1"])],
)
def test_a_budget_that_comparisons_do_not_heed_is_refused_before_anything_is_judged(
    verb: str,
    recipe: str,
    flag: str,
    more: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out = write_beir(tmp_path / "data", documents=8, queries=4), tmp_path / "out"
    with pytest.raises(SystemExit) as exit_:
        main(verb, [recipe, "--data", str(data), "--out", str(out), flag, "5", *more])
    assert exit_.value.code == 1
    assert f"error: {flag} limits the judging of pairs and not" in capsys.readouterr().err
    assert not (out / "judgments").exists()


@pytest.mark.parametrize(
    ("recipe", "flags", "reason"),
    [
        ("pairdistill", ["--preferring.no-train"], "this objective learns from preferences"),
        ("bixse", ["--judging.preferences", "file.tsv"], "does not read preferences"),
        ("bixse", ["--judging.calibration", "nowhere"], "no finished artefact at"),
        ("bixse", ["--track", "tensorboard"], "--track tensorboard needs a package"),
        ("bixse", ["--truncate", "384"], "vectors of 384 dimensions cannot be cut to 384"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_judged(
    recipe: str,
    flags: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A package that is nowhere installed: the real one is, here.
    monkeypatch.setitem(_TRACKERS, "tensorboard", (_TRACKERS["tensorboard"][0], "not_here", "any"))
    data, out = write_beir(tmp_path / "data", documents=8, queries=4), tmp_path / "out"
    with pytest.raises(SystemExit) as exit_:
        main("train", [recipe, "--data", str(data), "--out", str(out), *flags])
    assert exit_.value.code == 1
    assert reason in capsys.readouterr().err
    assert not (out / "judgments").exists()


def test_a_budget_is_for_judging_alone_and_stands_beside_given_preferences(tmp_path: Path) -> None:
    data, out = write_beir(tmp_path / "data", documents=8, queries=4), tmp_path / "out"
    line = ["pairdistill", "--data", str(data), "--out", str(out), "--judging.max-pairs", "5"]
    main("judge", line)
    assert (out / "judgments" / "manifest.json").exists()
    assert not compares(parse("train", [*line, "--judging.preferences", "file.tsv"]).recipe)


def compare(arguments: tuple[Any, ...], rows: pa.Table) -> tuple[pa.Table, list[Rejection]]:
    return PreferenceUnit(*arguments)(rows)


class Mumbling:
    """An engine that has next to no probability for either letter, as the real one
    with a model that does not follow the prompt: what is tested is what becomes of that."""

    dtype = "float32"

    def __init__(self, *_: Any) -> None:
        pass

    def logprobs(self, prompts: Sequence[Any], token_ids: Sequence[int]) -> Replies:
        return Replies([[-9.0] * len(token_ids) for _ in prompts], Usage())


def test_a_judge_that_never_prefers_is_refused(
    tmp_path: Path, tiny_llm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every comparison of the run was paid for first, and each was a rejection."""
    monkeypatch.setattr("jobs.prefer.Engine", Mumbling)
    corpus = [{"doc_id": f"d{n}", "title": "", "text": f"text {n}"} for n in range(9)]
    unit = PreferenceUnit(
        [artifact(tmp_path / "queries", "queries", [{"query_id": "q", "text": "tea"}], QUERIES)],
        artifact(tmp_path / "corpus", "corpus", corpus, CORPUS),
        Pointwise(model=tiny_llm, max_model_len=1024),
        "tiny",
    )
    rows = [("q", f"d{a}", f"d{b}") for a in range(9) for b in range(a)]
    table = pa.table(list(zip(*rows, strict=True)), schema=PAIRINGS)
    with pytest.raises(ValueError, match=r"none of 36 answers was a preference \(the mass of"):
        unit(table)
    kept, rejected = unit(table.slice(0, BROKEN - 1))
    assert (kept.num_rows, len(rejected)) == (0, BROKEN - 1)


@pytest.mark.timeout(900)
def test_preferences_are_those_of_a_forward_pass_and_swap_to_their_complement(
    tmp_path: Path, tiny_llm: str
) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    from transformers import AutoModelForCausalLM

    corpus = [{"doc_id": d, "title": "", "text": text} for d, text in TEXTS.items()]
    asked = [{"query_id": q, "text": text, "origin": "given"} for q, text in QUERIES_.items()]
    near = [(q, a, b) for q in QUERIES_ for a in TEXTS for b in TEXTS if a < b]
    # Each pair both ways round: six rows of the one that does not fit, in other units.
    both = near + [(q, b, a) for q, a, b in near]
    rows = [dict(zip(PAIRINGS.names, key, strict=True)) for key in both]
    model = Pointwise(model=tiny_llm, dtype="float32", max_model_len=1024, min_grade_mass=1e-9)
    arguments = (
        [artifact(tmp_path / "queries", "queries", asked, QUERIES)],
        artifact(tmp_path / "corpus", "corpus", corpus, CORPUS),
        model,
        "tiny",
    )
    # One process holds one engine.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        table, rejected = pool.submit(
            compare, arguments, pa.Table.from_pylist(rows, schema=PAIRINGS)
        ).result()
    assert table.schema == JUDGED_PREFERENCES
    assert table.num_rows + len(rejected) == len(both)
    found = {tuple(row[n] for n in PAIRINGS.names): row for row in table.to_pylist()}
    assert set(found) == {key for key in both if "d3" not in key}
    lost = {(lost.query_id, lost.doc_id, lost.other_doc_id) for lost in rejected}
    assert lost == {key for key in both if "d3" in key}

    tokens = PairwiseTokenizer.load(model)
    causal = AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.float32)

    def share_of_first(query_id: str, first: str, second: str) -> float:
        ids = tokens.encode([QUERIES_[query_id]], [TEXTS[first]], [TEXTS[second]])
        with torch.no_grad():
            logits = causal(torch.tensor(ids)).logits[0, -1]
        return float(logits[list(tokens.label_ids)].softmax(-1)[0])

    for (query_id, a, b), row in found.items():
        ab, ba = share_of_first(query_id, a, b), 1 - share_of_first(query_id, b, a)
        assert row["prob_a"] == pytest.approx((ab + ba) / 2, abs=1e-5)
        assert row["disagreement"] == pytest.approx(abs(ab - ba), abs=1e-5)
        assert row["prob_a"] + found[query_id, b, a]["prob_a"] == pytest.approx(1, abs=1e-5)
        assert row["prompt"] == PAIRWISE.hash
        assert "orders=2" in row["judge"]
    assert max(row["disagreement"] for row in found.values()) > 0.01  # The orders do differ.
