"""Checkpoints: everything comes back, and nothing else is taken for one."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bixse.place import Place
from bixse.training import state
from bixse.training.dev import Dev

METRICS = ("step", "loss")


def made(seed: int, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    module.append(nn.Linear(1, 1))
    optimizer = torch.optim.AdamW(list(module[0].parameters()) + list(module[1].parameters()))
    for _ in range(steps):
        optimizer.zero_grad()
        module[1](module[0](torch.ones(2, 3))).pow(3).sum().backward()
        optimizer.step()
    return module, optimizer


def test_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "checkpoints"))
    module, optimizer = made(0, steps=3)
    history = [[1.0, 0.1 + 0.2], [2.0, 1 / 3], [3.0, 1e-300]]
    dev, found = Dev(), Dev()
    dev.add(0, 0.5, module)
    dev.add(3, 0.4, made(2, steps=0)[0])
    state.save(place, "run", module, optimizer, METRICS, history, dev)
    other, moments = made(1, steps=0)
    assert state.load(place, "run", other, moments, METRICS, found) == history
    assert (found.scores, found.best_step) == ([(0, 0.5), (3, 0.4)], 0)
    assert all(torch.equal(found.weights[name], value) for name, value in dev.weights.items())
    for name, value in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert optimizer.state[a].keys() == moments.state[b].keys()
        assert all(
            torch.equal(optimizer.state[a][key], moments.state[b][key])
            for key in optimizer.state[a]
        )
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert len(names) == 1
    assert names[0].startswith("step-00000003-")


def test_the_last_two_are_kept_and_clear_removes_them(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "checkpoints"))
    module, optimizer = made(0, steps=1)
    assert state.load(place, "run", module, optimizer, METRICS, Dev()) == []
    # What Ray Train leaves of any start.
    place.write("ray-train/.validate_storage_marker", b"")
    assert not state.saved(place)
    history = [[float(step), 0.0] for step in range(1, 4)]
    for steps in (1, 2, 3):
        state.save(place, "run", module, optimizer, METRICS, history[:steps], Dev())
    names = [name[:13] for name in place.names() if name.startswith("step")]
    assert names == ["step-00000002", "step-00000003"]
    assert state.saved(place)
    state.clear(place)
    state.clear(place)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("cut", [False, True])
def test_damage_is_noticed(cut: bool, tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    module, optimizer = made(0, steps=1)
    name = state.save(place, "run", module, optimizer, METRICS, [[1.0, 2.0]], Dev())
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data[:-5] if cut else data)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        state.load(place, "run", module, optimizer, METRICS, Dev())


def test_another_run_is_refused(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    module, optimizer = made(0, steps=1)
    state.save(place, "run", module, optimizer, METRICS, [[1.0, 2.0]], Dev())
    with pytest.raises(ValueError, match=r"another run \(fingerprint run, now new\)"):
        state.load(place, "new", module, optimizer, METRICS, Dev())


def test_a_killed_writer_leaves_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000009-abc.safetensors.1234.tmp").write_bytes(b"half")
    module, optimizer = made(0, steps=0)
    assert state.load(Place(str(tmp_path)), "run", module, optimizer, METRICS, Dev()) == []
