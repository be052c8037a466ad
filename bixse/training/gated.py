"""An encoder learns from raw text: what is the context that it chooses worth to a language model?

Revela, arXiv 2506.16552. Of a group of chunks the encoder reads the first half of each as a query
and all of it as a document; the gate, a softmax of their cosines, says how far the language model
may attend to each other chunk while it predicts the tokens of one (`gated_attention`). The loss is

    L = -(1 / P) sum over groups, chunks i, t of  log p(token_it | tokens of i before, other chunks)

with P the predicted tokens of the batch, whatever rank has them. (The paper's code takes the mean
of each group, and the mean of those.) Both models learn from it, and the encoder is what stays.

A rank reads whole groups, one at a time: memory follows the group, not the batch. Weights and
moments of both are float32 on every rank, 16 bytes a parameter, but what is frozen under adapters.

Shapes: G groups, C chunks (of all groups, or of one), T tokens of all chunks, L of the longest.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from bixse.place import Place
from bixse.precision import autocast
from bixse.reading.chunks import Texts, tokenise
from bixse.training.adapters import adapt, adapt_transformer, refuse_adapted
from bixse.training.attention import fast_attention
from bixse.training.gated_attention import attended, gate, gated
from bixse.training.gather import World
from bixse.training.gradients import sum_gradients
from bixse.training.loop import Notice
from bixse.training.order import Ints, share
from bixse.training.scoring import Scoring
from bixse.training.seen import Seen
from bixse.training.settings import Gated
from bixse.training.stepping import Steps, take
from bixse.training.texts import MappedTexts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MORE = ("attended",)
"""Beside `stepping.METRICS`: how many others a chunk attends to, as the exponential of its weights'
entropy; mean of all chunks. 1 is one alone; `rows` are groups, `loss` is a predicted token."""


class Group(NamedTuple):
    """Chunks that are read together."""

    halves: list[str]
    wholes: list[str]
    ids: list[npt.NDArray[np.int32]]


@dataclass(frozen=True)
class ChunkGroups:
    """Chunks in the order of their groups: token ids in one array, texts where they stand."""

    text_C: "pa.Array | MappedTexts"
    half_C: Ints
    """Characters of each text that are its first half."""
    token_T: npt.NDArray[np.int32]
    token_from_C1: Ints
    """Where each chunk begins in `token_T`, and the end."""
    from_G1: Ints
    """The first chunk of each group, and the end."""

    def __len__(self) -> int:
        return len(self.from_G1) - 1

    def group(self, number: int) -> Group:
        chunks = np.arange(self.from_G1[number], self.from_G1[number + 1])
        wholes = self.text_C.take(chunks).to_pylist()
        halves = [text[:half] for text, half in zip(wholes, self.half_C[chunks], strict=True)]
        bounds = self.token_from_C1[chunks[0] : chunks[-1] + 2]
        return Group(
            halves, wholes, np.split(self.token_T[bounds[0] : bounds[-1]], bounds[1:-1] - bounds[0])
        )

    def counts(self, groups: Ints) -> tuple[int, int]:
        """Chunks and tokens of some groups."""
        begin, end = self.from_G1[groups], self.from_G1[groups + 1]
        tokens = self.token_from_C1[end] - self.token_from_C1[begin]
        return int((end - begin).sum()), int(tokens.sum())

    def put(self, place: Place) -> "ChunkGroups":
        """The same; texts that are stored in a file, with it at another place."""
        if isinstance(self.text_C, MappedTexts):
            return replace(self, text_C=self.text_C.put(place))
        return self


@dataclass(frozen=True)
class GatedRun:
    """What every rank is told; `fingerprint` is of the settings, the starts and the inputs."""

    settings: Gated
    groups: ChunkGroups
    checkpoints: Place
    fingerprint: str


def gated_loop(
    run: GatedRun,
    encoder: "SentenceTransformer",
    language_model: Any,
    world: World,
    on_step: Callable[[Seen], None] = lambda _: None,
    notice: Callable[[], Notice] = lambda: Notice.NONE,
) -> list[dict[str, float]]:
    """Train both models in place, from the last checkpoint if there is one; a line for each step.

    With more than one rank the process group must stand, and all have loaded the same weights.
    `on_step` and `notice` are as `train_loop` has them. The encoder is left in float32; or, with
    `settings.lora_rank`, its adapters merged and its weights in their own type. Raises ValueError
    as `gated` and `refuse_adapted`; otherwise as `train_loop`.
    """
    settings, groups = run.settings, run.groups
    refuse_adapted(encoder)
    merge = _prepare(encoder, language_model, settings)
    both = nn.ModuleDict({"encoder": encoder, "language_model": language_model}).eval()

    def gradients(batch: Ints) -> tuple[float, float]:
        return gated_gradients(encoder, language_model, groups, batch, settings, world)

    steps = Steps(settings, len(groups), run.checkpoints, run.fingerprint, MORE)
    fast = fast_attention(encoder, settings.precision, settings.chunk_tokens)
    with gated(language_model), fast:
        history = take(steps, both, gradients, world, on_step, notice)
    if merge is not None:
        merge()
    return history


def _prepare(
    encoder: "SentenceTransformer", language_model: Any, settings: Gated
) -> Callable[[], object] | None:
    """All weights of both in float32; or adapters on both, and what merges those of the encoder."""
    if settings.lora_rank is None:
        encoder.float()
        language_model.float()
        return None
    merge = adapt(encoder, settings.lora, settings.seed)
    language_model.requires_grad_(False)
    adapt_transformer(language_model, settings.lora, settings.seed)
    # A new vocabulary is not what it is to learn.
    language_model.get_output_embeddings().requires_grad_(False)
    return merge


def gated_gradients(
    encoder: "SentenceTransformer",
    language_model: Any,
    groups: ChunkGroups,
    batch: Ints,
    settings: Gated,
    world: World,
) -> tuple[float, float]:
    """Leave the gradients of a global batch of groups in `.grad` of both models, the same on every
    rank; its loss and `attended`. Within `gated`.

    Raises RuntimeError when memory does not suffice for a group.
    """
    for model in (encoder, language_model):
        model.zero_grad(set_to_none=True)
    chunks, tokens = groups.counts(batch)
    totals = torch.zeros(2, dtype=torch.float64, device=language_model.device)
    for number in batch[share(len(batch), world.rank, world.size)].tolist():
        group = groups.group(number)
        try:
            weight_CC = choices(encoder, group, settings)
            loss = losses(language_model, group, weight_CC, settings).sum() / (tokens - chunks)
            # torch leaves `Tensor.backward` without types.
            loss.backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"memory does not suffice for a group of {len(group.ids)} chunks: lower "
                "--gated.group-size or --gated.chunk-tokens, or take a smaller language model"
            ) from error
        entropy_C = torch.special.entr(weight_CC.detach()).sum(1)
        totals += torch.stack([loss.detach(), entropy_C.exp().sum() / chunks]).double()
    for model in (encoder, language_model):
        sum_gradients(model, world)
    if world.size > 1:
        dist.all_reduce(totals)
    loss, attends = totals.tolist()
    return loss, attends


def choices(encoder: "SentenceTransformer", group: Group, settings: Gated) -> Tensor:
    """The gate of a group, [C, C], with gradient to the encoder."""
    asked = [Texts(group.halves, "query"), Texts(group.wholes, "document")]
    reading = tokenise(encoder, asked)
    with autocast(encoder.device, settings.precision):
        # A copy: sentence-transformers adds its outputs to the features.
        made = [encoder(dict(c), task=role)["sentence_embedding"] for role, c in reading.chunks]
    made_NE = torch.cat(made)
    query_CE, document_CE = (
        functional.normalize(Scoring.ordered(made_NE, side), dim=1) for side in reading.sides
    )
    return gate(query_CE, document_CE, settings.temperature)


def losses(language_model: Any, group: Group, weight_CC: Tensor, settings: Gated) -> Tensor:
    """Of each chunk the negative log-probability of its tokens after the first, [C], with gradient
    to the language model and to the gate."""
    device = language_model.device
    ids = [torch.from_numpy(ids).to(device, torch.int64) for ids in group.ids]
    id_CL = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    length_C = torch.tensor([len(one) for one in ids], device=device)
    read_CL = torch.arange(id_CL.shape[1], device=device) < length_C[:, None]
    with autocast(device, settings.precision):
        logit_CLV = attended(language_model, id_CL, read_CL, weight_CC)
    loss_CL = functional.cross_entropy(
        logit_CLV[:, :-1].float().flatten(0, 1), id_CL[:, 1:].flatten(), reduction="none"
    ).view(len(id_CL), -1)
    return torch.where(read_CL[:, 1:], loss_CL, 0.0).sum(1)
