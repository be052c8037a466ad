"""Work units through Ray Data into a finished artefact, every row accounted for.

A stage that maps rows is cut into units, each of which becomes one part of the artefact it makes:

    units = row_units(pairs, rows=512)                 # plain values: which rows of which file
    run_units(draft, units, Judge, (arguments,), actors=2, ...)

Ray Data streams the units through an actor pool; an actor reads its rows, computes, writes the part
(rejected rows first, the part itself last, by rename) and returns counts only, so that no data
passes through the driver. A rerun makes only the parts that are missing. Parts depend on the unit
alone, not on how many actors ran or in what order.

Work that counts what it took (tokens, seconds) returns the counts as a third value. They are kept
beside the artefact, one file each time that a part is made (`<out>-usage`), so that a run that was
interrupted adds up what all its sessions took.
"""

import json
import os
import sys
import traceback
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bixse.artifacts import BEGUN, Artifact, Draft, begin, part_name
from bixse.place import Place, several
from bixse.records import REJECTED, Rejection
from jobs.cluster import refuse_unmet, start_ray

RESTARTS = 3
"""Deaths of a worker process (out of memory, a lost node) that a stage outlives, for each actor."""


@dataclass(frozen=True)
class Unit:
    """Some rows of one file of an artefact; `number` is the part they become."""

    number: int
    url: str
    name: str
    start: int
    rows: int

    def read(self) -> pa.Table:
        """The rows of this unit; only the row groups that hold them are read."""
        # Without the manifest: of thousands of parts, it takes longer to read than these rows.
        with Place(self.url).open(self.name) as handle:
            file = pq.ParquetFile(handle)
            first, groups, offset = None, [], 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if offset < self.start + self.rows and offset + size > self.start:
                    first = offset if first is None else first
                    groups.append(group)
                offset += size
            table = file.read_row_groups(groups)
        return table.slice(self.start - (first or 0), self.rows)


Counts = Mapping[str, float]
"""What a unit took, by name; counts of all units add up."""

Made = tuple[pa.Table, list[Rejection]] | tuple[pa.Table, list[Rejection], Counts]


class Work(Protocol):
    """What an actor does with a unit: one row out, or one rejection, for each row in."""

    def __call__(self, rows: pa.Table) -> Made: ...


class Unfinished(Exception):
    """Raised by work that must stop (a budget is spent): counts are kept, no part is written."""

    def __init__(self, counts: Counts) -> None:
        super().__init__(dict(counts))
        self.counts = dict(counts)


class Refusal(ValueError):
    """Raised by work to end the stage with a sentence for the user; carries the counts so far."""

    def __init__(self, sentence: str, counts: Counts) -> None:
        super().__init__(sentence)
        self.counts = dict(counts)


class Stopped(ValueError):
    """A stage that stopped where it was told to, its finished parts kept."""


def row_units(artifact: Artifact, rows: int) -> list[Unit]:
    """All rows of an artefact in units of at most `rows`, in order."""
    units: list[Unit] = []
    for name in artifact.parts():
        with artifact.place.open(name) as handle:
            total = pq.ParquetFile(handle).metadata.num_rows
        for start in range(0, total, rows):
            units.append(Unit(len(units), artifact.url, name, start, min(rows, total - start)))
    return units


def rejected_table(rejections: Sequence[Rejection]) -> pa.Table:
    return pa.Table.from_pylist([asdict(r) for r in rejections], schema=REJECTED)


def rows_of(items: Iterable[Any], schema: pa.Schema) -> pa.Table:
    """Records as a table of their schema."""
    return pa.Table.from_pylist([asdict(item) for item in items], schema=schema)


def sorted_out(
    made: Sequence[Any | Rejection], schema: pa.Schema
) -> tuple[pa.Table, list[Rejection]]:
    """What became of the rows of a unit: records as a table of their schema, and rejections."""
    kept = [item for item in made if not isinstance(item, Rejection)]
    return rows_of(kept, schema), [item for item in made if isinstance(item, Rejection)]


def write_rows(
    draft: Draft,
    items: Iterable[Any],
    schema: pa.Schema,
    rows: int,
    rejections: Sequence[Rejection] = (),
) -> None:
    """Records in parts of at most `rows`, one empty part where there is none; the rejections stand
    beside the first."""
    waiting, number = iter(items), 0
    while (some := list(islice(waiting, rows))) or number == 0:
        beside = rejected_table(rejections if number == 0 else ())
        draft.write_part(number, rows_of(some, schema), beside)
        number += 1


def part_rows(draft: Draft, number: int) -> int:
    """Rows of a part that stands."""
    with draft.place.open(part_name(number)) as handle:
        return int(pq.ParquetFile(handle).metadata.num_rows)


def run_units(
    draft: Draft,
    units: Sequence[Unit],
    work: Callable[..., Work],
    arguments: tuple[Any, ...],
    *,
    label: str,
    actors: int,
    cpus: float,
    gpus: float,
    in_flight: int = 1,
    note: Callable[[], str] | None = None,
    count: Callable[[Counts], None] | None = None,
) -> int:
    """Make the parts that `draft` still lacks, on `actors` actors that each build `work` once.

    An actor has `in_flight` units in hand at a time, each in a thread of its own: work that is
    called so must bear it. `note` is what the progress line says beside rate and time left; `count`
    is given what each unit took, made or not, as soon as it is known here.
    Returns how many units were left `Unfinished`.

    Raises ValueError as `refuse_unmet` and where `work` raised one, RuntimeError when `work` raised
    something else, a part does not account for every row of its unit, or workers keep dying: a
    stage fails loudly and a rerun goes on from the finished parts.
    """
    done = draft.parts_done()
    todo = [unit for unit in units if unit.number not in done]
    total = sum(unit.rows for unit in units)
    unfinished = 0
    with progress(label, total, note) as advance:
        advance(total - sum(unit.rows for unit in todo))
        if not todo:
            return 0
        start_ray()
        refuse_unmet(1, cpus, gpus)
        import ray

        writer = (draft, work, arguments)
        try:
            for result in _results(todo, writer, actors, cpus, gpus, in_flight):
                if count is not None:
                    count(json.loads(result["took"]))
                if result["refusal"]:
                    raise ValueError(result["refusal"])
                if result["failure"]:
                    print(result["failure"], file=sys.stderr)
                    what = result["failure"].strip().splitlines()[-1]
                    raise RuntimeError(f"{label} failed: {what}")
                if result["unfinished"]:
                    unfinished += 1
                    continue
                if result["rows"] + result["rejected"] != result["rows_in"]:
                    raise RuntimeError(
                        f"{label}: part {result['number']} got {result['rows_in']} rows, made "
                        f"{result['rows']} and rejected {result['rejected']}"
                    )
                advance(int(result["rows_in"]))
            missing = {unit.number for unit in units} - draft.parts_done()
            if len(missing) > unfinished:
                raise RuntimeError(
                    f"{label}: {len(missing)} of {len(units)} parts are not at {draft.place.url}: "
                    "it must be storage that all nodes share"
                )
        except ray.exceptions.RayActorError as error:
            what = "could not start" if error.actor_init_failed else f"died {RESTARTS + 1} times"
            last = str(error).strip().splitlines()[-1]
            raise RuntimeError(f"{label}: a worker {what}: {last}") from None
    return unfinished


def _results(
    units: Sequence[Unit],
    writer: tuple[Any, ...],
    actors: int,
    cpus: float,
    gpus: float,
    in_flight: int,
) -> Iterable[dict[str, Any]]:
    """What each unit came to, by a pool of actors that are `_PartWriter(*writer)`."""
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    # Threads only where asked for: most work is not safe in several.
    pool = ray.data.ActorPoolStrategy(
        size=min(actors, len(units)),
        max_tasks_in_flight_per_actor=in_flight if in_flight > 1 else None,
        max_concurrent_calls_per_actor=in_flight if in_flight > 1 else None,
        enable_true_multi_threading=in_flight > 1,
    )
    rows = ray.data.from_items([asdict(unit) for unit in units], override_num_blocks=len(units))
    with warnings.catch_warnings():
        # Ray 2.60 means to rename these two, and has no other name for them yet.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        results = rows.map_batches(
            _PartWriter,
            fn_constructor_args=writer,
            batch_size=1,
            compute=pool,
            num_cpus=cpus,
            num_gpus=gpus,
            runtime_env=_threads(actors, gpus),
            # The default restarts for ever, also on a unit that kills whoever takes it.
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )
    found: Iterable[dict[str, Any]] = results.iter_rows()
    return found


def _threads(actors: int, gpus: float) -> dict[str, Any] | None:
    """How many threads an actor's mathematics has, as its environment.

    Ray gives an actor one for each CPU it reserves. On a machine of our own nobody else wants the
    rest, and without GPUs the actors share all cores.
    """
    if gpus or {"RAY_ADDRESS", "OMP_NUM_THREADS"} & os.environ.keys():
        return None
    import ray

    # Ray leaves it without types.
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    threads = max(1, int(resources["CPU"]) // actors)
    return {"env_vars": {"OMP_NUM_THREADS": str(threads)}}


class _PartWriter:
    """Reads: a unit. Adds: nothing; writes the unit's part and returns its counts."""

    def __init__(self, draft: Draft, work: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
        self._draft = draft
        self._unmade: Exception | None = None
        try:
            self._work = work(*arguments)
        except Exception as error:  # noqa: BLE001
            # Whatever it is (an engine may raise anything), the first unit says it: of an actor
            # that does not begin Ray Data logs a traceback.
            self._unmade = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        unit = Unit(**{key: _plain(values[0]) for key, values in batch.items()})
        if self._unmade is not None:
            return _failed(unit, self._unmade)
        try:
            table, rejections, *counts = self._work(unit.read())
            took = counts[0] if counts else {}
            if counts:
                # A file for each session: one killed before the part stood was paid for too.
                self._count(f"{Path(part_name(unit.number)).stem}-{uuid.uuid4().hex}", took)
            # Otherwise nothing is written: a rerun would take the part for finished.
            if table.num_rows + len(rejections) == unit.rows:
                self._draft.write_part(unit.number, table, rejected_table(rejections))
        except (Unfinished, Refusal) as stop:
            if any(stop.counts.values()):
                self._count(f"cut-{uuid.uuid4().hex}", stop.counts)
            if isinstance(stop, Refusal):
                return _result(unit, 0, 0, stop.counts, refusal=str(stop))
            return _result(unit, 0, 0, stop.counts, unfinished=True)
        except Exception as error:  # noqa: BLE001
            # Not swallowed: the driver raises it. Ray Data keeps no cause, so that it travels as a
            # value, whatever it is.
            return _failed(unit, error)
        return _result(unit, table.num_rows, len(rejections), took)

    def _count(self, name: str, took: Counts) -> None:
        usage_place(self._draft).write(f"{name}.json", json.dumps(dict(took)).encode())


def begin_counted(
    url: str, kind: str, *, config: Mapping[str, Any], inputs: Mapping[str, str]
) -> Artifact | Draft:
    """`begin`, of work that counts what it takes.

    A draft that goes on keeps its counts, also those of units that a budget cut off before any part
    was whole, and its notes of what workers died of. One that begins empty, or again with another
    config or input, has none: they are of what stood there before.
    """
    place = Place(url)
    before = place.read(BEGUN) if place.exists(BEGUN) else None
    draft = begin(url, kind, config=config, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    if before is None or json.loads(before) != json.loads(place.read(BEGUN)):
        usage_place(draft).clear()
        trying_place(draft).clear()
    return draft


def usage_place(draft: Draft) -> Place:
    """Where the counts of a draft's parts are kept."""
    return Place(f"{draft.place.url}-usage")


def trying_place(draft: Draft) -> Place:
    """Where workers note what they are asking, in case they die of it (`jobs.judges.trying`)."""
    return Place(f"{draft.place.url}-trying")


def usage(draft: Draft) -> Counter[str]:
    """What all sessions so far took for the parts of this draft, added up."""
    place = usage_place(draft)
    total: Counter[str] = Counter()
    for data in several(place.read, place.names()):
        total.update(json.loads(data))
    return total


def _failed(unit: Unit, error: Exception) -> dict[str, list[Any]]:
    """The sentence of a refusal; of a bug of ours, or an engine that has no room, where it was."""
    if isinstance(error, ValueError | OSError):
        return _result(unit, 0, 0, refusal=str(error))
    return _result(unit, 0, 0, failure="".join(traceback.format_exception(error)))


def _result(
    unit: Unit,
    rows: int,
    rejected: int,
    took: Counts = MappingProxyType({}),
    *,
    refusal: str = "",
    failure: str = "",
    unfinished: bool = False,
) -> dict[str, list[Any]]:
    counts = {"number": unit.number, "rows_in": unit.rows, "rows": rows, "rejected": rejected}
    said = {"refusal": refusal, "failure": failure, "unfinished": unfinished}
    said |= {**counts, "took": json.dumps(dict(took))}
    return {name: [value] for name, value in said.items()}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


@contextmanager
def progress(
    label: str, total: int | None, note: Callable[[], str] | None = None
) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on standard error; gives the function that advances it.

    `note` is asked at every refresh for what else there is to say (money so far).
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.finished_speed or task.speed or 0:,.1f}/s")

    class Note(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(note() if note else "")

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        Note(),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda rows: bar.advance(task, rows)
