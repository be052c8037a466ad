"""How a program that starts Ray ends: with its own status.

Threads of Ray's outlive its shutdown, and C++ aborts a process that destroys one as it leaves:
status 134 on a loaded machine (LOG.md, 2026-11-28), after all was done and said. Such a program is
left without destroying anything, once every exit function of Python has run.
"""

import atexit
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def own_status() -> Iterator[None]:
    """Around all that a program does; changes nothing for one that imports no Ray meanwhile, nor
    for an exception, whose traceback Python gives.
    """
    before, statuses = "ray" in sys.modules, list[int]()
    # Exit functions run last registered first, and Ray registers its own when it is imported.
    atexit.register(_leave, statuses)
    status: int | None = None
    try:
        yield
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else None
        raise
    finally:
        if status is not None and "ray" in sys.modules and not before:
            statuses.append(status)


def _leave(statuses: list[int]) -> None:
    if statuses:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(statuses[0])
