"""Packed texts: the vectors and gradients of padded ones, whatever the model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import ModernBertConfig, ModernBertModel, RobertaConfig, RobertaModel

from bixse.reading.chunks import Reading, Texts, tokenise
from bixse.reading.packing import agreement, is_packed, may_pack, packed, reads_packed
from bixse.reading.spans import round_up
from tests.encoders import save_tiny_decoder, save_tiny_encoder, texts

LONG, SHORT = texts(9, seed=1, longest=40), texts(8, seed=2, longest=6)


def bert(place: Path) -> SentenceTransformer:
    prompts = {"query": "ask : ", "document": "tell : tell : "}
    return SentenceTransformer(str(save_tiny_encoder(place, prompts)), device="cpu")


def without_prompt(place: Path) -> SentenceTransformer:
    model = bert(place)
    model[1] = Pooling(32, "mean", include_prompt=False)
    return model


def first_token(place: Path) -> SentenceTransformer:
    model = bert(place)
    model[1] = Pooling(32, "cls")
    return model


def causal(place: Path) -> SentenceTransformer:
    """Fewer heads for keys than for queries, rotary positions, the last token's vector."""
    return SentenceTransformer(str(save_tiny_decoder(place, "left")), device="cpu")


def learned_from_two(place: Path) -> SentenceTransformer:
    """RoBERTa counts positions from behind that of padding."""
    config = RobertaConfig(
        vocab_size=len(bert(place).tokenizer), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64, max_position_embeddings=66, pad_token_id=1,
    )  # fmt: skip
    return with_tokenizer(place, RobertaModel(config))


def windowed(place: Path) -> SentenceTransformer:
    """ModernBERT: every other layer sees a few tokens on either side."""
    config = ModernBertConfig(
        vocab_size=len(bert(place).tokenizer), hidden_size=32, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=64, local_attention=6, pad_token_id=0,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    return with_tokenizer(place, ModernBertModel(config))


def with_tokenizer(place: Path, inner: torch.nn.Module) -> SentenceTransformer:
    tokenizer = SentenceTransformer(str(place / "encoder"), device="cpu").tokenizer
    inner.save_pretrained(str(place / "inner"))
    tokenizer.save_pretrained(str(place / "inner"))
    module = Transformer(str(place / "inner"), max_seq_length=32)
    return SentenceTransformer(modules=[module, Pooling(32, "mean")], device="cpu")


MODELS = [bert, without_prompt, first_token, causal, learned_from_two, windowed]


def read_of(model: SentenceTransformer, most: int | None = None) -> Reading:
    sides = [Texts(SHORT, "query"), Texts(LONG, "document")]
    return tokenise(model, sides, most)


def vectors(model: SentenceTransformer, read: Reading) -> list[torch.Tensor]:
    chunks = [model(dict(c), task=role)["sentence_embedding"] for role, c in read.chunks]
    return [torch.cat(chunks)[side.place] for side in read.sides]


def loss(found: list[torch.Tensor], along: list[torch.Tensor]) -> torch.Tensor:
    """Not their lengths, which a model may keep."""
    pairs = zip(found, along, strict=True)
    return torch.stack([(vectors * way).sum() for vectors, way in pairs]).sum()


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_packed_equals_padded(make: Callable[[Path], SentenceTransformer], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make(tmp_path).eval()
    padded = read_of(model)
    wanted = vectors(model, padded)
    along = [torch.randn_like(v) for v in wanted]
    loss(wanted, along).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) > 10
    with packed(model):
        whole = read_of(model)
        # Queries and documents in one pass, unless the prompt's length tells them apart.
        assert len(whole.chunks) == (2 if make is without_prompt else 1)
        for read in (whole, read_of(model, most=40), whole.within(40)):
            assert all(is_packed(chunk) for _, chunk in read.chunks)
            model.zero_grad()
            found = vectors(model, read)
            loss(found, along).backward()
            for mine, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)
            for name, parameter in model.named_parameters():
                if name in gradients:
                    torch.testing.assert_close(
                        parameter.grad,
                        gradients[name],
                        # The gradient of a key's bias is nothing but rounding.
                        atol=max(1e-6, 2e-5 * float(gradients[name].abs().max())),
                        rtol=1e-4,
                    )
        sizes = [chunk["input_ids"].numel() for _, chunk in read_of(model, most=40).chunks]
        assert len(sizes) > 2
        assert max(sizes) <= 40
        assert read_of(model, most=40).widest <= 40
    assert not reads_packed(model)
    torch.testing.assert_close(vectors(model, padded)[0], wanted[0])


def test_a_padded_text_is_refused_within(tmp_path: Path) -> None:
    model = bert(tmp_path)
    padded = read_of(model)
    with packed(model), pytest.raises(RuntimeError, match="not packed"):
        vectors(model, padded)


def test_it_is_for_models_that_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert(tmp_path).eval()
    for name, parameter in model.named_parameters():
        # Weights as they are drawn make next to nothing of what a token sees.
        if "value.weight" in name:
            parameter.data *= 100
    assert agreement(model) > 0.999999
    assert may_pack(model)
    # An attention that looks at nothing: no model that packs wrongly is at hand.
    monkeypatch.setattr("bixse.reading.spans.attend", lambda query, key, value, *_: value)
    assert not may_pack(model)


def test_packed_lengths_recur_and_are_within_the_limit(tmp_path: Path) -> None:
    model = bert(tmp_path)
    with packed(model):
        whole, halved = read_of(model), read_of(model, most=100)
    sizes = [[c["input_ids"].numel() for _, c in read.chunks] for read in (whole, halved)]
    assert sizes[0] == [round_up(sizes[0][0])]
    assert set(sizes[1][:-1]) <= {96, 100}
    assert len(sizes[1]) > 2
