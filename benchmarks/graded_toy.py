"""Graded BCE against InfoNCE where relevance is known exactly: linear encoders on made vectors.

    python -m benchmarks.graded_toy --seeds 10
    python -m benchmarks.graded_toy --feature-noise 0.35 --grades 3

Queries and documents have a latent direction each; relevance is their cosine there, 0 below
`irrelevant` and 1 from `perfect` on, so that every query has many documents that are partly
relevant. Encoders, one linear map a side from 64 features to 32, see the latent directions through
one random map and noise of their own. One document of each training query is judged: a third of
them irrelevant, a third partly relevant, a third from .5 on; a document may be judged for several
queries. A share of the judgments is then replaced by uniform draws. Every objective is ours
(`bixse.training.losses`) and gets the same start, batches and judgments; what is measured is
nDCG@10 of unseen queries over all documents, with their true relevance as gain.

The size is that of methods 1.3 (2,400 judged pairs, batch 64, 1,500 steps of Adam, temperature
.05); how relevance comes about is not told there and is ours. The leads are those of 40 epochs, in
which InfoNCE forgets more of what it had learnt: after 500 steps every objective is better than
after 1,500, and they differ by little.

All models are trained side by side: rows of a loss do not see each other, so that the batches of M
models are one batch of M times as many rows, and Adam does not see what a gradient is multiplied
by.

Shapes: S seeds, M models, B rows of a batch, F features, E dimensions of a vector, Q queries, D
documents.
"""

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import tyro
from torch import Tensor
from torch.nn.functional import normalize

from bixse.training.losses import calibrate_bias, graded_bce, infonce, positive_weights

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

OBJECTIVES = ("all", "threshold", "weighted", "graded_bce")
SCALE = 20.0


@dataclass(frozen=True)
class Options:
    seeds: int = 5
    """Paired: a seed's data, start and batches are the same for every objective."""
    noise: tuple[float, ...] = (0.0, 0.2, 0.4)
    """Shares of the judgments that are replaced."""
    steps: int = 1500
    learning_rate: float = 1e-2
    """Of Adam; ten times as much for the bias."""
    latent: int = 16
    """Dimensions in which relevance is decided."""
    feature_noise: float = 0.5
    """Standard deviation of each feature's noise; without it features have 1."""
    irrelevant: float = 0.2
    """Latent cosine below which relevance is 0."""
    perfect: float = 0.8
    """Latent cosine from which relevance is 1."""
    grades: int = 0
    """Round relevance to so many steps above 0; 0 rounds nothing."""
    documents: int = 2000
    json: bool = False


FEATURES, DIMENSIONS, BATCH = 64, 32, 64
QUERIES, TEST_QUERIES = 2400, 200


@dataclass(frozen=True)
class World:
    """What one seed gives."""

    query_QF: Floats
    document_DF: Floats
    judged_Q: Ints
    """The document judged for each training query."""
    relevance_Q: Floats
    """Of the judged document, true."""
    test_query_QF: Floats
    test_relevance_QD: Floats


def make(options: Options, seed: int) -> World:
    draw = np.random.default_rng([seed, 0])

    def directions(count: int) -> Floats:
        return _unit(draw.normal(size=(count, options.latent)))

    mixing = draw.normal(size=(options.latent, FEATURES))

    def seen(latent: Floats) -> Floats:
        noise = draw.normal(size=(len(latent), FEATURES))
        return latent @ mixing + options.feature_noise * noise

    documents, queries = directions(options.documents), directions(QUERIES + TEST_QUERIES)
    cosine_QD = queries @ documents.T
    relevance_QD = (cosine_QD - options.irrelevant) / (options.perfect - options.irrelevant)
    relevance_QD = relevance_QD.clip(0, 1)
    if options.grades:
        relevance_QD = np.round(relevance_QD * options.grades) / options.grades
    train_QD = relevance_QD[:QUERIES]
    judged_Q = np.asarray([_mixed(draw, relevance_D) for relevance_D in train_QD])
    query_QF = seen(queries)
    return World(
        query_QF[:QUERIES],
        seen(documents),
        judged_Q,
        train_QD[np.arange(QUERIES), judged_Q],
        query_QF[QUERIES:],
        relevance_QD[QUERIES:],
    )


def _mixed(draw: np.random.Generator, relevance_D: Floats) -> int:
    """A document of a third that is drawn: irrelevant, partly relevant, relevant from .5 on."""
    third_D = np.digitize(relevance_D, (0.05, 0.5))
    while True:
        inside = np.flatnonzero(third_D == draw.integers(3))
        if len(inside):
            return int(draw.choice(inside))


def replaced(relevance_Q: Floats, share: float, seed: int) -> Floats:
    """A share of the judgments, uniform draws; what a smaller share replaces a larger does too."""
    draw = np.random.default_rng([seed, 1])
    chance_Q, other_Q = draw.random(len(relevance_Q)), draw.random(len(relevance_Q))
    return np.where(chance_Q < share, other_Q, relevance_Q)


def scores(options: Options, objectives: Sequence[str]) -> dict[tuple[str, float], Floats]:
    """nDCG@10 of each objective under each share of noise, one value a seed."""
    worlds = [make(options, seed) for seed in range(options.seeds)]
    models = list(itertools.product(objectives, options.noise, range(options.seeds)))
    map_MSFE = _trained(options, worlds, models)
    found: dict[tuple[str, float], Floats] = {}
    for (objective, noise, seed), (query_FE, document_FE) in zip(models, map_MSFE, strict=True):
        world = worlds[seed]
        query_QE = _unit(world.test_query_QF @ query_FE)
        document_DE = _unit(world.document_DF @ document_FE)
        values = found.setdefault((objective, noise), np.zeros(options.seeds))
        values[seed] = graded_ndcg(query_QE @ document_DE.T, world.test_relevance_QD, 10).mean()
    return found


def _trained(
    options: Options, worlds: Sequence[World], models: Sequence[tuple[str, float, int]]
) -> Floats:
    """[M, 2, F, E]: the maps of queries and documents of each (objective, noise, seed)."""
    seed_M = torch.tensor([seed for _, _, seed in models])
    label_MQ = torch.tensor(
        np.stack([replaced(worlds[s].relevance_Q, noise, s) for _, noise, s in models]),
        dtype=torch.float32,
    )
    query_SQF, document_SDF = (
        torch.tensor(np.stack(arrays), dtype=torch.float32)
        for arrays in ([w.query_QF for w in worlds], [w.document_DF for w in worlds])
    )
    judged_SQ = torch.tensor(np.stack([world.judged_Q for world in worlds]))
    starts = [
        np.random.default_rng([s, 2]).normal(size=(FEATURES, DIMENSIONS)) / FEATURES**0.5
        for s in range(len(worlds))
    ]
    start_SFE = torch.tensor(np.stack(starts), dtype=torch.float32)
    # Both sides start equal, as sides that share an encoder do.
    map_M2FE = start_SFE[seed_M].unsqueeze(1).repeat(1, 2, 1, 1).requires_grad_()
    bias_M = torch.zeros(len(models), requires_grad=True)
    rate = options.learning_rate
    groups: list[dict[str, Any]] = [{"params": [map_M2FE]}, {"params": [bias_M], "lr": 10 * rate}]
    adam = torch.optim.Adam(groups, lr=rate)
    every_S = torch.arange(len(worlds)).unsqueeze(1)
    rows_M = {
        name: torch.tensor([row for row, model in enumerate(models) if model[0] == name])
        for name in dict.fromkeys(model[0] for model in models)
    }
    for step in range(options.steps):
        query_SB = _batch(step, len(worlds))
        column_SB = judged_SQ[every_S, query_SB]
        query_MBF = query_SQF[every_S, query_SB][seed_M]
        document_MBF = document_SDF[every_S, column_SB][seed_M]
        query_MBE = normalize(torch.bmm(query_MBF, map_M2FE[:, 0]), dim=2)
        document_MBE = normalize(torch.bmm(document_MBF, map_M2FE[:, 1]), dim=2)
        cosine_MBB = torch.bmm(query_MBE, document_MBE.mT)
        target_MBB = torch.diag_embed(label_MQ.gather(1, query_SB[seed_M]))
        # A document that stands twice is no negative of the query that it is judged for.
        own_BB = torch.eye(BATCH, dtype=torch.bool)
        copy_SBB = (column_SB.unsqueeze(2) == column_SB.unsqueeze(1)) & ~own_BB
        weight_MBB = (~copy_SBB).float()[seed_M]
        loss = torch.zeros(())
        for name, rows in rows_M.items():
            cells = cosine_MBB[rows], target_MBB[rows], weight_MBB[rows]
            if name == "graded_bce":
                if step == 0:
                    with torch.no_grad():
                        for row, cosine, target, weight in zip(rows, *cells, strict=True):
                            bias_M[row] = calibrate_bias(cosine, target, weight, SCALE)
                loss = loss + _graded_bce(*cells, bias_M[rows])
            else:
                loss = loss + _infonce(name, *cells)
        adam.zero_grad()
        loss.backward()
        adam.step()
    found: Floats = map_M2FE.detach().numpy().astype(np.float64)
    return found


def _batch(step: int, seeds: int) -> Tensor:
    """[S, B]: the queries of a step, each epoch in an order of its own."""
    epoch, place = divmod(step, QUERIES // BATCH)
    orders = [np.random.default_rng([s, 3, epoch]).permutation(QUERIES) for s in range(seeds)]
    return torch.tensor(np.stack([o[place * BATCH : (place + 1) * BATCH] for o in orders]))


def _graded_bce(
    cosine_MBB: Tensor, target_MBB: Tensor, weight_MBB: Tensor, bias_M: Tensor
) -> Tensor:
    logit_MBB = SCALE * cosine_MBB + bias_M[:, None, None]
    logit, target, weight = (
        of_models.flatten(0, 1) for of_models in (logit_MBB, target_MBB, weight_MBB)
    )
    return graded_bce(logit, target, weight, queries=BATCH)


def _infonce(form: str, cosine_MBB: Tensor, target_MBB: Tensor, weight_MBB: Tensor) -> Tensor:
    own_MBB = torch.eye(BATCH, dtype=torch.bool).expand_as(cosine_MBB)
    positive_MBB = positive_weights(target_MBB, own_MBB, form, 0.5)  # type: ignore[arg-type]
    # The divisor of each model's batch, so that theirs together is 1.
    positive_MBB = positive_MBB / positive_MBB.sum(dim=(1, 2), keepdim=True)
    cells = (SCALE * cosine_MBB, target_MBB, weight_MBB, own_MBB, positive_MBB)
    logit, target, weight, own, positive = (of_models.flatten(0, 1) for of_models in cells)
    return infonce(logit, target, weight, own, positive, divisor=1.0)


def graded_ndcg(score_QD: Floats, gain_QD: Floats, k: int) -> Floats:
    """nDCG@k of each query with these gains: `bixse.evaluation.metrics.ndcg`, for whole arrays."""
    discount_K = 1 / np.log2(np.arange(2, k + 2))
    found_QK = np.take_along_axis(gain_QD, np.argsort(-score_QD, axis=1, kind="stable")[:, :k], 1)
    best_QK = -np.sort(-gain_QD, axis=1)[:, :k]
    best_Q = best_QK @ discount_K
    values: Floats = np.divide(
        found_QK @ discount_K, best_Q, out=np.zeros(len(best_Q)), where=best_Q > 0
    )
    return values


def lead(
    found: Mapping[tuple[str, float], Floats], rival: str, noise: float
) -> tuple[float, float, int]:
    """Of graded BCE over a rival: mean over seeds, its standard error, seeds that it leads in."""
    apart = found["graded_bce", noise] - found[rival, noise]
    error = float(apart.std(ddof=1) / len(apart) ** 0.5) if len(apart) > 1 else 0.0
    return float(apart.mean()), error, int((apart > 0).sum())


def _unit(rows: Floats) -> Floats:
    unit: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def main(options: Options) -> None:
    found = scores(options, OBJECTIVES)
    if options.json:
        rows = [{"objective": o, "noise": n, "ndcg@10": v.tolist()} for (o, n), v in found.items()]
        print(json.dumps(rows))
        return
    print(f"{'nDCG@10':<12}" + "".join(f"{f'noise {noise:g}':>26}" for noise in options.noise))
    for objective in OBJECTIVES:
        cells = []
        for noise in options.noise:
            text = f"{found[objective, noise].mean():.3f}"
            if objective != "graded_bce":
                mean, error, seeds = lead(found, objective, noise)
                text += f" ({mean:+.3f}±{error:.3f}, {seeds}/{options.seeds})"
            cells.append(f"{text:>26}")
        print(f"{objective:<12}" + "".join(cells))
    print("(lead of graded BCE ± its standard error, seeds that it leads in)", file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Options))
