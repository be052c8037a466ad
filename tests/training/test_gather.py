"""W ranks equal one: gradients of both sides, of scale and of bias, whatever the batch."""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from bixse.training.gather import World
from tests.training import ranks
from tests.training.rank_process import Ranks

Found = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def of_ranks(
    run_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Found]:
    """What a group found; it runs once, for whoever asks."""
    return cache(lambda what, world: run_ranks(what, world, tmp_path_factory.mktemp("ranks")))


def naive(objective: str, kind: str) -> Found:
    """Loss and gradients by the formulae of methods 1.1 and 1.3, written out cell by cell."""
    settings, batch = ranks.OBJECTIVES[objective], ranks.batches()[kind]
    towers = ranks.TwoTowers()
    log_scale = torch.tensor(settings.scale, dtype=torch.float32).log().double().requires_grad_()
    bias = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
    query, document = (
        torch.nn.functional.normalize(side, dim=1) for side in ranks.vectors(towers, batch)
    )
    graded = objective == "graded_bce"
    scale = log_scale.exp() if graded else settings.scale
    s = scale * query @ document.T
    t = torch.from_numpy(batch.target_QD).double()
    loss, total = torch.zeros((), dtype=torch.float64), 0.0
    for i in range(s.shape[0]):
        for j in range(s.shape[1]):
            if graded and batch.weight_QD[i, j]:
                p = torch.sigmoid(s[i, j] + bias[0])
                loss = loss - (t[i, j] * p.log() + (1 - t[i, j]) * (1 - p).log())
            if not graded and batch.own_QD[i, j]:
                form, z = settings.positives, float(t[i, j])
                weight = {"all": 1.0, "threshold": float(z >= 0.5), "weighted": z}[form]
                others = [
                    k
                    for k in range(s.shape[1])
                    if batch.weight_QD[i, k] and not (batch.known_QD[i, k] and t[i, k] >= z)
                ]
                terms = torch.stack([s[i, j], *(s[i, k] for k in others if k != j)])
                loss = loss - weight * (s[i, j] - terms.exp().sum().log())
                total += weight
    loss = loss / (s.shape[0] if graded else max(total, 1e-30))
    loss.backward()
    found = {f"encoder.{name}": p.grad for name, p in towers.named_parameters()}
    found |= {"log_scale": log_scale.grad, "bias": bias.grad, "loss": loss.detach()}
    return {name: value for name, value in found.items() if value is not None}


@pytest.fixture(scope="module")
def one() -> Found:
    return ranks.gradients(World())


@pytest.mark.parametrize("kind", ranks.batches())
@pytest.mark.parametrize("objective", ["graded_bce", "all", "threshold", "weighted"])
def test_one_process_equals_the_formula(objective: str, kind: str, one: Found) -> None:
    expected = naive(objective, kind)
    assert len(expected) == (7 if objective == "graded_bce" else 5)
    for name, value in expected.items():
        found = one[f"{objective}/{kind}/{name}"]
        found = found[0] if name == "loss" else found
        torch.testing.assert_close(found, value, atol=1e-10, rtol=1e-9, msg=name)


@pytest.mark.parametrize(
    "what, world",
    [
        *(("gradients", ranks) for ranks in (2, 4)),
        *(("recomputed", ranks) for ranks in (1, 2)),
        pytest.param("recomputed", 4, marks=pytest.mark.slow),
        ("sharded", 2),
        pytest.param("sharded", 4, marks=pytest.mark.slow),
        ("cut", 2),
    ],
)
def test_ranks_equal_one_process(
    what: str, world: int, one: Found, of_ranks: Callable[[str, int], Found]
) -> None:
    found = of_ranks(what, world)
    assert found.keys() >= one.keys()
    sides = ("encoder.towers.query.weight", "encoder.towers.document.weight", "log_scale", "bias")
    assert all(one[f"graded_bce/even/{name}"].abs().sum() > 1e-3 for name in sides)
    assert not any(name.endswith("/encoder.unused") for name in found)
    kept = {name.split("/")[2] for name in found if name.startswith("adapters/even/encoder")}
    assert len(kept) == 4
    assert all("lora" in name for name in kept)
    if what in ("sharded", "cut"):
        parameters = sum(p.numel() for p in ranks.TwoTowers().parameters())
        assert found["graded_bce/held"] < 1.4 * parameters / world
    for name, value in one.items():
        if name.endswith("/reduced"):
            continue
        # The reported floor is reduced in float32, and a logit may fall into the next bin;
        # everything else is double.
        exact = 1e-6 if name.endswith(("/loss", "/calibrated")) else 1e-10
        torch.testing.assert_close(found[name], value, atol=exact, rtol=exact, msg=name)


@pytest.mark.parametrize("what", ["gradients", "recomputed"])
def test_gradients_are_reduced_once_a_step(
    what: str, of_ranks: Callable[[str, int], Found]
) -> None:
    found = of_ranks(what, 2)
    steps = [f"{name}/{kind}" for name in ("graded_bce", "all") for kind in ranks.batches()]
    for step in steps:
        parameters = [
            value.numel()
            for name, value in found.items()
            if name.startswith(f"{step}/")
            and name.split("/")[2] not in ("loss", "reduced", "calibrated")
        ]
        # Whether memory sufficed, the documents' vectors, again memory, which parameters have a
        # gradient, the gradients, and the loss with its floor.
        documents = ranks.batches()[step.split("/")[1]].document_D
        expected = [1, 6 * len(documents), 1, 7, sum(parameters), 2]
        sizes = found[f"{step}/reduced"].tolist()
        assert sizes[:3] + sizes[4:] == expected[:3] + expected[4:], step
        assert sizes[3] < 10


def test_batches_are_what_they_are_called() -> None:
    shapes = {kind: batch.own_QD.shape for kind, batch in ranks.batches().items()}
    assert shapes["two queries"][0] == 2
    assert shapes["one document"][1] == 1
    assert shapes["uneven"][0] % 4
    assert shapes["uneven"][1] % 4
    even = ranks.batches()["even"]
    assert (even.own_QD.sum(axis=0) > 1).any()
    assert (even.own_QD.sum(axis=1) > 1).any()
    assert (even.weight_QD == 0).any()
    assert (even.known_QD & ~even.own_QD).any()
