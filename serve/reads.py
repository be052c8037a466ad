"""Which copies of remote artefacts the generations of a replica read (`bixse.copies`)."""

import threading

from bixse.copies import let_go


class Reads:
    """By generation, the fingerprint of the artefact that it reads here, a copy or not."""

    def __init__(self) -> None:
        self._of: dict[int, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Generations that read one: those that are being loaded, too."""
        return len(self._of)

    def begin(self, number: int, fingerprint: str) -> None:
        """Before or after it is copied; the copy stays until `end`."""
        with self._lock:
            self._of[number] = fingerprint

    def end(self, number: int) -> None:
        """Remove the copy, some time later, unless another generation here or another process reads
        it.
        """
        # Removing large files takes a while, and requests are answered on this thread.
        threading.Thread(target=self._let_go, args=(number,), name="copies").start()

    def _let_go(self, number: int) -> None:
        with self._lock:
            fingerprint = self._of.pop(number, None)
            if fingerprint is not None and fingerprint not in self._of.values():
                let_go(fingerprint)
