"""One maker at a time: a lock (`flock`) on a directory, until it is released or the process ends.

A filesystem that is not local has no such locks, nor have some that look local (NFS): there nothing
refuses the second.
"""

import fcntl
import os

from bixse.place import Place


class Locked(Exception):
    """Another process holds the lock of a directory."""


_held: dict[str, int] = {}
"""Open directories of what this process is making, by path."""


def lock(place: Place) -> bool:
    """Let no other process make what stands here; whether this one did not hold the lock already.

    Raises Locked while another does.
    """
    if not place.is_local:
        return False
    path = os.path.realpath(place.path(""))
    before = _held.get(path)
    if before is not None and _is_at(before, path):
        return False
    os.makedirs(path, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Locked(place.url) from None
    except OSError:  # A filesystem without such locks.
        os.close(descriptor)
        return False
    if before is not None:  # Of a directory that has been removed since.
        os.close(before)
    _held[path] = descriptor
    return True


def unlock(place: Place) -> None:
    """Let others make what stands here."""
    if place.is_local:
        descriptor = _held.pop(os.path.realpath(place.path("")), None)
        if descriptor is not None:
            os.close(descriptor)


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
