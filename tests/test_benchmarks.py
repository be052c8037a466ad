"""The benchmarks' own arithmetic, and that a machine without Ray, vLLM and FAISS can run them."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import judge, judge_cases, train
from benchmarks.made_encoder import make_encoder
from benchmarks.text_pairs import pairs_of

ROOT = Path(__file__).resolve().parents[1]


def test_the_faster_rival_counts_round_by_round() -> None:
    rates = {"bixse": (30.0, 10.0, 40.0), "plain": (10.0, 5.0, 40.0), "cached": (9.0, 9.0, 9.0)}
    turns = {
        system: [{"pairs_s": rate, "rss_mb": 100.0 * len(system)} for rate in column]
        for system, column in rates.items()
    }
    found = train.summary(turns)
    assert found["sentence_transformers_loss"] == "plain"
    assert found["ratios"] == [3.0, 2.0, 1.0]
    assert found["ratio"] == 2
    assert (found["bixse_pairs_s"], found["sentence_transformers_pairs_s"]) == (30, 10)
    assert (found["peak_rss_mb"], found["sentence_transformers_rss_mb"]) == (500, 500)


def test_pairs_differ_and_both_sides_train_on_the_same(tmp_path: Path) -> None:
    from bixse.models.encoder import load_model

    options = train.Options(steps=3, batch_size=4)
    pairs = pairs_of(options.data, 12)
    assert len({query for query, _ in pairs}) == len({text for _, text in pairs}) == 12
    labels = train.labels_of(pairs)
    assert labels.pairs == 12
    model = load_model(str(make_encoder("minilm-l6", tmp_path)), "cpu")
    batches = list(train.collated(options, model, pairs))
    assert [len(column["input_ids"]) for batch in batches for column in batch] == [4] * 6
    widths = [column["input_ids"].shape[1] for batch in batches for column in batch]
    assert max(widths[::2]) <= options.query_tokens
    assert max(widths[1::2]) <= options.document_tokens


def test_work_is_counted_by_weights_tokens_and_what_tokens_see(tmp_path: Path) -> None:
    from benchmarks.flops import flops_of
    from bixse.models.encoder import load_model

    model = load_model(str(make_encoder("minilm-l6", tmp_path)), "cpu")
    # Queries and documents of 4 and 9 tokens, [CLS] and [SEP] among them; the last is cut.
    sides = [(["a b", "b a"], 64), (["a " * 7, "a " * 50], 9)]
    weights = 6 * (4 * 384**2 + 2 * 384 * 1536)
    attention = 12 * 6 * 384 * (2 * 4**2 + 2 * 9**2)
    assert flops_of(model, sides) == 6 * weights * (2 * 4 + 2 * 9) + attention


def test_a_judging_case_is_summed_up_by_its_medians_and_unknown_tokens_stay_unknown() -> None:
    rounds = [
        {"seconds": seconds, "prefill_tokens": 100, "cached_tokens": cached}
        for seconds, cached in ((2.0, 40), (1.0, 20), (4.0, 60))
    ]
    assert judge.summary(rounds, 8) == {
        "pairs_s": 4.0, "spread": 4.0, "prefill_tokens": 100, "cached_tokens": 40,
        "computed_tokens": 60, "computed_tokens_s": 30.0,
    }  # fmt: skip
    silent = [{**took, "cached_tokens": None} for took in rounds]
    assert judge.summary(silent, 8) == {
        "pairs_s": 4.0, "spread": 4.0, "prefill_tokens": 100, "cached_tokens": None,
    }  # fmt: skip


def test_judging_cases_differ_in_what_prompts_share(tmp_path: Path) -> None:
    options = judge.Options(model="any", pairs=24)
    cases = {name: judge_cases.make_case(options, tmp_path, name) for name in options.cases}
    keys = {
        name: [
            (row["query_id"], row["doc_id"]) for row in case.artifact("pairs").table().to_pylist()
        ]
        for name, case in cases.items()
    }
    assert sorted(keys["shared"]) == sorted(keys["shuffled"])
    assert keys["shared"] != keys["shuffled"]
    assert len({doc_id for _, doc_id in keys["shared"]}) == 6
    for side in zip(*keys["unshared"], strict=True):
        assert len(set(side)) == 24


@pytest.mark.parametrize(
    "modules, beside",
    [
        ("benchmarks.train, benchmarks.encode, bixse.training.loop", []),
        (
            "benchmarks.graded_losses, benchmarks.graded_runs",
            ["bm25s", "Stemmer", "ir_measures"],
        ),
    ],
)
def test_they_import_neither_ray_nor_vllm_nor_faiss(modules: str, beside: list[str]) -> None:
    code = (
        f"import sys; import {modules};"
        f"sys.exit(str({{'ray', 'vllm', 'faiss', *{beside}}} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "{" not in done.stderr, done.stderr
