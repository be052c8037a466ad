"""Copies of remote artefacts on this machine, shared by all processes of a user.

Who uses a copy holds a lock on it with others (`flock`), which ends with the process. Who lets go
of it removes it if it then gets the lock alone: never under a process that reads it, or that has
found it there and is about to. A process that just ends leaves its copies to the next.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from pathlib import Path

_lock = threading.Lock()
_held: dict[Path, int] = {}
"""Open lock files, by copy."""


def copies() -> Path:
    """This user's directory, on this machine, of what is copied or made once for all processes.

    Raises ValueError when it is another user's, who could change what is read from it.
    """
    folder = Path(tempfile.gettempdir()) / f"bixse-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Of a link itself, not of what it points to.
    if folder.lstat().st_uid != os.getuid():
        raise ValueError(f"{folder} is another user's: remove it, or set TMPDIR")
    return folder


def copy_of(fingerprint: str) -> Path:
    """Where the copy of an artefact stands, if there is one."""
    return copies() / fingerprint


def hold(fingerprint: str) -> Path:
    """Keep the copy of an artefact, now or once it is made, until this process lets go or ends."""
    folder = copy_of(fingerprint)
    with _lock:
        if folder not in _held:
            # Where the filesystem has no locks a copy is never known to be in use, nor removed.
            with contextlib.suppress(OSError):
                _held[folder] = _locked(folder, fcntl.LOCK_SH)
    return folder


def leave(fingerprint: str) -> None:
    """Hold a copy no longer, and leave it for those who are about to read it."""
    with _lock:
        if (descriptor := _held.pop(copy_of(fingerprint), None)) is not None:
            os.close(descriptor)


def let_go(fingerprint: str) -> None:
    """Remove a copy that this process has held, unless another holds it; else do nothing."""
    folder = copy_of(fingerprint)
    with _lock:
        if folder not in _held:
            return
        # Before asking for it alone: of several that let go at once, the last must get it.
        os.close(_held.pop(folder))
        with contextlib.suppress(OSError):
            alone = _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(alone)


def _locked(folder: Path, how: int) -> int:
    """The lock file of a copy, which stays when that goes. Raises OSError."""
    descriptor = os.open(f"{folder}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, how)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
