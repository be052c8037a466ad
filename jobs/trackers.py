"""Where training can be watched from elsewhere: TensorBoard, MLflow, Weights & Biases. None is
needed.

    with tracked(("mlflow",), checkpoints, fingerprint, out, config) as tell: ... tell(seen) ...

The driver tells them, of what the first rank saw: their stores and keys are those of the shell that
the command was typed in (MLFLOW_TRACKING_URI, WANDB_API_KEY, ...). Each has a thread of its own, so
that a slow one holds up nothing, and one that fails is left out from then on with one warning.

A run that goes on after an interruption is the same run there: its id is kept beside the
checkpoints until the model is finished. What the loop shows of it first is all its steps so far
(`Seen.lines`); a tracker takes those that it lacks, so that no step stands twice and none is lost.

With `training.mix` a step's loss stands under its set's number too (`set_1/loss`); the parameter
`sets.1` says which run that is.
"""

import importlib.util
import json
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from bixse.place import Place

if TYPE_CHECKING:
    from bixse.training.seen import Seen

_log = logging.getLogger(__name__)

DEV = "dev_ndcg_at_10"
"""MLflow allows no @ in a name."""

_OF_A_SET = ("loss", "excess", "bias")
"""What compares within a set of labels only."""

_RUN = "tracked.json"
_PROJECT = "bixse"
_WAIT_S = 60.0
"""How long a finished training waits for a tracker to catch up."""

Steps = Mapping[int, Mapping[str, float]]
"""step -> its metrics."""


@dataclass(frozen=True)
class TrackedRun:
    """What is said of a run once."""

    id: str
    name: str
    directory: str
    """Where files of a tracker go that keeps its own."""
    params: Mapping[str, str]
    resumed: bool
    """Whether a tracker may have been told of it before."""


class Tracker(Protocol):
    """A run that stands open with one of them; any of it may raise anything."""

    last: int
    """The last step that it was told of, -1 if none."""

    def log(self, steps: Steps) -> None: ...

    def finish(self, *, complete: bool) -> None: ...


class TensorBoard:
    """Event files. TensorBoard hides what they say of steps that a later file begins anew with."""

    def __init__(self, run: TrackedRun) -> None:
        from tensorboardX import SummaryWriter

        self.last = -1
        self._writer = SummaryWriter(
            run.directory,
            purge_step=0 if run.resumed else None,
            flush_secs=2,
            # Files are read in the order of their names, which have seconds and no more.
            filename_suffix=f".{time.time_ns()}",
        )
        self._writer.add_text("params", json.dumps(dict(run.params), indent=1))

    def log(self, steps: Steps) -> None:
        for step, metrics in steps.items():
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def finish(self, *, complete: bool) -> None:
        self._writer.close()


class MLflow:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME ("bixse") at MLFLOW_TRACKING_URI."""

    _MOST = 1000
    """Metrics that MLflow takes at a time."""

    def __init__(self, run: TrackedRun) -> None:
        import mlflow

        self.last = -1
        self._client = mlflow.MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        known = self._client.get_experiment_by_name(experiment)
        at = known.experiment_id if known else self._client.create_experiment(experiment)
        found = self._client.search_runs([at], f"tags.`bixse.run` = '{run.id}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, "RUNNING")
            told = [
                metric.step
                for name in ("loss", DEV)
                for metric in self._client.get_metric_history(self._id, name)
            ]
            self.last = max(told, default=-1)
            return
        made = self._client.create_run(at, run_name=run.name, tags={"bixse.run": run.id})
        self._id = made.info.run_id
        params = [mlflow.entities.Param(name, value) for name, value in run.params.items()]
        self._client.log_batch(self._id, params=params)

    def log(self, steps: Steps) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, step)
            for step, found in steps.items()
            for name, value in found.items()
        ]
        for start in range(0, len(metrics), self._MOST):
            self._client.log_batch(self._id, metrics=metrics[start : start + self._MOST])

    def finish(self, *, complete: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")


class WandB:
    """A run of the project WANDB_PROJECT ("bixse"). What is written offline is written whole by
    every session; W&B keeps one of each step."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run.id,
            name=run.name,
            config=dict(run.params),
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
        self.last = self._run.step - 1

    def log(self, steps: Steps) -> None:
        for step, metrics in steps.items():
            self._run.log(dict(metrics), step=step, commit=True)

    def finish(self, *, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


_TRACKERS: Mapping[str, tuple[Callable[[TrackedRun], Tracker], str, str]] = {
    "tensorboard": (TensorBoard, "tensorboardX", "tensorboardX==2.6.5"),
    "mlflow": (MLflow, "mlflow", "mlflow-skinny==3.17.2"),
    "wandb": (WandB, "wandb", "wandb==0.31.0"),
}
"""How each is opened, the module that it needs, and the package that has it."""


def refuse_missing(names: Sequence[str], out: str) -> None:
    """Raises ValueError when a tracker is not installed, or cannot write where it would have to."""
    for name in names:
        _, module, package = _TRACKERS[name]
        spec = importlib.util.find_spec(module)
        # A folder of that name is what wandb leaves where it ran, and no package.
        if spec is None or spec.origin is None:
            raise ValueError(f"--track {name} needs a package: pip install {package}")
        if name == "tensorboard" and "://" in out:
            raise ValueError(f"--track tensorboard writes local files, and not to {out}")


@contextmanager
def tracked(
    names: Sequence[str],
    checkpoints: Place,
    fingerprint: str,
    out: str,
    config: Mapping[str, Any],
) -> Iterator[Callable[["Seen"], None]]:
    """Gives the function that tells the named trackers of a run that is being made at `out`; waits
    at the end until they have heard it all."""
    told: list[_Told] = []
    if names:
        run = _run_of(checkpoints, fingerprint, out, config)
        told = [_Told(name, partial(_TRACKERS[name][0], run)) for name in names]
    complete = False

    def tell(seen: "Seen") -> None:
        for one in told:
            one.put(seen)

    try:
        yield tell
        complete = True
    finally:
        for one in told:
            one.end(complete=complete)


def _run_of(
    checkpoints: Place, fingerprint: str, out: str, config: Mapping[str, Any]
) -> TrackedRun:
    """A new run, or the one that stands at `checkpoints`."""
    known = json.loads(checkpoints.read(_RUN)) if checkpoints.exists(_RUN) else {}
    resumed = known.get("fingerprint") == fingerprint
    if not resumed:
        known = {"fingerprint": fingerprint, "id": uuid.uuid4().hex}
        checkpoints.write(_RUN, json.dumps(known).encode())
    return TrackedRun(
        id=known["id"],
        name="/".join(out.rstrip("/").split("/")[-2:]),
        directory=f"{out}-tensorboard/{known['id'][:8]}",
        params={"out": out, **dict(_flat(config))},
        resumed=resumed,
    )


class _Told:
    """One tracker in its thread."""

    def __init__(self, name: str, opened: Callable[[], Tracker]) -> None:
        self._name, self._opened = name, opened
        self._queue: queue.SimpleQueue[Seen | bool] = queue.SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"track-{name}", daemon=True)
        self._thread.start()

    def put(self, seen: "Seen") -> None:
        # Nobody would take it: it would only pile up.
        if not self._failed:
            self._queue.put(seen)

    def end(self, *, complete: bool) -> None:
        self._queue.put(complete)
        self._thread.join(_WAIT_S)
        if self._thread.is_alive():
            _log.warning("%s does not answer, and lacks the last steps", self._name)

    def _work(self) -> None:
        try:
            tracker = self._opened()
            complete: bool | None = None
            while complete is None:
                steps, complete = self._next(tracker.last)
                if steps:
                    tracker.log(steps)
                    tracker.last = max(steps)
            tracker.finish(complete=complete)
        # Whatever a tracker raises, training has nothing to do with it.
        except Exception as error:  # noqa: BLE001
            self._failed = True
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            _log.warning("%s failed, training goes on without it: %s", self._name, reason)

    def _next(self, last: int) -> tuple[Steps, bool | None]:
        """What there is to tell of steps after `last`, and whether the run is complete, once it has
        ended. Waits for the first; takes all that have come by then."""
        steps: dict[int, dict[str, float]] = {}
        item = self._queue.get()
        while True:
            if isinstance(item, bool):
                return steps, item
            for step, metrics in _steps(item, last).items():
                steps.setdefault(step, {}).update(metrics)
            if self._queue.empty():
                return steps, None
            item = self._queue.get()


def _steps(seen: "Seen", last: int) -> dict[int, dict[str, float]]:
    steps: dict[int, dict[str, float]] = {}
    for line in seen.lines:
        step = int(line["step"])
        if step > last:
            steps[step] = {name: value for name, value in line.items() if name != "step"}
            if "set" in line:
                under = f"set_{int(line['set'])}"
                steps[step] |= {f"{under}/{name}": line[name] for name in _OF_A_SET if name in line}
    for step, score in seen.dev:
        if step > last:
            steps.setdefault(step, {})[DEV] = score
    return dict(sorted(steps.items()))


def _flat(values: Mapping[str, Any], under: str = "") -> Iterator[tuple[str, str]]:
    """`a.b` -> value as text, for every value that holds no others by name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{under}{name}.")
        else:
            yield f"{under}{name}", str(value)
