"""What was being asked when a worker died, so that a pair that kills whoever reads it is found.

A worker notes a unit before it asks and takes the note away once it has the answers. Whoever finds
one has a predecessor that died: it asks the unit's pairs one at a time, each with a note of its
own, and a pair that was being asked by itself at `DEATHS` deaths is rejected. Notes are empty files
beside the judgments, so that a rerun knows them too. A job that is told to stop takes them along:
its workers die of that.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bixse.judging.asked import Asked
from bixse.place import Place
from bixse.records import Rejection, ids_hash

DEATHS = 2
"""A unit is noted at the first death, its pairs at the next two: as many as a worker has restarts
(`jobs.parts.RESTARTS`). One death may have another cause."""


@contextmanager
def unblamed(place: Place) -> Iterator[None]:
    """Around a job, in its driver: whoever interrupts it kills workers that no pair has killed."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        # A worker that is still alive may be writing a note.
        with contextlib.suppress(OSError):
            place.clear()
        raise


class Trying:
    """The notes of a job's workers. Called by several threads."""

    def __init__(self, url: str) -> None:
        self._place = Place(url)
        # With two pairs asked at once it would not be known which of them was fatal.
        self._alone = threading.Lock()

    @contextmanager
    def unit(self, asked: Sequence[Asked]) -> Iterator[bool]:
        """Around the asking of some pairs: whether a worker has died of them, or beside them."""
        name = f"unit-{ids_hash(map(_key, asked))}"
        died = self._place.exists(name)
        self._place.write(name, b"")
        try:
            yield died
        finally:
            self._place.remove(name)

    @contextmanager
    def pair(self, pair: Asked) -> Iterator[Rejection | None]:
        """Around the asking of one pair, no other beside it; a rejection where it must not be."""
        with self._alone:
            name = f"pair-{ids_hash([_key(pair)])}"
            deaths = sum(self._place.exists(f"{name}-{number}") for number in range(DEATHS))
            if deaths == DEATHS:
                yield _fatal(pair)
                return
            self._place.write(f"{name}-{deaths}", b"")
            try:
                yield None
            finally:
                self._place.remove(f"{name}-{deaths}")


def _key(pair: Asked) -> str:
    return f"{pair.query_id}\t{pair.doc_id}"


def _fatal(pair: Asked) -> Rejection:
    reason = f"the judge died {DEATHS} times while it was asked this pair alone"
    return Rejection(reason, query_id=pair.query_id, doc_id=pair.doc_id)
