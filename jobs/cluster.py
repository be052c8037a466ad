"""The Ray that stages run on: a cluster's, or one on this machine that ends with the process."""

import atexit
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
        logging_level=logging.ERROR,
    )
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@contextmanager
def ending() -> Iterator[None]:
    """Around what a program does, so that it ends with its own status if it starts Ray.

    Threads of Ray's outlive its shutdown, and C++ may abort a process that destroys one as it
    leaves: status 134 in 6 of 8 runs on a loaded machine (LOG.md, 2026-11-28), after all was done.
    Such a program is left without destroying anything, once every exit function has run.
    """
    begun, statuses = _in_ray(), list[int]()
    # Exit functions run last registered first, and Ray registers its own when it is imported.
    atexit.register(_leave, statuses)
    status: int | None = None
    try:
        yield
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else None
        raise
    finally:
        if status is not None and _in_ray() and not begun:
            statuses.append(status)


def _in_ray() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _leave(statuses: list[int]) -> None:
    if statuses:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(statuses[0])


def refuse_unmet(workers: int, cpus: float, gpus: float) -> None:
    """Raises ValueError when workers reserve more than a machine of our own has: Ray would wait for
    it for ever. A cluster may grow."""
    if "RAY_ADDRESS" in os.environ:
        return
    import ray

    # Ray leaves it without types.
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for what, each in (("CPU", cpus), ("GPU", gpus)):
        found = resources.get(what, 0)
        if workers * each > found:
            fewer = " or --placement.train-workers" if workers > 1 else ""
            raise ValueError(
                f"--placement asks for {workers * each:g} {what}s and this machine has {found:g}: "
                f"lower --placement.{what.lower()}s-per-actor{fewer}, or name a cluster in "
                "RAY_ADDRESS"
            )


def beside_driver(noun: Callable[..., Any], *arguments: Any) -> Any:
    """An actor of a class on the driver's node, which needs no CPU. Ray would put it on any node,
    and what it knows would be lost when that is taken away."""
    import ray

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, label_selector=here)(noun).remote(*arguments)
