"""Chats in, token ids out: a generator's own tokenizer and chat template. No engine needed."""

import re
from collections.abc import Sequence
from typing import Any

from bixse.synthesis.prompts import Messages
from bixse.synthesis.settings import Generator


class ChatTokenizer:
    """A generator's tokenizer, loaded once and called often.

    Thinking is switched off where the template has a switch. A model without a chat template reads
    the turns as plain text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    @classmethod
    def load(cls, settings: Generator) -> "ChatTokenizer":
        """Raises ValueError when there is no such tokenizer."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(settings.model, revision=settings.revision)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"no tokenizer of generator {settings.model!r}: {reason}") from None
        return cls(tokenizer)

    def encode(self, chats: Sequence[Messages]) -> list[list[int]]:
        """Each chat, ready for the first token of the answer."""
        if not chats:
            return []
        return self._ids([self._render(chat) for chat in chats])

    def answered(
        self, chats: Sequence[Messages], answers: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """Each chat as `encode` has it, and its answer up to the end of the turn: what a generator
        is tuned on.

        Raises ValueError when the tokenizer has no token that ends a turn, or takes the end of a
        chat and the beginning of its answer for one token.
        """
        end = self._tokenizer.eos_token_id
        if end is None:
            name = self._tokenizer.name_or_path
            raise ValueError(f"{name} has no token that ends an answer: choose another model")
        if not chats:
            return []
        texts = [self._render(chat) for chat in chats]
        whole = [text + self._plain(a) for text, a in zip(texts, answers, strict=True)]
        rows = []
        for prompt, both in zip(self._ids(texts), self._ids(whole), strict=True):
            if both[: len(prompt)] != prompt:
                raise ValueError(
                    f"{self._tokenizer.name_or_path} takes the end of a chat and its answer for "
                    "one token: choose another model"
                )
            rows.append((prompt, [*both[len(prompt) :], end]))
        return rows

    def cut(self, text: str, tokens: int) -> str:
        """The first `tokens` tokens of a text; 0 cuts none."""
        if not tokens:
            return text
        offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        return text if len(offsets) <= tokens else text[: offsets[tokens - 1][1]]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        # A chat template writes the special tokens itself.
        plain = self._tokenizer.chat_template is None
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=plain)["input_ids"]
        return ids

    def _render(self, chat: Messages) -> str:
        from jinja2 import TemplateError

        messages = [{**message, "content": self._plain(message["content"])} for message in chat]
        if self._tokenizer.chat_template is None:
            return "\n\n".join(message["content"] for message in messages) + "\n\n"
        switches = {"enable_thinking": False, "thinking": False}
        template = self._tokenizer.apply_chat_template
        try:
            text = template(messages, tokenize=False, add_generation_prompt=True, **switches)
        except TemplateError:
            # Some templates know no system role: the instructions then open the first user's turn.
            system, first, *rest = messages
            joined = f"{system['content']}\n\n{first['content']}"
            messages = [{"role": "user", "content": joined}, *rest]
            text = template(messages, tokenize=False, add_generation_prompt=True, **switches)
        return str(text)

    def _plain(self, text: str) -> str:
        """The text with special tokens broken up, so that no document ends its own turn."""
        return self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
