"""FAISS multiplies matrices with the kernels that fit the processor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bixse.retrieval.library import faiss, kernels, use_threads

LOADED = """
import json, os, threadpoolctl
from bixse.retrieval.library import faiss
found = [one for one in threadpoolctl.threadpool_info() if "faiss" in one["filepath"]]
kernels = [one["architecture"] for one in found if one["internal_api"] == "openblas"]
print(json.dumps([kernels, os.environ.get("OPENBLAS_CORETYPE")]))
"""


def loaded(**told):
    """The kernels in use after loading, and what other processes would be told."""
    known = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    done = subprocess.run(
        [sys.executable, "-c", LOADED], env=known | told, check=True, capture_output=True
    )
    return json.loads(done.stdout)


@pytest.fixture
def threads():
    """The number of threads, put back afterwards."""
    before = faiss.omp_get_max_threads()
    yield
    use_threads(before)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "fpu sse4_2 avx fma avx2 avx512f avx512cd avx512bw avx512dq avx512vl amx_bf16",
            "SkylakeX",
        ),
        ("fpu sse4_2 avx fma avx2 avx512f avx512cd avx512er avx512pf", "Haswell"),
        ("fpu sse4_2 avx fma avx2", "Haswell"),
        ("fpu sse4_2 avx", None),
    ],
)
def test_the_kernels_are_the_fastest_that_the_processor_can_run(flags, expected):
    assert kernels(f"model name\t: any\nflags\t\t: {flags}\nbugs\t\t: none\n") == expected


def test_other_processors_choose_for_themselves():
    assert kernels("Features\t: fp asimd evtstrm\n") is None
    assert kernels("") is None


def test_openblas_takes_them_and_nobody_else_is_told():
    cpuinfo = Path("/proc/cpuinfo")
    expected = kernels(cpuinfo.read_text()) if cpuinfo.exists() else None
    if expected is None:
        pytest.skip("this processor chooses for itself")
    used, told = loaded()
    if not used:
        pytest.skip("this FAISS was not built with OpenBLAS")
    assert (used, told) == ([expected], None)


def test_who_has_chosen_kernels_keeps_them():
    used, told = loaded(OPENBLAS_CORETYPE="Nehalem")
    assert told == "Nehalem"
    assert used in ([], ["Nehalem"])


@pytest.mark.parametrize(("count", "multiplied"), [(1, True), (64, False)])
@pytest.mark.usefixtures("threads")
def test_a_batch_finds_what_its_queries_find_alone(count, multiplied):
    use_threads(count)
    assert faiss.omp_get_max_threads() == count
    rng = np.random.default_rng(0)
    index = faiss.IndexFlatIP(32)
    index.add(rng.normal(size=(500, 32)).astype(np.float32))
    queries_QD = rng.normal(size=(400, 32)).astype(np.float32)
    assert (faiss.cvar.distance_compute_blas_threshold <= queries_QD.size) == multiplied
    scores_QK, rows_QK = index.search(queries_QD, 5)
    for query, (scores, rows) in enumerate(zip(scores_QK, rows_QK, strict=True)):
        (alone,), (own,) = index.search(queries_QD[query : query + 1], 5)
        assert rows.tolist() == own.tolist()
        np.testing.assert_allclose(scores, alone, rtol=1e-5, atol=1e-5)
