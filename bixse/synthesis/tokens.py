"""Chats in, token ids out: a generator's own tokenizer and chat template. No engine needed."""

from collections.abc import Sequence
from typing import Any

from bixse.reading.chats import Chats, Messages, load_tokenizer
from bixse.synthesis.settings import Generator


class ChatTokenizer:
    """A generator's tokenizer, loaded once and called often."""

    def __init__(self, tokenizer: Any) -> None:
        self._chats = Chats(tokenizer, "\n\n")

    @classmethod
    def load(cls, settings: Generator) -> "ChatTokenizer":
        """Raises ValueError when there is no such tokenizer."""
        return cls(load_tokenizer(settings.model, settings.revision, "generator"))

    def encode(self, chats: Sequence[Messages]) -> list[list[int]]:
        """Each chat, ready for the first token of the answer."""
        return self._chats.ids(self._rendered(chats))

    def answered(
        self, chats: Sequence[Messages], answers: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """Each chat as `encode` has it, and its answer up to the end of the turn: what a generator
        is tuned on.

        Raises ValueError when the tokenizer has no token that ends a turn, or takes the end of a
        chat and the beginning of its answer for one token.
        """
        name, end = self._chats.tokenizer.name_or_path, self._chats.tokenizer.eos_token_id
        if end is None:
            raise ValueError(f"{name} has no token that ends an answer: choose another model")
        texts = self._rendered(chats)
        whole = [text + self._chats.plain(a) for text, a in zip(texts, answers, strict=True)]
        rows = []
        for prompt, both in zip(self._chats.ids(texts), self._chats.ids(whole), strict=True):
            if both[: len(prompt)] != prompt:
                raise ValueError(
                    f"{name} takes the end of a chat and its answer for "
                    "one token: choose another model"
                )
            rows.append((prompt, [*both[len(prompt) :], end]))
        return rows

    def cut(self, text: str, tokens: int) -> str:
        """The first `tokens` tokens of a text; 0 cuts none."""
        (shown,) = self._chats.cut([text], tokens)
        return shown

    def _rendered(self, chats: Sequence[Messages]) -> list[str]:
        plain = self._chats.plain
        return [
            self._chats.render([{**turn, "content": plain(turn["content"])} for turn in chat])
            for chat in chats
        ]
