"""Which texts are encoded together, and that it changes no vector."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serve.query_encoder import alike, encode_now


def test_short_texts_stay_together_and_a_long_one_goes_alone():
    assert alike([9] * 32, 64) == [list(range(32))]
    assert alike([9, 9, 200, 9], 64) == [[2], [0, 1, 3]]
    # One text of 10 tokens would be spared 50: less than a call.
    assert alike([60, 10], 64) == [[0, 1]]
    assert alike([], 64) == []


@given(st.lists(st.integers(1, 512), max_size=64), st.integers(0, 500))
def test_every_text_is_in_one_group_and_no_split_costs_more_than_it_spares(lengths, call):
    groups = alike(lengths, call)
    assert sorted(position for group in groups for position in group) == list(range(len(lengths)))
    cost = sum(call + len(group) * lengths[group[0]] for group in groups)
    assert cost <= call + len(lengths) * max(lengths, default=0)


def test_vectors_do_not_depend_on_the_company(encoder):
    texts = ["an otter", "the heron feeds " * 60, "a toad", "x", "moths " * 30]
    batch = encode_now(encoder, texts, "query")
    alone = np.concatenate([encoder.encode([text], "query") for text in texts])
    assert np.allclose(batch.vectors, alone, atol=1e-6)
    assert batch.tokens == [encode_now(encoder, [text], "query").tokens[0] for text in texts]
    assert batch.refused == {}
