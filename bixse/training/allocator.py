"""The environment of a process that trains on a CPU."""

from collections.abc import Mapping

CPU_ALLOCATOR: Mapping[str, str] = {
    # One heap for all threads, that is never given back: a freed activation is used again. glibc
    # would map every tensor above 32 MB afresh and fault its pages in, step after step: 22 ms for
    # the 47 MB of a MiniLM embedding's gradient, against 3. Other C libraries ignore these.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""Read by the C library when a process starts."""
