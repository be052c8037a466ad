"""What refuses to start, and says why in one sentence."""

import asyncio
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import ray.serve
import torch

from bixse.artifacts import Artifact, ArtifactError, begin
from bixse.models.encoder import resolve
from bixse.models.settings import PACKAGED
from bixse.retrieval.library import faiss
from serve import wiring
from serve.app import build, main
from serve.generation import Generation
from serve.messages import NotHeld, Wanted
from serve.query_encoder import EncoderStore
from serve.settings import ServeArgs, ServedIndex
from serve.shard import ShardStore, load_shard, shards_by_slot, slot_name, slot_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run the command line, which must refuse before Ray starts; gives its one sentence."""

    def run(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["serve.app", *flags])
        monkeypatch.delenv("BIXSE_KEYS", raising=False)
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.fixture
def damaged(index, tmp_path):
    """A copy of the index in which one bit of one file is flipped."""

    def flip(name: str, position: int) -> str:
        url = tmp_path / "damaged"
        shutil.copytree(index.url, url)
        data = bytearray((url / name).read_bytes())
        data[position] ^= 1
        (url / name).write_bytes(data)
        return str(url)

    return flip


def test_a_missing_index(refused, tmp_path):
    url = str(tmp_path / "absent")
    sentence = refused("--index", url, "--encoder", PACKAGED)
    assert sentence == f"error: no finished artefact at {url}: manifest.json is missing"


@pytest.mark.parametrize("flags", [(), ("--plan",)])
def test_a_place_that_cannot_be_read(refused, flags, monkeypatch):
    """Each was a traceback."""
    for error in (ImportError("Install s3fs to access S3"), PermissionError("not\n yours")):

        def fails(url: str, error: Exception = error, **_: object) -> None:
            raise error

        monkeypatch.setattr(fsspec.core, "url_to_fs", fails)
        sentence = refused("--index", "s3://bucket/index", "--encoder", PACKAGED, *flags)
        assert sentence == f"error: {' '.join(str(error).split())}"


def test_an_artefact_of_another_kind(refused, tmp_path):
    draft = begin(str(tmp_path / "corpus"), "corpus", config={}, inputs={})
    assert not isinstance(draft, Artifact)
    draft.finish(rows=0)
    sentence = refused("--index", str(tmp_path / "corpus"), "--encoder", PACKAGED)
    assert "expected index" in sentence
    assert "found corpus" in sentence


def test_an_index_of_another_encoder_names_both(refused, tmp_path, corpus, vectors, make_index):
    other = make_index(tmp_path / "index", corpus, vectors, "0123456789abcdef", shards=1)
    sentence = refused("--index", other.url, "--encoder", PACKAGED)
    assert "0123456789abcdef" in sentence
    assert ServedIndex.read(other.url).encoder == "0123456789abcdef"
    with pytest.raises(ValueError, match="0123456789abcdef") as caught:
        EncoderStore(torch.get_num_threads()).load(
            Generation(1, ServedIndex.read(other.url), PACKAGED)
        )
    fingerprint = str(caught.value).split("is encoder ")[1][:32]
    assert fingerprint in sentence, "each replica checks what it loads, too"


def test_a_retrained_encoder_of_the_same_shape_is_refused(refused, index, tmp_path):
    from safetensors.numpy import load_file, save_file

    changed = tmp_path / "encoder"
    shutil.copytree(resolve(PACKAGED), changed)
    weights = load_file(changed / "model.safetensors")
    name = next(n for n in weights if weights[n].ndim == 2)
    weights[name] = weights[name] + np.float32(1e-4)
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    sentence = refused("--index", index.url, "--encoder", str(changed))
    assert index.manifest.extra["encoder"] in sentence
    assert "serve it with its own encoder" in sentence


@pytest.mark.parametrize(
    "name, position",
    [
        ("shard-00001/index.faiss", -1),
        ("shard-00000/index.faiss", 0),
        ("shard-00001/documents.arrow", 700),
        ("shard-00001/lexical/data.csc.index.npy", -1),
    ],
)
def test_one_flipped_bit_is_refused_and_the_file_named(refused, damaged, name, position):
    url = damaged(name, position)
    sentence = refused("--index", url, "--encoder", PACKAGED)
    assert f"{name} differs from its manifest" in sentence
    whole, broken = sorted(("shard-00000", "shard-00001"), key=name.startswith)
    fingerprint = ServedIndex.read(url).fingerprint
    with pytest.raises(ArtifactError, match=name):
        load_shard(url, fingerprint, broken)
    # A replica verifies its own files only.
    assert load_shard(url, fingerprint, whole)[0].size == 100


def test_a_damaged_manifest(refused, damaged):
    sentence = refused("--index", damaged("manifest.json", 40), "--encoder", PACKAGED)
    assert "manifest.json is damaged" in sentence


def test_a_replica_takes_no_other_index_than_the_one_it_was_told(index):
    with pytest.raises(ArtifactError, match=f"found {index.fingerprint}"):
        load_shard(index.url, "f" * 32, "shard-00000")
    with pytest.raises(ArtifactError, match="no shard shard-00007"):
        load_shard(index.url, index.fingerprint, "shard-00007")


@pytest.mark.parametrize("lacking", ["encoder", "dim", "shards", "shard_rows", "canary"])
def test_a_manifest_without_what_serving_needs(refused, index, tmp_path, lacking):
    extra = {k: v for k, v in index.manifest.extra.items() if k != lacking}
    draft = begin(str(tmp_path / "index"), "index", config={}, inputs={})
    assert not isinstance(draft, Artifact)
    draft.finish(rows=0, extra=extra)
    sentence = refused("--index", str(tmp_path / "index"), "--encoder", PACKAGED)
    assert f"does not say '{lacking}'" in sentence


def test_empty_shards_are_not_served_and_an_empty_index_is_refused(
    refused, tmp_path, corpus, vectors, encoder, make_index
):
    three = make_index(tmp_path / "three", corpus[:3], vectors[:3], encoder.fingerprint, shards=5)
    served = ServedIndex.read(three.url)
    assert served.shard_rows == {f"shard-{n:05d}": 1 for n in range(3)}
    for name in served.shard_rows:
        assert load_shard(three.url, three.fingerprint, name)[0].size == 1
    draft = begin(str(tmp_path / "none"), "index", config={}, inputs={})
    assert not isinstance(draft, Artifact)
    draft.finish(rows=0, extra={**three.manifest.extra, "shard_rows": [0] * 5})
    sentence = refused("--index", str(tmp_path / "none"), "--encoder", PACKAGED)
    assert sentence.endswith("holds no document")


def test_what_a_replica_raises_as_it_begins_is_the_sentence(index, monkeypatch, capsys):
    """It was a traceback of ours that named the deployment, and nowhere the reason."""
    raised = "RuntimeError: Traceback (most recent call last):\n  ...\nValueError: no room here\n"
    failed = SimpleNamespace(status="DEPLOY_FAILED", message=f"It failed 3 times. Error:\n{raised}")
    well = SimpleNamespace(status="HEALTHY", message="")
    deployments = {"Ledger": well, "shard-00000": failed}
    status = SimpleNamespace(applications={"bixse": SimpleNamespace(deployments=deployments)})
    stopped = []

    def run(*application: object, **named: object) -> None:
        raise RuntimeError("Failed to update the deployments ['shard-00000'].")

    monkeypatch.setattr(ray.serve, "start", lambda **options: None)
    monkeypatch.setattr(ray.serve, "run", run)
    monkeypatch.setattr(ray.serve, "status", lambda: status)
    monkeypatch.setattr(wiring, "start_ray", lambda args: None)
    monkeypatch.setattr(wiring, "stop", lambda: stopped.append(True))
    monkeypatch.setattr(signal, "signal", lambda *ask: None)
    flags = ["--index", index.url, "--encoder", PACKAGED, "--port", "8799"]
    monkeypatch.setattr(sys, "argv", ["serve.app", *flags])
    with pytest.raises(SystemExit) as caught:
        main()
    assert (caught.value.code, stopped) == (1, [True])
    assert capsys.readouterr().err == (
        "error: shard-00000 cannot be started: ValueError: no room here\n"
    )


@pytest.mark.parametrize("named", [False, True])
def test_a_ray_that_does_not_answer(named, index, monkeypatch, capsys):
    """It raises a bare Exception of its own node, and it was a traceback."""
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    where = f"at {address}" if named else "on this machine"

    def init(**options: object) -> None:
        raise Exception("The current node timed out\nduring startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if named:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.init", init)
    flags = ["--index", index.url, "--encoder", PACKAGED, "--port", "8799"]
    monkeypatch.setattr(sys, "argv", ["serve.app", *flags])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert said == f"error: no Ray {where}: The current node timed out during startup.\n"
    listening.close()
    if named:
        with pytest.raises(SystemExit):
            main()
        assert capsys.readouterr().err == f"error: no Ray {where}: Connection refused\n"


def test_a_port_in_use(refused, index):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        sentence = refused("--index", index.url, "--encoder", PACKAGED, "--port", port)
    assert sentence == f"error: cannot listen on 127.0.0.1 port {port}: Address already in use"


def test_a_second_haproxy_on_one_machine(refused, index, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        monkeypatch.setenv("RAY_SERVE_HAPROXY_METRICS_PORT", port)
        flags = ["--index", index.url, "--encoder", PACKAGED, "--port", "8799"]
        sentence = refused(*flags, "--profile", "fast")
    assert sentence == (
        f"error: cannot listen on 0.0.0.0 port {port}: Address already in use "
        "(HAProxy's statistics: RAY_SERVE_HAPROXY_METRICS_PORT moves them)"
    )


def test_no_keys_and_not_loopback(refused, index):
    sentence = refused("--index", index.url, "--encoder", PACKAGED, "--host", "0.0.0.0")
    assert "no keys are configured" in sentence


def test_no_encoder_there(refused, index, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    sentence = refused("--index", index.url, "--encoder", str(empty))
    assert str(empty) in sentence


def test_the_program_itself_refuses_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "serve.app", "--index", str(tmp_path), "--encoder", PACKAGED]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: no finished artefact")
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--portt", "3"], "error: Unrecognized options: --portt, 3: the nearest is --port"),
        (["--port", "abc"], "error: Error parsing --port: invalid literal for int()"),
        (["--port", "99999"], "error: --port: Input should be less than or equal to 65535, found"),
        (["--topology", "mesh"], "error: invalid choice 'mesh'"),
        (["--wrong-flag"], "error: "),
        (["--tls-key", "k"], "error: give both --tls-certificate and --tls-key, or neither"),
    ],
)
def test_a_flag_that_is_not_one(refused, flags, sentence):
    assert refused("--index", "a", "--encoder", "b", *flags).startswith(sentence)


def test_flags_are_read_before_anything_heavy():
    program = (
        "import sys; from serve.app import parse; parse(['--index', 'a', '--encoder', 'b']);"
        "print([m for m in ('ray', 'torch', 'faiss') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_serve_run_builds_from_plain_strings(index):
    args = ServeArgs.model_validate(
        {"index": index.url, "encoder": PACKAGED, "replicas_per_shard": "2", "batch_wait_ms": "0"}
    )
    assert (args.replicas_per_shard, args.batch_wait_ms) == (2, 0.0)
    assert isinstance(build(args), ray.serve.Application)
    with pytest.raises(ValueError, match="replica_per_shard"):
        ServeArgs.model_validate({"index": "", "encoder": "", "replica_per_shard": "2"})


def test_a_text_that_cannot_be_encoded_fails_alone(index, encoder):
    replica = EncoderStore(torch.get_num_threads())
    replica.load(Generation(3, ServedIndex.read(index.url), PACKAGED))
    texts = ["an otter", "half \ud800 of a pair", "a heron", "a lynx", "\udfff"]
    batch = asyncio.run(replica.encode(3, texts, "query", 60))
    assert set(batch.refused) == {1, 4}
    good = [0, 2, 3]
    assert batch.vectors[good] == pytest.approx(
        encoder.encode([texts[i] for i in good], "query"), abs=1e-5
    )
    asyncio.run(replica.check_health())


def test_a_replica_whose_time_is_over_never_begins(index, vectors):
    async def run() -> None:
        threads = faiss.omp_get_max_threads()
        shard = ShardStore(threads)
        shard.load(Generation(7, ServedIndex.read(index.url), PACKAGED))
        with pytest.raises(TimeoutError):
            await shard.search(7, vectors[:1], [Wanted(3, False)], -1.0)
        wanted = [Wanted(3, False, with_vectors=True), Wanted(1, True), Wanted(500, False)]
        some = vectors[[0, 2, 4]]
        found = await shard.search(7, some, wanted, 60)
        assert [len(f.doc_ids) for f in found] == [3, 1, 200], "of both shards"
        assert [f.documents is not None for f in found] == [False, True, False]
        assert [f.vectors is not None for f in found] == [True, False, False]
        assert found[0].vectors[0] == pytest.approx(vectors[0])
        assert found[1].documents is not None
        assert found[1].documents[0].doc_id == found[1].doc_ids[0]
        await shard.check_health()
        shard.drop(7)
        with pytest.raises(NotHeld, match="generation 7"):
            await shard.search(7, vectors[:1], [Wanted(3, False)], 60)

    asyncio.run(run())


@pytest.mark.parametrize("shards, slots", [(1, 1), (2, 2), (5, 2), (2, 5)])
def test_every_shard_has_one_slot_whatever_their_numbers(shards, slots):
    names = [f"shard-{n:05d}" for n in range(shards)]
    held = [slot_of(names, name, slots) for name in names]
    assert all(0 <= slot < slots for slot in held)
    assert len(set(held)) == min(shards, slots)
    by_slot = shards_by_slot(names, slots)
    assert sorted(name for held in by_slot.values() for name in held) == names
    assert set(by_slot) == {slot_name(slot) for slot in held}
