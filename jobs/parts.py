"""Work units through Ray Data into a finished artefact, every row accounted for.

A stage that maps rows is cut into units, each of which becomes one part of the artefact it makes:

    units = row_units(pairs, rows=512)                 # plain values: which rows of which file
    run_units(draft, units, Judge, (arguments,), actors=2, ...)

Ray Data streams the units through an actor pool; an actor reads its rows, computes, writes the part
(rejected rows first, the part itself last, by rename) and returns counts only, so that no data
passes through the driver. A rerun makes only the parts that are missing. Parts depend on the unit
alone, not on how many actors ran or in what order.

Work that counts what it took (tokens, seconds) returns the counts as a third value. They are kept
beside the artefact, one file a part (`<out>-usage`), so that a run that was interrupted adds up
what all its sessions took.
"""

import json
import logging
import os
import sys
import tempfile
import threading
import uuid
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bixse.artifacts import Artifact, Draft, Place, part_name
from bixse.records import CORPUS, REJECTED, Document, Rejection, documents_at

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
        place = Artifact.open(self.url, verify=False).place
        with place.open(self.name) as handle:
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
    """Raised by work that must stop (a budget is spent): no part is written, its counts are."""

    def __init__(self, counts: Counts) -> None:
        super().__init__(dict(counts))
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
) -> int:
    """Make the parts that `draft` still lacks, on `actors` actors that each build `work` once.

    An actor has `in_flight` units in hand at a time, each in a thread of its own: work that is
    called so must bear it. `note` is what the progress line says beside rate and time left.
    Returns how many units were left `Unfinished`.

    Raises RuntimeError when a part does not account for every row of its unit, or workers keep
    dying, and whatever `work` raises: a stage fails loudly and a rerun goes on from the finished
    parts.
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
        import ray.data
        from ray.util.annotations import RayDeprecationWarning

        # Threads only where asked for: most work is not safe in several.
        pool = ray.data.ActorPoolStrategy(
            size=min(actors, len(todo)),
            max_tasks_in_flight_per_actor=in_flight if in_flight > 1 else None,
            max_concurrent_calls_per_actor=in_flight if in_flight > 1 else None,
            enable_true_multi_threading=in_flight > 1,
        )
        rows = ray.data.from_items([asdict(unit) for unit in todo], override_num_blocks=len(todo))
        with warnings.catch_warnings():
            # Ray 2.60 means to rename these two, and has no other name for them yet.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            results = rows.map_batches(
                _PartWriter,
                fn_constructor_args=(draft, work, arguments),
                batch_size=1,
                compute=pool,
                num_cpus=cpus,
                num_gpus=gpus,
                # The default restarts for ever, also on a unit that kills whoever takes it.
                max_restarts=RESTARTS,
                max_task_retries=RESTARTS,
            )
        try:
            for result in results.iter_rows():
                if result["refusal"]:
                    raise ValueError(result["refusal"])
                if result["unfinished"]:
                    unfinished += 1
                    continue
                if result["rows"] + result["rejected"] != result["rows_in"]:
                    raise RuntimeError(
                        f"{label}: part {result['number']} got {result['rows_in']} rows, wrote "
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


class _PartWriter:
    """Reads: a unit. Adds: nothing; writes the unit's part and returns its counts."""

    def __init__(self, draft: Draft, work: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
        self._draft = draft
        self._work = work(*arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        unit = Unit(**{key: _plain(values[0]) for key, values in batch.items()})
        try:
            table, rejections, *counts = self._work(unit.read())
            for took in counts:
                self._count(Path(part_name(unit.number)).stem, took)
            self._draft.write_part(unit.number, table, rejected_table(rejections))
        except Unfinished as stop:
            if any(stop.counts.values()):
                self._count(f"cut-{uuid.uuid4().hex}", stop.counts)
            return _result(unit, 0, 0, unfinished=True)
        except (ValueError, OSError) as error:
            # Ray Data keeps no cause: the sentence for the user travels as a value.
            return _result(unit, 0, 0, refusal=str(error))
        return _result(unit, table.num_rows, len(rejections))

    def _count(self, name: str, took: Counts) -> None:
        usage_place(self._draft).write(f"{name}.json", json.dumps(dict(took)).encode())


def usage_place(draft: Draft) -> Place:
    """Where the counts of a draft's parts are kept."""
    return Place(f"{draft.place.url}-usage")


def usage(draft: Draft) -> Counter[str]:
    """What all sessions so far took for the parts of this draft, added up."""
    place = usage_place(draft)
    total: Counter[str] = Counter()
    for name in place.names():
        total.update(json.loads(place.read(name)))
    return total


def _result(
    unit: Unit, rows: int, rejected: int, *, refusal: str = "", unfinished: bool = False
) -> dict[str, list[Any]]:
    counts = {"number": unit.number, "rows_in": unit.rows, "rows": rows, "rejected": rejected}
    said = {"refusal": [refusal], "unfinished": [unfinished]}
    return {**{name: [count] for name, count in counts.items()}, **said}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names, or start a local one; once a process."""
    import ray

    if ray.is_initialized():
        return
    # Workers must find bixse, jobs and serve wherever the driver was started from.
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    env = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "TOKENIZERS_PARALLELISM": "false"}
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    ray.init(
        address=os.environ.get("RAY_ADDRESS", "local"),
        # `ray job submit` brings the working directory itself.
        runtime_env=None if submitted else {"env_vars": env},
        include_dashboard=None if "RAY_ADDRESS" in os.environ else False,
        log_to_driver=False,
        logging_level="error",
    )
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


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


class _Mapped:
    """Rows of artefacts by id, in memory-mapped files: memory does not follow their number.

    The files are made once a node and content, in the temporary directory, and shared by all
    actors: the rows in their own order, and the order of their ids.
    """

    def __init__(self, artifacts: Sequence[Artifact], schema: pa.Schema) -> None:
        self._id = schema.names[0]
        folder = Path(tempfile.gettempdir()) / f"bixse-{os.getuid()}"
        name = "-".join(artifact.fingerprint for artifact in artifacts)
        rows, order = folder / f"{name}.arrow", folder / f"{name}.order.npy"
        if not order.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _write_ordered(artifacts, schema, rows, order)
        self.table = pa.ipc.open_file(pa.memory_map(str(rows))).read_all()
        self._ids = self.table[self._id]
        self._order = np.load(order, mmap_mode="r")

    def row(self, key: str) -> int | None:
        """Where the row with this id stands."""
        place = bisect_left(self._order, key, key=lambda row: self._ids[int(row)].as_py())
        if place < len(self._order):
            row = int(self._order[place])
            if self._ids[row].as_py() == key:
                return row
        return None


class Texts:
    """Documents of a corpus by `doc_id`; memory does not follow the size of the corpus."""

    def __init__(self, corpus: Artifact) -> None:
        self._mapped = _Mapped([corpus], CORPUS)

    def get(self, doc_ids: Sequence[str]) -> list[Document]:
        """The documents, in the order asked for. Raises KeyError naming an unknown `doc_id`."""
        return self.at([self.row(doc_id) for doc_id in doc_ids])

    def at(self, rows: Iterable[int]) -> list[Document]:
        """The documents that stand in these rows."""
        return documents_at(self._mapped.table, rows)

    def row(self, doc_id: str) -> int:
        """Where the document stands in the corpus. Raises KeyError."""
        row = self._mapped.row(doc_id)
        if row is None:
            raise KeyError(f"no document {doc_id!r} in the corpus")
        return row


class QueryTexts:
    """Texts of queries by `query_id`; memory does not follow their number."""

    def __init__(self, queries: Sequence[Artifact]) -> None:
        self._mapped = _Mapped(queries, QUERY_TEXTS)

    def get(self, query_ids: Sequence[str]) -> list[str]:
        """The texts, in the order asked for. Raises KeyError naming an unknown `query_id`."""
        return [self._text(query_id) for query_id in query_ids]

    def _text(self, query_id: str) -> str:
        row = self._mapped.row(query_id)
        if row is None:
            raise KeyError(f"no query {query_id!r} among the queries")
        return str(self._mapped.table["text"][row].as_py())


QUERY_TEXTS = pa.schema([("query_id", pa.string()), ("text", pa.string())])


def _write_ordered(
    artifacts: Sequence[Artifact], schema: pa.Schema, rows: Path, order: Path
) -> None:
    """Stream the artefacts into one Arrow file; of all rows only the ids are held."""
    mark = f".{os.getpid()}.{threading.get_ident()}.tmp"
    aside, order_aside = Path(f"{rows}{mark}"), Path(f"{order}{mark}")
    ids: list[str] = []
    with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for artifact in artifacts:
            for batch in artifact.batches(schema.names, rows=4096):
                writer.write_batch(batch)
                ids += batch[schema.names[0]].to_pylist()
    with open(order_aside, "wb") as handle:
        np.save(handle, np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64))
    aside.replace(rows)
    order_aside.replace(order)


def rows_of(items: Iterable[Any], schema: pa.Schema) -> pa.Table:
    """Records as a table of their schema."""
    return pa.Table.from_pylist([asdict(item) for item in items], schema=schema)
