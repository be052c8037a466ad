"""What a job's workers have cost so far, in all its sessions."""

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bixse.artifacts import Draft
from jobs.parts import usage, usage_place
from jobs.recipe import Placement

WRITE_EVERY_S = 20
"""What a killed driver can forget of the time that its workers were held."""


@dataclass
class Spending:
    """Seconds for which GPUs (or, without GPUs, workers) were held, and their price."""

    devices: float
    price_per_hour: float | None
    earlier: float = 0.0
    _started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Device seconds of this session."""
        return (time.monotonic() - self._started) * self.devices

    @property
    def cost(self) -> float | None:
        """Cost of all sessions, in the currency of the price."""
        if self.price_per_hour is None:
            return None
        return (self.earlier + self.seconds) / 3600 * self.price_per_hour

    def note(self) -> str:
        """Money so far, for the progress line."""
        return "" if self.cost is None else f"cost {self.cost:,.2f}"


def devices(placement: Placement) -> float:
    """GPUs that all workers hold together, or the workers themselves where they hold none."""
    return placement.judge_actors * (placement.gpus_per_actor or 1)


@contextmanager
def spending(
    draft: Draft, placement: Placement, price_per_hour: float | None
) -> Iterator[Spending]:
    """Count a session, and keep the count beside the draft even if the driver is killed."""
    place, name = usage_place(draft), f"session-{uuid.uuid4().hex}.json"
    spent = Spending(devices(placement), price_per_hour, usage(draft)["device_seconds"])
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
