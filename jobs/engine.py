"""The vLLM engine: prompts in, log-probabilities of a few tokens out.

One prefill and one output token a prompt; nothing is sampled, parsed or detokenised. The numbers
are raw log-probabilities under the whole vocabulary (`SamplingParams.logprob_token_ids`):
temperature and penalties do not touch them. Tokenisation is `bixse.judging.tokens`.
"""

import itertools
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bixse.judging.asked import Usage
from bixse.judging.pointwise import Logprobs
from bixse.judging.settings import Pointwise
from bixse.synthesis.settings import Generator
from jobs.loading import dtype_of, load_llm
from jobs.peaks import known_peak


@dataclass(frozen=True)
class Replies:
    """What the engine says of each prompt, and what it took."""

    logprobs: list[Logprobs]
    usage: Usage


class Engine:
    """Loaded once in an actor, called often. It lives and dies with its process.

    In the caller's process there is one death, which Ray sees (`load_llm`), and the same prompts
    are always scheduled alike.
    """

    def __init__(
        self, settings: Pointwise | Generator, wanted_by: str = "--judging.judge vllm"
    ) -> None:
        """Raises ValueError when vLLM is absent or refuses the model or a setting."""
        self._llm = load_llm(
            settings,
            wanted_by,
            tensor_parallel_size=settings.tensor_parallel,
            enable_prefix_caching=True,
        )
        self._peak = known_peak(self._llm, settings.tensor_parallel, self.dtype)
        self._waiting: queue.SimpleQueue[_Batch] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._names = itertools.count()
        self._busy = 0.0

    @property
    def dtype(self) -> str:
        """What `auto` came to: bfloat16, float16 or float32."""
        return dtype_of(self._llm)

    def logprobs(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Replies:
        """For each prompt, the log-probability of each of `token_ids` as the next token.

        Several threads may ask at a time: their prompts run side by side, so that the engine has
        work while a thread prepares or writes. Raises what the engine raised for these prompts.
        """
        if not prompts:
            return Replies([], Usage())
        batch = _Batch(prompts, tuple(token_ids))
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, daemon=True, name="engine")
                self._thread.start()
        self._waiting.put(batch)
        replies = batch.wait()
        return Replies(replies.logprobs, replies.usage + self._arithmetic(replies.usage))

    def _arithmetic(self, usage: Usage) -> Usage:
        """What the prefill computed and what the hardware could have, where it is known."""
        if self._peak is None:
            return Usage()
        each, peak = self._peak
        computed = usage.prompt_tokens - usage.cached_tokens
        return Usage(flops=computed * each, peak_flops=usage.seconds * peak)

    def _serve(self) -> None:
        """The only thread that touches the engine: takes what waits, steps, hands replies out."""
        engine = self._llm.llm_engine
        batches: dict[str, tuple[_Batch, int]] = {}
        while True:
            if not batches:
                self._add(self._waiting.get(), batches)
            while not self._waiting.empty():
                self._add(self._waiting.get(), batches)
            started = time.monotonic()
            try:
                replies = engine.step()
            except Exception as error:  # noqa: BLE001
                # Every caller that waits is told: the state of the engine is not known.
                self._fail(error, batches)
                continue
            self._busy += time.monotonic() - started
            for reply in replies:
                batch, row = batches.pop(reply.request_id)
                if batch.answer(row, reply):
                    batch.finish(self._busy)
                    self._busy = 0.0

    def _add(self, batch: "_Batch", batches: dict[str, tuple["_Batch", int]]) -> None:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            logprob_token_ids=list(batch.token_ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        added = []
        try:
            # Side by side, prompts that share a prefix find it in the cache before it is evicted.
            for row in sorted(range(len(batch.prompts)), key=batch.prompts.__getitem__):
                name = str(next(self._names))
                self._llm.llm_engine.add_request(name, tokens_input(batch.prompts[row]), params)
                batches[name] = (batch, row)
                added.append(name)
        except Exception as error:  # noqa: BLE001
            # A refused prompt concerns its caller alone; the thread goes on serving the others.
            self._llm.llm_engine.abort_request(added)
            for name in added:
                del batches[name]
            batch.fail(error)

    def _fail(self, error: Exception, batches: dict[str, tuple["_Batch", int]]) -> None:
        for batch in {id(batch): batch for batch, _ in batches.values()}.values():
            batch.fail(error)
        self._llm.llm_engine.abort_request(list(batches))
        batches.clear()


class _Batch:
    """The prompts of one caller, who waits for the last of them."""

    def __init__(self, prompts: Sequence[Sequence[int]], token_ids: tuple[int, ...]) -> None:
        self.prompts = [list(prompt) for prompt in prompts]
        self.token_ids = token_ids
        self._found: list[Logprobs] = [[] for _ in prompts]
        self._left = len(prompts)
        self._usage = Usage()
        self._error: Exception | None = None
        self._done = threading.Event()

    def answer(self, row: int, reply: Any) -> bool:
        """Keep one reply; says whether it was the last."""
        self._found[row] = _select(reply, self.token_ids)
        cached = reply.num_cached_tokens or 0
        given = sum(len(output.token_ids) for output in reply.outputs)
        self._usage += Usage(1, len(reply.prompt_token_ids), cached, given)
        self._left -= 1
        return not self._left

    def finish(self, seconds: float) -> None:
        self._usage += Usage(seconds=seconds)
        self._done.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._done.set()

    def wait(self) -> Replies:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return Replies(self._found, self._usage)


def _select(reply: Any, token_ids: Sequence[int]) -> Logprobs:
    """The log-probabilities of `token_ids`; the reply also holds that of the sampled token."""
    steps = reply.outputs[0].logprobs
    found = steps[0] if steps else {}
    return [found[token].logprob if token in found else None for token in token_ids]


def judge_name(settings: Pointwise, identity: str, dtype: str) -> str:
    """Who judged: the model's name, its weights, and the settings that change an answer."""
    return (
        f"{Path(settings.model).name}@{identity[:12]}:{dtype}"
        f":orders={settings.orders}:document_tokens={settings.document_tokens}"
    )
