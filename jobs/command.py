"""The command line: a recipe's name, then flags that its types generate.

    python -m jobs.<verb> <recipe> --out DIR [--data DIR] [--section.field value ...]

An unknown flag or a wrong value is one sentence and exit status 2, before anything heavy is
imported. Nothing here imports Ray, torch or vLLM.
"""

import contextlib
import difflib
import io
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

import tyro
from pydantic import ValidationError

from bixse.settings import plain_refusal
from jobs.recipe import Recipe
from jobs.recipes.bixse import bixse, bixse_cloze, infonce, infonce_threshold, infonce_weighted
from jobs.recipes.clicks import two_tower
from jobs.recipes.language_modelling import revela
from jobs.recipes.quickstart import quickstart
from jobs.recipes.ranking import (
    lambda_loss,
    list_kl,
    margin_mse,
    pairdistill,
    ranknet,
    scincl,
    stratified_kd,
    triplet,
    wasserstein,
)
from jobs.recipes.reranking import bce_reranker, lce
from jobs.recipes.written import customir, promptagator, promptodile, ssra, sycl

RECIPES: dict[str, Callable[[], Recipe]] = {
    "quickstart": quickstart,
    "bixse": bixse,
    "bixse_cloze": bixse_cloze,
    "infonce": infonce,
    "infonce_threshold": infonce_threshold,
    "infonce_weighted": infonce_weighted,
    "list_kl": list_kl,
    "ranknet": ranknet,
    "lambda_loss": lambda_loss,
    "margin_mse": margin_mse,
    "triplet": triplet,
    "wasserstein": wasserstein,
    "pairdistill": pairdistill,
    "stratified_kd": stratified_kd,
    "scincl": scincl,
    "two_tower": two_tower,
    "revela": revela,
    "lce": lce,
    "bce_reranker": bce_reranker,
    "promptagator": promptagator,
    "promptodile": promptodile,
    "customir": customir,
    "sycl": sycl,
    "ssra": ssra,
}

_CONFIG = (tyro.conf.AvoidSubcommands,)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every verb is told."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: str
    """Directory (or fsspec URL) that the stages' artefacts go to; finished ones are not redone."""
    data: str | None = None
    """The corpus, with queries and qrels if any: a directory or a file."""
    encoder: str | None = None
    """Evaluate, embed or index this encoder (or evaluate this reranker) instead of training one: a
    directory or hub id."""
    base_index: str | None = None
    """Make a new generation of this index: its documents stay, those of `--data` are added, or put
    in place of those of the same doc_id. Without `--data` nothing is added. The encoder must be the
    index's own; name it with `--encoder`. For `index` only."""
    delete: str | None = None
    """With `--base-index`: a file of doc_ids, one a line, that the new generation leaves out."""
    split: Literal["train", "dev", "test"] = "test"
    """The split that is evaluated."""
    track: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Show training there too: TensorBoard's files go beside the model, into `<model>-tensorboard`;
    MLflow and W&B go where their own environment says (MLFLOW_TRACKING_URI, WANDB_API_KEY, ...)."""
    plan: bool = False
    """Only count what judging will take (pairs, tokens), and name what else a run asks of models;
    nothing is asked, but with `--judging.price-per-gpu-hour` a few pairs, for hours and money."""
    json: bool = False
    """Print the final summary as one JSON object on standard output; logs go to standard error."""


def parse(verb: str, argv: Sequence[str]) -> Run:
    """The run that a command line describes; exits 2 with one sentence when it describes none."""
    if not argv or argv[0] in ("-h", "--help"):
        names = ", ".join(RECIPES)
        print(f"usage: python -m jobs.{verb} <recipe> --out DIR [flags]\nrecipes: {names}")
        print(f"what each is: python -m jobs.{verb} --list")
        print(f"flags of a recipe: python -m jobs.{verb} <recipe> --help")
        sys.exit(0 if argv else 2)
    name, flags = argv[0], list(argv[1:])
    if name.startswith("-"):
        refuse(f"the recipe comes before the flags: python -m jobs.{verb} <recipe> {name} ...")
    if name not in RECIPES:
        refuse(f"unknown recipe {name!r}{_nearest(name, RECIPES)}")
    if {"-h", "--help"} & {*flags}:
        # Who reads it (`less`, `head`) may have seen enough: that ends the process, as any tool.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    default = Run(recipe=RECIPES[name](), out=tyro.MISSING)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            run = tyro.cli(
                Run,
                prog=f"python -m jobs.{verb} {name}",
                default=default,
                args=flags,
                config=_CONFIG,
            )
    except SystemExit as exit_:
        if exit_.code:
            refuse(_unknown_flag(flags, default) or _one_sentence(complaint.getvalue()))
        raise
    except ValidationError as error:
        # Raised by a check of the whole recipe; tyro reports those of its sections itself.
        refuse(plain_refusal(" ".join(str(error).split())))
    for flag in ("out", "data", "encoder", "base_index", "delete"):
        # An unset variable of the shell would otherwise name the directory that one stands in.
        if getattr(run, flag) == "":
            refuse(f"--{flag.replace('_', '-')} is empty")
    return run


def refuse(sentence: str, status: int = 2) -> NoReturn:
    """End the program with one sentence on standard error."""
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(status)


def show(found: dict[str, Any], as_json: bool) -> None:
    """What a verb ends with: a line for each thing it found, then what it made and where."""
    if as_json:
        print(json.dumps(found))
        return
    rest = dict(found)
    verb = rest.pop("verb")
    made = {key: rest.pop(key) for key in ("made", "at", "rows", "rejected") if key in rest}
    for key, value in rest.items():
        print(f"{key:<10} {_shown(value)}")
    if made:
        counts = f"{made['rows']:,} rows, {made['rejected']:,} rejected"
        print(f"{verb}: made {made['made']} at {_shown(made['at'])} ({counts})")


def absolute(path: str) -> str:
    """Workers run in directories of their own, on nodes of their own; a URL stays as it is."""
    return path.rstrip("/") if "://" in path else os.path.abspath(path)


def _shown(value: Any) -> str:
    """A value for people: numbers in few digits, paths as they are typed from here."""
    if isinstance(value, dict):
        return "  ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    here = f"{os.getcwd()}/"
    return str(value).replace(here, "") if isinstance(value, str) else str(value)


def _unknown_flag(words: Sequence[str], default: Run) -> str | None:
    """A sentence on the first word that is no flag, with the flags that may have been meant."""
    with warnings.catch_warnings(action="ignore"):
        parser = tyro.extras.get_parser(Run, default=default, config=_CONFIG)
    known = [name for action in parser._actions for name in action.option_strings]
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            ends = [name for name in known if name.endswith(f".{flag.removeprefix('--')}")]
            close = ends[:3] or difflib.get_close_matches(flag, known, n=1)
            nearest = f": the nearest is {' or '.join(close)}" if close else ""
            return f"unknown flag {word.partition('=')[0]}{nearest}"
    return None


def _one_sentence(box: str) -> str:
    """tyro's boxed complaint as a sentence, and pydantic's in it without its types."""
    rows = [line.strip("│ ").strip() for line in box.splitlines()[1:-1]]
    # Where a terminal has no UTF-8 the title has a rule of its own.
    texts = "\n".join("" if re.fullmatch("[─-]{4,}", row) else row for row in rows).strip()
    shown = texts.partition("\n\n")[0].splitlines()
    sentence = " ".join(row for row in shown if "errors.pydantic.dev" not in row)
    sentence = sentence.split(" For further information")[0]
    return plain_refusal(sentence)


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f": the nearest is {close[0]!r}" if close else ""
