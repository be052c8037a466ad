"""Other runs' judgments, trained on beside a recipe's own: `training.mix`.

A run is the directory that its `--out` named. Of what stands there training reads what that run
would train on: the last of its judgments, and the queries and documents that they name, through
the calibration map that its own model was trained through, if any. Of a run that has trained none,
judgments are read as stored. Its preferences are not read.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bixse.artifacts import BEGUN, MANIFEST, Artifact, fingerprints
from bixse.evaluation.leakage import find_leaks
from bixse.place import Place
from bixse.training.settings import Training
from jobs.held_out import kept_apart
from jobs.supervision import read_labels

if TYPE_CHECKING:
    from bixse.training.groups import Labels

_JUDGMENTS = ("judgments-sampled", "judgments-contrasted", "judgments-verified", "judgments")
"""Names of a run's judgments, from those that it makes last to those that it makes first."""


@dataclass(frozen=True)
class Supervision:
    """A run's judgments, and what they name."""

    url: str
    judgments: Artifact
    queries: tuple[Artifact, ...]
    """The given ones, then what was made."""
    corpus: Artifact
    documents: Artifact | None
    calibration: Artifact | None = None

    def inputs(self, name: str) -> dict[str, str]:
        """Fingerprints of what training reads."""
        found = fingerprints(
            judgments=self.judgments,
            queries=self.queries,
            corpus=self.corpus,
            documents=self.documents,
            calibration=self.calibration,
        )
        return {f"{name}-{what}": fingerprint for what, fingerprint in found.items()}


def open_run(url: str) -> Supervision:
    """What stands in a run's directory, or at its URL.

    Raises ValueError when there are no judgments, when one of the artefacts is unfinished or
    damaged, when the map that the run trained through stands elsewhere, and when a query of its own
    dev or test split was judged: it is kept to measure by.
    """
    judgments = next((name for name in _JUDGMENTS if _is_there(url, name)), None)
    if judgments is None:
        raise _refusal(url, "holds no judgments: name the --out of a run that judged or trained")

    def made(name: str, kind: str) -> Artifact | None:
        return Artifact.open(f"{url}/{name}", kind) if _is_there(url, name) else None

    try:
        more = [made(name, "queries") for name in ("synthetic", "anchors", "shown-queries")]
        given = Artifact.open(f"{url}/queries", "queries")
        run = Supervision(
            url,
            Artifact.open(f"{url}/{judgments}", "judgments"),
            (given, *(queries for queries in more if queries is not None)),
            Artifact.open(f"{url}/corpus", "corpus"),
            made("documents", "documents"),
            _calibration(url),
        )
        qrels = Artifact.open(f"{url}/qrels", "qrels")
    except ValueError as error:
        raise _refusal(url, str(error)) from None
    refuse_held_out(run, given, qrels, "its own")
    return run


def labels_of(run: Supervision, settings: Training, aside: Path) -> "Labels":
    """A run's labels. Raises ValueError as `read_labels` and `plan_of`, naming the run."""
    from bixse.training.loop import plan_of

    try:
        labels = read_labels(
            run.judgments,
            run.queries,
            run.corpus,
            run.calibration,
            documents=run.documents,
            aside=aside,
        )
        plan_of(labels, settings)
    except ValueError as error:
        raise _refusal(run.url, str(error)) from None
    return labels


def refuse_held_out(run: Supervision, queries: Artifact, qrels: Artifact, whose: str) -> None:
    """Raises ValueError when a run judged a query, under whatever id, that `qrels` keep for dev or
    test."""
    judged = set(run.judgments.column("query_id"))
    leaks = find_leaks(dict(_texts([queries], kept_apart(qrels))), _texts(run.queries, judged))
    if leaks:
        raise _refusal(
            run.url,
            f"{len(leaks)} queries of {whose} dev or test split are judged there, first "
            f"{leaks[0].training_query_id!r} ({leaks[0].text!r}): they are not for training",
        )


def refuse_repeated(judgments: Artifact, mix: Sequence[Supervision]) -> None:
    """Raises ValueError when the same judgments would be two sets."""
    homes = {judgments.fingerprint: "this run"}
    for run in mix:
        if run.judgments.fingerprint in homes:
            raise _refusal(run.url, f"has the judgments of {homes[run.judgments.fingerprint]}")
        homes[run.judgments.fingerprint] = run.url


def _refusal(url: str, sentence: str) -> ValueError:
    return ValueError(f"--training.mix {url}: {sentence}")


def _is_there(url: str, name: str) -> bool:
    """Whether the artefact is there, finished or begun."""
    return bool(Place(f"{url}/{name}").names())


def _calibration(url: str) -> Artifact | None:
    """The map that a run's model was trained through, or begun to be.

    Raises ValueError when another, or none, stands in the run's directory.
    """
    wanted = None
    for kind in ("encoder", "reranker"):
        place = Place(f"{url}/{kind}")
        if place.exists(MANIFEST):
            inputs = Artifact.open(place.url, kind, verify=False).manifest.inputs
        elif place.exists(BEGUN):
            inputs = json.loads(place.read(BEGUN))["inputs"]
        else:
            continue
        wanted = inputs.get("calibration", wanted)
    if wanted is None:
        return None
    at = f"{url}/calibration"
    found = Artifact.open(at, "calibration") if _is_there(url, "calibration") else None
    if found is None or found.fingerprint != wanted:
        stands = "nothing" if found is None else f"map {found.fingerprint}"
        raise ValueError(
            f"trained through calibration map {wanted}, and {stands} stands at {at}: copy the "
            "map's directory there"
        )
    return found


def _texts(artifacts: Sequence[Artifact], query_ids: set[str]) -> Iterator[tuple[str, str]]:
    for artifact in artifacts:
        for query_id, text in artifact.rows("query_id", "text"):
            if query_id in query_ids:
                yield query_id, text
