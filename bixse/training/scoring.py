"""How a batch's texts become its loss: the seam between the trainer and the kinds of model.

The trainer knows no kind. It asks which texts of a batch this rank reads (`reading`), lets the
model make of them what it makes, chunk after chunk (`made`), and takes this rank's share of the
loss from what was made of all its texts (`share`). The shares of all ranks add up to the loss of
one process, so gradients are summed over the ranks (`gradients.py`).

An encoder reads queries and documents apart. Each rank encodes its share of either, the documents'
vectors are gathered with gradient, and each rank takes the loss of its own queries against all
documents (form 3 of methods 1.4). A reranker reads a query and a judged document of it together:
each rank scores the judged pairs of its own queries, and nothing is gathered.

Shapes: Q queries of this rank, D documents of the batch, N texts of this rank, E dimensions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from bixse.precision import autocast
from bixse.reading.chunks import Reading, Side, Texts, longest_of, template_tokens, tokenise
from bixse.reading.tokenising import Role
from bixse.settings import Precision
from bixse.training import losses
from bixse.training import objective as objectives
from bixse.training.batches import Batch
from bixse.training.gather import World, gather_rows
from bixse.training.groups import Ints, Labels
from bixse.training.objective import Cells
from bixse.training.objective_settings import Objective
from bixse.training.order import share
from bixse.training.settings import Training

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base import BaseModel

MAX_SCALE = 100.0

# 64 MiB for each float32 that an objective keeps of a cell.
_CHUNK_CELLS = 2**24


class Scoring(nn.Module, ABC):
    """A model, scale and bias, and the loss of a batch of which each rank holds a share."""

    output: str
    """Name of what the model makes of its texts, [texts, E]."""
    sharded: bool
    """Whether each rank holds a part of the encoder (`sharding.py`)."""

    def __init__(
        self,
        encoder: nn.Module,
        objective: Objective,
        world: World,
        precision: Precision = "auto",
        biases: int = 1,
        sets: int = 1,
    ) -> None:
        super().__init__()
        self._sets = sets
        self.precision = precision
        self.encoder = encoder
        self.objective = objective
        self.world = world
        self.sharded = False
        self.learns_scale = objective.learns_scale
        log_scale = torch.tensor(math.log(objective.scale))
        self.log_scale = nn.Parameter(log_scale, requires_grad=self.learns_scale)
        self.bias = nn.Parameter(torch.zeros(sets * biases), requires_grad=objective.learns_bias)

    @staticmethod
    @abstractmethod
    def longest(model: "BaseModel", settings: Training) -> int:
        """Tokens of the longest text that is read."""

    def refuse_unread(self, model: "BaseModel", settings: Training) -> None:
        """Raises ValueError when longer texts are asked for than the model reads.

        What is asked for by default is cut where a model reads less.
        """
        longest, most = self.longest(model, settings), model.max_seq_length
        if most is not None and longest > max(most, self.longest(model, Training())):
            raise ValueError(
                f"training.query_tokens and document_tokens ask for texts of {longest} tokens, and "
                f"the model reads {most}: lower them, or start from one that reads more"
            )

    @abstractmethod
    def reading(
        self, model: "BaseModel", labels: Labels, batch: Batch, settings: Training
    ) -> Reading:
        """This rank's texts of a batch, tokenised."""

    @abstractmethod
    def share(self, made_NE: Tensor, reading: Reading, cells: Cells) -> tuple[Tensor, Tensor]:
        """This rank's share of the batch's loss and of its floor.

        `made_NE` is what `made` gave, concatenated.
        """

    @property
    def scale(self) -> float:
        return self.log_scale.exp().item() if self.learns_scale else self.objective.scale

    def biases(self, set_number: int) -> Tensor:
        """Those of a set of labels, the first of whole vectors; writing to them changes `bias`."""
        return self.bias.view(self._sets, -1)[set_number]

    def autocast(self) -> torch.autocast:
        return autocast(self.log_scale.device, self.precision)

    def made(self, reading: Reading) -> Iterator[Tensor]:
        """What the model makes of each chunk, [texts, E], when it is asked for."""
        for role, chunk in reading.chunks:
            with self.autocast():
                # A copy: sentence-transformers adds its outputs to the features.
                made: Tensor = self.encoder(dict(chunk), task=role)[self.output]
            yield made

    @staticmethod
    def ordered(made_NE: Tensor, side: Side) -> Tensor:
        """[side.count, E] in the order of the texts and in float32, of those of all chunks."""
        precision = torch.promote_types(made_NE.dtype, torch.float32)
        return made_NE.to(precision)[side.place][: side.count]


class EncoderScoring(Scoring):
    """Cosines of every query with every document of the batch.

    `encoder(features, task=role)` returns a mapping with `sentence_embedding` [texts, E].

    With `dimensions` the loss is the mean of those of the whole vectors and of their first so many
    components, each normalised by itself: Matryoshka, arXiv 2205.13147, all weights 1. Cosines
    spread the more, the fewer components they have, so each has a bias of its own.

    So has each of several sets of labels: how near the texts of a corpus are to each other, how
    high its grades are and how many documents meet in a batch all move the bias (methods 1.6), and
    no vector can tell whose it is. While other sets have their turn momentum alone moves it. The
    scale is one, as cosine is one when it is served.
    """

    output = "sentence_embedding"
    chunk_cells = _CHUNK_CELLS

    def __init__(
        self,
        encoder: nn.Module,
        objective: Objective,
        world: World,
        precision: Precision = "auto",
        dimensions: Sequence[int] = (),
        sets: int = 1,
    ) -> None:
        super().__init__(encoder, objective, world, precision, 1 + len(dimensions), sets)
        self._dimensions = (None, *dimensions)

    @staticmethod
    def longest(model: "BaseModel", settings: Training) -> int:
        return max(settings.query_tokens, settings.document_tokens)

    def refuse_unread(self, model: "BaseModel", settings: Training) -> None:
        """Also when a prompt is so long that nothing of a text would be read behind it."""
        super().refuse_unread(model, settings)
        limits: dict[Role, int] = {
            "query": settings.query_tokens,
            "document": settings.document_tokens,
        }
        for role, limit in limits.items():
            ((_, features),) = tokenise(model, [Texts([""], role)]).chunks
            prompt = int(features["attention_mask"].sum()) if "attention_mask" in features else 0
            if prompt >= min(limit, longest_of(model, role) or limit):
                raise ValueError(
                    f"the {role} prompt of the model takes {prompt} tokens and leaves none for a "
                    f"{role}: raise training.{role}_tokens, now {limit}"
                )

    def reading(
        self, model: "BaseModel", labels: Labels, batch: Batch, settings: Training
    ) -> Reading:
        def mine(texts: pa.Array, numbers: Ints, role: Role, tokens: int) -> Texts:
            mine = numbers[share(len(numbers), self.world.rank, self.world.size)]
            # A rank without texts reads one and uses none: every rank is in every collective.
            read = texts.take(mine if len(mine) else numbers[:1]).to_pylist()
            return Texts(read, role, tokens, len(mine))

        both = [
            mine(labels.query_text_Q, batch.query_Q, "query", settings.query_tokens),
            mine(labels.document_text_D, batch.document_D, "document", settings.document_tokens),
        ]
        return tokenise(model, both, settings.micro_batch_tokens)

    def vectors(self, made_NE: Tensor, side: Side) -> Tensor:
        """Unit vectors [side.count, E] in the order of the texts."""
        return normalize(self.ordered(made_NE, side), dim=1)

    def cosines(self, query_QE: Tensor, document_DE: Tensor) -> list[Tensor]:
        """Of whole vectors and of each number of leading components, [Q, D] each."""

        def of(vector_NE: Tensor, leading: int | None) -> Tensor:
            return vector_NE if leading is None else normalize(vector_NE[:, :leading], dim=1)

        return [of(query_QE, n) @ of(document_DE, n).T for n in self._dimensions]

    def share(self, made_NE: Tensor, reading: Reading, cells: Cells) -> tuple[Tensor, Tensor]:
        """From the vectors alone: of its own queries and of the documents of all ranks."""
        query_QE, own_NE = (self.vectors(made_NE, side) for side in reading.sides)
        document_DE = gather_rows(own_NE, cells.documents, self.world)
        return self.of_vectors(query_QE, document_DE, cells)

    def of_vectors(
        self, query_QE: Tensor, document_DE: Tensor, cells: Cells
    ) -> tuple[Tensor, Tensor]:
        """The share, in chunks of rows: what an objective makes of its cells never takes more than
        about `chunk_cells` numbers at a time.
        """
        scale = self.log_scale.exp() if self.learns_scale else self.objective.scale
        biases = self.biases(cells.set_number)

        def of_rows(query_CE: Tensor, document_DE: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            loss, floor = query_CE.new_zeros(()), query_CE.new_zeros(())
            grid = cells.grid(part)
            for cosine_CD, bias in zip(self.cosines(query_CE, document_DE), biases, strict=True):
                more = objectives.share(self.objective, cosine_CD, grid, scale, bias)
                loss, floor = loss + more[0], floor + more[1]
            return loss / len(biases), floor / len(biases)

        rows = len(query_QE)
        row_cells = cells.row_cells * len(biases)
        size = rows if self.objective.whole_batch else self.chunk_cells // row_cells
        if rows <= size:
            return of_rows(query_QE, document_DE, slice(0, rows))
        loss, floor = query_QE.new_zeros(()), query_QE.new_zeros(())
        for part in _parts(rows, size):
            # What a chunk makes is made again on the way back, not kept.
            more = checkpoint(of_rows, query_QE[part], document_DE, part, use_reentrant=False)
            loss, floor = loss + more[0], floor + more[1]
        return loss, floor

    def count_logits(self, query_QE: Tensor, document_DE: Tensor, cells: Cells) -> Tensor:
        """Of this rank's queries (`losses.count_logits`), in chunks of rows, for each set of
        `cosines`, [K, 2, bins]."""
        found = []
        # Of each cell it keeps several numbers of double precision.
        for part in _parts(len(query_QE), self.chunk_cells // (8 * len(document_DE))):
            weight_QD = cells.grid(part).weight_QD
            cosines = self.cosines(query_QE[part], document_DE)
            found.append([losses.count_logits(c_QD, weight_QD, self.scale) for c_QD in cosines])
        return torch.stack([torch.stack(of_part) for of_part in found]).sum(dim=0)


def _parts(rows: int, size: int) -> Iterator[slice]:
    """Rows in pieces of at most `size`, or of one; of no rows an empty piece."""
    for start in range(0, max(1, rows), max(1, size)):
        yield slice(start, min(rows, start + max(1, size)))


class RerankerScoring(Scoring):
    """One score of every judged pair of the batch.

    `encoder(features, task="pair")` returns a mapping with `scores` [pairs, 1], log-odds.
    """

    output = "scores"

    @staticmethod
    def longest(model: "BaseModel", settings: Training) -> int:
        # Of the texts: what stands around every pair takes nothing from them.
        return settings.query_tokens + settings.document_tokens + template_tokens(model)

    def reading(
        self, model: "BaseModel", labels: Labels, batch: Batch, settings: Training
    ) -> Reading:
        read, count = self.mine(batch)
        queries = labels.query_text_Q.take(batch.query_Q[batch.row_K[read]]).to_pylist()
        documents = labels.document_text_D.take(batch.document_D[batch.column_K[read]]).to_pylist()
        pairs = list(zip(queries, documents, strict=True))
        asked = Texts(pairs, "pair", self.longest(model, settings), count)
        return tokenise(model, [asked], settings.micro_batch_tokens)

    def mine(self, batch: Batch) -> tuple[Ints, int]:
        """The known cells that this rank reads, judged in the batch; how many of them count."""
        rows = share(len(batch.query_Q), self.world.rank, self.world.size)
        mine_K = batch.own_K & (batch.row_K >= rows.start) & (batch.row_K < rows.stop)
        if mine_K.any():
            return np.flatnonzero(mine_K), int(mine_K.sum())
        # A rank without queries reads one pair and uses none: every rank is in every collective.
        return np.flatnonzero(batch.own_K)[:1], 0

    def share(self, made_NE: Tensor, reading: Reading, cells: Cells) -> tuple[Tensor, Tensor]:
        """Of the judged pairs of its own queries; every other cell is out of every objective."""
        (side,) = reading.sides
        score_N = self.ordered(made_NE, side).squeeze(1)
        own = cells.row_K[cells.own_K], cells.column_K[cells.own_K]
        shape = cells.rows, sum(cells.documents)
        score_QD = score_N.new_zeros(shape).index_put(own, score_N)
        grid = cells.grid(slice(0, cells.rows))
        (bias,) = self.biases(cells.set_number)
        return objectives.share(self.objective, score_QD, grid, self.objective.scale, bias)


def scoring_of(model: "BaseModel", settings: Training, world: World, sets: int = 1) -> Scoring:
    """A model of the kind that the objective is for, with the biases of so many sets of labels.

    Raises ValueError for more leading dimensions than the model's vectors have.
    """
    objective, precision = settings.objective, settings.precision
    if objective.scores_pairs:
        return RerankerScoring(model, objective, world, precision, sets=sets)
    if settings.dimensions:
        most = cast("SentenceTransformer", model).get_embedding_dimension() or 0
        if max(settings.dimensions) >= most:
            raise ValueError(
                f"training.dimensions are fewer than the model's {most}: "
                f"found {max(settings.dimensions)}"
            )
    return EncoderScoring(model, objective, world, precision, settings.dimensions, sets)
