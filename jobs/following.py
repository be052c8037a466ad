"""What the driver of a training run sees and says: how it goes, and whether to stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bixse.training.seen import Seen


class Count:
    """How it goes, from the first rank to the driver; and back, whether to stop."""

    def __init__(self) -> None:
        self._fresh: list[Seen] = []
        self._stop = False

    def put(self, seen: "Seen") -> bool:
        self._fresh.append(seen)
        return self._stop

    def stop(self) -> None:
        self._stop = True

    def take(self) -> "list[Seen]":
        """All since it was last asked, in order."""
        fresh, self._fresh = self._fresh, []
        return fresh


class Note:
    """What the bar says beside rows, rate and time left."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self) -> str:
        return self.text


def note_of(seen: "Seen") -> str:
    """`loss 0.031, 0.012 over labels, 812 pairs/s, dev nDCG@10 0.412 (best 0.431 at 200)`."""
    said = []
    if seen.lines:
        line = seen.lines[-1]
        said.append(f"loss {line['loss']:.4g}")
        # A language model's answers have no floor, and are no pairs.
        said += [f"{line['excess']:.4g} over labels"] if "excess" in line else []
        if "pairs" in line:
            said.append(f"{line['pairs'] / line['seconds']:,.0f} pairs/s")
    if seen.dev:
        step, best = max(seen.dev, key=lambda found: (found[1], -found[0]))
        said.append(f"dev nDCG@10 {seen.dev[-1][1]:.3f} (best {best:.3f} at {step})")
    return ", ".join(said)


@contextmanager
def follow(
    count: Any,
    advance: Any,
    rows: float,
    note: Note,
    tell: "Callable[[Seen], None]" = lambda _: None,
) -> Iterator[None]:
    """Advance the bar, in rows, and its note, while the trainer holds the driver's thread; `tell`
    is given all that is seen.
    """
    import ray

    done = threading.Event()

    def poll() -> None:
        shown, last = 0, False
        while not last:
            last = done.wait(0.5)
            for seen in ray.get(count.take.remote()):
                now, note.text = int(seen.steps * rows), note_of(seen)
                advance(now - shown)
                shown = now
                tell(seen)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Ended(SystemExit):
    """A signal ended training, with its steps saved; `status` is for the shell."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


@contextmanager
def stop_on_signals(count: Any) -> Iterator[list[int]]:
    """Let SIGTERM or Ctrl-C end training after its step, saved, and not the driver at once; gives
    the signals that were heard. A second Ctrl-C interrupts.

    Only the main thread hears signals: elsewhere nothing changes. Nor does it for a signal that is
    ignored, as Ctrl-C is by what a script has put into the background.
    """
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: handler for number, handler in found.items() if handler != signal.SIG_IGN}

    def stop(number: int, _: object) -> None:
        heard.append(number)
        count.stop.remote()
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    for number in before:
        signal.signal(number, stop)
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
