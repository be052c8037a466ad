"""A language model in vLLM, asked for the distribution of one token a pair and order."""

from collections.abc import Sequence

from bixse.judging.asked import Answers, Asked, Usage
from bixse.judging.pointwise import judgment, refuse_unreadable, too_long
from bixse.judging.prompts import ORDERS, PROMPTS
from bixse.judging.settings import Pointwise
from bixse.judging.tokens import PromptTokenizer
from jobs.engine import Engine, judge_name, pin
from jobs.judges.seam import Judge
from jobs.recipe import Placement


def generative(settings: Pointwise, placement: Placement) -> Judge:
    """Raises ValueError when there is no such model, or it cannot answer the prompt."""
    pinned, identity = pin(settings)
    _check_gpus(pinned, placement)
    PromptTokenizer.load(pinned)  # A wrong label or template is an error before any engine.
    prompt = PROMPTS[pinned.prompt]
    return Judge(
        build=GenerativeJudge,
        arguments=(pinned, identity),
        scale=prompt.scale,
        origin="llm",
        config={"prompt": prompt.hash},
        inputs={"judge": identity},
        signature={
            "judge": "vllm",
            "model": identity,
            "prompt": prompt.hash,
            "scale": {"name": prompt.scale.name, "values": list(prompt.scale.values)},
            "orders": pinned.orders,
            "dtype": pinned.dtype,
            "document_tokens": pinned.document_tokens,
            "min_grade_mass": pinned.min_grade_mass,
        },
    )


class GenerativeJudge:
    """Prompts, tokens, one prefill each, and the reading of the answers."""

    def __init__(self, settings: Pointwise, identity: str) -> None:
        self._settings = settings
        self._tokens = PromptTokenizer.load(settings)
        self._engine = Engine(settings)
        judge = judge_name(settings, identity, self._engine.dtype)
        self._signature = (self._tokens.prompt, judge, settings.min_grade_mass)

    def __call__(self, asked: Sequence[Asked]) -> Answers:
        # One list an order, one prompt a pair.
        queries, passages = [pair.query for pair in asked], [pair.passage for pair in asked]
        orders = ORDERS[: self._settings.orders]
        prompts = [self._tokens.encode(queries, passages, order) for order in orders]
        lengths = [max(map(len, of_pair)) for of_pair in zip(*prompts, strict=True)]
        limit = self._settings.max_model_len - 1  # The answer takes a token too.
        fitting = [row for row, length in enumerate(lengths) if length <= limit]
        sent = [of_order[row] for of_order in prompts for row in fitting]
        answers = self._engine.logprobs(sent, self._tokens.label_ids)
        # Order after order, so that every len(fitting)-th answer is of the same pair.
        answers_of = {row: answers[at :: len(fitting)] for at, row in enumerate(fitting)}
        read = {
            row: judgment(asked[row].query_id, asked[row].doc_id, found, *self._signature)
            for row, found in answers_of.items()
        }
        refuse_unreadable(list(read.values()))
        verdicts = [
            read[row] if row in read else too_long(pair.query_id, pair.doc_id, lengths[row], limit)
            for row, pair in enumerate(asked)
        ]
        usage = Usage(len(sent), sum(map(len, sent)), 0, len(sent))
        return Answers(verdicts, usage)


def _check_gpus(settings: Pointwise, placement: Placement) -> None:
    wanted, given = settings.tensor_parallel, placement.gpus_per_actor
    if wanted > 1 and given < wanted:
        raise ValueError(
            f"--judging.vllm.tensor-parallel {wanted} needs --placement.gpus-per-actor {wanted}, "
            f"found {given:g}"
        )
