"""Judgments beside human grades: how far they agree, and the map that brings them together."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bixse.artifacts import Artifact, begin
from bixse.judging.agreement import Aligned, confusion, intervals, measures, reliability
from bixse.judging.audit import align, matched
from bixse.judging.calibration import (
    FILE,
    KIND,
    LEAST_PAIRS,
    Calibration,
    Floats,
    Isotonic,
    Temperature,
    fit_isotonic,
    fit_temperature,
    grade_probs,
    load,
    relevance,
    signers,
    single_grades,
)
from bixse.judging.given import ASSUMED
from bixse.judging.settings import Audit
from bixse.records import JUDGMENTS


def fit(
    sources: Sequence[tuple[Artifact, Artifact]],
    kind: Literal["isotonic", "temperature"],
    split: str,
    out: str,
) -> Artifact:
    """A calibration map of the judgments, fitted on the human grades of `split` beside each.

    `sources` are (judgments, qrels), on one scale; every pair weighs the same. Raises ValueError
    when no pair has both, when people gave all of them one grade, when an isotonic map is asked for
    of fewer than LEAST_PAIRS, when no judge answered, or there is no scale that all are on.
    """
    inputs: dict[str, str] = {}
    for number, (judgments, qrels) in enumerate(sources):
        inputs |= {f"judgments-{number}": judgments.fingerprint}
        inputs |= {f"qrels-{number}": qrels.fingerprint}
    scales = {tuple(judgments.manifest.extra["scale"]["values"]) for judgments, _ in sources}
    if len(scales) > 1:
        raise ValueError(f"one map cannot be fitted on several scales: {sorted(scales)}")
    (scale,) = scales
    if not scale:
        raise ValueError(
            "a map is of judgments on one scale, the judges of this cascade are on several: name "
            "the judgments of one of them with --audit.judgments"
        )
    fitted = _fit(sources, scale, kind, split)
    draft = begin(out, KIND, config={"map": kind, "split": split}, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    draft.write_file(FILE, fitted.model_dump_json(indent=1).encode())
    return draft.finish(rows=fitted.pairs, extra={"queries": fitted.queries})


def _fit(
    sources: Sequence[tuple[Artifact, Artifact]],
    scale: tuple[float, ...],
    kind: Literal["isotonic", "temperature"],
    split: str,
) -> Calibration:
    probs, human, signed, queries = [], [], set(), 0
    for judgments, qrels in sources:
        table = _answered(judgments, judgments.table(JUDGMENTS.names), qrels)
        if not table.num_rows:
            raise ValueError(
                "a map is of a judge's answers, and these are the grades that people gave: "
                "--judging.judge names a judge, --audit.judgments what one has said"
            )
        graded = _graded(qrels, split)
        rows, others = matched(table, graded)
        chosen = table.take(pa.array(rows))
        probs.append(grade_probs(chosen, scale))
        human.append(graded["relevance"].to_numpy().astype(np.float64)[others])
        signed |= set(signers(chosen))
        queries += len(pc.unique(chosen["query_id"]))
    probs_NK, human_N = np.concatenate(probs), np.concatenate(human)
    if not len(human_N):
        raise ValueError(f"nobody graded a judged pair of split {split}: set --audit.fit-split")
    if not np.ptp(human_N):
        # Qrels often hold nothing but what is relevant: of them every pair would be.
        raise ValueError(
            f"people gave all {len(human_N)} judged pairs of split {split} one grade, and a map of "
            "them gives every pair that: bring grades of what is irrelevant too, or set "
            "--audit.fit-split"
        )
    map_: Isotonic | Temperature
    if kind == "isotonic":
        _refuse_few(probs_NK, split)
        map_ = fit_isotonic(probs_NK, human_N, scale)
    else:
        map_ = fit_temperature(probs_NK, human_N, scale)
    return Calibration(
        map=map_, signed=tuple(sorted(signed)), scale=scale, pairs=len(human_N), queries=queries
    )


def _refuse_few(probs_NK: Floats, split: str) -> None:
    """Raises ValueError for an isotonic map of fewer than LEAST_PAIRS."""
    if len(probs_NK) >= LEAST_PAIRS:
        return
    else_ = "" if single_grades(probs_NK) else ", or fit a single number (--audit.fit temperature)"
    raise ValueError(
        f"judge and people have both graded {len(probs_NK)} pairs of split {split}, and an "
        f"isotonic map of fewer than {LEAST_PAIRS} follows their noise: bring more grades of such "
        f"pairs, set --audit.fit-split{else_}"
    )


def agreement(
    judgments: Artifact,
    table: pa.Table,
    qrels: Artifact,
    calibration: Artifact | None,
    lengths: Mapping[str, int],
    settings: Audit,
) -> dict[str, Any] | None:
    """Of each split with a pair that judge and people graded; None where no judge answered.

    A split on which the map was fitted says `in_sample`.
    """
    table = _answered(judgments, table, qrels)
    if not table.num_rows:
        return None
    scale = judgments.manifest.extra["scale"]["values"]
    read = {"judged": relevance(table, scale, None)}
    if calibration is not None:
        read["calibrated"] = relevance(table, scale, load(calibration))
    found: dict[str, Any] = {}
    for split in qrels.manifest.extra["splits"]:
        human = _graded(qrels, split)
        for name, relevance_N in read.items():
            pairs = align(table, relevance_N, human, qrels.manifest.extra["scale"], lengths)
            if not len(pairs):
                continue
            of_split = found.setdefault(split, {})
            of_split |= {"pairs": len(pairs), "queries": len(np.unique(pairs.query_N))}
            of_split[name] = _figures(pairs, settings)
        if calibration is not None and split in found:
            found[split]["in_sample"] = _in_sample(calibration, qrels, split)
    return found


def _answered(judgments: Artifact, table: pa.Table, qrels: Artifact) -> pa.Table:
    """The rows of the judgments that a judge has answered: no candidate that nobody judged, and no
    grade of these very qrels, which would agree with itself."""
    chosen = pc.not_equal(table["judge"], ASSUMED)
    manifest = judgments.manifest
    if qrels.fingerprint in (manifest.inputs.get("qrels"), manifest.extra.get("qrels")):
        chosen = pc.and_(chosen, pc.not_equal(table["origin"], "human"))
    return table.filter(chosen)


def refuse_in_sample(calibration: Artifact, qrels: Artifact, split: str) -> None:
    """Raises ValueError for a map that was fitted on the grades that a run is measured by."""
    if _in_sample(calibration, qrels, split):
        raise ValueError(
            f"the map {calibration.url} was fitted on people's grades of the {split} split, which "
            "this run is measured by: fit it on another (--audit.fit-split)"
        )


def _in_sample(calibration: Artifact, qrels: Artifact, split: str) -> bool:
    fitted_on = calibration.manifest.inputs.values()
    return qrels.fingerprint in fitted_on and calibration.manifest.config["split"] == split


def _figures(pairs: Aligned, settings: Audit) -> dict[str, Any]:
    values = measures(pairs, settings.bins)
    ci95 = intervals(pairs, settings.bins, settings.bootstrap, settings.seed)
    return {
        "measures": {
            name: {"value": value, "ci95": list(ci95[name])} for name, value in values.items()
        },
        "confusion": confusion(pairs).tolist(),
        "reliability": {
            by: reliability(pairs.judged_N, pairs.human_N, settings.bins, by)
            for by in ("mass", "width")
        },
    }


def _graded(qrels: Artifact, split: str) -> pa.Table:
    return qrels.table(["query_id", "doc_id", "relevance", "split"]).filter(
        pc.equal(pc.field("split"), split)
    )
