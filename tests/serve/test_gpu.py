"""Shards on a GPU: who asks for one, what is searched there, and what is said where that fails."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

import serve.shard
from bixse.artifacts import begin
from bixse.models.encoder import resolve
from bixse.models.settings import PACKAGED
from bixse.retrieval.building import build_shard
from bixse.retrieval.device import SCRATCH_BYTES, Device
from bixse.retrieval.library import faiss
from bixse.retrieval.settings import Retrieval
from serve.generation import Generation
from serve.messages import Wanted
from serve.plan import as_text, plan
from serve.settings import ServeArgs, ServedIndex
from serve.shard import ShardStore
from serve.wiring import build, start_ray
from tests.retrieval.devices import StandIn
from tests.retrieval.made import clustered, table


def args(index, **flags) -> ServeArgs:
    return ServeArgs.model_validate({"index": index.url, "encoder": PACKAGED, **flags})


def deployments(application) -> dict[str, Any]:
    """Every deployment below an application, by name."""
    found = {}
    todo = [application._bound_deployment]
    while todo:
        one = todo.pop()
        found[one.name] = one
        for given in (*one.init_args, *one.init_kwargs.values()):
            for each in given if isinstance(given, list) else [given]:
                if hasattr(each, "_bound_deployment"):
                    todo.append(each._bound_deployment)
    return found


def test_each_shard_asks_for_its_gpus(index):
    made = deployments(build(args(index, shard_gpus=0.5)))
    gpus = {name: one.ray_actor_options.get("num_gpus", 0) for name, one in made.items()}
    assert {name: count for name, count in gpus.items() if count} == {
        "shard-00000": 0.5,
        "shard-00001": 0.5,
    }
    assert made["shard-00000"].init_args[-1] is True
    without = deployments(build(args(index)))
    assert not any(one.ray_actor_options.get("num_gpus") for one in without.values())
    assert without["shard-00000"].init_args[-1] is False


def test_a_replica_asks_for_those_of_both(index):
    flags = {"topology": "replicate", "encoder_gpus": 0.5, "shard_gpus": 0.25}
    (replica,) = (one for name, one in deployments(build(args(index, **flags))).items()
                  if name == "Replica")  # fmt: skip
    assert replica.ray_actor_options["num_gpus"] == 0.75


def test_answers_are_those_of_the_cpu(index, vectors, monkeypatch):
    there = StandIn()
    monkeypatch.setattr(serve.shard, "find", lambda: there.device)

    async def found(on_gpu: bool):
        store = ShardStore(1, on_gpu=on_gpu)
        store.load(Generation(3, ServedIndex.read(index.url), PACKAGED))
        await store.check_health()
        return await store.search(3, vectors[:7], [Wanted(10, True)] * 7, 60)

    assert asyncio.run(found(True)) == asyncio.run(found(False))
    assert there.copies == 2
    assert there.asked


def test_no_gpu_where_one_is_asked_for_is_refused(index, monkeypatch):
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    store = ShardStore(1, on_gpu=True)
    with pytest.raises(ValueError, match="--shard-gpus asks for a GPU and FAISS sees none"):
        store.load(Generation(3, ServedIndex.read(index.url), PACKAGED))


def test_gpus_that_this_machine_lacks_are_not_waited_for(index, monkeypatch):
    """The program said nothing and was never ready."""
    found, stopped = {"CPU": 8.0, "GPU": 1.0}, []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: found)
    monkeypatch.setattr(ray, "shutdown", lambda: stopped.append(True))
    start_ray(args(index, shard_gpus=0.5))
    start_ray(args(index, topology="replicate", replicas=2, encoder_gpus=0.25, shard_gpus=0.25))
    assert not stopped
    for flags in ({"shard_gpus": 0.5, "encoder_gpus": 0.25}, {"shard_gpus": 1}):
        with pytest.raises(ValueError, match=r"the replicas ask for \S+ GPUs and Ray finds 1 here"):
            start_ray(args(index, **flags))
    assert stopped == [True, True]


def test_a_full_gpu_is_refused_and_what_is_served_goes_on(index, vectors, monkeypatch):
    there = StandIn()
    monkeypatch.setattr(serve.shard, "find", lambda: there.device)

    def full(index: faiss.Index) -> faiss.Index:
        raise RuntimeError("StandardGpuResources: alloc fail")

    async def run() -> None:
        store = ShardStore(1, on_gpu=True)
        served = ServedIndex.read(index.url)
        store.load(Generation(1, served, PACKAGED))
        monkeypatch.setattr(serve.shard, "find", lambda: Device(full))
        with pytest.raises(ValueError, match="the GPU has no room for 100 vectors"):
            store.load(Generation(2, served, PACKAGED))
        (found,) = await store.search(1, vectors[:1], [Wanted(3, False)], 60)
        assert len(found.doc_ids) == 3

    asyncio.run(run())


def hnsw(place: Path):
    """An index that no GPU searches."""
    draft = begin(str(place / "hnsw"), "index", config={}, inputs={})
    folder = Path(draft.place.path("shard-00000"))
    folder.mkdir(parents=True)
    ids = [f"d{n}" for n in range(50)]
    documents: pa.Table = table(ids)
    build_shard(folder, documents, clustered(50, 8, seed=1), Retrieval(structure="hnsw"))
    extra = {"encoder": "e", "dim": 8, "shards": ["shard-00000"], "shard_rows": [50]}
    extra |= {"canary": {"query": "q", "doc_id": "d0", "score": 1.0}, "structure": "hnsw"}
    return draft.finish(rows=50, extra=extra)


def test_what_stays_on_the_cpu_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(serve.shard, "find", lambda: StandIn().device)
    made = hnsw(tmp_path)
    with caplog.at_level(logging.WARNING, "bixse"):
        store = ShardStore(1, on_gpu=True)
        store.load(Generation(1, ServedIndex.read(made.url), PACKAGED))
    assert "shard-00000 on the CPU: FAISS searches no IndexHNSWFlat on a GPU" in caplog.text
    planned = plan(args(made, shard_gpus=1), resolve(PACKAGED))
    assert "--shard-gpus does nothing for hnsw" in as_text(planned)
    assert not any(part.gpu_bytes for part in planned.parts)


def test_the_plan_counts_what_is_copied(index):
    planned = plan(args(index, shard_gpus=0.5), resolve(PACKAGED))
    by_name = {part.name: part for part in planned.parts}
    files = index.manifest.files
    for name in ("shard-00000", "shard-00001"):
        # Current, previous and candidate, each with scratch of its own.
        assert by_name[name].gpu_bytes == 3 * (SCRATCH_BYTES + files[f"{name}/index.faiss"].bytes)
        assert by_name[name].gpus == 0.5
    assert by_name["encoder"].gpu_bytes == 0
    assert "x shard-00000: 1 CPU, 0.5 GPU (0.75 GiB of it for shards), " in as_text(planned)
    whole = plan(args(index, topology="replicate", shard_gpus=1), resolve(PACKAGED)).parts[0]
    assert whole.gpus == 1
    assert whole.gpu_bytes > 3 * SCRATCH_BYTES
    assert "GPU" not in as_text(plan(args(index), resolve(PACKAGED)))
