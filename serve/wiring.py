"""Wire the deployments into an application, and start it.

Each replica loads its own files: nothing but paths and fingerprints goes through Ray.
"""

import logging
import os
from pathlib import Path
from typing import Any

import ray
import ray.serve
from ray.exceptions import RayError
from ray.serve.config import BackpressureConfig, HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from bixse.copies import leave
from bixse.models.encoder import encoder_fingerprint, resolve
from bixse.reachable import refuse_unreachable
from serve.backend import CALLS_A_REPLICA
from serve.fanout import RERANKER
from serve.gateway import FRONT, Gateway, Replica
from serve.generation import Generations
from serve.ledger import Ledger
from serve.query_encoder import QueryEncoder
from serve.reranker import RerankServer
from serve.settings import ROUTER_LOOP, ServeArgs, ServedIndex, ServedReranker
from serve.shard import ShardServer, slot_name

NAME = "bixse"

_LEDGER_WITHIN_S = 5.0

_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)

# Ray would say 503 when its queue is full; `serve.proxy` puts this 429 into our words.
_SHED = BackpressureConfig(status_code=429, retry_after_s=1)

# A replica takes all that comes, and `serve.access.Door` refuses at once what is more than
# `max_in_flight`; Ray's own queue fills while no replica is there at all.
_TAKES_ALL = 100_000


def build(args: ServeArgs) -> ray.serve.Application:
    """The application, in the topology asked for; see `ServeArgs.topology`.

    Raises ValueError when there is no index, or another encoder made it, and as
    `ServedReranker.read`.
    """
    index = ServedIndex.read(args.index)
    directory = resolve(args.encoder)
    index.check_encoder(args.encoder, encoder_fingerprint(directory))
    leave(directory.name)
    reranker = None if args.reranker is None else ServedReranker.read(args.reranker)
    first = Generations.first(index, args.encoder, reranker)
    if args.topology == "replicate":
        return _replicate(args, first)
    return _shard(args, first)


def _replicate(args: ServeArgs, first: Generations) -> ray.serve.Application:
    ledger = _ledger(args, first, (FRONT,))
    replica = _deployment(Replica).options(
        num_replicas=args.replicas,
        ray_actor_options={
            "num_cpus": args.encoder_cpus + args.shard_cpus,
            "num_gpus": args.encoder_gpus + args.shard_gpus,
        },
        max_ongoing_requests=_TAKES_ALL,
        max_queued_requests=args.max_in_flight,
        backpressure_config=_SHED,
    )
    application: ray.serve.Application = replica.bind(args, ledger, *_reranker(args, ledger))
    return application


def _shard(args: ServeArgs, first: Generations) -> ray.serve.Application:
    """A gateway over one encoder deployment and one deployment a shard."""
    count = len(first.current.index.shard_rows)
    slots = tuple(slot_name(slot) for slot in range(count))
    ledger = _ledger(args, first, (FRONT, "encoder", *slots))
    encoder = _deployment(QueryEncoder).options(
        num_replicas=args.encoder_replicas,
        # Two roles are batched apart, and two generations while one gives way to the next.
        max_ongoing_requests=4 * CALLS_A_REPLICA * args.encoder_replicas,
        ray_actor_options={"num_cpus": args.encoder_cpus, "num_gpus": args.encoder_gpus},
    )
    shard = _deployment(ShardServer).options(
        num_replicas=args.replicas_per_shard,
        max_ongoing_requests=2 * CALLS_A_REPLICA * args.replicas_per_shard,
        ray_actor_options={"num_cpus": args.shard_cpus, "num_gpus": args.shard_gpus},
    )
    gateway = _deployment(Gateway).options(
        # One: limits, batches and metrics are those of the process that holds them.
        num_replicas=1,
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=_TAKES_ALL,
        max_queued_requests=args.max_in_flight,
        backpressure_config=_SHED,
    )
    application: ray.serve.Application = gateway.bind(
        args,
        ledger,
        encoder.bind(ledger, args.encoder_cpus, args.query_precision),
        [
            shard.options(name=name).bind(ledger, slot, count, args.shard_cpus, args.shard_gpus > 0)
            for slot, name in enumerate(slots)
        ],
        *_reranker(args, ledger),
    )
    return application


def _reranker(
    args: ServeArgs, ledger: ray.serve.Application
) -> tuple[ray.serve.Application] | tuple[()]:
    """The reranker's deployment, if there is to be one."""
    if args.reranker is None:
        return ()
    fronts = args.replicas if args.topology == "replicate" else 1
    deployment = _deployment(RerankServer).options(
        num_replicas=args.reranker_replicas,
        # Each front has so many calls out, to one replica all of them when the others have died;
        # twice as many while one generation gives way to the next.
        max_ongoing_requests=2 * fronts * CALLS_A_REPLICA * args.reranker_replicas,
        ray_actor_options={"num_cpus": args.reranker_cpus, "num_gpus": args.reranker_gpus},
    )
    settings = (args.reranker_cpus, args.rerank_batch_tokens, args.reranker_precision)
    return (deployment.bind(ledger, *settings),)


def _ledger(args: ServeArgs, first: Generations, slots: tuple[str, ...]) -> ray.serve.Application:
    ledger = _deployment(Ledger).options(
        # Each replica waits in a call of its own.
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
    )
    second = () if args.reranker is None else (RERANKER,)
    application: ray.serve.Application = ledger.bind(first, (*slots, *second))
    return application


def _deployment(of: type) -> Any:
    # Ray's own annotation knows `deployment` as a decorator with arguments only. What a deployment
    # does not say of its log it does not take from Serve's: a line a request, on the request's way.
    return ray.serve.deployment(of, logging_config=_LOGGING)


def deploy(args: ServeArgs, application: ray.serve.Application) -> None:
    """Start Serve on the connected cluster, and wait until every replica has loaded.

    Raises RuntimeError with what a replica raised that cannot.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.serve.start(
        http_options=HTTPOptions(
            host=args.host,
            port=args.port,
            ssl_certfile=args.tls_certificate,
            ssl_keyfile=args.tls_key,
            # A backstop: every request has a deadline of its own.
            request_timeout_s=max(args.max_timeout_ms / 1e3, args.load_within_s) + 30,
        ),
        logging_config=_LOGGING,
    )
    try:
        ray.serve.run(application, name=NAME, route_prefix="/")
    except RuntimeError as error:
        # It names the deployments, and says nothing of why.
        raise RuntimeError(_failures() or str(error)) from None


def _failures() -> str:
    """Of each deployment that could not be started, what its replicas raised."""
    application = ray.serve.status().applications.get(NAME)
    deployments = {} if application is None else application.deployments
    said = {
        name: of.message.strip().splitlines()
        for name, of in deployments.items()
        if of.status == "DEPLOY_FAILED"
    }
    # The last line of a traceback is the error.
    return ", ".join(
        f"{name} cannot be started: {lines[-1]}" for name, lines in said.items() if lines
    )


def start_ray(args: ServeArgs) -> None:
    """Join the cluster of RAY_ADDRESS, or start a local one with room for every replica.

    Raises ValueError when this machine has too few GPUs, ConnectionError when no Ray answers.
    """
    # Workers must find bixse and serve wherever the program was started from.
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    env = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "TOKENIZERS_PARALLELISM": "false"}
    if args.profile == "fast":
        # Replicas route in their own loop; this process, which has none, must not: `set_profile`.
        env[ROUTER_LOOP] = "0"
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": env},
        "log_to_driver": False,
        "logging_level": "warning",
    }
    if "RAY_ADDRESS" in os.environ:
        _init(os.environ["RAY_ADDRESS"], **options)
        return
    cpus, gpus = _asked(args)
    # On a laptop replicas share cores rather than wait for some that never come.
    cpus = max(cpus, os.cpu_count() or 1)
    _init("local", num_cpus=cpus, include_dashboard=False, **options)
    # Ray leaves it without types.
    found = ray.cluster_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
    if gpus > found:
        ray.shutdown()
        raise ValueError(
            f"the replicas ask for {gpus:g} GPUs and Ray finds {found:g} here: they would wait for "
            "ever (--encoder-gpus, --shard-gpus and --reranker-gpus are of each replica)"
        )


def _init(address: str, **options: Any) -> None:
    refuse_unreachable(address)
    try:
        ray.init(address=address, **options)
    except Exception as error:  # noqa: BLE001
        # Whatever Ray raises: of a node of its own that is not up within 30 s, a bare Exception.
        where = "on this machine" if address == "local" else f"at {address}"
        raise ConnectionError(f"no Ray {where}: {' '.join(str(error).split())}") from None


def _asked(args: ServeArgs) -> tuple[int, float]:
    """CPUs and GPUs of all replicas together."""
    if args.topology == "replicate":
        cpus = args.replicas * (args.encoder_cpus + args.shard_cpus)
        gpus = args.replicas * (args.encoder_gpus + args.shard_gpus)
    else:
        shards = args.replicas_per_shard * len(ServedIndex.read(args.index).shard_rows)
        cpus = 1 + args.encoder_cpus * args.encoder_replicas + args.shard_cpus * shards
        gpus = args.encoder_gpus * args.encoder_replicas + args.shard_gpus * shards
    if args.reranker is not None:
        cpus += args.reranker_replicas * args.reranker_cpus
        gpus += args.reranker_replicas * args.reranker_gpus
    return cpus, gpus


def drain(within_s: float) -> bool:
    """Have new requests refused, and wait; whether those under way were all answered in time."""
    ledger = ray.serve.get_deployment_handle(Ledger.__name__, NAME)
    try:
        answered: bool = ledger.drain.remote(within_s).result(timeout_s=within_s + _LEDGER_WITHIN_S)
    except (TimeoutError, RayError, RayServeException):
        # A ledger that is gone leaves only the time that Ray itself gives each replica.
        return False
    return answered


def stop() -> None:
    """Take the application down; a cluster that others use goes on."""
    if "RAY_ADDRESS" in os.environ:
        # Others may have applications there.
        ray.serve.delete(NAME)
    else:
        # Ray leaves it without types.
        ray.serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()
