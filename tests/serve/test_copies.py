"""Copies of what is remote, which go with the last generation and process that read them."""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bixse.artifacts import Artifact, begin
from bixse.copies import copy_of, leave
from bixse.models.encoder import encoder_fingerprint, resolve
from bixse.models.settings import PACKAGED
from serve.generation import Generation
from serve.query_encoder import EncoderStore
from serve.reranker import RerankerStore
from serve.settings import ServedIndex, ServedReranker
from serve.shard import ShardStore
from tests.encoders import save_tiny_cross_encoder, save_tiny_encoder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def remote(index, other_index, cache):
    """Two indexes, each by its URL on another filesystem."""
    import fsspec

    memory = fsspec.filesystem("memory")
    urls = []
    for name, made in (("one", index), ("two", other_index)):
        memory.put(made.url, f"/{cache.name}/{name}", recursive=True)
        urls.append(f"memory://{cache.name}/{name}")
    yield urls
    memory.rm(f"/{cache.name}", recursive=True)


def generation(number: int, url: str) -> Generation:
    return Generation(number, ServedIndex.read(url), PACKAGED)


def copy_at(url: str) -> Path:
    return copy_of(Artifact.open(url, verify=False).fingerprint)


def test_a_copy_goes_with_the_last_generation_that_reads_it(remote, wait_until):
    """A new index a day would fill the disk."""
    first, second = (copy_at(url) for url in remote)
    store = ShardStore(1)
    for number, url in enumerate((remote[0], remote[0], remote[1]), start=1):
        store.load(generation(number, url))
    store.drop(1)
    store.drop(3)
    wait_until(lambda: not second.exists(), 10)
    assert first.exists()
    store.drop(2)
    wait_until(lambda: not first.exists(), 10)
    store.load(generation(4, remote[0]))
    assert store._held[4].group.shards[0].search(np.ones((1, 384), np.float32), 1)


def test_a_copy_that_another_process_reads_stays(remote, cache, wait_until):
    one = copy_at(remote[0])
    store = ShardStore(1)
    store.load(generation(1, remote[0]))
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from bixse.copies import hold, let_go; hold(sys.argv[1]);"
            "print(flush=True); input(); let_go(sys.argv[1])",
            one.name,
        ],
        env={**os.environ, "TMPDIR": str(cache)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline()
    store.drop(1)
    wait_until(lambda: not store._reads, 10)
    assert one.exists()
    holder.communicate(b"\n", timeout=30)
    assert holder.returncode == 0
    assert not one.exists(), "the last to let go removes it"


def test_what_is_no_copy_stays(index, cache, tmp_path, wait_until):
    shutil.copytree(index.url, tmp_path / "index")
    store = ShardStore(1)
    store.load(generation(1, str(tmp_path / "index")))
    store.drop(1)
    wait_until(lambda: not store._reads, 10)
    Artifact.open(str(tmp_path / "index"))


def test_a_generation_that_cannot_be_loaded_leaves_no_copy(remote, wait_until):
    import fsspec

    whole = generation(1, remote[0])
    memory, damaged = fsspec.filesystem("memory"), sorted(whole.index.shard_rows)[-1]
    for path in memory.find(remote[0].removeprefix("memory:/")):
        if f"/{damaged}/" in path:
            memory.pipe_file(path, b"damaged")
    store = ShardStore(1)
    with pytest.raises(ValueError, match="differs from its manifest"):
        store.load(whole)
    assert copy_at(remote[0]).exists()
    store.drop(1)
    wait_until(lambda: not copy_at(remote[0]).exists(), 10)


@pytest.fixture
def models(cache, monkeypatch) -> list[str]:
    """An encoder and a reranker, each by its URL on a filesystem that other processes see too."""
    monkeypatch.setenv("TMPDIR", str(cache))
    made = save_tiny_encoder(cache / "tiny"), save_tiny_cross_encoder(cache / "cross", 1)
    urls = []
    for kind, folder in zip(("encoder", "reranker"), made, strict=True):
        url = f"simplecache::file://{cache}/{kind}"
        draft = begin(f"{cache}/{kind}", kind, config={}, inputs={})
        draft.add_directory(folder)
        draft.finish(rows=0)
        urls.append(url)
    return urls


@pytest.mark.timeout(120)
def test_copies_of_models_go_with_the_last_generation_that_reads_them(index, models, wait_until):
    """A new encoder a week would fill the disk, too."""
    encoder, reranker = (copy_at(url) for url in models)
    read = ServedReranker.read(models[1])
    made_by = encoder_fingerprint(resolve(models[0]))
    leave(encoder.name)
    assert encoder.exists(), "whoever only looks at one leaves it to those who load it"
    assert reranker.exists()
    served = replace(ServedIndex.read(index.url), encoder=made_by)
    one, two = (Generation(number, served, models[0], read) for number in (1, 2))
    for store, copy in ((EncoderStore(1), encoder), (RerankerStore(1, 1024), reranker)):
        store.load(one)
        store.load(two)
        store.drop(1)
        wait_until(lambda store=store: len(store._reads) == 1, 10)
        assert copy.exists()
        store.drop(2)
        wait_until(lambda copy=copy: not copy.exists(), 20)
