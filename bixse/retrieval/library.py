"""FAISS, loaded so that it multiplies matrices with all that the processor can do.

Whoever compares a batch of queries with all vectors, with the centroids of an inverted file, or
clusters, multiplies matrices. The wheels of FAISS bring an OpenBLAS of 2021 (0.3.15 in faiss-cpu
1.15.1), which takes processors made since for some without AVX, and FAISS asks it only where
queries times dimensions come to 128,000, a number found for tens of threads
(github.com/facebookresearch/faiss/pull/5022 and 5109). `benchmarks.matrices` measures what both
cost.

Take `faiss` from here: OpenBLAS looks once, when it is loaded.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["faiss", "give_back_memory", "kernels", "use_threads"]

_CORE_TYPE = "OPENBLAS_CORETYPE"
_KERNELS = {
    "SkylakeX": {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"},
    "Haswell": {"avx2", "fma"},
}
"""OpenBLAS's kernels and the instructions that they need, the faster first."""

_WORTHWHILE = 1000
"""Queries times dimensions for each thread from which products of matrices are the faster: with 384
dimensions and one thread, three queries. The pull request 5109 found 800 with MKL."""


def kernels(cpuinfo: str) -> str | None:
    """The name of the fastest kernels for a processor, None where its own choice is to stand.

    `cpuinfo` is the text of /proc/cpuinfo; only that of x86 has a line `flags`.
    """
    found = [line.split() for line in cpuinfo.splitlines() if line.startswith("flags")]
    flags = set(found[0]) if found else set()
    return next((name for name, needed in _KERNELS.items() if needed <= flags), None)


@contextmanager
def _told() -> Iterator[None]:
    """OpenBLAS is told its kernels while it is loaded, and other processes are not."""
    cpuinfo = Path("/proc/cpuinfo")
    name = kernels(cpuinfo.read_text()) if cpuinfo.exists() else None
    if name is None or _CORE_TYPE in os.environ:
        yield
        return
    os.environ[_CORE_TYPE] = name
    try:
        yield
    finally:
        del os.environ[_CORE_TYPE]


with _told():
    import faiss


def use_threads(threads: int) -> None:
    """Let FAISS compute on so many threads when called from this one.

    OpenMP keeps the number by thread; when to multiply matrices follows it, in the whole process.
    """
    faiss.omp_set_num_threads(threads)
    faiss.cvar.distance_compute_blas_threshold = _WORTHWHILE * threads


def give_back_memory() -> None:
    """Let the system have what FAISS has let go of, which glibc would keep; another C library is
    not asked.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


use_threads(faiss.omp_get_max_threads())
