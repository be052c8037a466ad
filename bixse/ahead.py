"""Making the next thing while the one before it is used."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(
    made: Iterator[T], count: int | None = None, alone: Callable[[], bool] = lambda: False
) -> Iterator[T]:
    """Each thing, made in a thread while the one before it is used.

    Where `alone` says so, before a thing is handed out, the next one is made first. No thread is
    started for a `count` of one.
    """
    if count == 1:
        yield from made
        return
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, made, None)
        while (one := coming.result()) is not None:
            coming = thread.submit(next, made, None)
            if alone():
                coming.result()
            yield one


def one_behind(made: Iterator[T]) -> Iterator[T]:
    """Each thing when the next one was made, and the last."""
    before: list[T] = []
    for one in made:
        yield from before
        before = [one]
    yield from before
