"""A directory on any filesystem: the few operations that artefacts need of one.

Files are written atomically: locally by rename after fsync, on object stores by a single put.
"""

import contextlib
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec

from bixse.settings import Settings

_ASIDE = re.compile(r"\.[0-9a-f]{8}\.tmp$")
"""How a name ends that `_aside` gives."""

T = TypeVar("T")

_AT_ONCE = 8
"""Files that are read together, a megabyte of each in memory."""


class FileEntry(Settings):
    """What a manifest knows of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Place:
    """A directory by its path or fsspec URL; it need not exist."""

    url: str

    @cached_property
    def _resolved(self) -> tuple[Any, str]:
        # A remembered listing says that what another process has written since is not there.
        fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        return fs, root.rstrip("/")

    @property
    def is_local(self) -> bool:
        return "file" in _protocols(self._resolved[0])

    def path(self, name: str) -> str:
        """The filesystem's own path of `name`; on a local place an ordinary path."""
        return f"{self._resolved[1]}/{name}"

    def exists(self, name: str) -> bool:
        return bool(self._resolved[0].exists(self.path(name)))

    def read(self, name: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError."""
        return bytes(self._resolved[0].cat_file(self.path(name)))

    def open(self, name: str) -> IO[bytes]:
        """A seekable reader."""
        handle: IO[bytes] = self._resolved[0].open(self.path(name), "rb")
        return handle

    def write(self, name: str, data: bytes) -> None:
        """All of the file or none of it."""
        fs, path = self._resolved[0], self.path(name)
        if not self.is_local:
            fs.pipe_file(path, data)
            return
        with _aside(path) as aside:
            Path(aside).write_bytes(data)

    def put(self, local: Path, name: str) -> None:
        """Copy a local file in, atomically, without holding it in memory."""
        fs, path = self._resolved[0], self.path(name)
        if not self.is_local:
            fs.put_file(str(local), path)
            return
        with _aside(path) as aside:
            shutil.copyfile(local, aside)

    def get(self, name: str, local: Path) -> None:
        """Copy a file out, atomically, without holding it in memory. Raises FileNotFoundError."""
        with _aside(str(local)) as aside:
            self._resolved[0].get_file(self.path(name), aside)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.exists(name):
            self._resolved[0].rm_file(self.path(name))

    def clear(self) -> None:
        """Remove the directory with all that is in it, if it is there."""
        fs, root = self._resolved
        if fs.exists(root):
            fs.rm(root, recursive=True)

    def names(self) -> list[str]:
        """All files below, relative and sorted; leftovers of killed writers are not files."""
        fs, root = self._resolved
        if not fs.exists(root):
            return []
        found = (path[len(root) + 1 :] for path in fs.find(root))
        return sorted(name for name in found if not name.endswith(".tmp"))

    def tidy(self, older_than_s: float = 0.0) -> None:
        """Remove the leftovers of killed writers, which only local places have: for one whose
        writers are all done, or have been at none for so long."""
        fs, root = self._resolved
        if self.is_local and fs.exists(root):
            before = time.time() - older_than_s
            for path in fs.find(root):
                if _ASIDE.search(path):
                    # Its writer may be done with it meanwhile.
                    with contextlib.suppress(FileNotFoundError):
                        if not older_than_s or os.stat(path).st_mtime < before:
                            os.unlink(path)

    def entry(self, name: str) -> FileEntry:
        """sha256 and size, read in pieces."""
        digest, size = hashlib.sha256(), 0
        with self.open(name) as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
                size += len(block)
        return FileEntry(sha256=digest.hexdigest(), bytes=size)

    def entries(self, names: Sequence[str]) -> Iterator[FileEntry | None]:
        """`entry` of each file in order, None where it is missing; several at a time."""
        return several(self._entry, names)

    def _entry(self, name: str) -> FileEntry | None:
        try:
            return self.entry(name)
        except FileNotFoundError:
            return None


def several(work: Callable[[str], T], names: Sequence[str]) -> Iterator[T]:
    """What `work` makes of each name, in order, several at a time.

    Of thousands of small files elsewhere each would wait for the one before.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            yield from pool.map(work, names)
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _aside(path: str) -> Iterator[str]:
    """A name to write to; the file becomes `path` when it is on the disk, or is gone."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    aside = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield aside
        with open(aside, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(aside, path)
    except BaseException:
        if os.path.exists(aside):
            os.unlink(aside)
        raise


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
