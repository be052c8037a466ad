"""Chats as a causal language model reads them: in the words of its own template, as token ids.

What a judge and a generator have in common. No engine needed.
"""

import re
from collections.abc import Sequence
from typing import Any

Messages = list[dict[str, str]]
"""The turns of a chat, each with a `role` and its `content`."""


def load_tokenizer(model: str, revision: str | None, what: str) -> Any:
    """Raises ValueError when there is no such tokenizer; `what` is the model to its reader."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no tokenizer of {what} {model!r}: {reason}") from None


class Plain:
    """Breaks up the special tokens of a tokenizer in texts, so that none ends its own turn."""

    def __init__(self, tokenizer: Any) -> None:
        special = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def __call__(self, text: str) -> str:
        return self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


class Chats:
    """A model's tokenizer and chat template: chats in, token ids out.

    Thinking is switched off where the template has a switch. A model without a chat template reads
    the turns and `cue` as plain text.
    """

    def __init__(self, tokenizer: Any, cue: str) -> None:
        self.tokenizer = tokenizer
        self.plain = Plain(tokenizer)
        self._cue = cue

    def render(self, chat: Messages) -> str:
        """The chat as one text, up to where its answer begins."""
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None:
            return "\n\n".join(message["content"] for message in chat) + self._cue
        switches = {"enable_thinking": False, "thinking": False}
        template = self.tokenizer.apply_chat_template
        try:
            text = template(chat, tokenize=False, add_generation_prompt=True, **switches)
        except TemplateError:
            # Some templates know no system role: the instructions then open the first user's turn.
            system, first, *rest = chat
            joined = f"{system['content']}\n\n{first['content']}"
            chat = [{"role": "user", "content": joined}, *rest]
            text = template(chat, tokenize=False, add_generation_prompt=True, **switches)
        return str(text)

    def encode(self, chats: Sequence[Messages]) -> list[list[int]]:
        """Each chat, ready for the first token of the answer."""
        return self.ids([self.render(chat) for chat in chats])

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of rendered chats."""
        if not texts:
            return []
        # A chat template writes the special tokens itself.
        special = self.tokenizer.chat_template is None
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=special)["input_ids"]
        return ids

    def cut(self, texts: Sequence[str], tokens: int) -> list[str]:
        """As `first_tokens`."""
        return first_tokens(self.tokenizer, texts, tokens)


def first_tokens(tokenizer: Any, texts: Sequence[str], tokens: int) -> list[str]:
    """The first `tokens` tokens of each text; 0 cuts none."""
    if not tokens or not texts:
        return list(texts)
    found = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    return [
        text if len(offsets) <= tokens else text[: offsets[tokens - 1][1]]
        for text, offsets in zip(texts, found["offset_mapping"], strict=True)
    ]
