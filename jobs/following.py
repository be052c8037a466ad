"""What the driver of a training run sees and says: steps done, and whether to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Count:
    """Steps done, from the first rank to the driver; and back, whether to stop."""

    def __init__(self) -> None:
        self._steps = 0
        self._stop = False

    def put(self, steps: int) -> bool:
        self._steps = steps
        return self._stop

    def stop(self) -> None:
        self._stop = True

    def get(self) -> int:
        return self._steps


@contextmanager
def follow(count: Any, advance: Any, rows: float) -> Iterator[None]:
    """Advance the bar, in rows, while the trainer holds the driver's thread."""
    import ray

    done = threading.Event()

    def poll() -> None:
        shown, last = 0, False
        while not last:
            last = done.wait(0.5)
            now = int(ray.get(count.get.remote()) * rows)
            advance(now - shown)
            shown = now

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def stop_on_sigterm(count: Any) -> Iterator[None]:
    """Let SIGTERM end training after its step, saved, and not the driver at once.

    Only the main thread hears signals: elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: count.stop.remote())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
