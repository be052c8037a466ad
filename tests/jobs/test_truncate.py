"""A cut encoder is an artefact of its own, and what follows takes it like any other."""

from pathlib import Path

import pyarrow as pa
import pytest

from bixse.artifacts import Artifact, Draft, begin
from bixse.models.encoder import encoder_fingerprint, resolve
from bixse.records import CORPUS
from jobs.command import parse
from jobs.embed import EmbedUnit
from jobs.evaluate import _chosen_on, _curves
from jobs.pipeline import Pipeline
from jobs.recipe import Placement
from jobs.truncate import truncate
from tests.encoders import save_tiny_encoder
from tests.jobs.evaluated import qrels_artifact


def test_it_is_made_once_and_embeds_in_fewer_dimensions(tmp_path: Path) -> None:
    encoder = str(save_tiny_encoder(tmp_path))
    made = truncate(encoder, 8, str(tmp_path / "cut"))
    assert truncate(encoder, 8, str(tmp_path / "cut")).fingerprint == made.fingerprint
    fingerprint = encoder_fingerprint(resolve(made.url))
    assert made.manifest.extra["encoder"] == fingerprint != encoder_fingerprint(Path(encoder))
    rows = pa.table({"doc_id": ["a"], "title": [""], "text": ["bal bem"]}).cast(CORPUS)
    vectors, rejected = EmbedUnit(made.url, fingerprint, Placement())(rows)
    assert vectors["vector"].type.list_size == 8
    assert not rejected


def test_a_flag_cuts_the_encoder_that_is_named(tmp_path: Path) -> None:
    encoder = str(save_tiny_encoder(tmp_path))
    words = ["bixse", "--out", str(tmp_path / "out"), "--encoder", encoder, "--truncate", "8"]
    cut = Pipeline(parse("index", words)).encoder()
    assert cut == str(tmp_path / "out" / "encoder-8")
    assert Artifact.open(cut, "encoder").manifest.rows == 8


def test_there_must_be_more_dimensions(tmp_path: Path) -> None:
    encoder = str(save_tiny_encoder(tmp_path))
    with pytest.raises(ValueError, match="32 dimensions cannot be cut to 64"):
        truncate(encoder, 64, str(tmp_path / "cut"))
    assert not (tmp_path / "cut").exists()


def test_a_report_knows_how_the_whole_one_was_chosen(tmp_path: Path) -> None:
    """A cut encoder that was chosen on the dev split was reported there without a word of it."""
    qrels = qrels_artifact(tmp_path / "qrels", split="dev")
    save_tiny_encoder(tmp_path / "made")
    draft = begin(
        str(tmp_path / "whole"), "encoder", config={}, inputs={"dev qrels": qrels.fingerprint}
    )
    assert isinstance(draft, Draft)
    draft.add_directory(tmp_path / "made" / "encoder")
    draft.write_file("training.jsonl", b'{"step": 1, "loss": 0.5}\n')
    draft.write_file("dev.jsonl", b'{"step": 1, "ndcg@10": 0.4}\n')
    whole = draft.finish(rows=1)
    cut = truncate(whole.url, 8, str(tmp_path / "cut"))
    for made in (whole, cut):
        encoders = {"trained": (made.url, made)}
        assert _chosen_on(encoders, qrels, "dev")
        assert _curves(encoders, None) == ([(1, 0.5)], [(1, 0.4)])
    assert not _chosen_on(encoders, qrels_artifact(tmp_path / "other", split="test"), "dev")
