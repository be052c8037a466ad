"""Texts in mapped files: the same labels, batches and weights, and nothing of them in a pickle."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from bixse.place import Place
from bixse.training.gather import World
from bixse.training.groups import Labels, group
from bixse.training.objective_settings import LCE, GradedBCE
from bixse.training.texts import FOLDER, MappedTexts, StoredTexts
from tests.encoders import save_tiny_encoder, texts
from tests.training import ranks


def mapped(labels: Labels, folder: Path) -> Labels:
    """The same labels, their texts in files that stand in another order."""

    def column(held: pa.Array) -> MappedTexts:
        named = list(enumerate(held.to_pylist()))
        stored = StoredTexts([(str(number), text) for number, text in reversed(named)], folder)
        return stored.column([str(number) for number, _ in named])

    query, document = column(labels.query_text_Q), column(labels.document_text_D)
    return replace(labels, query_text_Q=query, document_text_D=document)


def test_labels_of_stored_texts_are_those_of_texts_in_memory(tmp_path: Path) -> None:
    queries = {"q1": "How far?", "q2": "how  FAR?", "q3": "Why?"}
    documents = {name: f"text {name} é\n" * 9000 for name in "abc"} | {"copy": "TEXT a é\n" * 9000}
    query_ids, doc_ids = ["q1", "q2", "q1", "q3"], ["a", "copy", "c", "a"]
    relevance = np.array([1, 0.5, 0.25, 0], np.float32)
    held = group(query_ids, doc_ids, relevance, queries, documents, {"q3": "c"})
    asked, told = (StoredTexts(side.items(), tmp_path) for side in (queries, documents))
    found = group(query_ids, doc_ids, relevance, asked, told, {"q3": "c"})
    for name in ("query_text_Q", "document_text_D"):
        ours, theirs = getattr(found, name), getattr(held, name)
        assert ours.to_pylist() == theirs.to_pylist()
        assert ours.take(np.asarray([1, 0, 1])) == theirs.take(pa.array([1, 0, 1]))
        assert len(ours) == len(theirs) == 2
    assert found.document_P.tolist() == held.document_P.tolist()
    assert found.suspects == held.suspects


def test_more_texts_than_a_batch_of_the_file_keep_their_rows(tmp_path: Path) -> None:
    made = {f"d{number}": text for number, text in enumerate(texts(9000, seed=3))}
    stored = StoredTexts(made.items(), tmp_path)
    assert (len(stored), list(stored)) == (9000, list(made))
    assert stored.column(list(made)).to_pylist() == list(made.values())
    assert "d8999" in stored
    assert "d9000" not in stored
    with pytest.raises(KeyError, match="d9000"):
        stored["d9000"]


@pytest.mark.parametrize(
    "changes",
    [{"objective": GradedBCE()}, {"objective": LCE(), "docs_per_query": 3}],
    ids=["encoder", "reranker"],
)
def test_training_on_mapped_texts_is_training_on_texts_in_memory(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = save_tiny_encoder(tmp_path)
    held = ranks.labels(20, 12, seed=3)
    checkpoints = Place(str(tmp_path / "checkpoints"))
    there = pickle.loads(pickle.dumps(mapped(held, tmp_path).put(checkpoints)))
    assert sorted(name[: len(FOLDER)] for name in checkpoints.names()) == [FOLDER, FOLDER]
    outcomes = []
    for number, labels in enumerate((held, there)):
        monkeypatch.setattr(ranks, "labels", lambda *_, now=labels, **__: now)
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "encoder").symlink_to(start)
        outcomes.append(ranks.loop(World(), directory, **changes))
    first, second = outcomes
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_a_pickle_holds_no_text_and_reads_them_from_any_filesystem(tmp_path: Path) -> None:
    long = {f"d{number}": text * 500 for number, text in enumerate(texts(50, seed=3))}
    stored = StoredTexts(long.items(), tmp_path).column(list(long))
    # Mapped pages are not what travels.
    assert stored.to_pylist() == list(long.values())
    for place in (Place(str(tmp_path / "shared")), Place(f"memory://{tmp_path}")):
        sent = pickle.dumps(stored.put(place))
        assert len(sent) < 2000
        assert pickle.loads(sent).take(np.asarray([7])).to_pylist() == [long["d7"]]
