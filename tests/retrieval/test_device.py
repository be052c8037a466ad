"""What goes to a GPU and what stays, with the CPU in its place; and on a GPU where there is one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest

from bixse.records import Metadata
from bixse.retrieval import metadata
from bixse.retrieval.building import build_shard
from bixse.retrieval.comparing import compare
from bixse.retrieval.device import MOST, SCRATCH_BYTES, Device, find, searchable, takes
from bixse.retrieval.filters import Filter
from bixse.retrieval.group import ShardGroup
from bixse.retrieval.library import faiss
from bixse.retrieval.settings import ON_GPU, Retrieval, Search, Structure
from bixse.retrieval.shard import INDEX_FILE, Shard
from bixse.retrieval.sources import Source, exact_hits, gather
from bixse.retrieval.structures import empty, fill, parameters, resolve, trained
from tests.retrieval.devices import StandIn
from tests.retrieval.made import artefacts, clustered, table

ROWS, DIM = 4000, 32
DOC_IDS = [f"d{n:05d}" for n in np.random.default_rng(6).permutation(ROWS)]
VECTORS = clustered(ROWS, DIM, seed=5)
VECTORS[ROWS // 2 : ROWS // 2 + 100] = VECTORS[0]
"""A hundred of them the same vector: a tie that no small `fetch` holds."""
QUERIES = np.concatenate([VECTORS[:1], clustered(20, DIM, seed=7)])
COLOURS: dict[str, Metadata] = {
    doc_id: {"colour": "red" if n % 3 else "blue"} for n, doc_id in enumerate(DOC_IDS)
}

no_gpu = pytest.mark.skipif(not faiss.get_num_gpus(), reason="FAISS sees no GPU")


def settings(structure: str) -> Retrieval:
    wanted = Retrieval.model_validate(
        {"structure": structure, "nlist": 32, "nprobe": 4, "pq_m": 16, "ef_search": 40}
    )
    return resolve(wanted, ROWS, DIM)


def built(folder: Path, structure: str, count: int = 1, device: Device | None = None) -> list[Path]:
    wanted = settings(structure)
    template = trained(wanted, VECTORS, device)
    places = []
    for number in range(count):
        place = folder / f"{structure}-{number}-of-{count}"
        place.mkdir(parents=True)
        ids, own = DOC_IDS[number::count], VECTORS[number::count]
        copy = faiss.clone_index(template)
        known = {doc_id: COLOURS[doc_id] for doc_id in ids}
        build_shard(place, table(ids), own, wanted, copy, known, {"colour": "text"}, device)
        places.append(place)
    return places


@pytest.mark.parametrize("structure", get_args(Structure))
def test_whole_vectors_are_searched_there_and_nothing_else(structure: Structure) -> None:
    assert searchable(empty(settings(structure), DIM)) == (structure in ON_GPU)


def test_what_faiss_selects_and_filters() -> None:
    assert takes(None, MOST)
    assert not takes(None, MOST + 1)
    make: Any = faiss
    lists = make.SearchParametersIVF
    assert takes(lists(nprobe=MOST), MOST)
    assert not takes(lists(nprobe=MOST + 1), 10)
    assert not takes(lists(nprobe=4), MOST + 1)
    some = faiss.IDSelectorRange(0, 5)
    assert not takes(lists(nprobe=4, sel=some), 10)
    assert not takes(make.SearchParameters(sel=some), 10)
    wide = parameters(empty(Retrieval(structure="ivf_flat", nlist=4096), DIM),
                      Search(list_rows=1.0), 1025, 10)  # fmt: skip
    assert wide.nprobe == 2050, "a large k widens"
    assert not takes(wide, 10)


@pytest.mark.parametrize("structure", get_args(Structure))
@pytest.mark.parametrize("count", [1, 3])
def test_rankings_are_those_of_the_cpu(tmp_path: Path, structure: Structure, count: int) -> None:
    places, there = built(tmp_path, structure, count), StandIn()
    on_cpu = ShardGroup([Shard.load(place) for place in places])
    on_gpu = ShardGroup([Shard.load(place, there.device) for place in places])
    for k in (1, 10, 150, 1000):
        assert on_gpu.search(QUERIES, k) == on_cpu.search(QUERIES, k)
    assert there.copies == (count if structure in ON_GPU else 0)
    assert bool(there.asked) == (structure in ON_GPU)


@pytest.mark.parametrize("structure", sorted(ON_GPU))
def test_more_than_faiss_selects_stays(tmp_path: Path, structure: str) -> None:
    (place,), there = built(tmp_path, structure), StandIn()
    on_cpu, on_gpu = Shard.load(place), Shard.load(place, there.device)
    all_lists = Search(nprobe=32)
    # 2 and a sixteenth more than k are fetched.
    assert on_gpu.search(QUERIES, 1925, all_lists) == on_cpu.search(QUERIES, 1925, all_lists)
    assert 0 < max(there.asked) <= MOST
    there.asked.clear()
    assert on_gpu.search(QUERIES, 1930, all_lists) == on_cpu.search(QUERIES, 1930, all_lists)
    assert not there.asked


@pytest.mark.parametrize("structure", sorted(ON_GPU))
@pytest.mark.parametrize("few", [0, 20_000])
def test_neighbours_are_asked_for_there_and_what_filters_keep_is_compared_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, structure: str, few: int
) -> None:
    monkeypatch.setattr(metadata, "FEW", few)
    places, there = built(tmp_path, structure, 2), StandIn()
    on_cpu = ShardGroup([Shard.load(place) for place in places])
    on_gpu = ShardGroup([Shard.load(place, there.device) for place in places])
    kept = on_gpu.kept(Filter.model_validate({"colour": "red"}).text)
    assert on_gpu.search(QUERIES, 10, kept=kept) == on_cpu.search(QUERIES, 10, kept=kept)
    assert bool(there.asked) == (structure == "ivf_flat" and not few)


@pytest.mark.parametrize("structure", get_args(Structure))
def test_the_files_are_the_same(tmp_path: Path, structure: str) -> None:
    there = StandIn()
    (here,) = built(tmp_path / "cpu", structure)
    (place,) = built(tmp_path / "gpu", structure, device=there.device)
    for file in sorted(path.name for path in here.iterdir()):
        assert (place / file).read_bytes() == (here / file).read_bytes(), file
    # k-means, and the lists of the rows.
    assert there.copies == (2 if structure.startswith("ivf") else 0)
    assert (here / INDEX_FILE).exists()


def test_a_template_is_whole_again_when_adding_fails() -> None:
    template = trained(settings("ivf_flat"), VECTORS)
    with pytest.raises(AssertionError):
        fill(template, iter([VECTORS[:5], VECTORS[:, :3]]), StandIn().device)
    template.add(VECTORS)
    assert template.ntotal == ROWS + 5


def test_the_truth_and_the_comparison_are_the_same(tmp_path: Path) -> None:
    there = StandIn()
    source = Source(*artefacts(tmp_path, DOC_IDS, VECTORS))
    gathered = gather(source, 0, 1, DIM, tmp_path)
    assert exact_hits(gathered, QUERIES, 10, there.device) == exact_hits(gathered, QUERIES, 10)
    assert there.asked
    there.asked.clear()
    wanted = Retrieval(target_recall=0.8, nlist=16)

    def compared(device: Device | None) -> list[dict[str, Any]]:
        found = compare(DOC_IDS[:1000], VECTORS[:1000], QUERIES[1:], wanted, ROWS, 10, device)
        names = ("structure", "chosen", "recall", "work")  # Milliseconds choose among equal work.
        return [{name: row[name] for name in names} for row in found]

    assert compared(there.device) == compared(None)
    assert len(there.asked) == 1, "the truth alone: what is measured is the CPU's"


def test_products_that_are_not_float32_are_refused() -> None:
    StandIn().device.check()

    def tf32(index: faiss.Index) -> faiss.Index:
        rows = index.reconstruct_n(0, index.ntotal).view(np.uint32)
        kept = ((rows + np.uint32(1 << 12)) & ~np.uint32((1 << 13) - 1)).view(np.float32)
        copy = faiss.IndexFlatIP(index.d)
        copy.add(kept)
        return copy

    with pytest.raises(ValueError, match=r"wrong by up to .*rankings need 1e-05.*TF32"):
        Device(tf32).check()


def test_no_room_is_one_sentence_and_another_failure_is_not() -> None:
    def full(index: faiss.Index) -> faiss.Index:
        raise RuntimeError("Error in virtual void* …: StandardGpuResources: alloc fail type\n…")

    index = faiss.IndexFlatIP(DIM)
    index.add(VECTORS)
    with pytest.raises(ValueError, match=r"no room for 4000 vectors of 32 numbers \(1 MB\)") as no:
        Device(full).copied(index)
    assert "\n" not in str(no.value)

    def broken(index: faiss.Index) -> faiss.Index:
        raise RuntimeError("CUDA error 700")

    with pytest.raises(RuntimeError, match="CUDA error 700"):
        Device(broken).copied(index)


def test_the_last_of_several_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    assert find() is None
    seen: list[Any] = []

    class Resources:
        def setTempMemory(self, size: int) -> None:
            seen.append(size)

        def setPinnedMemory(self, size: int) -> None:
            seen.append(size)

    def flat(resources: Resources, index: faiss.Index, config: Any) -> faiss.Index:
        seen.append(config.device)
        return faiss.clone_index(index)

    fakes = {
        "get_num_gpus": lambda: 3,
        "StandardGpuResources": Resources,
        "GpuIndexFlatConfig": SimpleNamespace,
        "GpuIndexFlat": flat,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(faiss, name, fake, raising=False)
    assert find() is not None
    assert seen == [SCRATCH_BYTES, 0, 2]


@no_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("structure", get_args(Structure))
def test_on_a_gpu(tmp_path: Path, structure: Structure) -> None:
    device = find()
    assert device is not None, "its products are float32"
    known: Any = faiss
    assert known.isGpuIndexImplemented(empty(settings(structure), DIM)) == (structure in ON_GPU)
    # Built there: as good, searched here and there alike.
    places = built(tmp_path, structure, 2, device)
    on_cpu = ShardGroup([Shard.load(place) for place in places])
    on_gpu = ShardGroup([Shard.load(place, device) for place in places])
    all_lists = Search(nprobe=32, refine_factor=16)
    for k in (1, 10, 150, 1900):
        assert on_gpu.search(QUERIES, k, all_lists) == on_cpu.search(QUERIES, k, all_lists)
    found = on_gpu.search(QUERIES, 10, Search(nprobe=8, refine_factor=16))
    same = on_cpu.search(QUERIES, 10, Search(nprobe=8, refine_factor=16))
    both = sum(
        len({hit.doc_id for hit in there} & {hit.doc_id for hit in here})
        for there, here in zip(found, same, strict=True)
    )
    assert both > 9.9 * len(QUERIES), "lists may differ where a query is as near to two"


@no_gpu
@pytest.mark.gpu
def test_the_truth_on_a_gpu(tmp_path: Path) -> None:
    gathered = gather(Source(*artefacts(tmp_path, DOC_IDS, VECTORS)), 0, 1, DIM, tmp_path)
    assert exact_hits(gathered, QUERIES, 10, find()) == exact_hits(gathered, QUERIES, 10)


@no_gpu
@pytest.mark.gpu
def test_a_gpu_that_is_full_says_so() -> None:
    device = find()
    assert device is not None
    index = faiss.IndexFlatIP(4096)
    index.add(np.zeros((16_384, 4096), np.float32))
    with pytest.raises(ValueError, match="no room"):
        _ = [device.copied(index) for _ in range(10_000)]
