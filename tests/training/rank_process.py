"""Ranks of process groups, each an interpreter of its own that stays for all tests.

Importing torch and sentence-transformers takes each ten seconds, what a test asks of it one or two.

gradients   of every objective on every batch, in double precision -> DIR/gradients-WORLD
sharded     the same of a model that is spread over the ranks -> DIR/sharded-WORLD
cut         the same of one, two texts at a time -> DIR/cut-WORLD
recomputed  the same with GradCache, two texts at a time -> DIR/recomputed-WORLD
loop        training of DIR/encoder from its last checkpoint -> DIR/loop-WORLD
dev         the same with an evaluation every third step -> DIR/dev-WORLD
reranker    the same of a reranker that begins as DIR/encoder -> DIR/reranker-WORLD
spread      the same of a model that is spread over the ranks -> DIR/spread-WORLD
adapters    the same of a reranker's adapters and head -> DIR/adapters-WORLD
mixed       the same on two sets of labels -> DIR/mixed-WORLD
gated       training of DIR/encoder beside DIR/llm from the last checkpoint -> DIR/gated-WORLD
tuning      tuning of the language model DIR/llm from its last checkpoint -> DIR/tuning-WORLD
"""

import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from bixse.training.gather import World
from tests.training import ranks

_WITHIN_S = 280


class Ranks:
    """Runs groups of up to as many processes as were ever asked for."""

    def __init__(self) -> None:
        self._processes: list[tuple[BaseProcess, Connection]] = []

    def begin(self, world: int) -> None:
        """Let so many processes import what they need, without waiting for it."""
        while len(self._processes) < world:
            self._processes.append(_started(len(self._processes)))

    def __call__(self, what: str, world: int, directory: Path) -> dict[str, Tensor]:
        """Run a group of processes; what the first one saved."""
        self.begin(world)
        try:
            for _, channel in self._processes[:world]:
                channel.send((what, world, directory))
            for rank, (_, channel) in enumerate(self._processes[:world]):
                assert channel.poll(_WITHIN_S), f"rank {rank} does not end"
                # Of one that died there is EOFError, and its traceback on standard error.
                assert channel.recv() == what
        except BaseException:
            # Whoever is left of the group waits for the others.
            self.end()
            raise
        return load_file(directory / f"{what}-{world}.safetensors")

    def end(self) -> None:
        for process, channel in self._processes:
            channel.close()
            process.kill()
            process.join()
        self._processes.clear()


def _started(rank: int) -> tuple[BaseProcess, Connection]:
    # Not forked: as on several machines, each has its own random state and order of sets.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(rank: int, channel: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            what, size, directory = channel.recv()
        except EOFError:
            return
        store = f"file://{directory}/store-{what}-{size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        found = _found(what, World(rank, size), directory)
        if rank == 0:
            save_file(found, directory / f"{what}-{size}.safetensors")
        dist.destroy_process_group()
        channel.send(what)


def _found(what: str, world: World, directory: Path) -> dict[str, Tensor]:
    match what:
        case "gradients":
            return ranks.gradients(world)
        case "recomputed":
            return ranks.gradients(world, tokens=2)
        case "sharded":
            return ranks.gradients(world, sharded=True)
        case "cut":
            return ranks.gradients(world, tokens=2, sharded=True)
        case "spread":
            return ranks.sharded(world, directory)
        case "dev":
            return ranks.dev(world, directory)
        case "reranker":
            return ranks.reranker(world, directory)
        case "adapters":
            return ranks.adapters(world, directory)
        case "mixed":
            return ranks.mixed(world, directory)
        case "gated":
            return ranks.gated(world, directory)
        case "tuning":
            return ranks.tuning(world, directory)
        case "loop":
            return ranks.loop(world, directory)
    raise ValueError(f"nothing is called {what!r}")
