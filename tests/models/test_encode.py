"""`Encoder.encode` gives the vectors of sentence-transformers, whatever the model is made of."""

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    BoW,
    Dense,
    Normalize,
    Pooling,
    Router,
    StaticEmbedding,
    Transformer,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertModel

from bixse.models.encoder import Encoder, Role, load_model
from bixse.reading.chunks import Texts, even, evenly, longest_of, tokenise
from tests.encoders import (
    WORDS,
    save_tiny_decoder,
    save_tiny_encoder,
    texts,
    without_padding,
)

# Long, short, cut by the model, and empty: in no order.
TEXTS = [*texts(60, seed=1, longest=40), " ".join(WORDS), "", "bal", *texts(9, seed=2)]
PROMPTS = {"query": "ask : ", "document": "tell : "}


def saved(directory: Path, *modules: torch.nn.Module, **options: object) -> Path:
    # What options a test may name is not worth a type.
    model = SentenceTransformer(modules=list(modules), device="cpu", **options)  # type: ignore[arg-type]
    model.save_pretrained(str(directory / "made"), create_model_card=False)
    return directory / "made"


def plain(place: Path) -> Path:
    return save_tiny_encoder(place, PROMPTS)


def without_prompt(place: Path) -> Path:
    """The prompt is read and does not count in the mean."""
    model = SentenceTransformer(str(save_tiny_encoder(place)), device="cpu")
    pooling = Pooling(32, "mean", include_prompt=False)
    return saved(place, model[0], pooling, Normalize(), prompts=PROMPTS)


def decoder_left(place: Path) -> Path:
    return save_tiny_decoder(place, "left")


def decoder_right(place: Path) -> Path:
    return save_tiny_decoder(place, "right")


def decoder_without_prompt(place: Path) -> Path:
    model = SentenceTransformer(str(save_tiny_decoder(place, "left")), device="cpu")
    return saved(place, model[0], Pooling(32, "mean", include_prompt=False), prompts=PROMPTS)


def default_prompt(place: Path) -> Path:
    model = SentenceTransformer(str(save_tiny_encoder(place)), device="cpu")
    prompts = {"both": "tell : "}
    return saved(place, model[0], model[1], prompts=prompts, default_prompt_name="both")


def short_queries(place: Path) -> Path:
    """The model reads fewer tokens of a query than of a document."""
    model = SentenceTransformer(str(save_tiny_encoder(place)), device="cpu")
    bert = Transformer(str(place / "bert"), max_seq_length=32, query_length=8)
    return saved(place, bert, model[1])


def two_towers(place: Path) -> Path:
    """Queries and documents take different ways through the model."""
    model = SentenceTransformer(str(save_tiny_encoder(place)), device="cpu")
    torch.manual_seed(0)
    towers = [[Dense(32, 16)], [Dense(32, 16)]]
    # The Router wants lists of modules, and lists of Dense are no such lists to a type checker.
    return saved(place, model[0], model[1], Router.for_query_document(*towers))  # type: ignore[arg-type]


def static(place: Path) -> Path:
    """A bag of words, without attention mask."""
    tokenizer = SentenceTransformer(str(save_tiny_encoder(place)), device="cpu").tokenizer
    torch.manual_seed(0)
    return saved(place, StaticEmbedding(tokenizer, embedding_dim=16), prompts=PROMPTS)


def words(place: Path) -> Path:
    """A bag of words whose vectors come from the tokeniser."""
    return saved(place, BoW(WORDS[:200]), Dense(200, 16))


MAKERS = [
    plain, without_prompt, decoder_left, decoder_right, decoder_without_prompt, default_prompt,
    short_queries, two_towers, static, words,
]  # fmt: skip


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_vectors_are_those_of_sentence_transformers(
    make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In float32, where a difference is no rounding; and more than one window of texts.
    monkeypatch.setattr("bixse.precision._multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr("bixse.models.encoder._WINDOW", 50)
    directory = str(make(tmp_path))
    encoder = Encoder.load(directory, "cpu")
    theirs = SentenceTransformer(directory, device="cpu")
    # A bag of no words has no direction.
    read = [text for text in TEXTS if text or make not in (static, words)]
    roles: tuple[Role, ...] = ("query", "document")
    for role in roles:
        encode = theirs.encode_query if role == "query" else theirs.encode_document
        wanted = np.asarray(encode(read, normalize_embeddings=True))
        for tokens in (None, 100, 1):
            np.testing.assert_allclose(encoder.encode(read, role, tokens), wanted, atol=5e-6)
        assert encoder.encode([], role).shape == (0, encoder.dim)
        # Texts stand apart, so that an order lost would show.
        assert np.median(wanted @ wanted.T) < 0.9999


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_chunks_of_few_shapes_give_the_same_vectors(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    model = load_model(str(make(tmp_path)), "cpu").eval()
    read = [text for text in TEXTS if text or make not in (static, words)]
    roles: tuple[Role, ...] = ("query", "document")
    for role in roles:
        found = []
        for alike in (False, True):
            reading = tokenise(model, [Texts(read, role)], 100, alike)
            with torch.no_grad():
                made = [
                    model(dict(c), task=role)["sentence_embedding"] for role, c in reading.chunks
                ]
            found.append(torch.cat(made)[reading.sides[0].place].numpy())
        np.testing.assert_allclose(found[1], found[0], atol=5e-6)


@given(
    lengths=st.lists(st.integers(0, 600), min_size=1, max_size=60),
    limit=st.none() | st.integers(600, 700),
    most=st.integers(1, 5000),
)
def test_even_lengths_hold_their_texts_within_the_models_positions(
    lengths: list[int], limit: int | None, most: int
) -> None:
    falling = np.array(sorted(lengths, reverse=True))
    wide = even(falling, limit)
    assert (wide >= falling).all()
    assert (wide < falling + 16 + (falling == 0)).all()
    assert limit is None or wide.max() <= limit
    assert (wide > 0).all()
    parts = evenly(wide, most)
    assert [row for part in parts for row in range(part.start, part.stop)] == [*range(len(wide))]
    for part in parts:
        texts = part.stop - part.start
        assert texts == 1 or texts * wide[part.start] <= most


def asked_of_bert(most: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes that a BERT is called with; memory suffices for `most` tokens."""
    forward, asked = BertModel.forward, []

    def limited(self: BertModel, input_ids: torch.Tensor, **kwargs: object) -> object:
        asked.append((input_ids.shape[0], input_ids.shape[1]))
        if input_ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, input_ids, **kwargs)

    limited.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(BertModel, "forward", limited)
    return asked


def test_calls_keep_to_the_budget_with_little_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder.load(str(plain(tmp_path)), "cpu")
    asked = asked_of_bert(10**6, monkeypatch)
    encoder.encode(TEXTS, "query", 256)
    assert sum(texts for texts, _ in asked) == len(TEXTS)
    assert all(texts * width <= 256 for texts, width in asked)
    used = sum(encoder.model.preprocess(TEXTS, prompt="ask : ")["attention_mask"].sum(1)).item()
    assert sum(texts * width for texts, width in asked) < 1.15 * used


def test_calls_in_bfloat16_on_a_cpu_have_few_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A CPU without instructions for it would stay in float32; torch multiplies there all the same.
    monkeypatch.setattr("bixse.precision._multiplies_bfloat16", lambda device: True)
    encoder = Encoder.load(str(plain(tmp_path)), "cpu")
    asked = asked_of_bert(10**6, monkeypatch)
    encoder.encode(TEXTS * 20, "document", 512)
    assert sum(texts for texts, _ in asked) == 20 * len(TEXTS)
    assert all(texts * width <= 512 and width % 16 == 0 for texts, width in asked)
    # One for each length, and what is left in the end.
    assert len(set(asked)) <= len({width for _, width in asked}) + 1
    assert len(asked) > 2 * len(set(asked))


def test_what_memory_does_not_hold_is_halved_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder.load(str(plain(tmp_path)), "cpu")
    wanted = encoder.encode(TEXTS, "query")
    asked = asked_of_bert(200, monkeypatch)
    np.testing.assert_allclose(encoder.encode(TEXTS, "query"), wanted, atol=2e-6)
    assert max(texts * width for texts, width in asked) > 200
    asked.clear()
    encoder.encode(TEXTS, "query", 4096)
    assert max(texts * width for texts, width in asked) <= 200
    asked_of_bert(1, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        encoder.encode(["bal"], "query")


def test_a_text_without_a_direction_is_refused_by_its_place(tmp_path: Path) -> None:
    encoder = Encoder.load(str(static(tmp_path)), "cpu")
    encoder.model.prompts.clear()
    with pytest.raises(ValueError, match=r"not finite for text 1$"):
        encoder.encode(["bal", ""], "document")


def routed(place: Path, queries: SentenceTransformer, documents: SentenceTransformer) -> str:
    """A model of which two others read queries and documents."""
    router = Router.for_query_document([*queries], [*documents])
    SentenceTransformer(modules=[router], device="cpu").save_pretrained(str(place))
    return str(place)


def test_each_route_pads_on_its_own_side(tmp_path: Path) -> None:
    left = SentenceTransformer(str(save_tiny_decoder(tmp_path / "left", "left")), device="cpu")
    right = SentenceTransformer(str(save_tiny_encoder(tmp_path / "right")), device="cpu")
    asked = ["bal", *texts(8, seed=1)]
    for name, towers in (("a", (left, right)), ("b", (right, left))):
        start = routed(tmp_path / name, *towers)
        encoder, plain = Encoder.load(start, "cpu"), SentenceTransformer(start, device="cpu")
        for role, encode in (("query", plain.encode_query), ("document", plain.encode_document)):
            theirs = encode(asked, normalize_embeddings=True)
            assert (encoder.encode(asked, role) * theirs).sum(axis=1).min() > 0.999  # type: ignore[arg-type]


def test_a_tokenizer_without_padding_takes_the_token_that_ends_texts(tmp_path: Path) -> None:
    """transformers refused two texts at once, in a sentence on its own arguments."""
    start = save_tiny_decoder(tmp_path, "right")
    asked = ["bal", *texts(8, seed=1)]
    expected = Encoder.load(str(start), "cpu").encode(asked, "document")
    without_padding(start)
    encoder = Encoder.load(str(start), "cpu")
    assert (encoder.encode(asked, "document") == expected).all()
    encoder.model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    theirs = plain.encode_document(asked)
    assert (expected * theirs).sum(axis=1).min() > 0.999


def test_a_tokenizer_without_any_such_token_is_refused(tmp_path: Path) -> None:
    start = without_padding(save_tiny_decoder(tmp_path, "right"))
    config = start / "tokenizer_config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"eos_token": None, "unk_token": None}))
    with pytest.raises(ValueError, match="without a padding token"):
        load_model(str(start), "cpu")


def test_each_route_cuts_where_it_does_by_itself(tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({word: at for at, word in enumerate(["[UNK]", *WORDS])}))
    tokenizer.pre_tokenizer = Whitespace()
    static = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)])
    other = SentenceTransformer(str(save_tiny_encoder(tmp_path)), device="cpu")
    model = load_model(routed(tmp_path / "routed", static, other), "cpu")
    # A static embedding reads on for ever: that is no limit of the other route's.
    assert model.max_seq_length == math.inf
    assert longest_of(model, "query") is None
    assert longest_of(model, "document") == 32
    ((_, chunk),) = tokenise(model, [Texts([" ".join(WORDS[:200])], "document", 256)]).chunks
    assert chunk["input_ids"].shape == (1, 32)
