"""A judging job that takes long enough to be killed: `python -m tests.jobs.slow_judge FOLDER OUT`.

With a third word the label store of that name is used; OUT `backwards` asks the last pairs first.

The judge stands at the engine's seam: it writes down whom it answered, and answers slowly.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bixse.artifacts import Artifact, begin
from bixse.judging.asked import Answers, Asked
from bixse.judging.labels import Labels
from jobs.judges.seam import Judge
from jobs.judges.unit import JudgeUnit
from jobs.parts import row_units, run_units
from tests.jobs.test_store import LengthJudge, judge_of

UNIT_PAIRS, IN_FLIGHT = 5, 2


class SlowJudge(LengthJudge):
    """A fiftieth of a second a pair."""

    def __call__(self, asked: Sequence[Asked]) -> Answers:
        time.sleep(0.02 * len(asked))
        return super().__call__(asked)


def run(folder: Path, out: str, shared: str | None = None) -> Artifact:
    draft = begin(str(folder / out), "judgments", config={}, inputs={})
    if isinstance(draft, Artifact):
        return draft
    log = folder / f"{out}.log"
    seam = judge_of(log)
    judge = Judge(
        build=SlowJudge, arguments=(str(log),), scale=seam.scale, origin="llm",
        signature=seam.signature,
    )  # fmt: skip
    queries = [Artifact.open(str(folder / "queries"))]
    corpus = Artifact.open(str(folder / "corpus"))
    trying = str(folder / f"{out}-trying")
    units = row_units(Artifact.open(str(folder / "pairs")), UNIT_PAIRS)
    store = str(folder / (shared or f"{out}-labels"))
    if out == "backwards":
        units = units[::-1]
    run_units(
        draft, units, JudgeUnit, (queries, corpus, judge, store, None, trying),
        label="judge", actors=1, cpus=1, gpus=0, in_flight=IN_FLIGHT,
    )  # fmt: skip
    Labels(store, seam.signature or {}, load=False).compact()
    return draft.finish()


if __name__ == "__main__":
    run(Path(sys.argv[1]), *sys.argv[2:])
