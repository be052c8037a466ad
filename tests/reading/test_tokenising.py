"""Tokens without `preprocess` are the tokens of `preprocess`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bixse.models.encoder import load_model
from bixse.models.reranker import load_reranker
from bixse.models.settings import PACKAGED
from bixse.reading.chunks import prompt_of
from bixse.reading.ragged import Ragged
from bixse.reading.tokenising import Role, tokenised
from tests.encoders import (
    save_tiny_cross_encoder,
    save_tiny_decoder,
    save_tiny_encoder,
    texts,
)

ODD = ["", " a ", "UPPER lower", "é — 漢字 🙂", "[SEP] </s>", "\n\t", "don't", "a" * 500]
PROMPTS = {"query": "ask : ", "document": "tell : tell : "}


def encoder(place: Path) -> Any:
    return load_model(str(save_tiny_encoder(place, PROMPTS)), "cpu")


def decoder(place: Path) -> Any:
    return load_model(str(save_tiny_decoder(place, "left")), "cpu")


def real(place: Path) -> Any:
    return load_model(PACKAGED, "cpu")


@pytest.mark.parametrize("make", [encoder, decoder, real], ids=lambda make: make.__name__)
@pytest.mark.parametrize("most", [None, 12])
def test_texts(make: Callable[[Path], Any], most: int | None, tmp_path: Path) -> None:
    model = make(tmp_path)
    read = [*ODD, *texts(40, seed=1, longest=60), "word " * 900]
    roles: tuple[Role, ...] = ("query", "document")
    for role in roles:
        cut = {} if most is None else {"max_length": most}
        prompt = prompt_of(model, role)
        wanted = Ragged.of(dict(model.preprocess(read, prompt=prompt, task=role, **cut)))
        state = str(model.tokenizer.backend_tokenizer.to_str())
        calls = count_calls(model)
        for _ in range(2):
            found = tokenised(model, read, role, prompt, most)
            assert isinstance(found, Ragged)
            assert_same(found, wanted)
        # Asked once, to be shown how.
        assert len(calls) == 1
        assert model.tokenizer.backend_tokenizer.to_str() == state


def test_pairs(tmp_path: Path) -> None:
    model = load_reranker(str(save_tiny_cross_encoder(tmp_path, logits=1)), "cpu")
    long = texts(12, seed=3, longest=60)
    pairs = [*zip(long, reversed(long), strict=True), ("", ""), ("a", ""), (long[0], "")]
    wanted = Ragged.of(dict(model.preprocess(pairs, prompt=None, task="pair", max_length=24)))
    assert_same(tokenised(model, pairs, "pair", None, 24), wanted)
    if "token_type_ids" in wanted.of_tokens:
        assert wanted.of_tokens["token_type_ids"].any()


def test_a_model_with_ways_of_its_own_is_asked_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = encoder(tmp_path)
    theirs = type(model).preprocess

    def upside_down(self: Any, inputs: list[str], **kwargs: Any) -> dict[str, Any]:
        return theirs(self, [text[::-1] for text in inputs], **kwargs)

    monkeypatch.setattr(type(model), "preprocess", upside_down)
    found = tokenised(model, ["bal bem"], "query", None, None)
    wanted = Ragged.of(dict(model.preprocess(["bal bem"], task="query")))
    assert_same(found, wanted)


def count_calls(model: Any) -> list[int]:
    calls: list[int] = []
    preprocess = model.preprocess

    def counted(inputs: Any, **kwargs: Any) -> Any:
        calls.append(len(inputs))
        return preprocess(inputs, **kwargs)

    model.preprocess = counted
    return calls


def assert_same(found: Any, wanted: Ragged) -> None:
    assert found.of_tokens.keys() == wanted.of_tokens.keys()
    assert found.of_all == wanted.of_all
    for name, value in wanted.of_tokens.items():
        torch.testing.assert_close(found.of_tokens[name], value, msg=name)
    torch.testing.assert_close(found.length_N, wanted.length_N)
