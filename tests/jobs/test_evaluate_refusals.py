"""What is not evaluated: too little, what does not belong together, and what training has seen."""

import pytest

from bixse.records import CORPUS, JUDGMENTS
from tests.artifacts import artifact
from tests.jobs.evaluated import (
    GIVEN,
    World,
    make_world,
    qrels_artifact,
    queries_artifact,
    run,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def refused(world, tmp_path, sentence, **changes):
    """Assert that evaluate refuses in one sentence and leaves nothing behind."""
    with pytest.raises(ValueError, match=sentence) as error:
        run(world, tmp_path / "refused", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "refused").exists()


def test_a_split_without_judgments_is_refused(world, tmp_path):
    refused(world, tmp_path, "no judgments for split dev: there are test, train", split="dev")


def test_no_judgments_at_all_are_refused(world, tmp_path):
    empty = qrels_artifact(tmp_path / "qrels", {})
    refused(world, tmp_path, "no judgments for split test: there are none at all", qrels=empty)


def test_judged_queries_without_text_are_refused(world, tmp_path):
    some = {query_id: text for query_id, text in GIVEN.items() if query_id != "q 3"}
    queries = queries_artifact(tmp_path / "queries", some)
    refused(world, tmp_path, "1 of 5 judged queries .* the first is q 3", queries=queries)


def test_embeddings_of_another_encoder_are_refused(world, tmp_path):
    (base, of_base), (_, of_trained) = world.encoders.values()
    made_by, wanted = of_trained.manifest.extra["encoder"], of_base.manifest.extra["encoder"]
    refused(
        world,
        tmp_path,
        f"is of encoder {made_by}, .* is {wanted}",
        encoders={"base": (base, of_trained)},
    )


def test_embeddings_of_another_corpus_are_refused(world, tmp_path):
    rows = [{"doc_id": "d", "title": "", "text": "another corpus"}]
    other = artifact(tmp_path / "corpus", "corpus", rows, CORPUS)
    refused(world, tmp_path, f"is of documents {world.corpus.rows_fingerprint}", corpus=other)


def test_a_query_seen_in_training_is_refused(world, tmp_path):
    seen = {"s1": "something else", "s2": "  Parse json "}
    synthetic = queries_artifact(tmp_path / "synthetic", seen, "synthetic")
    refused(
        world,
        tmp_path,
        r"1 evaluation queries stand in training too: the first is q 2 \('parse JSON'\), there s2",
        trained_on=[world.queries, synthetic],
    )


def test_a_training_query_with_the_text_of_a_test_query_is_refused(world, tmp_path):
    queries = queries_artifact(tmp_path / "queries", GIVEN | {"t 2": "PARSE  JSON"})
    refused(world, tmp_path, "the first is q 2", queries=queries, trained_on=[queries])


def test_the_training_split_is_not_evaluated_after_training_on_it(world, tmp_path):
    refused(world, tmp_path, "2 evaluation queries stand in training", split="train")
    kept = run(world, tmp_path / "out", split="train", trained_on=[], encoders={})
    assert kept.manifest.rows == 2


def test_only_judged_queries_count_as_seen_when_the_judgments_are_given(world, tmp_path):
    queries = queries_artifact(tmp_path / "queries", GIVEN | {"t 2": "PARSE  JSON"})
    judged = [row for row in world.qrels.table().to_pylist() if row["query_id"] == "t 1"]
    judgments = artifact(tmp_path / "judgments", "judgments", judged, JUDGMENTS)
    changes = {"queries": queries, "encoders": {}}
    assert (
        run(world, tmp_path / "out", trained_on=[queries, judgments], **changes).manifest.rows == 5
    )
    judged = [row for row in world.qrels.table().to_pylist() if row["query_id"] == "t 2"]
    judgments = artifact(tmp_path / "leaking", "judgments", judged, JUDGMENTS)
    refused(world, tmp_path, "first is q 2", trained_on=[queries, judgments], **changes)
