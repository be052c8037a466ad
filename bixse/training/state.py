"""What a checkpoint holds, and how it reads back, on any number of ranks.

A checkpoint is one safetensors file, `step-<steps done>-<sha256>.safetensors`, written atomically:

    model.<parameter>          what is trained of encoder, log_scale and bias
    adam.<parameter>.<moment>  the optimiser's moments and its step
    history                    [steps, metrics] float64, the whole curve so far
    dev                        [evaluations, 2] float64: (step, score) of each so far
    best.<parameter>           the weights of the best of them, where there are any
    metadata                   format, the fingerprint of the run, the names of the metrics

The learning rate and the row order are functions of the step, and no random number is drawn in a
step (dropout is off), so there is nothing else to keep.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bixse.place import Place
from bixse.training.dev import Dev, trained
from bixse.training.sharding import as_parts, whole

_FORMAT = "bixse-checkpoint-2"
_KEEP = 2


def save(
    place: Place,
    fingerprint: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    metrics: Sequence[str],
    history: Sequence[Sequence[float]],
    dev: Dev,
    rank: int = 0,
) -> str | None:
    """Write the checkpoint after `len(history)` steps, drop all but the last two; its name.

    Only the first rank writes; of a sharded module all must call.
    """
    tensors = {
        "history": torch.tensor(history, dtype=torch.float64),
        "dev": torch.tensor(dev.scores, dtype=torch.float64).reshape(-1, 2),
        **{f"best.{name}": weights for name, weights in dev.weights.items()},
    }
    for name, parameter in trained(module).items():
        parts = {f"model.{name}": parameter}
        for key, value in optimizer.state.get(parameter, {}).items():
            parts[f"adam.{name}.{key}"] = value
        for key, value in parts.items():
            # Every rank is in the collective; one holds what came of it.
            gathered = whole(value.detach())
            if rank == 0:
                tensors[key] = gathered.cpu().contiguous()
    if rank != 0:
        return None
    metadata = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "metrics": json.dumps(list(metrics)),
    }
    with tempfile.TemporaryDirectory() as aside:
        path = Path(aside) / "checkpoint.safetensors"
        save_file(tensors, path, metadata)
        name = f"step-{len(history):08d}-{_sha256(path)}.safetensors"
        place.put(path, name)
    for old in _names(place)[:-_KEEP]:
        place.remove(old)
    return name


def saved(place: Place) -> bool:
    """Whether a checkpoint stands there."""
    return bool(_names(place))


def clear(place: Place) -> None:
    """Remove all checkpoints: the encoder they led to is finished."""
    place.clear()


def load(
    place: Place,
    fingerprint: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    metrics: Sequence[str],
    dev: Dev,
) -> list[list[float]]:
    """Read the last checkpoint into module, optimiser and `dev`; the history, empty when there is
    none.

    Raises ValueError when it is damaged or belongs to another run, naming the file.
    """
    names = _names(place)
    if not names:
        return []
    name = names[-1]
    with tempfile.TemporaryDirectory() as aside:
        path = Path(aside) / "checkpoint.safetensors"
        path.write_bytes(place.read(name))
        if _sha256(path) != name.removesuffix(".safetensors").split("-")[-1]:
            raise ValueError(
                f"{place.url}/{name} is damaged: remove it to go on from the one before"
            )
        with safe_open(path, "pt") as file:
            found = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    expected = {"format": _FORMAT, "fingerprint": fingerprint, "metrics": json.dumps(list(metrics))}
    for key, value in expected.items():
        if found.get(key) != value:
            raise ValueError(
                f"{place.url}/{name} belongs to another run ({key} {found.get(key)}, now {value}): "
                "choose another --out, or remove it"
            )
    _restore(module, optimizer, tensors)
    dev.scores = [(int(step), score) for step, score in tensors["dev"].tolist()]
    dev.weights = {
        key.removeprefix("best."): value
        for key, value in tensors.items()
        if key.startswith("best.")
    }
    history: list[list[float]] = tensors["history"].tolist()
    return history


@torch.no_grad()
def _restore(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    for name, parameter in trained(module).items():
        parameter.copy_(as_parts(tensors[f"model.{name}"], parameter))
        moments = {
            key.removeprefix(f"adam.{name}."): value
            for key, value in tensors.items()
            if key.startswith(f"adam.{name}.") and "." not in key.removeprefix(f"adam.{name}.")
        }
        if moments:
            optimizer.state[parameter] = {
                key: as_parts(value, parameter) for key, value in moments.items()
            }


def _names(place: Place) -> list[str]:
    return [name for name in place.names() if name.startswith("step-")]


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
