"""A cross-encoder on the real vLLM pooling engine: its logits are those of a plain forward pass."""

import importlib.util
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from bixse.judging.cross_encoder import PairTokenizer, probs_of
from bixse.judging.settings import CrossEncoder, Judging
from bixse.records import CORPUS, PAIRS, QUERIES
from bixse.retrieval.settings import Lexical
from jobs.judge import judge, plan
from jobs.pooling import Pooling
from jobs.recipe import Placement
from tests.artifacts import artifact
from tests.encoders import save_tiny_cross_encoder, texts

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)

LONG = 4
"""The document that does not fit."""


def forward(model: Path, queries: Sequence[str], passages: Sequence[str]) -> Any:
    """[pairs, classes]: logits by transformers alone, in float32, one pair at a time."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        rows = [
            plain(**tokenizer(query, passage, return_tensors="pt")).logits[0]
            for query, passage in zip(queries, passages, strict=True)
        ]
    return torch.stack(rows)


@pytest.mark.slow
def test_one_logit_through_ray_data(tmp_path: Path) -> None:
    """Every pair that fits is graded as a forward pass would, the one that does not is rejected."""
    model = save_tiny_cross_encoder(tmp_path / "model", logits=1)
    passages, asked = texts(8, seed=3), texts(3, seed=4)
    passages[LONG] = " ".join(texts(8, seed=5, longest=12) * 2)
    documents = [{"doc_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(passages)]
    queries = [{"query_id": f"q{n}", "text": x, "origin": "given"} for n, x in enumerate(asked)]
    keys = [(q, d) for q in range(len(asked)) for d in range(len(passages))]
    pairs = [
        {"query_id": f"q{q}", "doc_id": f"d{d}", "source": "bm25", "rank": 1, "score": 1.0}
        for q, d in keys
    ]
    settings = CrossEncoder(
        model=str(model), dtype="float32", max_model_len=64, slope=0.5, intercept=0.1
    )
    pairs_ = artifact(tmp_path / "pairs", "pairs", pairs, PAIRS)
    queries_ = [artifact(tmp_path / "queries", "queries", queries, QUERIES)]
    corpus = artifact(tmp_path / "corpus", "corpus", documents, CORPUS)
    judging = Judging(judge="cross_encoder", cross_encoder=settings, unit_pairs=10)
    last = (judging, Lexical(), None, Placement(), str(tmp_path / "judgments"))
    planned = plan(pairs_, queries_, corpus, *last)
    made = judge(pairs_, queries_, corpus, None, *last)
    took = made.manifest.extra["usage"]
    assert planned == {
        "pairs": len(keys), "known": 0, "new": took["new"], "too_long": made.manifest.rejected,
        "prompt_tokens": took["prompt_tokens"],
    }  # fmt: skip
    assert took["prefill_tokens_s"] > 0
    found = {(row["query_id"], row["doc_id"]): row for row in made.table().to_pylist()}
    fitting = [key for key in keys if key[1] != LONG]
    assert set(found) == {(f"q{q}", f"d{d}") for q, d in fitting}
    logits = forward(model, [asked[q] for q, _ in fitting], [passages[d] for _, d in fitting])
    assert logits.std() > 0.5  # The answers do differ.
    for (q, d), logit in zip(fitting, logits[:, 0].tolist(), strict=True):
        row = found[f"q{q}", f"d{d}"]
        assert row["grade_probs"] == pytest.approx(probs_of([logit], 0.5, 0.1), abs=1e-4)
        assert row["relevance"] == pytest.approx(row["grade_probs"][1], abs=1e-6)
        assert row["origin"] == "cross_encoder"
    rejected = made.rejected()
    assert rejected is not None
    assert set(rejected["doc_id"].to_pylist()) == {f"d{LONG}"}
    assert rejected.num_rows == len(asked)
    assert made.manifest.extra["scale"]["values"] == [0, 1]
    assert "float32:0.5*logit+0.1" in made.manifest.extra["judges"][0]


def ask(settings: CrossEncoder, queries: list[str], passages: list[str]) -> tuple[str, Any]:
    engine = Pooling(settings)
    found = engine.logits(PairTokenizer.load(settings).encode(queries, passages))
    return engine.dtype, found


@pytest.mark.slow
def test_four_logits_in_bfloat16_stay_within_its_tolerance(tmp_path: Path) -> None:
    """Eight bits of mantissa on logits of up to about 10."""
    model = save_tiny_cross_encoder(tmp_path / "model", logits=4)
    settings = CrossEncoder(model=str(model), dtype="bfloat16", max_model_len=64)
    passages = texts(12, seed=6)
    queries = texts(12, seed=7)
    # One process holds one engine.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        dtype, found = pool.submit(ask, settings, queries, passages).result()
    assert dtype == "bfloat16"
    expected = forward(model, queries, passages)
    torch.testing.assert_close(torch.tensor(found), expected, atol=0.15, rtol=0.05)
