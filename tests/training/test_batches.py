"""Batches: what is known of every cell, and texts read as the served encoder reads them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from bixse.models.encoder import Encoder, load_model
from bixse.reading.chunks import Texts, cut, prompt_of, tokenise
from bixse.training.batches import batch_of
from bixse.training.gather import World
from bixse.training.groups import Ints, Labels, group
from bixse.training.losses import graded_bce
from bixse.training.objective_settings import GradedBCE
from bixse.training.scoring import EncoderScoring
from tests.encoders import save_tiny_encoder, texts


def labels_of(rows: list[tuple[str, str, float]], texts: dict[str, str], **seeds: str) -> Labels:
    query_ids, doc_ids, relevance = zip(*rows, strict=True)
    queries = {name: name for name in query_ids}
    documents = {name: texts.get(name, name) for name in doc_ids}
    return group(query_ids, doc_ids, np.asarray(relevance, np.float32), queries, documents, seeds)


ROWS = [("q0", "a", 1.0), ("q0", "b", 0.5), ("q1", "b", 0.25), ("q1", "c", 0.0), ("q2", "d", 0.75)]


def test_known_grades_fill_the_batch() -> None:
    labels = labels_of(ROWS, {}, q2="c")
    # q0 with a, q1 with b and c, q2 with d: b is known for q0 too, though no pair of this batch.
    batch = batch_of(labels, np.asarray([4, 0, 3, 2]))
    assert batch.query_Q.tolist() == [0, 1, 2]
    assert batch.document_D.tolist() == [0, 1, 2, 3]
    assert batch.target_QD.tolist() == [[1, 0.5, 0, 0], [0, 0.25, 0, 0], [0, 0, 0, 0.75]]
    assert batch.known_QD.tolist() == [
        [True, True, False, False],
        [False, True, True, False],
        [False, False, False, True],
    ]
    assert batch.own_QD.tolist() == [
        [True, False, False, False],
        [False, True, True, False],
        [False, False, False, True],
    ]
    # q2 was written from c, which nobody judged for it: it is no zero.
    assert batch.weight_QD.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1]]


def test_a_batch_that_leaves_out_a_query_knows_what_is_of_its_own() -> None:
    batch = batch_of(labels_of(ROWS, {}), np.asarray([0, 4]))
    assert (batch.query_Q.tolist(), batch.document_D.tolist()) == ([0, 2], [0, 3])
    assert batch.target_QD.tolist() == [[1, 0], [0, 0.75]]
    assert batch.own_QD.tolist() == batch.known_QD.tolist() == [[True, False], [False, True]]


def test_a_copy_of_a_document_is_the_document() -> None:
    labels = labels_of(ROWS, {"c": "A"})
    batch = batch_of(labels, np.asarray([0, 2, 3, 4]))
    assert len(batch.document_D) == 3
    # q1 judged the copy with 0; for q0 it is the document judged 1, in one column.
    assert batch.target_QD.tolist() == [[1, 0.5, 0], [0, 0.25, 0], [0, 0, 0.75]]


def test_masking_and_merging_change_the_loss_as_predicted() -> None:
    logit = {"a": 1.5, "b": -0.5, "d": 0.25}
    apart = batch_of(labels_of(ROWS, {}, q2="c"), np.asarray([0, 2, 3, 4]))
    logits = torch.tensor([[1.5, -0.5, 1.5, 0.25]] * 3)

    def loss(target: torch.Tensor, weight: torch.Tensor, s: torch.Tensor) -> float:
        return float(graded_bce(s, target, weight, queries=3))

    target, weight = torch.from_numpy(apart.target_QD), torch.from_numpy(apart.weight_QD)
    masked = loss(target, weight, logits)
    unmasked = loss(target, torch.ones_like(weight), logits)
    softplus = float(torch.nn.functional.softplus(torch.tensor(1.5)))
    assert unmasked - masked == pytest.approx(softplus / 3, abs=1e-6)
    merged = batch_of(labels_of(ROWS, {"c": "a"}), np.asarray([0, 2, 3, 4]))
    target = torch.from_numpy(merged.target_QD)
    narrow = torch.tensor([[logit["a"], logit["b"], logit["d"]]] * 3)
    # One column less: three cells of target 0 at logit 1.5.
    assert unmasked - loss(target, torch.ones_like(target), narrow) == pytest.approx(
        softplus, abs=1e-6
    )


def test_a_batch_is_a_set_of_pairs() -> None:
    labels = labels_of(ROWS, {})
    first, second = (batch_of(labels, np.asarray(pairs)) for pairs in ([0, 3, 2, 4], [4, 2, 3, 0]))
    for name, value in vars(first).items():
        assert np.all(value == getattr(second, name)), name


PROMPTS = [{"query": "ask: ", "document": "tell: "}, {"query": "ask: ", "passage": "tell: "}, {}]


@pytest.mark.parametrize("prompts", PROMPTS, ids=lambda p: "-".join(p) or "none")
def test_trained_and_served_vectors_agree(
    prompts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In float32, where a difference is no rounding.
    monkeypatch.setattr("bixse.precision._multiplies_bfloat16", lambda device: False)
    directory = save_tiny_encoder(tmp_path, prompts)
    encoder = Encoder.load(str(directory), "cpu")
    model = load_model(str(directory), "cpu").eval()
    module = EncoderScoring(model, GradedBCE(), World(), "float32")
    read = texts(70, seed=1, longest=60)
    for role in ("query", "document"):
        side = tokenise(model, [Texts(read, role, 512, 69)])
        side = side.within(512)
        assert 3 <= len(side.chunks) <= 12
        vectors = module.vectors(torch.cat(list(module.made(side))), side.sides[0]).detach().numpy()
        np.testing.assert_allclose(vectors, encoder.encode(read, role)[:69], atol=2e-6)
    assert (prompt_of(model, "query") or "") == prompts.get("query", "")
    assert (prompt_of(model, "document") or "") == prompts.get("document", "")


def test_long_texts_are_cut_at_the_lower_limit(tmp_path: Path) -> None:
    model = load_model(str(save_tiny_encoder(tmp_path)), "cpu")
    (long,) = texts(1, seed=2, longest=60)
    long = " ".join([long] * 30)
    widths = [
        tokenise(model, [Texts([long], "query", limit)]).chunks[0][1]["input_ids"].shape[1]
        for limit in (8, 32, 512)
    ]
    assert widths == [8, 32, 32]


def test_chunks_waste_as_little_as_can_be() -> None:
    draw = np.random.default_rng(0)
    for cost, most in ((0, None), (20, None), (20, 64), (300, 128)):
        lengths = np.sort(draw.integers(2, 90, size=9))[::-1].astype(np.int64)

        def price(parts: list[slice], cost: int = cost, lengths: Ints = lengths) -> int:
            return sum(int(lengths[p.start]) * (p.stop - p.start) + cost for p in parts)

        def allowed(part: slice, most: int | None = most, lengths: Ints = lengths) -> bool:
            texts = part.stop - part.start
            return texts == 1 or most is None or int(lengths[part.start]) * texts <= most

        every = []
        for ends in range(2**8):
            marks = [0, *(i + 1 for i in range(8) if ends >> i & 1), 9]
            parts = [slice(a, b) for a, b in itertools.pairwise(marks)]
            if all(map(allowed, parts)):
                every.append(price(parts))
        found = cut(lengths, cost, most)
        assert [p.start for p in found] == [0, *(p.stop for p in found[:-1])]
        assert found[-1].stop == 9
        assert all(map(allowed, found))
        assert price(found) == min(every)


def test_chunks_hold_every_text_without_its_padding(tmp_path: Path) -> None:
    model = load_model(str(save_tiny_encoder(tmp_path, {"query": "ask: "})), "cpu")
    read = texts(40, seed=4, longest=30)
    whole = tokenise(model, [Texts(read, "query", 512)])
    small = tokenise(model, [Texts(read, "query", 512)], most=64)
    halved = whole.within(64)
    (all_at_once,) = (model.preprocess(read, prompt="ask: ", task="query", max_length=32),)
    wanted = [row[row != 0].tolist() for row in all_at_once["input_ids"]]
    for side in (whole, small, halved):
        rows = [row[row != 0].tolist() for _, c in side.chunks for row in c["input_ids"]]
        assert [rows[place] for place in side.sides[0].place.tolist()] == wanted
        assert all(c["attention_mask"].any(dim=0).all() for _, c in side.chunks)
    for side in (small, halved):
        assert all(c["input_ids"].numel() <= 64 for _, c in side.chunks)
        assert side.widest <= 64
    padded = sum(c["input_ids"].numel() for _, c in whole.chunks)
    assert padded < 0.9 * all_at_once["input_ids"].numel()
