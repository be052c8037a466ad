"""Requests for texts: written down first, then handed out in units, and what they yielded.

What is wanted stands in an artefact of its own, one row a text, so that each row becomes a text or
a rejection and a rerun asks only for what is missing.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bixse.artifacts import REJECTED_DIR, Artifact, Draft, begin, part_name
from bixse.synthesis.requests import REQUESTS, Request
from bixse.synthesis.settings import Generator
from jobs.parts import row_units, run_units, write_rows
from jobs.recipe import Placement
from jobs.texts import DocumentTexts

PART_ROWS = 10_000

# The model is an input, by its weights; where it runs changes no text.
_ELSEWHERE = {"model", "revision", "gpu_memory_utilization", "tensor_parallel"}


def store_requests(
    url: str,
    inputs: Mapping[str, str],
    config: Mapping[str, Any],
    wanted: Callable[[], Iterable[Request]],
) -> Artifact:
    draft = begin(url, "requests", config=config, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    write_rows(draft, wanted(), REQUESTS, PART_ROWS)
    return draft.finish()


def run_requests(
    draft: Draft,
    wanted: Artifact,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    rows: int,
    placement: Placement,
) -> None:
    run_units(
        draft,
        row_units(wanted, rows),
        work,
        arguments,
        label="write",
        actors=placement.judge_actors,
        cpus=placement.cpus_per_actor,
        gpus=placement.gpus_per_actor,
    )


def yields(draft: Draft, wanted: Artifact, written_from: str, asked_from: str) -> dict[str, Any]:
    """Texts per document (or query) and why the others were rejected, for the manifest."""
    texts: dict[str, int] = dict.fromkeys(wanted.column(asked_from), 0)
    reasons: Counter[str] = Counter()
    for number in draft.parts_done():
        for name in draft.part(part_name(number), [written_from])[written_from].to_pylist():
            texts[name] += 1
        rejected = f"{REJECTED_DIR}/{part_name(number)}"
        if draft.place.exists(rejected):
            found = draft.part(rejected, ["reason"])["reason"].to_pylist()
            reasons.update(reason.split(":")[0] for reason in found)
    return {
        "requests": wanted.manifest.rows,
        "written_from": len(texts),
        "texts_each": {str(n): count for n, count in sorted(Counter(texts.values()).items())},
        "rejections": dict(sorted(reasons.items())),
    }


def cut_documents(
    texts: DocumentTexts, doc_ids: Sequence[str], cut: Callable[[str], str]
) -> dict[str, str]:
    """Each document once, cut to what a prompt shows of it."""
    once = list(dict.fromkeys(doc_ids))
    return {doc_id: cut(text).strip() for doc_id, text in zip(once, texts.get(once), strict=True)}


def generator_config(generator: Generator) -> dict[str, Any]:
    return generator.model_dump(mode="json", exclude=_ELSEWHERE)
