"""Encoders: unit vectors, prompts, fingerprints, and what cannot be loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize

from bixse.models.encoder import Encoder, encoder_fingerprint, load_model, resolve, truncated
from bixse.models.language_model import load_language_model
from bixse.models.reranker import load_reranker
from bixse.models.settings import PACKAGED
from bixse.precision import in_bfloat16
from tests.encoders import (
    WORDS,
    save_tiny_cross_encoder,
    save_tiny_encoder,
    save_tiny_roberta,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = {"query": "ask : ", "document": "tell : "}
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"), prompts=prompts)


def test_vectors_are_those_of_sentence_transformers(directory: Path) -> None:
    texts = ["bal bem", "tot " * 40, ""]
    encoder, plain = Encoder.load(str(directory)), SentenceTransformer(str(directory))
    for role, encode in (("query", plain.encode_query), ("document", plain.encode_document)):
        ours = encoder.encode(texts, role)  # type: ignore[arg-type]
        theirs = encode(texts, normalize_embeddings=True)
        assert (ours * theirs).sum(axis=1).min() >= 0.9999
        assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    as_query, as_document = encoder.encode(texts, "query"), encoder.encode(texts, "document")
    assert not np.allclose(as_query, as_document)
    assert encoder.encode([], "query").shape == (0, encoder.dim)


def test_queries_in_bfloat16_are_nearly_those_in_float32_and_documents_are_the_same() -> None:
    texts = ["bal bem", "which animal sleeps in winter by the coast", "x", "long " * 400]
    whole, rounded = Encoder.load(PACKAGED, "cpu"), Encoder.load(PACKAGED, "cpu", "bfloat16")
    queries = rounded.encode(texts, "query")
    assert (queries * whole.encode(texts, "query")).sum(axis=1).min() >= 0.9999
    assert not np.array_equal(queries, whole.encode(texts, "query"))
    if in_bfloat16(whole.model.device):
        documents = rounded.encode(texts, "document")
        assert np.allclose(documents, whole.encode(texts, "document"), atol=1e-6)


def test_documents_are_read_by_a_copy_in_bfloat16_and_queries_never(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = ["which animal sleeps in winter by the coast", "x", "", "long " * 400]
    monkeypatch.setattr("bixse.precision._multiplies_bfloat16", lambda device: False)
    exact = Encoder.load(PACKAGED, "cpu")
    monkeypatch.setattr("bixse.precision._multiplies_bfloat16", lambda device: True)
    encoder = Encoder.load(PACKAGED, "cpu")
    documents = encoder.encode(texts, "document")
    assert (documents * exact.encode(texts, "document")).sum(axis=1).min() >= 0.9997
    # With float32 between its layers the same model is nearer to float32.
    ours = Encoder(load_model(PACKAGED, "cpu"), "").encode(texts, "document")
    assert not np.array_equal(documents, ours)
    assert np.array_equal(encoder.encode(texts, "query"), exact.encode(texts, "query"))
    assert {value.dtype for value in encoder.model.parameters()} == {torch.float32}


def test_padding_changes_nothing(directory: Path) -> None:
    encoder = Encoder.load(str(directory))
    texts = ["bal", "bal bem " * 12, "tot tut"]
    alone = np.concatenate([encoder.encode([text], "document") for text in texts])
    assert np.abs(encoder.encode(texts, "document") - alone).max() < 1e-5


def test_the_fingerprint_follows_what_shapes_vectors(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    assert encoder_fingerprint(copy) == encoder_fingerprint(directory)
    (copy / "README.md").write_text("a card")
    (copy / "manifest.json").write_text("{}")
    assert encoder_fingerprint(copy) == encoder_fingerprint(directory)
    weights = next(copy.rglob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert encoder_fingerprint(copy) != encoder_fingerprint(directory)
    prompts = save_tiny_encoder(tmp_path / "other", prompts={"query": "ask : "})
    before = encoder_fingerprint(prompts)
    assert before != encoder_fingerprint(directory)
    # A causal language model that scores pairs reads them through it.
    (prompts / "chat_template.jinja").write_text("{{ messages }}")
    assert encoder_fingerprint(prompts) != before


def test_folders_that_are_links_shape_vectors_too(directory: Path, tmp_path: Path) -> None:
    """What stood in them was left out, and all weights may."""
    linked = tmp_path / "linked"
    shutil.copytree(directory, linked)
    before = encoder_fingerprint(linked)
    (linked / "1_Pooling").rename(tmp_path / "pooling")
    (linked / "1_Pooling").symlink_to(tmp_path / "pooling")
    assert encoder_fingerprint(linked) == before
    config = tmp_path / "pooling" / "config.json"
    config.write_text(config.read_text().replace("mean", "cls"))
    assert encoder_fingerprint(linked) != before


def test_the_fingerprint_of_adapters_follows_the_model_below_them(
    directory: Path, tmp_path: Path
) -> None:
    """An index went on being served after the base under its encoder's adapters had changed."""
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    shutil.copytree(directory, base)
    adapters.mkdir()
    config = adapters / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = encoder_fingerprint(adapters)
    (weights,) = base.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes() + b" ")
    assert encoder_fingerprint(adapters) != before
    shutil.rmtree(base)
    with pytest.raises(ValueError, match="neither a directory nor a model"):
        encoder_fingerprint(adapters)
    # Of a model that has its adapters beside it, there is nothing more to follow.
    config.write_text(json.dumps({"base_model_name_or_path": str(adapters)}))
    assert encoder_fingerprint(adapters)


def test_what_a_directory_lacks_is_drawn_by_the_seed(tmp_path: Path) -> None:
    directory = save_tiny_encoder(tmp_path)
    stored = load_file(directory / "model.safetensors")
    kept = {name: value for name, value in stored.items() if "pooler" not in name}
    assert len(kept) < len(stored)
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (
        dict(load_model(str(directory), "cpu", seed).named_parameters()) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.rand(1), expected), "the caller's draws are its own"
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    differing = {name for name, value in first.items() if not torch.equal(value, other[name])}
    assert differing == {name for name in first if name.endswith("pooler.dense.weight")}


def test_an_encoder_stored_in_bfloat16_is_multiplied_in_float32(
    directory: Path, tmp_path: Path
) -> None:
    model = SentenceTransformer(str(directory), device="cpu").bfloat16()
    model.save_pretrained(str(tmp_path / "rounded"), create_model_card=False)
    model.float().save_pretrained(str(tmp_path / "whole"), create_model_card=False)
    rounded, whole = (Encoder.load(str(tmp_path / name), "cpu") for name in ("rounded", "whole"))
    texts = ["bal bem", "tot " * 12]
    assert np.array_equal(rounded.encode(texts, "query"), whole.encode(texts, "query"))


def test_the_packaged_encoder_is_a_path() -> None:
    assert (resolve(PACKAGED) / "modules.json").is_file()


def test_an_encoder_that_cuts_only_in_encode_is_refused(directory: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(directory), truncate_dim=8)
    model.save_pretrained(str(tmp_path / "cut"), create_model_card=False)
    with pytest.raises(ValueError, match=r"outside its modules \(truncate_dim 8\)"):
        Encoder.load(str(tmp_path / "cut"))


def test_whatever_was_saved_last_a_loaded_encoder_ends_normalised(
    directory: Path, tmp_path: Path
) -> None:
    plain = SentenceTransformer(str(directory))
    plain.append(Normalize())
    plain.append(Dense(32, 16))
    plain.save_pretrained(str(tmp_path / "dense"), create_model_card=False)
    model = load_model(str(tmp_path / "dense"), "cpu")
    assert np.linalg.norm(model.encode(["bal bem"])) == pytest.approx(1, abs=1e-6)
    assert truncated(model, 8).encode(["bal bem"]).shape == (1, 8)


@pytest.mark.parametrize("load", [load_model, load_reranker, load_language_model])
def test_weights_that_were_copied_in_part_are_one_sentence(
    load: Callable[[str], object], directory: Path, tmp_path: Path
) -> None:
    shutil.copytree(directory, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut is (not|no) .*incomplete metadata") as error:
        load(str(tmp_path / "cut"))
    assert "\n" not in str(error.value)


def test_a_model_without_its_tokenizer_is_refused(directory: Path, tmp_path: Path) -> None:
    # transformers gives it one to which all texts are the same unknown words.
    shutil.copytree(directory, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    one, other = SentenceTransformer(str(tmp_path / "mute")).encode(["bal bem", "tot sas"])
    assert np.allclose(one, other)
    with pytest.raises(ValueError, match="mute has a tokenizer that knows no word"):
        load_model(str(tmp_path / "mute"))
    cross = save_tiny_cross_encoder(tmp_path / "cross", logits=1)
    for name in ("tokenizer.json", "vocab.txt"):
        (cross / name).unlink()
    with pytest.raises(ValueError, match="cross has a tokenizer that knows no word"):
        load_reranker(str(cross))


def test_a_text_is_cut_where_a_roberta_has_no_more_positions(tmp_path: Path) -> None:
    directory = save_tiny_roberta(tmp_path)
    # What sentence-transformers takes from the configuration is two too many.
    assert SentenceTransformer(str(directory)).max_seq_length == 34
    encoder = Encoder.load(str(directory), "cpu")
    assert encoder.model.max_seq_length == 32
    long = " ".join(WORDS[:60])
    assert encoder.encode([long, long + " bal"], "document").shape == (2, 32)
    reranker = load_reranker(str(directory), "cpu", pooled=False)
    assert reranker.max_seq_length == 32
    assert reranker.predict([("bal bem", long)]).shape == (1,)


def test_what_is_no_encoder_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not an encoder") as error:
        Encoder.load(str(tmp_path))
    assert "\n" not in str(error.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no encoder 'nobody/nothing'") as error:
        resolve("nobody/nothing")
    assert "\n" not in str(error.value)
