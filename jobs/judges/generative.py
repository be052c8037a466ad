"""A language model in vLLM, asked for the distribution of one token a pair and order."""

from collections.abc import Sequence

from bixse.judging.asked import Answers, Asked, Cost
from bixse.judging.pointwise import judgment, too_long, unreadable
from bixse.judging.prompts import ORDERS, PROMPTS
from bixse.judging.settings import Pointwise
from bixse.judging.tokens import PromptTokenizer
from jobs.engine import Engine, judge_name
from jobs.judges.seam import Judge
from jobs.loading import check_gpus, pin
from jobs.recipe import Placement

IN_FLIGHT = 3
"""Units a worker: one in the engine, one being tokenised, one being written (ours)."""


def generative(settings: Pointwise, placement: Placement) -> Judge:
    """Raises ValueError when there is no such model, or it cannot answer the prompt."""
    pinned, identity = pin(settings)
    check_gpus(pinned, placement, "--judging.vllm")
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
            "scale": prompt.scale.record,
            "orders": pinned.orders,
            "dtype": pinned.dtype,
            "document_tokens": pinned.document_tokens,
            "min_grade_mass": pinned.min_grade_mass,
        },
        in_flight=IN_FLIGHT,
        plan=GenerativePlan,
        planned=("prompt_tokens", "shared_tokens", "output_tokens"),
        prefixes=("query", "document")[: pinned.orders],
    )


class GenerativeJudge:
    """Prompts, tokens, one prefill each, and the reading of the answers."""

    def __init__(self, settings: Pointwise, identity: str) -> None:
        self._prompts = _Prompts(settings)
        self._engine = Engine(settings)
        judge = judge_name(settings, identity, self._engine.dtype)
        self._signature = (self._prompts.tokens.prompt, judge, settings.min_grade_mass)

    def __call__(self, asked: Sequence[Asked]) -> Answers:
        prompts, lengths, fitting = self._prompts(asked)
        sent = [of_order[row] for of_order in prompts for row in fitting]
        replies = self._engine.logprobs(sent, self._prompts.tokens.label_ids)
        # Order after order, so that every len(fitting)-th answer is of the same pair.
        answers = replies.logprobs
        answers_of = {row: answers[at :: len(fitting)] for at, row in enumerate(fitting)}
        read = {
            row: judgment(asked[row].query_id, asked[row].doc_id, found, *self._signature)
            for row, found in answers_of.items()
        }
        limit = self._prompts.limit
        verdicts = [
            read[row] if row in read else too_long(pair.query_id, pair.doc_id, lengths[row], limit)
            for row, pair in enumerate(asked)
        ]
        return Answers(verdicts, replies.usage, unreadable(read.values()))


class GenerativePlan:
    """Counts what `GenerativeJudge` would send, token for token, and answers nothing."""

    def __init__(self, settings: Pointwise, identity: str) -> None:
        self._prompts = _Prompts(settings)

    def __call__(self, asked: Sequence[Asked]) -> list[Cost]:
        prompts, lengths, fitting = self._prompts(asked)
        tokens, shared = [0] * len(asked), [0] * len(asked)
        sent = sorted((of_order[row], row) for of_order in prompts for row in fitting)
        before: Sequence[int] = ()
        for prompt, row in sent:
            tokens[row] += len(prompt)
            shared[row] += _common(before, prompt)
            before = prompt
        fits = set(fitting)
        return [
            Cost(tokens[row], shared[row], len(prompts) * (row in fits), fits=row in fits)
            for row in range(len(lengths))
        ]


class _Prompts:
    """The prompts of pairs in every order, and which of them fit."""

    def __init__(self, settings: Pointwise) -> None:
        self.tokens = PromptTokenizer.load(settings)
        self._orders = ORDERS[: settings.orders]
        self.limit = settings.max_model_len - 1  # The answer takes a token too.

    def __call__(
        self, asked: Sequence[Asked]
    ) -> tuple[list[list[list[int]]], list[int], list[int]]:
        """One list an order with one prompt a pair; the longest prompt of each pair; the rows of
        the pairs that fit."""
        queries, passages = [pair.query for pair in asked], [pair.passage for pair in asked]
        prompts = [self.tokens.encode(queries, passages, order) for order in self._orders]
        lengths = [max(map(len, of_pair)) for of_pair in zip(*prompts, strict=True)]
        return prompts, lengths, [row for row, n in enumerate(lengths) if n <= self.limit]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next(
        (at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
