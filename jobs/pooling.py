"""The vLLM pooling engine: encoded pairs in, the raw logits of a classifier out."""

from collections.abc import Sequence

from bixse.judging.cross_encoder import EncodedPair
from bixse.judging.settings import CrossEncoder
from jobs.loading import dtype_of, load_llm


class Pooling:
    """Loaded once in an actor, called often; in the caller's process, as `jobs.engine.Engine`."""

    def __init__(self, settings: CrossEncoder) -> None:
        """Raises ValueError when vLLM is absent or refuses the model or a setting."""
        self._llm = load_llm(
            settings,
            "--judging.judge cross_encoder",
            runner="pooling",
            # Logits, whatever activation the model's own configuration asks for. To ask the engine
            # for none would also take the tanh out of BERT's pooler (vLLM 0.29).
            hf_overrides={"problem_type": "regression"},
        )

    @property
    def dtype(self) -> str:
        """What `auto` came to: bfloat16, float16 or float32."""
        return dtype_of(self._llm)

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
