"""The Ray that stages run on: a cluster's, or one on this machine that ends with the process."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bixse.reachable import refuse_unreachable


def start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names, or start a local one; once a process.

    Raises ConnectionError when neither answers.
    """
    import ray

    if ray.is_initialized():
        return
    # Workers must find bixse, jobs and serve wherever the driver was started from.
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    env = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "TOKENIZERS_PARALLELISM": "false"}
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    refuse_unreachable(os.environ.get("RAY_ADDRESS", "local"))
    try:
        ray.init(
            address=os.environ.get("RAY_ADDRESS", "local"),
            # `ray job submit` brings the working directory itself.
            runtime_env=None if submitted else {"env_vars": env},
            include_dashboard=None if "RAY_ADDRESS" in os.environ else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # noqa: BLE001
        # Whatever Ray raises: of a node of its own that is not up within 30 s, a bare Exception.
        address = os.environ.get("RAY_ADDRESS")
        where = "on this machine" if address is None else f"at {address}"
        raise ConnectionError(f"no Ray {where}: {' '.join(str(error).split())}") from None
    if threading.current_thread() is threading.main_thread():
        # Ray's own, in place of the one that its C++ puts before it: that writes out a stack, and
        # aborts what has not ended three seconds later.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


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


def tokenise_on_cores() -> None:
    """Let the tokenizer of this worker have its GPUs' share of the node's cores, which have nothing
    else to do; before it is first asked.

    One core tokenises fewer texts than a GPU encodes. Without a GPU the model needs all cores, and
    a tokenizer that took some would only stand in its way: there it has one. A process that is no
    worker of Ray's was given no GPU.
    """
    import ray

    # Asked before Ray is started, the context would start it.
    if not ray.is_initialized():
        return
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return
    # Ray leaves both without types.
    mine: dict[str, float] = context.get_assigned_resources()  # type: ignore[no-untyped-call]
    if not mine.get("GPU"):
        return
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    (node,) = (n["Resources"] for n in nodes if n["NodeID"] == context.get_node_id())
    cores = max(1, int(node.get("CPU", 0) * mine["GPU"] / node["GPU"]))
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(cores)}
