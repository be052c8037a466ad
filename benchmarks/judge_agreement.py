"""Published LLM grades beside human ones: how far they agree, and what a calibration map mends.

    python -m benchmarks.judge_agreement --data DIR

`--data` holds `trec-dl-2019`, `-2020` and `-2021` in BEIR layout, with `qrels_llm/<judge>.tsv` in
each: grades 0-3 of the pairs that NIST's assessors graded too. Each file is imported as judgments
like `--judging.judge given` does; a map is fitted on the other years and applied to the year that
it has not seen. Intervals are bootstrap intervals over queries. `--quick` runs on made-up grades.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from bixse.artifacts import Artifact
from bixse.judging.agreement import Aligned, interval, measures, resampled
from bixse.judging.audit import align
from bixse.judging.calibration import load, relevance
from bixse.judging.settings import Given, Judging, config
from bixse.records import JUDGMENTS
from jobs.calibration import fit
from jobs.grades import import_grades
from jobs.ingest import ingest
from jobs.recipe import Ingest

YEARS = (2019, 2020, 2021)
JUDGES = (
    "gpt4o_umbrela",
    "gpt4_umbrela",
    "llama3-70b_4prompts",
    "llama3-8b_4prompts",
    "flant5large_4prompts",
)
SPLIT, BINS, SEED = "test", 10, 0
SHOWN = ("kappa", "kappa_quadratic", "kendall", "over_rating", "squared_error", "ece")

EXPECTED = {
    "gpt4o_umbrela": {
        2019: {"kappa": 0.363, "kappa_quadratic": 0.595, "kendall": 0.548},
        2020: {"kappa": 0.341, "kappa_quadratic": 0.555, "kendall": 0.512},
        2021: {"kappa": 0.371, "kappa_quadratic": 0.650, "kendall": 0.602},
    },
    "llama3-8b_4prompts": {
        2019: {"kappa": 0.124, "kappa_quadratic": 0.302, "kendall": 0.413},
        2020: {"kappa": 0.125, "kappa_quadratic": 0.275, "kendall": 0.406},
    },
}
"""What the description of the data says (GPT-4o .34-.37, quadratic .56-.65; Llama-3-8B .12), in the
digits that scikit-learn and scipy give on the files themselves, read with pandas."""


@dataclass(frozen=True)
class Graded:
    """One judge on one year: its judgments and the human grades."""

    judgments: Artifact
    qrels: Artifact

    def aligned(self, calibration: Artifact | None = None) -> Aligned:
        table = self.judgments.table(JUDGMENTS.names)
        scale = self.judgments.manifest.extra["scale"]["values"]
        read_N = relevance(table, scale, load(calibration) if calibration else None)
        human = self.qrels.table(["query_id", "doc_id", "relevance", "split"])
        human = human.filter(pc.equal(human["split"], SPLIT))
        return align(table, read_N, human, self.qrels.manifest.extra["scale"])


def sets(data: Path, out: Path, judges: Sequence[str]) -> dict[str, dict[int, Graded]]:
    """judge -> year -> its grades as judgments, for every file that is there."""
    found: dict[str, dict[int, Graded]] = {judge: {} for judge in judges}
    for year in YEARS:
        folder = data / f"trec-dl-{year}"
        made = ingest(str(folder), Ingest(grade_max=3.0), str(out / str(year)))
        for judge in judges:
            file = folder / "qrels_llm" / f"{judge}.tsv"
            if file.exists():
                given = Given(file=str(file), grade_max=3.0)
                shaping = config(Judging(judge="given", given=given))
                path = str(out / str(year) / judge)
                judgments = import_grades([made.queries], made.corpus, given, shaping, path)
                found[judge][year] = Graded(judgments, made.qrels)
    return found


def agreement_of(graded: Graded) -> dict[str, float]:
    return measures(graded.aligned(), BINS)


def fitted_elsewhere(by_year: Mapping[int, Graded], held_out: int, out: Path) -> Artifact:
    """The isotonic map of every other year."""
    others = [(one.judgments, one.qrels) for year, one in by_year.items() if year != held_out]
    return fit(others, "isotonic", SPLIT, str(out / f"without-{held_out}"))


def rotation(
    by_year: Mapping[int, Graded], held_out: int, out: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Measures on the year held out, before and after the map of the others."""
    map_ = fitted_elsewhere(by_year, held_out, out)
    graded = by_year[held_out]
    return measures(graded.aligned(), BINS), measures(graded.aligned(map_), BINS)


def row(by_year: Mapping[int, Graded], year: int, out: Path, resamples: int) -> dict[str, Any]:
    """Everything of one judge and year, with intervals; `difference` is calibrated - judged."""
    graded = by_year[year]
    pairs = graded.aligned()
    drawn = resampled(pairs, BINS, resamples, SEED)
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "judged": _with_intervals(measures(pairs, BINS), drawn),
    }
    if len(by_year) > 1:
        mended = graded.aligned(fitted_elsewhere(by_year, year, out))
        redrawn = resampled(mended, BINS, resamples, SEED)
        found["calibrated"] = _with_intervals(measures(mended, BINS), redrawn)
        found["difference"] = {
            name: {
                "value": found["calibrated"][name]["value"] - found["judged"][name]["value"],
                "ci95": list(interval(redrawn[name] - drawn[name])),
            }
            for name in SHOWN
        }
    return found


def _with_intervals(values: Mapping[str, float], drawn: Mapping[str, Any]) -> dict[str, Any]:
    return {n: {"value": values[n], "ci95": list(interval(drawn[n]))} for n in SHOWN}


def table(found: Mapping[str, Mapping[int, Any]]) -> list[str]:
    """The figures as Markdown: agreement, then calibration on the year held out."""
    lines = ["| judge | year | pairs | κ | quadratic κ | τ-b | over-rating |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for judge, by_year in found.items():
        for year, one in by_year.items():
            cells = [_cell(one["judged"][name]) for name in SHOWN[:4]]
            lines.append(f"| {judge} | {year} | {one['pairs']:,} | {' | '.join(cells)} |")
    lines += ["", "| judge | held-out year | calibration error | mapped | difference |"]
    lines[-1] += " squared error | mapped | quadratic κ | mapped |"
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for judge, by_year in found.items():
        for year, one in by_year.items():
            if "calibrated" in one:
                before, after = one["judged"], one["calibrated"]
                cells = [
                    *(f"{side['ece']['value']:.3f}" for side in (before, after)),
                    _cell(one["difference"]["ece"], sign=True),
                    *(f"{side['squared_error']['value']:.3f}" for side in (before, after)),
                    *(f"{side['kappa_quadratic']['value']:.3f}" for side in (before, after)),
                ]
                lines.append(f"| {judge} | {year} | {' | '.join(cells)} |")
    return lines


def _cell(measure: Mapping[str, Any], sign: bool = False) -> str:
    low, high = measure["ci95"]
    form = "+.3f" if sign else ".3f"
    return f"{measure['value']:{form}} [{low:{form}}, {high:{form}}]"


def make_up(at: Path) -> None:
    """Three years of ten queries; the judge gives the human grade, or one more half of the time."""
    rng = random.Random(0)
    for year in YEARS:
        folder = at / f"trec-dl-{year}"
        for name in ("qrels", "qrels_llm"):
            (folder / name).mkdir(parents=True)
        queries = [f"{year}-{n}" for n in range(10)]
        documents = [f"d{n}" for n in range(20)]
        for name, ids in (("queries", queries), ("corpus", documents)):
            lines = (json.dumps({"_id": one, "text": f"text of {one}"}) + "\n" for one in ids)
            (folder / f"{name}.jsonl").write_text("".join(lines))
        human = {(q, d): rng.choice((0, 0, 0, 1, 2, 3)) for q in queries for d in documents}
        kind = {pair: min(3, grade + rng.randint(0, 1)) for pair, grade in human.items()}
        for path, grades in (("qrels/test", human), (f"qrels_llm/{JUDGES[0]}", kind)):
            lines = (f"{q}\t{d}\t{grade}\n" for (q, d), grade in grades.items())
            (folder / f"{path}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="directory of the three years")
    parser.add_argument("--quick", action="store_true", help="on made-up grades")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of the queries")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    args = parser.parse_args()
    if args.data is None and not args.quick:
        parser.error("--data is missing: the directory that holds trec-dl-2019, -2020 and -2021")
    with tempfile.TemporaryDirectory() as aside:
        data, resamples = args.data, args.bootstrap
        if args.quick:
            data, resamples = Path(aside) / "data", 20
            make_up(data)
        graded = sets(data, Path(aside) / "out", JUDGES)
        found = {
            judge: {
                year: row(by_year, year, Path(aside) / "maps" / judge, resamples)
                for year in by_year
            }
            for judge, by_year in graded.items()
        }
    print("\n".join(table(found)))
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
