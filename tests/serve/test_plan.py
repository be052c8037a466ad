"""What serving will take, against the files that it will load."""

import json
import sys

import pytest

from bixse.models.encoder import resolve
from bixse.models.settings import PACKAGED
from bixse.retrieval.settings import Retrieval
from serve.app import main
from serve.plan import as_text, plan
from serve.settings import ServeArgs
from tests.serve.conftest import documents, index_of


def planned(index, **flags):
    args = ServeArgs.model_validate({"index": index.url, "encoder": PACKAGED, **flags})
    return plan(args, resolve(PACKAGED))


def test_memory_follows_the_files(index):
    whole = planned(index, topology="replicate", replicas=3)
    (replica,) = whole.parts
    parts = planned(index).parts
    assert [part.name for part in parts] == ["gateway", "encoder", "shard-00000", "shard-00001"]
    nothing = parts[0].bytes
    held = sum(part.bytes - nothing for part in parts)
    assert replica.bytes - nothing == held
    # 200 vectors of 384 float32, some words, MiniLM's weights, and the process that holds them.
    assert held == pytest.approx(200 * 384 * 4 + 90.9e6 + (700 << 20), rel=0.001)
    assert replica.changing_bytes - nothing == 3 * held
    assert replica.replicas == 3
    assert whole.documents == 200


def test_codes_of_several_shards_are_merged_beside_themselves(vectors, encoder, tmp_path):
    """One process holds them all; of a process a shard nothing is merged."""
    settings = Retrieval(structure="ivf_pq", nlist=4, pq_m=192)
    coded = index_of(tmp_path / "coded", documents(), vectors, encoder.fingerprint, 3,
                     settings=settings)  # fmt: skip
    gateway, encoder_, *shards = planned(coded).parts
    nothing = gateway.bytes
    codes = sum(part.bytes - nothing for part in shards)
    (replica,) = planned(coded, topology="replicate").parts
    held = replica.bytes - nothing
    assert held == codes + encoder_.bytes - nothing
    assert replica.changing_bytes - nothing == 3 * held + codes
    assert [part.changing_bytes - nothing for part in shards] == [
        3 * (part.bytes - nothing) for part in shards
    ]


def test_the_words_of_bm25_are_held_in_memory(index):
    """They were counted as mapped: of a million words 150 MB a shard and generation were not."""
    files = {name: entry.bytes for name, entry in index.manifest.files.items()}
    gateway, _, shard, _ = planned(index).parts
    words = files["shard-00000/lexical/vocab.index.json"]
    vectors = files["shard-00000/index.faiss"]
    assert shard.bytes - gateway.bytes == vectors + 8 * words
    of_shard = sum(size for name, size in files.items() if name.startswith("shard-00000/"))
    assert shard.mapped_bytes == of_shard - vectors - words
    text = json.dumps({f"word{number:x}": number for number in range(100_000)})
    held = json.loads(text)
    size = sys.getsizeof(held) + sum(sys.getsizeof(one) for pair in held.items() for one in pair)
    assert 8 * len(text) == pytest.approx(size, rel=0.3)


def test_weights_of_either_format_are_counted_once(index, tmp_path):
    """Those in `pytorch_model.bin` were none."""

    def held() -> int:
        args = ServeArgs.model_validate({"index": index.url, "encoder": str(tmp_path)})
        return next(part.bytes for part in plan(args, tmp_path).parts if part.name == "encoder")

    nothing = held()
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense" / "pytorch_model.bin").write_bytes(bytes(30))
    for number in (1, 2):
        path = tmp_path / f"pytorch_model-0000{number}-of-00002.bin"
        path.write_bytes(bytes(1000))
    # What training leaves beside them is not loaded.
    (tmp_path / "training_args.bin").write_bytes(bytes(7))
    assert held() - nothing == 2030
    (tmp_path / "model.safetensors").write_bytes(bytes(1500))
    assert held() - nothing == 1530


def test_what_a_lost_node_costs(index):
    assert "67% of the rate" in planned(index, topology="replicate", replicas=3).losses[0]
    assert "nothing answers" in planned(index, topology="replicate").losses[0]
    alone = " ".join(planned(index).losses)
    assert "falls by up to 50%" in alone
    assert "losing the encoder's node" in alone
    spread = " ".join(planned(index, replicas_per_shard=2, encoder_replicas=2).losses)
    assert "full coverage" in spread
    assert "encoder's node" not in spread


def test_the_rate_is_that_of_the_cores_asked_for(vectors, encoder, tmp_path):
    """Milliseconds of one search were said, and no rate."""
    measured = index_of(tmp_path / "index", documents(), vectors, encoder.fingerprint, 2,
                        latency_ms=0.5)  # fmt: skip
    assert planned(measured).search_per_s == 2_000
    assert planned(measured, replicas_per_shard=3, shard_cpus=2).search_per_s == 12_000
    replicas = {"topology": "replicate", "replicas": 3}
    assert planned(measured, **replicas).search_per_s == 3_000
    assert "0.5 ms a shard on one core when the index was built, so about 2,000 queries/s" in (
        as_text(planned(measured))
    )
    # On a GPU it takes another time, which nobody has measured.
    assert planned(measured, shard_gpus=1).search_per_s is None


def test_a_reranker_may_be_changed_too(index, reranker):
    """It was planned as one for ever, and `/admin/generation` loads another beside it."""
    flags = {"index": index.url, "encoder": PACKAGED, "reranker": str(reranker)}
    args = ServeArgs.model_validate({**flags, "topology": "replicate", "reranker_gpus": 0.5})
    whole = plan(args, resolve(PACKAGED), reranker)
    assert [part.name for part in whole.parts] == ["replica", "reranker"]
    part = whole.parts[1]
    weights = (reranker / "model.safetensors").stat().st_size
    assert part.bytes == (700 << 20) + weights
    assert part.changing_bytes == (700 << 20) + 3 * weights
    assert "0.5 GPU" in as_text(whole)
    assert "losing the reranker's node" in whole.losses[-1]


def test_plan_starts_nothing_and_prints(index, monkeypatch, capsys):
    flags = ["--index", index.url, "--encoder", PACKAGED, "--plan"]
    monkeypatch.setattr(sys, "argv", ["serve.app", *flags])
    main()
    out = capsys.readouterr().out
    assert out.startswith("200 documents\n1 x gateway")
    assert "in all:" in out
