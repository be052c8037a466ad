"""Numbers that others have published, reproduced from the same rankings and judgments."""

import csv
import gzip
import json

import numpy as np
import pytest

from bixse.evaluation.metrics import measure
from bixse.records import Hit, document_text
from bixse.retrieval.lexical import LexicalIndex
from bixse.retrieval.settings import Lexical

# castorini's baselines of TREC Deep Learning 2019, from the data's README.
PUBLISHED_NDCG10 = {"BM25": 0.5058, "TAS-B": 0.7210, "SPLADE++ED": 0.7308, "RepLLaMA": 0.7439}


@pytest.mark.parametrize("unit", [1.0, 1 / 3])
def test_official_runs_score_what_was_published(real_data, unit):
    folder = real_data / "trec-dl-2019"
    qrels: dict[str, dict[str, float]] = {}
    with open(folder / "qrels" / "test.tsv") as handle:
        for row in csv.DictReader(handle, delimiter="\t"):
            judged = qrels.setdefault(row["query-id"], {})
            # As artefacts hold it: float32, so 2/3 is not two thirds.
            judged[row["corpus-id"]] = float(np.float32(float(row["score"]) * unit))
    runs: dict[str, dict[str, list[Hit]]] = {}
    with gzip.open(folder / "baseline_runs_top100.tsv.gz", "rt") as handle:
        for row in csv.DictReader(handle, delimiter="\t"):
            hit = Hit(row["corpus-id"], float(row["score"]), int(row["rank"]))
            runs.setdefault(row["run"], {}).setdefault(row["query-id"], []).append(hit)
    for system, published in PUBLISHED_NDCG10.items():
        found = measure(runs[system], qrels, 2 * unit - 1e-6, 100)
        assert round(float(found["ndcg@10"].mean()), 4) == published, system


def test_bm25_of_cranfield_scores_what_the_data_says(real_data):
    folder = real_data / "cranfield"
    corpus, queries = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("corpus.jsonl", "queries.jsonl")
    )
    query_texts = {row["_id"]: row["text"] for row in queries}
    texts = [document_text(row["title"], row["text"]) for row in corpus]
    index = LexicalIndex([row["_id"] for row in corpus], texts, Lexical())
    ndcg: dict[str, np.ndarray] = {}
    for split in ("train", "dev", "test"):
        qrels: dict[str, dict[str, float]] = {}
        with open(folder / "qrels" / f"{split}.tsv") as handle:
            for row in csv.DictReader(handle, delimiter="\t"):
                qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = float(row["score"]) / 4
        rankings = {query_id: index.search(query_texts[query_id], 100) for query_id in qrels}
        ndcg[split] = measure(rankings, qrels, 0.5, 100)["ndcg@10"]
    assert ndcg["test"].mean() == pytest.approx(0.471, abs=0.01)
    assert np.concatenate(list(ndcg.values())).mean() == pytest.approx(0.519, abs=0.01)
