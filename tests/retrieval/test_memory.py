"""What codes take when the lists of several shards are merged."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bixse.retrieval.library import faiss

DIM, LISTS, ROWS, SHARDS = 64, 16, 160_000, 4

# In a process of its own, since what another test has let go of would be filled again.
MERGE = """
import sys
from pathlib import Path
from bixse.retrieval.finder import Finder
from bixse.retrieval.stored import Stored
from bixse.retrieval.structures import read_index

def held():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

before = held()
places = sorted(Path(sys.argv[1]).iterdir())
finders = [Finder(read_index(place), stored=Stored([])) for place in places]
loaded = held() - before
merged = Finder.together(finders)
print(merged.size, loaded, held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_merged_codes_take_no_more_memory_than_before(tmp_path: Path) -> None:
    """The C library kept what lists had let go of when they moved: nearly as much again."""
    vectors = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    kind = f"RR{DIM},IVF{LISTS},RaBitQfs"
    template = faiss.index_factory(DIM, kind, faiss.METRIC_INNER_PRODUCT)
    template.train(vectors[:5000])
    for shard in range(SHARDS):
        index = faiss.clone_index(template)
        index.add(np.ascontiguousarray(vectors[shard::SHARDS]))
        faiss.write_index(index, str(tmp_path / f"{shard}"))
    command = [sys.executable, "-c", MERGE, str(tmp_path)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    rows, loaded, merged = map(int, found.stdout.split())
    assert rows == ROWS
    assert merged < 1.3 * loaded
