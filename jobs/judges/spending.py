"""What a job's workers have cost so far, in all its sessions."""

import json
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from bixse.artifacts import Draft
from bixse.judging.asked import Usage
from bixse.judging.settings import Judging
from jobs.parts import usage, usage_place
from jobs.recipe import Placement

WRITE_EVERY_S = 20
"""What a killed driver can forget of the time that its workers were held."""


@dataclass
class Spending:
    """What is paid for, and its price: seconds for which GPUs (or, without GPUs, workers) were
    held, or the tokens of an endpoint."""

    devices: float
    price_per_hour: float | None
    earlier: float = 0.0
    """Device seconds of the sessions before."""
    token_prices: tuple[float, float] | None = None
    """Of a prompt token and of an output token: then tokens are paid for, and no seconds."""
    limit: float | None = None
    """What all may cost."""
    tokens: Usage = field(default_factory=Usage)
    """Of all sessions, as far as units have ended."""
    _started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Device seconds of this session."""
        return (time.monotonic() - self._started) * self.devices

    @property
    def cost(self) -> float | None:
        """Cost of all sessions, in the currency of the price."""
        if self.token_prices is not None:
            return self.tokens.cost(self.token_prices)
        if self.price_per_hour is None:
            return None
        return (self.earlier + self.seconds) / 3600 * self.price_per_hour

    def count(self, took: Mapping[str, float]) -> None:
        """What another unit took."""
        self.tokens += tokens_of(took)

    def note(self) -> str:
        """Money so far, for the progress line."""
        if self.cost is None:
            return ""
        return f"cost {self.cost:,.2f}" + ("" if self.limit is None else f" of {self.limit:,.2f}")


def tokens_of(took: Mapping[str, float]) -> Usage:
    """The tokens among the counts of a unit, or of many."""
    prompt, output = took.get("prompt_tokens", 0), took.get("output_tokens", 0)
    return Usage(prompt_tokens=int(prompt), output_tokens=int(output))


def devices(placement: Placement) -> float:
    """GPUs that all workers hold together, or the workers themselves where they hold none."""
    return placement.judge_actors * (placement.gpus_per_actor or 1)


@contextmanager
def spending(draft: Draft, placement: Placement, judging: Judging) -> Iterator[Spending]:
    """Count a session, and keep the count beside the draft even if the driver is killed."""
    place, name = usage_place(draft), f"session-{uuid.uuid4().hex}.json"
    before = usage(draft)
    spent = Spending(
        devices(placement),
        judging.price_per_gpu_hour,
        before["device_seconds"],
        judging.token_prices,
        judging.max_cost,
        tokens_of(before),
    )
    over = threading.Event()

    def write() -> None:
        place.write(name, json.dumps({"device_seconds": spent.seconds}).encode())

    def keep() -> None:
        while not over.wait(WRITE_EVERY_S):
            write()

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield spent
    finally:
        over.set()
        keeper.join()
        write()
