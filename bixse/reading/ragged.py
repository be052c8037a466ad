"""Features of texts without their padding.

Shapes: N texts, T tokens of all of them, L of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Features = dict[str, Any]
"""Of sentence-transformers: `input_ids` [N, L], `attention_mask` [N, L], ..., by name."""


@dataclass(frozen=True)
class Ragged:
    """Texts of different lengths, end to end."""

    of_tokens: dict[str, Tensor]
    """[T, ...] each: `input_ids` and what else has a row a token."""
    of_texts: dict[str, Tensor]
    """[N, ...] each."""
    of_all: Features
    """What is said once for all texts."""
    length_N: Tensor

    @classmethod
    def of(cls, features: Features) -> "Ragged":
        """Features with an `attention_mask`, padded on either side."""
        mask_NL = features["attention_mask"].bool()
        texts, width = mask_NL.shape
        ragged = cls({}, {}, {}, mask_NL.sum(dim=1))
        for name, value in features.items():
            if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != texts:
                ragged.of_all[name] = value
            elif value.ndim > 1 and value.shape[1] == width:
                ragged.of_tokens[name] = value[mask_NL]
            else:
                ragged.of_texts[name] = value
        return ragged

    @classmethod
    def joined(cls, parts: "Sequence[Ragged]") -> "Ragged":
        """One after the other; what is said once must be the same of all."""
        first = parts[0]
        return cls(
            {name: torch.cat([part.of_tokens[name] for part in parts]) for name in first.of_tokens},
            {name: torch.cat([part.of_texts[name] for part in parts]) for name in first.of_texts},
            first.of_all,
            torch.cat([part.length_N for part in parts]),
        )

    def taken(self, rows: "slice | Tensor") -> "Ragged":
        """Some of the texts, in the order of `rows`."""
        starts = self.length_N.cumsum(0)[rows] - self.length_N[rows]
        lengths = self.length_N[rows]
        if isinstance(rows, slice):
            # Texts that follow each other are a view.
            tokens: slice | Tensor = slice(0, 0)
            if len(lengths):
                tokens = slice(int(starts[0]), int(starts[-1] + lengths[-1]))
        else:
            tokens = _positions(lengths) + torch.repeat_interleave(starts, lengths)
        return Ragged(
            {name: value[tokens] for name, value in self.of_tokens.items()},
            {name: value[rows] for name, value in self.of_texts.items()},
            self.of_all,
            lengths,
        )

    def positions(self) -> Tensor:
        """Of each token in its text, from 0, [T]."""
        return _positions(self.length_N)

    def padded(self, left: bool, pad: int, width: int = 1) -> Features:
        """[N, L] again, `pad` for `input_ids` where no token is and 0 for all else. L is that of
        the longest, or `width`."""
        # Texts of no token at all: what the model makes of them is for it to say.
        width = max(1, width, int(self.length_N.max()))
        row_T = torch.repeat_interleave(torch.arange(len(self.length_N)), self.length_N)
        column_T = self.positions()
        if left:
            column_T = column_T + width - self.length_N[row_T]

        def of(name: str, value: Tensor) -> Tensor:
            shape = (len(self.length_N), width, *value.shape[1:])
            made = value.new_full(shape, pad if name == "input_ids" else 0)
            made[row_T, column_T] = value
            return made

        tokens = {name: of(name, value) for name, value in self.of_tokens.items()}
        return tokens | self.of_texts | self.of_all


def padded_rows(features: Features, rows: slice) -> Features:
    """Some of the texts of padded features, without the columns that are padding in all of them."""
    mask_NL = features["attention_mask"]
    texts, width = mask_NL.shape
    used = mask_NL[rows].any(dim=0).nonzero()
    columns = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(None)

    def of(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != texts:
            return value
        wide = value.ndim > 1 and value.shape[1] == width
        return value[rows, columns] if wide else value[rows]

    return {name: of(value) for name, value in features.items()}


def _positions(lengths: Tensor) -> Tensor:
    ends = lengths.cumsum(0)
    return torch.arange(int(lengths.sum())) - torch.repeat_interleave(ends - lengths, lengths)
