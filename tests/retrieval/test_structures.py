"""Every structure: what it finds; sharded equals whole; damage and bad input are refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bixse.artifacts import Artifact, ArtifactError
from bixse.place import Place
from bixse.records import Hit
from bixse.retrieval.building import build_shard
from bixse.retrieval.library import faiss
from bixse.retrieval.merge import merge
from bixse.retrieval.settings import Retrieval, Search
from bixse.retrieval.shard import Shard
from bixse.retrieval.structures import empty, resident_bytes, resolve, trained, work
from serve.shard import load_shard
from tests.artifacts import drafted
from tests.retrieval.made import clustered, table

ROWS, DIM = 4000, 32
DOC_IDS = [f"d{n:05d}" for n in np.random.default_rng(5).permutation(ROWS)]
VECTORS = clustered(ROWS, DIM, seed=1)
QUERIES = clustered(40, DIM, seed=2)
IVF = ("ivf_flat", "ivf_pq", "ivf_rabitq")
WIDE = Search(nprobe=12, refine_factor=16)


def settings(structure: str, **more: object) -> Retrieval:
    return Retrieval.model_validate({"structure": structure, "nlist": 64, "pq_m": 16, **more})


def shards_of(
    place: Path, wanted: Retrieval, count: int, template: faiss.Index | None = None
) -> list[Shard]:
    loaded = []
    for number in range(count):
        folder = place / f"{wanted.structure}-{wanted.stored}-{number}-of-{count}"
        folder.mkdir(parents=True)
        copy = None if template is None else faiss.clone_index(template)
        ids, vectors = DOC_IDS[number::count], VECTORS[number::count]
        build_shard(folder, table(ids), vectors, wanted, copy)
        loaded.append(Shard.load(folder))
    return loaded


def merged(shards: list[Shard], k: int, width: Search) -> list[list[Hit]]:
    pieces = [shard.search(QUERIES, k, width) for shard in shards]
    return [merge([piece[row] for piece in pieces], k) for row in range(len(QUERIES))]


def found_of(hits: list[list[Hit]], k: int) -> float:
    order = np.argsort(-(QUERIES @ VECTORS.T), axis=1)[:, :k]
    true = [{DOC_IDS[row] for row in rows} for rows in order]
    return float(
        np.mean([len(t & {h.doc_id for h in of}) / k for t, of in zip(true, hits, strict=True)])
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shard]:
    place = tmp_path_factory.mktemp("whole")
    return {name: shards_of(place, settings(name), 1)[0] for name in IVF}


@pytest.mark.parametrize("structure", IVF)
def test_lists_find_nearly_all_and_score_exactly(whole: dict[str, Shard], structure: str) -> None:
    hits = whole[structure].search(QUERIES, 10, WIDE)
    assert found_of(hits, 10) > 0.95
    row_of = {doc_id: row for row, doc_id in enumerate(DOC_IDS)}
    for query, of in zip(QUERIES.astype(np.float64), hits, strict=True):
        for hit in of:
            exact = float((query * VECTORS[row_of[hit.doc_id]].astype(np.float64)).sum())
            assert hit.score == np.float32(exact)


def test_every_list_and_every_candidate_is_exact(tmp_path: Path, whole: dict[str, Shard]) -> None:
    exact = shards_of(tmp_path, settings("exact"), 1)[0].search(QUERIES, 10)
    everything = Search(nprobe=64, refine_factor=ROWS)
    for structure in IVF:
        assert whole[structure].search(QUERIES, 10, everything) == exact


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("k", [1, 10, 200])
def test_sharded_lists_equal_whole_lists(tmp_path: Path, count: int, k: int) -> None:
    wanted = settings("ivf_flat")
    template = trained(resolve(wanted, ROWS, DIM), VECTORS)
    one = shards_of(tmp_path, wanted, 1, template)
    many = shards_of(tmp_path, wanted, count, template)
    for nprobe in (1, 5, 64):
        width = Search(nprobe=nprobe, list_rows=ROWS / 64)
        assert merged(many, k, width) == merged(one, k, width)


@pytest.mark.parametrize("structure", ["ivf_pq", "ivf_rabitq"])
def test_sharded_codes_find_no_less_than_whole_codes(tmp_path: Path, structure: str) -> None:
    """Each shard scores its own candidates again: together no fewer than those of the whole."""
    wanted = settings(structure)
    template = trained(resolve(wanted, ROWS, DIM), VECTORS)
    one = shards_of(tmp_path, wanted, 1, template)
    many = shards_of(tmp_path, wanted, 3, template)
    width = Search(nprobe=5, refine_factor=3)
    for whole_hits, hits in zip(merged(one, 10, width), merged(many, 10, width), strict=True):
        pairs = zip(whole_hits, hits, strict=True)
        assert all(mine.score >= its.score for its, mine in pairs)


def test_a_large_k_widens_the_search(whole: dict[str, Shard]) -> None:
    narrow, widens = Search(nprobe=1), Search(nprobe=1, list_rows=ROWS / 64)
    short = [len(hits) for hits in whole["ivf_flat"].search(QUERIES, 1000, narrow)]
    full = [len(hits) for hits in whole["ivf_flat"].search(QUERIES, 1000, widens)]
    assert max(short) < 1000
    assert min(full) == 1000


@pytest.mark.parametrize(("stored", "error"), [("float16", 2e-3), ("int8", 2e-2)])
def test_smaller_stored_vectors(tmp_path: Path, stored: str, error: float) -> None:
    shard = shards_of(tmp_path, settings("ivf_rabitq", stored=stored), 1)[0]
    hits = shard.search(QUERIES, 10, WIDE)
    assert found_of(hits, 10) > 0.9
    rows = np.arange(ROWS)
    order = np.argsort(DOC_IDS)
    assert np.abs(shard.vectors(rows) - VECTORS[order]).max() < error
    assert shard.search(shard.vectors(rows[:5]), 1, WIDE)[0][0].doc_id == "d00000"


def test_more_bits_need_fewer_candidates(tmp_path: Path, whole: dict[str, Shard]) -> None:
    finer = shards_of(tmp_path, settings("ivf_rabitq", rabitq_bits=4), 1)[0]
    width = Search(nprobe=64, refine_factor=1)
    coarse = found_of(whole["ivf_rabitq"].search(QUERIES, 20, width), 20)
    assert found_of(finer.search(QUERIES, 20, width), 20) > coarse


@pytest.mark.parametrize(
    ("asked", "rows", "sentence"),
    [
        ({"structure": "ivf_pq"}, 600, "ivf_pq needs 624 training vectors, there are 600: choose "
         "--retrieval.structure exact"),
        ({"structure": "ivf_flat", "nlist": 64}, 1000, "ivf_flat of 64 lists needs 2496 training "
         "vectors, there are 1000: choose --retrieval.nlist 25, or --retrieval.structure exact"),
        ({"structure": "ivf_rabitq", "nlist": 64, "train_rows": 1000}, 9000, "choose --retrieval."
         "nlist 25, or --retrieval.train-rows 2496 or more, or --retrieval.structure exact"),
        ({"structure": "ivf_pq", "pq_m": 7}, 9000, "--retrieval.pq-m 7 does not divide the "
         "dimension 32"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(
    asked: dict[str, object], rows: int, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        resolve(Retrieval.model_validate(asked), rows, DIM)


def test_what_is_decided_by_the_size_of_the_corpus() -> None:
    assert resolve(Retrieval(), 50_000, DIM).structure == "exact"
    assert resolve(Retrieval(), 50_001, DIM).structure == "auto"
    assert resolve(Retrieval(memory_budget_mb=1), 50_000, DIM).structure == "auto"
    assert resolve(Retrieval(), 1_000_001, DIM).shards == 2
    decided = resolve(Retrieval(structure="ivf_pq"), 1_000_000, DIM)
    assert (decided.nlist, decided.pq_m, decided.shards) == (2048, 16, 1)
    with pytest.raises(ValueError, match="auto was not decided"):
        empty(Retrieval(), DIM)


@pytest.mark.parametrize(
    ("structure", "compared"), [("hnsw", 128 * 3.0), ("ivf_flat", 128), ("ivf_pq", 8 * 4.0),
                                ("ivf_rabitq", 12 * 10.0)]
)  # fmt: skip
def test_a_byte_counts_by_how_it_is_read(structure: str, compared: float) -> None:
    """100 distances, 64 centroids of 128 bytes, 20 vectors scored again, by hand."""
    centroids = 0 if structure == "hnsw" else 64 * 128 * 0.5
    again = 2 * 20 * 128 if structure in ("ivf_pq", "ivf_rabitq") else 0
    found = work(settings(structure), DIM, ROWS, 100, Search(refine_factor=2), 10)
    assert found == 100 * compared + centroids + again


@pytest.mark.parametrize("structure", ["exact", "hnsw", *IVF])
def test_the_size_of_a_structure_is_known_before(tmp_path: Path, structure: str) -> None:
    wanted = resolve(settings(structure, hnsw_m=16, ef_construction=40), ROWS, DIM)
    shards_of(tmp_path, wanted, 1)
    size = (tmp_path / f"{structure}-float32-0-of-1" / "index.faiss").stat().st_size
    # FastScan fills its lists up to blocks of 32 rows.
    assert size == pytest.approx(resident_bytes(wanted, structure, ROWS, DIM), rel=0.3)


@pytest.mark.parametrize("structure", ["exact", "hnsw", *IVF])
def test_vectors_are_mapped_not_read(tmp_path: Path, structure: str) -> None:
    """The file changes under the loaded shard, and the shard sees it: nothing was copied."""
    shard = shards_of(tmp_path, settings(structure, hnsw_m=16, ef_construction=40), 1)[0]
    rows, before = np.arange(ROWS), shard.vectors(np.arange(ROWS))
    folder = tmp_path / f"{structure}-float32-0-of-1"
    path = folder / ("vectors.npy" if structure in ("ivf_pq", "ivf_rabitq") else "index.faiss")
    data = path.read_bytes()
    # Where the numbers of some vector stand, whatever surrounds them.
    spot = data.index(before[7].tobytes())
    with path.open("r+b") as handle:
        handle.seek(spot)
        handle.write(bytes(DIM * 4))
    assert np.flatnonzero(np.any(shard.vectors(rows) != before, axis=1)).tolist() == [7]


def _artifact(place: Path, structure: str) -> Artifact:
    draft = drafted(place, "index")
    folder = Path(draft.place.path("shard-00000"))
    folder.mkdir()
    ids = DOC_IDS[:1300]
    wanted = Retrieval(structure=structure, nlist=4 if structure in IVF else None, stored="int8")
    build_shard(folder, table(ids), VECTORS[:1300], wanted)
    return draft.finish(rows=len(ids))


@pytest.mark.parametrize("structure", ["exact", "hnsw", *IVF])
def test_any_flipped_byte_of_a_shard_is_refused(tmp_path: Path, structure: str) -> None:
    index = _artifact(tmp_path / "index", structure)
    rng = np.random.default_rng(7)
    load_shard(index.url, index.fingerprint, "shard-00000")
    assert len(index.manifest.files) == {"exact": 2, "hnsw": 3, "ivf_flat": 3}.get(structure, 5)
    for name, entry in index.manifest.files.items():
        path = Path(Place(index.url).path(name))
        whole_file = path.read_bytes()
        # Heads, where sizes and types stand, and tails; in between wherever chance falls.
        spots = {0, 4, 8, 12, entry.bytes - 1, *rng.integers(entry.bytes, size=8).tolist()}
        for spot in spots:
            flipped = bytearray(whole_file)
            flipped[spot] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            with pytest.raises(ArtifactError, match=f"{name} differs from its manifest"):
                load_shard(index.url, index.fingerprint, "shard-00000")
        path.write_bytes(whole_file[:-1])
        with pytest.raises(ArtifactError, match=f"{name} differs"):
            load_shard(index.url, index.fingerprint, "shard-00000")
        path.unlink()
        with pytest.raises(ArtifactError, match=f"{name} is missing"):
            load_shard(index.url, index.fingerprint, "shard-00000")
        path.write_bytes(whole_file)
    load_shard(index.url, index.fingerprint, "shard-00000")


FULL_DISK = """
import sys
from pathlib import Path
from bixse.retrieval.building import build_shard
from tests.retrieval.test_structures import DOC_IDS, VECTORS, settings, table
build_shard(Path(sys.argv[1]), table(DOC_IDS[:1300]), VECTORS[:1300], settings("ivf_pq", nlist=4))
"""


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    """It ended the process with SIGBUS, which Ray took for a crash and tried again."""
    mount = f"mount -t tmpfs -o size=128k none {tmp_path}"
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*alone, mount]).returncode:
        # Some kernels and containers refuse one to whoever is not root.
        pytest.skip("no small disk can be had: that takes a namespace of one's own")
    run = f'{mount} && exec "$0" -c "$1" {tmp_path}'
    done = subprocess.run(
        [*alone, run, sys.executable, FULL_DISK], capture_output=True, text=True, timeout=300
    )
    assert done.stderr.endswith("OSError: [Errno 28] No space left on device\n")
