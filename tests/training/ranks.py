"""What a rank of a process group computes, and one process alone: the same to rounding."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bixse.models.encoder import load_model
from bixse.models.language_model import load_language_model
from bixse.models.reranker import load_reranker
from bixse.place import Place
from bixse.reading.chunks import Reading, Side
from bixse.reading.tokenising import Role
from bixse.training.adapters import adapt_transformer
from bixse.training.batches import Batch, batch_of
from bixse.training.completions import Completions
from bixse.training.gated import ChunkGroups, GatedRun, gated_loop
from bixse.training.gather import World, cells_of
from bixse.training.gradients import batch_gradients, batch_logits
from bixse.training.groups import Clicked, Labels, Preferred, group
from bixse.training.loop import Notice, Run, train_loop
from bixse.training.losses import bias_of
from bixse.training.objective_settings import (
    LCE,
    ClickBCE,
    Combined,
    GradedBCE,
    InfoNCE,
    LambdaLoss,
    ListKL,
    MarginMSE,
    Objective,
    PairBCE,
    PreferenceKL,
    RankNet,
    Triplet,
    Wasserstein,
)
from bixse.training.order import share
from bixse.training.scoring import EncoderScoring, RerankerScoring, Scoring
from bixse.training.seen import Seen
from bixse.training.settings import Gated, LoRA, Training, Tuning
from bixse.training.sharding import spread, whole
from bixse.training.tuning import TuningRun, tune_loop
from tests.encoders import WORDS, texts

OBJECTIVES: dict[str, Objective] = {
    "graded_bce": GradedBCE(scale=5.0, learn_scale=True),
    "all": InfoNCE(positives="all", scale=5.0),
    "threshold": InfoNCE(positives="threshold", scale=5.0),
    "weighted": InfoNCE(positives="weighted", scale=5.0),
    "list_kl": ListKL(scale=5.0),
    "list_kl of the judged": ListKL(scale=5.0, in_batch=False),
    "ranknet": RankNet(scale=5.0),
    "ranknet of the judged": RankNet(scale=5.0, in_batch=False),
    "lambda_loss": LambdaLoss(scale=5.0),
    "lambdarank of the judged": LambdaLoss(scale=5.0, in_batch=False, weighting="lambdarank"),
    "margin_mse": MarginMSE(scale=5.0),
    "margin_mse of the judged": MarginMSE(scale=5.0, in_batch=False),
    "wasserstein": Wasserstein(scale=5.0),
    "triplet": Triplet(),
    "triplet of the judged": Triplet(in_batch=False),
    "preference_kl": PreferenceKL(scale=5.0),
    "click_bce": ClickBCE(scale=5.0),
    "combined": Combined(
        parts=(Wasserstein(scale=5.0), GradedBCE(scale=3.0, learn_scale=True), PreferenceKL()),
        weights=(0.5, 2.0, 3.0),
    ),
    "matryoshka": GradedBCE(scale=5.0, learn_scale=True),
    "lce": LCE(temperature=0.5),
    "pair_bce": PairBCE(),
    "combined of pairs": Combined(parts=(LCE(threshold=0.3), PairBCE()), weights=(0.5, 2.0)),
    "adapters": GradedBCE(scale=5.0, learn_scale=True),
    "adapters of pairs": PairBCE(),
}

DIMENSIONS: dict[str, tuple[int, ...]] = {"matryoshka": (4, 2)}
"""Leading dimensions that an objective is also taken at."""

ADAPTED = {"adapters": LoRA(rank=2), "adapters of pairs": LoRA(rank=2)}
"""What is trained of a model, where it is not all."""


class TwoTowers(nn.Module):
    """A bag of words a role, in double precision: query and document gradients stand apart."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.towers = nn.ModuleDict({"query": nn.Linear(12, 6), "document": nn.Linear(12, 6)})
        self.unused = nn.Parameter(torch.zeros(3))
        for parameter in self.towers.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)

    def forward(self, features: dict[str, Any], task: Role) -> dict[str, Tensor]:
        return {"sentence_embedding": torch.tanh(self.towers[task](features["words"]))}


class Together(nn.Module):
    """A bag of words for a pair, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(24, 5), nn.Tanh(), nn.Linear(5, 1))
        for parameter in self.layers.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)

    @property
    def base_model(self) -> nn.Module:
        """What is no head, by the name that transformers gives it."""
        return self.layers[0]

    def forward(self, features: dict[str, Any], task: Role) -> dict[str, Tensor]:
        return {"scores": self.layers(features["words"])}


def scoring(objective: Objective, world: World, name: str = "", sets: int = 1) -> Scoring:
    encoder = Together() if objective.scores_pairs else TwoTowers()
    if name in ADAPTED:
        adapt_transformer(encoder, ADAPTED[name], seed=0)
        draw = torch.Generator().manual_seed(1)
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                # B begins as 0, at which A has no gradient.
                parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    if objective.scores_pairs:
        return RerankerScoring(encoder, objective, world, sets=sets).double()
    dimensions = DIMENSIONS.get(name, ())
    return EncoderScoring(encoder, objective, world, dimensions=dimensions, sets=sets).double()


def vectors(encoder: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """What an encoder of words makes of both sides, [Q, E] and [D, E]."""
    query, document = words("query", batch.query_Q), words("document", batch.document_D)
    name = "sentence_embedding"
    return encoder({"words": query}, "query")[name], encoder({"words": document}, "document")[name]


def labels(queries: int, documents: int, seed: int) -> Labels:
    """Random grades of half of all pairs, preferences between a few of those, and clicks on each at
    one rank or two.

    Some queries were written from an unjudged document.
    """
    draw = np.random.default_rng(seed)
    judged = np.argwhere(draw.random((queries, documents)) < 0.5)
    first, second = judged[:-1][::2], judged[1:][::2]
    alike = first[:, 0] == second[:, 0]
    preferred = Preferred(
        [f"q{q}" for q in first[alike, 0]],
        [f"d{d}" for d in first[alike, 1]],
        [f"d{d}" for d in second[alike, 1]],
        np.random.default_rng(seed).random(alike.sum()).astype(np.float32),
    )
    shown = judged[np.random.default_rng(seed + 3).permutation(np.tile(np.arange(len(judged)), 2))]
    shown = np.concatenate([judged, shown[: len(judged) // 2]])
    impressions = np.random.default_rng(seed + 4).integers(1, 9, len(shown))
    clicked = Clicked(
        [f"q{q}" for q, _ in shown],
        [f"d{d}" for _, d in shown],
        impressions,
        np.random.default_rng(seed + 5).integers(0, impressions + 1),
        -np.log(np.random.default_rng(seed + 6).integers(1, 6, len(shown))),
        np.ones(len(shown)),
    )
    query_texts = texts(queries, seed=seed + 1)
    document_texts = texts(documents, seed=seed + 2)
    return group(
        [f"q{q}" for q, _ in judged],
        [f"d{d}" for _, d in judged],
        draw.random(len(judged)).astype(np.float32),
        {f"q{q}": text for q, text in enumerate(query_texts)},
        {f"d{d}": text for d, text in enumerate(document_texts)},
        {f"q{q}": f"d{q % documents}" for q in range(queries)},
        preferred,
        clicked,
    )


def batches() -> dict[str, Batch]:
    """Whole, uneven and too small for every rank; documents and queries shared between rows."""
    known = labels(12, 16, seed=5)
    draw = np.random.default_rng(1)
    return {
        "even": batch_of(known, draw.permutation(known.pairs)[:24]),
        "uneven": batch_of(known, np.flatnonzero(known.query_of(np.arange(known.pairs)) < 7)[::3]),
        "two queries": batch_of(known, known.pairs_from_Q1[[0, 3]]),
        "one document": batch_of(known, np.flatnonzero(known.document_P == 4)),
    }


def words(role: Role, numbers: np.ndarray) -> Tensor:
    """Made-up features of texts, the same on every rank."""
    seed = 100 if role == "query" else 200
    rows = [np.random.default_rng(seed + number).normal(size=12) for number in numbers]
    return torch.tensor(np.asarray(rows))


def reading(module: Scoring, batch: Batch) -> Reading:
    """This rank's texts, as `Scoring.reading` would choose them."""
    if isinstance(module, RerankerScoring):
        cells, count = module.mine(batch)
        return as_reading([("pair", pair_words(batch, cells), count)])
    sides: list[tuple[Role, Tensor, int]] = []
    numbers_of: tuple[tuple[Role, np.ndarray], ...]
    numbers_of = ("query", batch.query_Q), ("document", batch.document_D)
    for role, numbers in numbers_of:
        mine = numbers[share(len(numbers), module.world.rank, module.world.size)]
        sides.append((role, words(role, mine if len(mine) else numbers[:1]), len(mine)))
    return as_reading(sides)


def as_reading(read: list[tuple[Role, Tensor, int]]) -> Reading:
    chunks: list[tuple[Role, dict[str, Any]]] = []
    sides: list[Side] = []
    first = 0
    for role, made, count in read:
        features = {"words": made, "attention_mask": torch.ones(len(made), 1)}
        # As `tokenise` leaves them: not in the order of the texts.
        order = torch.arange(len(made)).flip(0)
        chunks.append((role, {name: value[order] for name, value in features.items()}))
        sides.append(Side(role, first + order, count))
        first += len(made)
    return Reading(chunks, tuple(sides))


def pair_words(batch: Batch, cells: np.ndarray) -> Tensor:
    queries = words("query", batch.query_Q[batch.row_K[cells]])
    return torch.cat([queries, words("document", batch.document_D[batch.column_K[cells]])], dim=1)


@contextmanager
def counted() -> Iterator[list[int]]:
    """The numbers of elements of all tensors that are all-reduced meanwhile."""
    sizes: list[int] = []
    reduce = dist.all_reduce

    def count(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    with patch.object(dist, "all_reduce", count):
        yield sizes


def part_of(value: Tensor) -> Tensor:
    """What this rank holds of it."""
    return value.to_local() if isinstance(value, DTensor) else value


def gradients(world: World, tokens: int | None = None, sharded: bool = False) -> dict[str, Tensor]:
    """Loss, gradients, sizes of all-reduces and where biases would begin, by objective, batch and
    parameter.

    With `tokens`, encoded twice in chunks of at most so many texts; `sharded`, by a model of which
    each rank has a part.
    """
    found = {}
    for name, objective in OBJECTIVES.items():
        module = scoring(objective, world, name)
        module.bias.data.fill_(-0.5)
        if sharded:
            spread(module.encoder, torch.device("cpu"), world.size, bfloat16=False)
            module.sharded = True
            held = sum(part_of(value).numel() for value in module.encoder.parameters())
            found[f"{name}/held"] = torch.tensor(held)
        for kind, batch in batches().items():
            cells = cells_of(batch, objective, world, torch.device("cpu"))
            read = reading(module, batch)
            if tokens is not None:
                read = read.within(tokens)
            with counted() as sizes:
                shares = batch_gradients(module, cells, read, recompute=tokens is not None)
            assert shares is not None
            found[f"{name}/{kind}/loss"] = shares
            found[f"{name}/{kind}/reduced"] = torch.tensor(sizes)
            for parameter, value in module.named_parameters():
                if value.grad is not None:
                    found[f"{name}/{kind}/{parameter}"] = whole(value.grad)
            if isinstance(module, EncoderScoring) and objective.learns_bias:
                made = batch_logits(module, cells, read)
                assert made is not None
                biases = [bias_of(of_logits, batch.mean_target) for of_logits in made]
                found[f"{name}/{kind}/calibrated"] = torch.tensor(biases)
    return found


def loop(
    world: World,
    directory: Path,
    notice: Callable[[], Notice] = lambda: Notice.NONE,
    mix: tuple[Labels, ...] = (),
    **changes: Any,
) -> dict[str, Tensor]:
    """Weights and curve after training with checkpoints every 4 steps."""
    settings = Training(
        batch_size=8,
        epochs=2,
        learning_rate=1e-3,
        checkpoint_every=4,
        # Ranks encode other chunks than one process: bfloat16 would round them apart.
        precision="float32",
    ).replace(**changes)
    start, pairs = str(directory / "encoder"), settings.objective.scores_pairs
    model = load_reranker(start, "cpu") if pairs else load_model(start, "cpu")
    checkpoints = Place(str(directory / "checkpoints"))
    run = Run(settings, labels(20, 12, seed=3), checkpoints, "a fingerprint", mix)

    def on_step(seen: Seen) -> None:
        if (directory / "stop").exists() and seen.steps == int((directory / "stop").read_text()):
            raise KeyboardInterrupt

    start_at = [parameter.detach().clone() for parameter in model.parameters()]

    def measure() -> float:
        """Neither rising nor falling with the distance from the start; tokenises, as one would."""
        vectors = model.encode(texts(4, seed=7))
        assert len(vectors) == 4
        now = zip(model.parameters(), start_at, strict=True)
        distance = sum(float(((a.detach() - b) ** 2).sum()) for a, b in now) ** 0.5
        return math.sin(4 * distance)

    measured = measure if settings.evaluate_every is not None else None
    trained = train_loop(run, model, world, on_step, notice, measured)
    curve = [[line[name] for name in line if name != "seconds"] for line in trained.history]
    weights = {name: value.detach() for name, value in model.named_parameters()}
    dev = torch.tensor([*trained.dev, (trained.best_step, 0.0)], dtype=torch.float64)
    return {**weights, "curve": torch.tensor(curve, dtype=torch.float64), "dev": dev}


def dev(world: World, directory: Path) -> dict[str, Tensor]:
    """The same with an evaluation every third step."""
    return loop(world, directory, evaluate_every=3)


def reranker(world: World, directory: Path) -> dict[str, Tensor]:
    """The same of a reranker that begins as the encoder."""
    return loop(world, directory, objective=LCE(), docs_per_query=4)


def adapters(world: World, directory: Path, **changes: Any) -> dict[str, Tensor]:
    """The same of a reranker's adapters and head."""
    changes = {"objective": LCE(), "docs_per_query": 4, "lora": LoRA(rank=4), **changes}
    return loop(world, directory, **changes)


def mixed(world: World, directory: Path) -> dict[str, Tensor]:
    """The same with a smaller set beside, of other queries and documents."""
    return loop(world, directory, mix=(labels(11, 9, seed=8),))


def sharded(world: World, directory: Path) -> dict[str, Tensor]:
    """The same of a model that is spread over the ranks, with an evaluation every third step."""
    return loop(world, directory, sharded=True, evaluate_every=3)


def completions(count: int, seed: int = 0) -> Completions:
    """Prompts of random tokens; the answer is the last of them, and one more."""
    draw = np.random.default_rng(seed)
    rows = []
    for length in draw.integers(1, 9, count):
        prompt = draw.integers(10, 40, length).tolist()
        rows.append((prompt, [prompt[-1], prompt[-1] + 1][: 1 + length % 2]))
    return Completions.of(rows)


def tuning(world: World, directory: Path, **changes: Any) -> dict[str, Tensor]:
    """Weights, curve and what is expected of held-out rows, with checkpoints every 4 steps."""
    settings = Tuning(
        batch_size=8, epochs=2, learning_rate=3e-3, checkpoint_every=4, precision="float32",
        micro_batch_tokens=24,
    ).replace(**changes)  # fmt: skip
    model, stored = load_language_model(str(directory / "llm"))
    checkpoints = Place(str(directory / "checkpoints"))
    held_out = completions(9, seed=1)
    run = TuningRun(settings, completions(61), held_out, (10, 11), checkpoints, "a fingerprint")

    def on_step(seen: Seen) -> None:
        if (directory / "stop").exists() and seen.steps == int((directory / "stop").read_text()):
            raise KeyboardInterrupt

    tuned = tune_loop(run, model, stored, world, on_step)
    curve = [[line[name] for name in line if name != "seconds"] for line in tuned.history]
    weights = {name: value.detach() for name, value in model.named_parameters()}
    expected = {
        f"{when}{of}": torch.from_numpy(np.ascontiguousarray(value))
        for when, found in (("before", tuned.before), ("after", tuned.after))
        for of, value in (("", found.answer_R), (" labels", found.label_RL))
    }
    return {**weights, **expected, "curve": torch.tensor(curve, dtype=torch.float64)}


def chunk_groups(sizes: tuple[int, ...] = (4, 3, 2, 5, 4, 3, 4), seed: int = 0) -> ChunkGroups:
    """Groups of so many sentences; a word is a token."""
    wholes = texts(sum(sizes), seed)
    ids = [[10 + WORDS.index(word) % 200 for word in text.split()] for text in wholes]
    return ChunkGroups(
        pa.array(wholes, pa.large_string()),
        np.array([text.index(" ", len(text) // 3) for text in wholes]),
        np.concatenate(ids).astype(np.int32),
        np.cumsum([0, *map(len, ids)]),
        np.cumsum([0, *sizes]),
    )


def gated(
    world: World,
    directory: Path,
    notice: Callable[[], Notice] = lambda: Notice.NONE,
    **changes: Any,
) -> dict[str, Tensor]:
    """Weights of both models and curve, with checkpoints every 2 of 9 steps."""
    settings = Gated(
        batch_size=3, epochs=3, learning_rate=1e-3, temperature=0.05, checkpoint_every=2,
        precision="float32",
    ).replace(**changes)  # fmt: skip
    encoder = load_model(str(directory / "encoder"), "cpu")
    language_model, _ = load_language_model(str(directory / "llm"))
    checkpoints = Place(str(directory / "checkpoints"))
    run = GatedRun(settings, chunk_groups(), checkpoints, "a fingerprint")

    def on_step(seen: Seen) -> None:
        if (directory / "stop").exists() and seen.steps == int((directory / "stop").read_text()):
            raise KeyboardInterrupt

    lines = gated_loop(run, encoder, language_model, world, on_step, notice)
    curve = [[line[name] for name in line if name != "seconds"] for line in lines]
    weights = {
        f"{of}.{name}": value.detach().contiguous().clone()
        for of, model in (("encoder", encoder), ("language model", language_model))
        for name, value in model.named_parameters()
    }
    return {**weights, "curve": torch.tensor(curve, dtype=torch.float64)}


def gated_adapters(world: World, directory: Path) -> dict[str, Tensor]:
    """The same of adapters on both."""
    return gated(world, directory, lora_rank=4)
