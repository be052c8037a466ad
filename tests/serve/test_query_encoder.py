"""That a vector does not depend on what it is encoded with."""

import numpy as np

from serve.encoder_process import encode_now


def test_vectors_do_not_depend_on_the_company(encoder):
    texts = ["an otter", "the heron feeds " * 60, "a toad", "x", "moths " * 30]
    batch = encode_now(encoder, texts, "query")
    alone = np.concatenate([encoder.encode([text], "query") for text in texts])
    assert np.allclose(batch.vectors, alone, atol=1e-6)
    assert batch.tokens == [encode_now(encoder, [text], "query").tokens[0] for text in texts]
    assert batch.refused == {}
