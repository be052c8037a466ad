"""A file of grades -> judgments: what somebody else's judge has said, under its name.

    python -m jobs.judge bixse --data DIR --out DIR --judging.judge given --judging.given.file FILE

A grade becomes all the probability on its step of the scale (a grade between two steps is shared by
both). A line that cannot be read, names an unknown id, comes twice or lies outside the scale is a
rejection with its reason.
"""

from collections.abc import Sequence

from bixse.artifacts import Artifact, begin, fingerprints
from bixse.judging.settings import Given
from bixse.records import JUDGMENTS, Judgment, Rejection
from bixse.scale import Scale, linear
from jobs.files import file_fingerprint, short_name
from jobs.formats import read_grades
from jobs.parts import write_rows

PART_ROWS = 1_000_000


def import_grades(
    queries: Sequence[Artifact],
    corpus: Artifact,
    given: Given,
    config: dict[str, object],
    out: str,
) -> Artifact:
    """The judgments that `given.file` holds of these queries and documents.

    Raises ValueError in one sentence when no file is named, it cannot be read, or no line of it is
    a grade of a known pair.
    """
    if not given.file:
        raise ValueError("--judging.judge given needs the grades: set --judging.given.file")
    inputs = {
        "grades": file_fingerprint(given.file),
        **fingerprints(corpus=corpus, queries=queries),
    }
    judge = given.judge or given.file.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    found = list(read_grades(given.file))
    grades = [grade for _, _, grade in found if grade is not None]
    scale = _scale(given, grades)
    known_queries = {query_id for some in queries for query_id in some.column("query_id")}
    known_docs = set(corpus.column("doc_id"))
    kept: dict[tuple[str, str], Judgment] = {}
    rejected: list[Rejection] = []
    for row, key, grade in found:
        problem = row.problem
        if grade is not None:
            if key[0] not in known_queries:
                problem = "unknown query_id"
            elif key[1] not in known_docs:
                problem = "unknown doc_id"
            elif key in kept:
                problem = "judged twice"
            elif not scale.values[0] <= grade <= scale.values[-1]:
                problem = f"grade {grade:g} is outside the scale"
        if problem or grade is None:
            ids = {} if grade is None else {"query_id": key[0], "doc_id": key[1]}
            rejected.append(row.reject(problem, **ids))
            continue
        probs = scale.grade_probs(grade)
        kept[key] = Judgment(*key, probs, scale.relevance(probs), judge, "", given.origin)
    if not kept:
        why = f"{rejected[0].source} line {rejected[0].line}: {rejected[0].reason}"
        raise ValueError(f"no grade of a known pair in {short_name(given.file)}: {why}")
    draft = begin(out, "judgments", config=config, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    write_rows(draft, kept.values(), JUDGMENTS, PART_ROWS, rejected)
    extra = {
        "scale": scale.record,
        "origin": given.origin,
        "judges": [judge],
    }
    return draft.finish(extra=extra)


def _scale(given: Given, grades: Sequence[float]) -> Scale:
    if not grades:
        raise ValueError(
            f"{short_name(given.file)} holds no grade: expected query, document, grade"
        )
    best = max(grades) if given.grade_max is None else given.grade_max
    if best <= given.grade_min:
        raise ValueError(
            f"{short_name(given.file)} holds no grade above {given.grade_min:g}: set "
            "--judging.given.grade-min and --judging.given.grade-max to the ends of its scale"
        )
    return linear(given.grade_min, best)
