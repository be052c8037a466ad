"""The vLLM engine that writes: chats in, sampled text out, every answer held to a JSON schema.

The schema is enforced while tokens are sampled (vLLM's structured outputs), so that an answer that
ends is JSON of that form. Sampled text is not the same on another machine or engine: what is
written is kept, it cannot be made again from its settings.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bixse.reading.chats import Messages
from bixse.synthesis.settings import Generator
from bixse.synthesis.tokens import ChatTokenizer
from bixse.synthesis.writing import Completion
from jobs.engine import Engine
from jobs.loading import check_gpus, pin
from jobs.recipe import Placement


class Writer:
    """Loaded once in an actor, called often. It lives and dies with its process."""

    def __init__(self, settings: Generator, schema: dict[str, Any]) -> None:
        """Raises ValueError when vLLM is absent or refuses the model or a setting."""
        self._settings = settings
        self._schema = schema
        self._tokens = ChatTokenizer.load(settings)
        self._llm = _Llm(settings, wanted_by="this recipe")

    def cut(self, text: str) -> str:
        """A document cut to what a prompt shows of it."""
        return self._tokens.cut(text, self._settings.document_tokens)

    def __call__(self, chats: Sequence[Messages], seeds: Sequence[int]) -> list[Completion]:
        """One completion a chat, in order (the seam `bixse.synthesis.writing.Complete`)."""
        prompts = self._tokens.encode(chats)
        limit = self._settings.max_model_len - self._settings.max_tokens
        fitting = [row for row, prompt in enumerate(prompts) if len(prompt) <= limit]
        params = [self._params(seeds[row]) for row in fitting]
        replies = self._llm.generate([prompts[row] for row in fitting], params)
        found = dict(zip(fitting, replies, strict=True))
        return [
            _completion(found[row])
            if row in found
            else Completion("", f"the prompt is too long: {len(prompt)} tokens, {limit} are read")
            for row, prompt in enumerate(prompts)
        ]

    def _params(self, seed: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        settings = self._settings
        return SamplingParams(
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=seed,
            structured_outputs=StructuredOutputsParams(json=self._schema),
        )


class _Llm(Engine):
    """The judge's engine, asked for text."""

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        """vLLM's replies, in order; prompts that share a prefix run side by side."""
        if not prompts:
            return []
        order = sorted(range(len(prompts)), key=lambda row: list(prompts[row]))
        requests = [{"prompt_token_ids": list(prompts[row])} for row in order]
        replies = self._llm.generate(requests, [params[row] for row in order], use_tqdm=False)
        found = dict(zip(order, replies, strict=True))
        return [found[row] for row in range(len(prompts))]


def _completion(reply: Any) -> Completion:
    answer = reply.outputs[0]
    cut = answer.finish_reason != "stop"
    problem = f"the answer was cut off: {len(answer.token_ids)} tokens" if cut else ""
    return Completion(answer.text, problem)


def pin_generator(settings: Generator, placement: Placement) -> tuple[Generator, str]:
    """Settings bound to the weights that stand there now, and the name of who writes.

    Raises ValueError when there is no such model, when no prompt would fit beside the answer, when
    there is no tokenizer, or when an actor has too few GPUs.
    """
    if settings.max_tokens >= settings.max_model_len:
        raise ValueError(
            f"an answer of {settings.max_tokens} tokens leaves no prompt in a length of "
            f"{settings.max_model_len}: lower --synthesis.generator.max-tokens"
        )
    try:
        bound, identity = pin(settings)
    except ValueError as error:
        raise ValueError(str(error).replace("judge model", "generator")) from None
    ChatTokenizer.load(bound)
    check_gpus(bound, placement, "--synthesis.generator")
    return bound, f"{Path(settings.model).name}@{identity[:12]}"
