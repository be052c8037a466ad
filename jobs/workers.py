"""Ray Train workers of one loop: started, resumed when they die, stopped when told to.

The loop keeps checkpoints of its own (`bixse.training.state`), so a restarted driver resumes like a
restarted worker.
"""

import itertools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bixse.artifacts import Draft
from bixse.training.allocator import CPU_ALLOCATOR
from bixse.training.seen import Seen
from jobs.cluster import beside_driver, refuse_unmet, start_ray
from jobs.following import Count, Ended, stop_on_signals
from jobs.recipe import Placement

if TYPE_CHECKING:
    from bixse.training.gather import World
    from bixse.training.loop import Notice

_TIMEOUT_S = 600
_AT_HOME = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
"""Where Ray runs on this machine alone: it will not be taken away, and checking often is cheap."""
_PREEMPTION_EVERY = 10
"""Steps between two questions whether Ray knows of a machine that will be taken away."""


@dataclass(frozen=True)
class Job:
    """What a worker is told."""

    run: Any
    """An object reference to what the loop runs on: its rows go to each node once."""
    start: Any
    """What the model begins as."""
    draft: Draft
    count: Any
    """The actor that counts steps for the driver's progress bar."""


def run_workers(
    work: Callable[[Job], dict[str, Any] | None],
    run: Any,
    start: Any,
    placement: Placement,
    draft: Draft,
    followed: Callable[[Any], AbstractContextManager[None]],
) -> dict[str, Any]:
    """Run `work` on Ray Train; the summary that its first worker returns.

    `run` has the checkpoints' place; `followed` is the context in which the driver sees the counts
    of the actor that it is given. `work` returns what it "refused", or that it was "stopped", as a
    value. Raises ValueError for the first and as `refuse_unmet`, Ended for the second, RuntimeError
    when workers keep dying.
    """
    if "RAY_ADDRESS" not in os.environ:
        for name, value in _AT_HOME.items():
            os.environ.setdefault(name, value)
    start_ray()
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    count = beside_driver(Count)
    job = Job(ray.put(run), start, draft, count)
    cpus, gpus = _cpus(placement), placement.gpus_per_actor
    refuse_unmet(placement.train_workers, cpus, gpus)
    resources = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    trainer: Any = TorchTrainer(
        partial(work, job),
        # A dead rank is noticed in minutes, not in torch's half hour.
        torch_config=TorchConfig(timeout_s=_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=placement.train_workers,
            use_gpu=gpus > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name="ray-train",
            storage_path=run.checkpoints.url,
            worker_runtime_env={} if gpus else {"env_vars": dict(CPU_ALLOCATOR)},
            failure_config=FailureConfig(max_failures=placement.train_retries),
        ),
    )
    # Ray's handler of Ctrl-C ends the driver without a word, also long after training.
    trainer._register_sigint_handler = lambda _: None
    with followed(count), stop_on_signals(count) as heard:
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            failures = getattr(error, "worker_failures", None)
            cause = next(iter(failures.values())) if failures else error
            raise RuntimeError(f"training failed: {_last_line(cause)}") from None
    summary: dict[str, Any] = result.return_value
    if "refused" in summary:
        raise ValueError(summary["refused"])
    if "stopped" in summary:
        sentence = f"{summary['stopped']}: the same command goes on from there"
        raise Ended(sentence, 128 + heard[0])
    return {**summary, "workers": placement.train_workers}


class Signals:
    """What a loop tells the driver after a step, and hears."""

    def __init__(self, count: Any, world: "World") -> None:
        self._count, self._world = count, world
        self._asked = itertools.count()
        self._stop = count.put.remote(Seen(0, [], []))

    def on_step(self, seen: "Seen") -> None:
        if self._world.rank == 0:
            self._stop = self._count.put.remote(seen)

    def wait(self) -> None:
        """Until the driver's actor has it all: a message may be lost when the worker ends."""
        import ray

        ray.get(self._stop)

    def notice(self) -> "Notice":
        import ray
        import ray.train

        from bixse.training.loop import Notice

        # Whether a machine will be taken away. All ranks must ask equally often, and wait for it.
        asks = next(self._asked) % _PREEMPTION_EVERY == 0
        leaving = asks and ray.train.get_preemption_info() is not None
        # What the driver answered to the step before; nobody waits for it.
        answered = self._world.rank == 0 and ray.wait([self._stop], timeout=0)[0]
        if answered and ray.get(self._stop):
            return Notice.STOP
        return Notice.SAVE if leaving else Notice.NONE


def alike(world: "World", load: Callable[[], Any]) -> tuple[Any, str]:
    """What `load` returns, or None and the first rank's complaint: either on all ranks or on none.

    A complaint (ValueError) is returned, not raised: a model that cannot be read is not worth a
    retry.
    """
    import torch.distributed as dist

    loaded: Any = None
    complaint = ""
    try:
        loaded = load()
    except ValueError as error:
        complaint = str(error)
    complaints = [complaint]
    if world.size > 1:
        complaints *= world.size
        dist.all_gather_object(complaints, complaint)
    first = next(filter(None, complaints), "")
    return (None if first else loaded), first


def _cpus(placement: Placement) -> float:
    """CPUs of a training worker.

    On a machine of our own, training is alone: without GPUs its workers share all CPUs there are.
    """
    import ray

    if "RAY_ADDRESS" in os.environ or placement.gpus_per_actor:
        return placement.cpus_per_actor
    # Ray leaves it without types.
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return max(placement.cpus_per_actor, resources["CPU"] // placement.train_workers)


def _last_line(error: Any) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
