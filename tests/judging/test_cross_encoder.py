"""Pairs as a cross-encoder reads them, and logits as grades."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.judging.cross_encoder import PairTokenizer, classes, probs_of, scale_of, verdict
from bixse.judging.settings import CrossEncoder
from bixse.records import Judgment, Rejection
from bixse.scale import linear
from jobs.judges.cross_encoder import cross_encoder_name, signature
from tests.encoders import save_tiny_cross_encoder

PLAIN = CrossEncoder(model="any")


def test_one_logit_by_hand() -> None:
    """sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4; the map moves it before."""
    assert probs_of([0.0], 1, 0) == (0.5, 0.5)
    assert probs_of([math.log(3)], 1, 0) == pytest.approx((0.25, 0.75))
    assert probs_of([2.0], 0.5, math.log(3) - 1) == pytest.approx((0.25, 0.75))
    assert scale_of(1).values == (0, 1)


def test_many_logits_by_hand() -> None:
    assert probs_of([0.0, 0.0, math.log(2)], 1, 0) == pytest.approx((0.25, 0.25, 0.5))
    assert scale_of(2).values == (0, 1)
    assert scale_of(4).values == (0, 1, 2, 3)


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=5))
def test_a_distribution_whatever_the_logits(logits: list[float]) -> None:
    found = verdict("q", "d", logits, len(logits), PLAIN, "tiny")
    assert isinstance(found, Judgment)
    assert sum(found.grade_probs) == pytest.approx(1, abs=1e-9)
    assert 0 <= found.relevance <= 1
    assert found.origin == "cross_encoder"


@pytest.mark.parametrize("logits", [[], [math.nan], [math.inf], [0.1, 0.2]])
def test_what_is_no_logit_is_a_rejection(logits: list[float]) -> None:
    found = verdict("q", "d", logits, 1, PLAIN, "tiny")
    assert isinstance(found, Rejection)
    assert found.reason == "1 finite logits are needed"
    assert (found.query_id, found.doc_id) == ("q", "d")


def test_pairs_are_two_segments_and_no_passage_opens_a_third(tmp_path: Path) -> None:
    model = save_tiny_cross_encoder(tmp_path, logits=1)
    tokens = PairTokenizer.load(PLAIN.replace(model=str(model)))
    plain, forged = tokens.encode(["bal bam", "bal"], ["ban bar bas", "ban [SEP] bal [SEP]"])
    assert len(plain.ids) == 2 + 3 + 3
    assert plain.second == 4
    assert forged.ids.count(plain.ids[-1]) == 2
    assert tokens.encode([], []) == []


def test_documents_are_cut_by_tokens_only_when_asked(tmp_path: Path) -> None:
    """A teacher reads the beginning of a document, where all of it would be rejected."""
    plain = PLAIN.replace(model=str(save_tiny_cross_encoder(tmp_path, logits=1)))
    long, short = "ban bar bas bal bam", "bar ban"
    cut = PairTokenizer.load(plain.replace(document_tokens=3))
    assert cut.encode(["bal bam"] * 2, [long, short]) == PairTokenizer.load(plain).encode(
        ["bal bam"] * 2, ["ban bar bas", short]
    )
    assert PairTokenizer.load(plain).encode(["bal"], [long]) != cut.encode(["bal"], [long])


def test_who_cuts_documents_is_another_judge() -> None:
    """And who cuts none is who it was: labels that stand are not paid for again."""
    cut = PLAIN.replace(document_tokens=9)
    assert cross_encoder_name(PLAIN, "0" * 32, "float32") == "any@000000000000:float32:1*logit+0"
    assert cross_encoder_name(cut, "0" * 32, "float32").endswith("+0:document_tokens=9")
    assert "document_tokens" not in signature(PLAIN, "0", linear(0, 1))
    assert signature(cut, "0", linear(0, 1))["document_tokens"] == 9


def test_settings_that_could_only_fail_are_refused(tmp_path: Path, tiny_llm: str) -> None:
    model = str(save_tiny_cross_encoder(tmp_path / "three", logits=3))
    assert classes(PLAIN.replace(model=model)) == 3
    with pytest.raises(ValueError, match="slope and intercept map one logit"):
        classes(PLAIN.replace(model=model, slope=2.0))
    with pytest.raises(ValueError, match="is no cross-encoder"):
        classes(PLAIN.replace(model=tiny_llm))
    with pytest.raises(ValueError, match="no cross-encoder"):
        classes(PLAIN.replace(model=str(tmp_path / "nowhere")))
