"""Documents in chunks and chunks in groups: what stays together, what is left out, and why."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.records import Chunk, Rejection
from bixse.synthesis.chunk_groups import Chunker, cut_evenly, grouped, once


@pytest.fixture(scope="module")
def tokenizer(tiny_llm: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llm)


@given(count=st.integers(0, 500), most=st.integers(1, 40))
def test_pieces_are_as_few_and_as_even_as_can_be(count: int, most: int) -> None:
    pieces = cut_evenly(count, most)
    sizes = [piece.stop - piece.start for piece in pieces]
    assert [n for piece in pieces for n in range(piece.start, piece.stop)] == list(range(count))
    assert len(pieces) == -(-count // most)
    assert not sizes or (max(sizes) <= most and max(sizes) - min(sizes) <= 1)


@given(
    sizes=st.lists(st.integers(0, 40), max_size=60),
    size=st.integers(2, 16),
)
def test_every_chunk_is_in_one_group_beside_the_rest_of_its_document(
    sizes: list[int], size: int
) -> None:
    documents = [[(number, n) for n in range(count)] for number, count in enumerate(sizes)]
    groups = list(grouped(documents, size))
    assert sorted(c for group in groups for c in group) == [c for d in documents for c in d]
    assert all(1 <= len(group) <= size for group in groups)
    # Only the last may have one chunk.
    assert all(len(group) > 1 for group in groups[:-1])
    parts = Counter(number for group in groups for number in {number for number, _ in group})
    assert all(parts[number] == -(-count // size) for number, count in enumerate(sizes) if count)


def test_groups_are_filled_with_what_fits() -> None:
    documents = [["a1", "a2", "a3"], ["b1", "b2"], ["c1"], ["d1", "d2", "d3", "d4", "d5"]]
    assert list(grouped(documents, 4)) == [
        ["a1", "a2", "a3", "c1"],
        ["b1", "b2", "d1", "d2"],
        ["d3", "d4", "d5"],
    ]


def test_what_waits_does_not_follow_the_documents() -> None:
    """Of documents that never fit beside each other, groups come out while more go in."""
    read = []

    def documents() -> Any:
        for number in range(100):
            read.append(number)
            yield [number] * 9

    seen = [len(read) for _ in grouped(documents(), 16)]
    assert seen == [*range(9, 101), *[100] * 8]


def test_chunks_are_cut_where_the_tokens_are(tokenizer: Any) -> None:
    text = "query passage grade search tea water leaf"
    long, short, empty = Chunker(tokenizer, 4)([("a", text), ("b", "tea water"), ("c", " \n")])
    # " leaf" and its kin are one token each; the seven are cut into 3 and 4.
    assert [chunk.text for chunk in long] == ["query passage grade", "search tea water leaf"]
    assert [chunk.text[: chunk.half] for chunk in long] == ["query", "search tea"]
    for chunk in (*long, *short):
        assert isinstance(chunk, Chunk)
        assert tokenizer.decode(chunk.token_ids).strip() == chunk.text
    assert [chunk.doc_id for chunk in (*long, *short)] == ["a", "a", "b"]
    (nothing,) = empty
    assert isinstance(nothing, Rejection)
    assert nothing.reason in ("has no text", "has no two halves")


@given(text=st.text(max_size=200), most=st.integers(8, 40))
def test_whatever_a_text_is_its_chunks_have_two_halves(
    tokenizer: Any, text: str, most: int
) -> None:
    (found,) = Chunker(tokenizer, most)([("a", text)])
    assert found
    for chunk in found:
        if isinstance(chunk, Rejection):
            assert chunk.reason in ("has no text", "has no two halves")
            continue
        assert 2 <= len(chunk.token_ids) <= most
        assert 0 < chunk.half < len(chunk.text)
        assert chunk.text == chunk.text.strip()


def test_what_a_tokenizer_puts_before_every_text_is_before_every_chunk(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    begins = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|start|>", eos_token="<|end|>"
    )
    number = begins.bos_token_id
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", number)]
    )
    (found,) = Chunker(begins, 4)([("a", "query passage grade search <|end|> tea")])
    assert all(isinstance(c, Chunk) and c.token_ids[0] == number for c in found)
    assert all(isinstance(c, Chunk) and len(c.token_ids) <= 4 for c in found)
    # The end that the text spelt out is broken up.
    ids = [i for c in found if isinstance(c, Chunk) for i in c.token_ids[1:].tolist()]
    assert not {begins.eos_token_id, number} & set(ids)


def test_a_copy_is_left_out(tokenizer: Any) -> None:
    (found,) = Chunker(tokenizer, 100)([("a", "tea water leaf")])
    (again,) = Chunker(tokenizer, 100)([("b", "Tea  WATER leaf")])
    known: set[str] = set()
    first, *rest = [*once(found, known), *once(again, known)]
    assert isinstance(first, Chunk)
    (copy,) = rest
    assert isinstance(copy, Rejection)
    assert (copy.reason, copy.doc_id) == ("equals another chunk", "b")


def test_a_tokenizer_that_does_not_say_where_tokens_stand_is_refused() -> None:
    class Slow:
        is_fast, name_or_path = False, "slow-model"

    with pytest.raises(ValueError, match="slow-model does not say where"):
        Chunker(Slow(), 100)
