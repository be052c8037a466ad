"""What the command line of every verb does: read it, run the stages, say in one line what was made.

Each verb's module calls `main` with its name; `VERBS` has what each asks of the pipeline and says.
"""

import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bixse.leaving import own_status
from bixse.models.settings import Reranking
from jobs.command import RECIPES, parse, refuse, show
from jobs.following import Ended
from jobs.pipeline import Pipeline

if TYPE_CHECKING:
    from bixse.artifacts import Artifact


_JUDGED = ("pair", "judge", "audit", "prefer")
"""Verbs on the way to judgments, or about them."""


def program(verb: str = "pipeline") -> None:
    """`main` as a process of its own, whose status is what was done."""
    with own_status():
        main(verb)


def main(verb: str = "pipeline", argv: list[str] | None = None) -> None:
    """Run a verb from the command line; bad input is one sentence and exit status 1 or 2, a budget
    that is spent one sentence and 3, a signal one sentence and its number above 128.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--list"]:
        list_recipes()
        return
    run = parse(verb, argv)
    if verb != "index" and (run.base_index or run.delete):
        refuse("--base-index and --delete are for jobs.index")
    if run.plan and verb not in ("judge", "pipeline"):
        refuse(f"--plan is of judge and pipeline: {verb} asks no judge")
    if run.recipe.gated is not None and (run.plan or verb in _JUDGED):
        what = "--plan" if run.plan else verb
        refuse(f"recipe {run.recipe.name} learns from the corpus alone: {what} is of judgments")
    made = _plan if run.plan else VERBS[verb]
    try:
        show(made(Pipeline(run)), run.json)
    except _expected() as error:
        refuse(_sentence(error), status=_status(error))
    except KeyboardInterrupt:
        refuse("interrupted: the same command goes on from the finished parts", status=130)
    except Ended as stop:
        refuse(str(stop), status=stop.status)
    except SystemExit as stop:
        # What Ray makes of SIGTERM, without a word.
        if stop.code == signal.SIGTERM:
            refuse("terminated: the same command goes on from the finished parts", status=143)
        raise


def _expected() -> tuple[type[BaseException], ...]:
    """What a person can act on; everything else is a bug of ours and keeps its traceback."""
    errors = (ValueError, OSError, RuntimeError, ImportError)
    ray = sys.modules.get("ray.exceptions")
    return (*errors, ray.RayError) if ray else errors


def _status(error: BaseException) -> int:
    """3 where a budget is spent and more of it would go on; 1 for everything else."""
    parts = sys.modules.get("jobs.parts")
    return 3 if parts and isinstance(error, parts.Stopped) else 1


def list_recipes() -> None:
    """Every recipe with its paper, hardware and cost class."""
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "paper", "hardware", "cost")
    for name, build in RECIPES.items():
        about = build().about
        table.add_row(name, about.paper, about.hardware, about.cost)
    Console().print(table)


def _sentence(error: BaseException) -> str:
    """The innermost cause that a person can act on, on one line."""
    cause: BaseException | None = error
    while cause is not None:
        inner = getattr(cause, "cause", None) or cause.__cause__
        if not isinstance(inner, BaseException):
            break
        cause = inner
    found = cause or error
    text = " ".join(str(found).split()) or type(found).__name__
    if isinstance(found, ModuleNotFoundError) and found.name in ("s3fs", "gcsfs"):
        return f"{text}: pip install -e '.[cloud]' brings what s3:// and gs:// need"
    return text if isinstance(found, ValueError | OSError) else f"{type(found).__name__}: {text}"


def _made(verb: str, artifact: "Artifact", **more: Any) -> dict[str, Any]:
    manifest = artifact.manifest
    counts = {"rows": manifest.rows, "rejected": manifest.rejected, "seconds": manifest.seconds}
    return {"verb": verb, "made": manifest.kind, "at": artifact.url, **counts, **more}


def _ingest(pipeline: Pipeline) -> dict[str, Any]:
    data = pipeline.data()
    found = {"queries": data.queries.manifest.rows, "qrels": data.qrels.manifest.rows}
    rejected = data.queries.manifest.rejected + data.qrels.manifest.rejected
    made = {"corpus": data.corpus, "queries": data.queries, "qrels": data.qrels}
    reasons = {kind: one.manifest.extra.get("rejected_for") for kind, one in made.items()}
    told = {kind: reason for kind, reason in reasons.items() if reason}
    more = {"rejected_for": told} if told else {}
    return _made("ingest", data.corpus, **found, rejected_queries_and_qrels=rejected, **more)


def _synthesise(pipeline: Pipeline) -> dict[str, Any]:
    synthetic = pipeline.synthetic() or pipeline.documents() or pipeline.chunks()
    if synthetic is None:
        raise ValueError(f"recipe {pipeline.recipe.name} synthesises nothing")
    return _made("synthesise", synthetic)


def _pair(pipeline: Pipeline) -> dict[str, Any]:
    pairs = pipeline.pairs()
    if pairs is None:
        raise ValueError(
            f"--judging.judge {pipeline.recipe.judging.judge} needs no candidates: "
            "choose features or vllm"
        )
    return _made("pair", pairs)


def _audit(pipeline: Pipeline) -> dict[str, Any]:
    from rich.console import Console

    from jobs.audit import tables

    made = pipeline.audit()
    for table in tables(made):
        Console(stderr=pipeline.run.json).print(table)
    return _made("audit", made, checks=made.manifest.extra["checks"])


def _plan(pipeline: Pipeline) -> dict[str, Any]:
    return {"verb": "plan", **pipeline.plan()}


def _judge(pipeline: Pipeline) -> dict[str, Any]:
    judgments = pipeline.judgments()
    extra = judgments.manifest.extra
    # Tokens are of judges that have some.
    more = {k: v for k, v in extra.get("usage", {}).items() if v or k in ("new", "known")}
    more |= {name: extra[name] for name in ("store", "rank_bias") if extra.get(name)}
    return _made("judge", judgments, **more)


def _train(pipeline: Pipeline) -> dict[str, Any]:
    if pipeline.run.encoder is not None:
        raise ValueError("train makes an encoder: --start names the one to begin with")
    if pipeline.recipe.reranking is not None:
        pipeline.reranker(pipeline.recipe.reranking)
    else:
        pipeline.encoder()
    return _made("train", pipeline.artifact("train"))


def _embed(pipeline: Pipeline) -> dict[str, Any]:
    return _made("embed", pipeline.embeddings("trained", pipeline.encoder()))


def _evaluate(pipeline: Pipeline) -> dict[str, Any]:
    from rich.console import Console

    from jobs.evaluate import table

    report = pipeline.report()
    Console(stderr=pipeline.run.json).print(table(report))
    return _made("evaluate", report, **{"ndcg@10": report.manifest.extra["ndcg@10"]})


def _index(pipeline: Pipeline) -> dict[str, Any]:
    index = pipeline.index()
    made = ("structure", "search", "recall@10", "latency_ms")
    return _made("index", index, **{name: index.manifest.extra[name] for name in made})


def _pipeline(pipeline: Pipeline) -> dict[str, Any]:
    pipeline.refuse_trained_split()
    if pipeline.recipe.reranking is not None:
        return _reranking(pipeline, pipeline.recipe.reranking)
    encoder = pipeline.encoder()
    split, splits = pipeline.run.split, pipeline.data().qrels.manifest.extra["splits"]
    summary: dict[str, Any] = {}
    if splits.get(split):
        summary = _evaluate(pipeline)
        summary["report"] = f"{summary['at']}/report.html"
    index = pipeline.index()
    if not splits.get(split):
        summary = _made("pipeline", index, report=_no_report(pipeline))
    serve = f"make serve INDEX={index.url} ENCODER={encoder}"
    return {**summary, "verb": "pipeline", "index": index.url, "serve": serve}


def _reranking(pipeline: Pipeline, settings: Reranking) -> dict[str, Any]:
    """The pipeline of a reranker, which has no index of its own."""
    reranker = pipeline.reranker(settings)
    split, splits = pipeline.run.split, pipeline.data().qrels.manifest.extra["splits"]
    # A reranker that `--encoder` names is not trained: there is only the report to make.
    if splits.get(split) or pipeline.run.encoder is not None:
        summary = _evaluate(pipeline)
        summary["report"] = f"{summary['at']}/report.html"
    else:
        summary = _made("pipeline", pipeline.artifact("train"), report=_no_report(pipeline))
    return {**summary, "verb": "pipeline", "reranker": reranker}


def _no_report(pipeline: Pipeline) -> str:
    from jobs.qrels import why_rejected

    rejected = why_rejected(pipeline.data().qrels)
    return f"none: nobody judged a query of split {pipeline.run.split}{rejected}"


VERBS: dict[str, Callable[[Pipeline], dict[str, Any]]] = {
    "ingest": _ingest,
    "synthesise": _synthesise,
    "pair": _pair,
    "judge": _judge,
    "audit": _audit,
    "train": _train,
    "prefer": lambda pipeline: _made("prefer", pipeline.judged_preferences()),
    "embed": _embed,
    "index": _index,
    "evaluate": _evaluate,
    "pipeline": _pipeline,
}
