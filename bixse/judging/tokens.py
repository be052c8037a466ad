"""Pairs in, the token ids of their prompts out; grades as single tokens, checked before any pair.

A judge's answer is the distribution of its first token, so each label of the scale must be exactly
one token where the prompt ends ("2" and " 2" differ). Loaded once, called often; no engine needed.
"""

from collections.abc import Sequence
from typing import Any

from bixse.judging.prompts import ORDERS, PROMPTS, Order, Prompt
from bixse.judging.settings import Pointwise
from bixse.reading.chats import Chats, Messages, load_tokenizer


def label_ids(
    chats: Chats, labels: Sequence[str], asked: Sequence[Messages], prompt: str
) -> tuple[int, ...]:
    """The token that each label is at the end of every chat of `asked`.

    Raises ValueError when one is none or not one, or when the template opens a chain of thought,
    which would stand where the answer is read.
    """
    return tuple(_label_id(chats, label, asked, prompt) for label in labels)


def _label_id(chats: Chats, label: str, asked: Sequence[Messages], prompt: str) -> int:
    name = chats.tokenizer.name_or_path
    found = set()
    for messages in asked:
        text = chats.render(messages)
        if text.rstrip().endswith("<think>"):
            raise ValueError(
                f"the chat template of {name} opens a chain of thought "
                "that cannot be switched off: choose a model that answers at once"
            )
        before, answered = chats.ids([text, text + label])
        if len(answered) != len(before) + 1 or answered[:-1] != before:
            raise ValueError(
                f"grade {label!r} is not one token of {name} where "
                f"the {prompt} prompt ends: choose another prompt or model"
            )
        found.add(answered[-1])
    if len(found) != 1:
        raise ValueError(f"grade {label!r} is another token in each presentation order")
    return int(found.pop())


class PromptTokenizer:
    """Pairs in the words of one prompt, as token ids."""

    def __init__(self, tokenizer: Any, prompt: Prompt, document_tokens: int = 0) -> None:
        """`document_tokens` cuts longer passages; 0 cuts none. Raises ValueError as `label_ids`."""
        self.prompt = prompt
        self._chats = Chats(tokenizer, "\n\nGrade:\n")
        self._document_tokens = document_tokens
        asked = [prompt.messages("query", "passage", order) for order in ORDERS]
        self.label_ids = label_ids(self._chats, prompt.scale.labels, asked, prompt.name)

    @classmethod
    def load(cls, settings: Pointwise) -> "PromptTokenizer":
        """Raises ValueError as the constructor, or when there is no such tokenizer."""
        tokenizer = load_tokenizer(settings.model, settings.revision, "judge model")
        return cls(tokenizer, PROMPTS[settings.prompt], settings.document_tokens)

    def encode(
        self, queries: Sequence[str], passages: Sequence[str], order: Order
    ) -> list[list[int]]:
        """The prompt of each pair, ready for the first token of the answer."""
        plain = self._chats.plain
        shown = self._chats.cut(list(map(plain, passages)), self._document_tokens)
        asked = [
            self.prompt.messages(plain(query), passage, order)
            for query, passage in zip(queries, shown, strict=True)
        ]
        return self._chats.encode(asked)
