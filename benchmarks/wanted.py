"""A retriever that is wanted, and the file that holds what it found."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bixse.place import Place
from bixse.training.settings import Training


@dataclass(frozen=True)
class Wanted:
    """The base encoder, or what it becomes, on one set."""

    results: Path
    """Directory of all files."""
    name: str
    """Of the file there, without its ending."""
    set: str
    split: str
    base: str
    """Fingerprint of the base encoder."""
    encoder_tokens: int | None
    noise: float
    settings: Training | None
    """None: the base as it is."""

    def values(self) -> dict[str, float] | None:
        """nDCG@10 of each query, where the file is there.

        Raises ValueError when it is that of other settings.
        """
        path = self.results / f"{self.name}.json"
        if not path.exists():
            return None
        stored = json.loads(path.read_text())
        if stored["asked"] != self._asked:
            other = [key for key, value in self._asked.items() if stored["asked"].get(key) != value]
            raise ValueError(f"{path} was made with another {', '.join(other)}: take another --out")
        values: dict[str, float] = stored["ndcg@10"]
        return values

    def write(self, values: Mapping[str, float], found: Mapping[str, Any]) -> None:
        """All of the file or none of it."""
        stored = {"asked": self._asked, **found, "ndcg@10": values}
        Place(str(self.results)).write(f"{self.name}.json", json.dumps(stored).encode())

    @property
    def _asked(self) -> dict[str, Any]:
        training = None if self.settings is None else self.settings.model_dump(mode="json")
        return {
            "set": self.set,
            "split": self.split,
            "base": self.base,
            "encoder_tokens": self.encoder_tokens,
            "noise": self.noise,
            "training": training,
        }
