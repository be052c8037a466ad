"""Pairs in, the token ids of their prompts out; grades as single tokens, checked before any pair.

A judge's answer is the distribution of its first token, so each label of the scale must be exactly
one token where the prompt ends ("2" and " 2" differ). Loaded once, called often; no engine needed.
"""

import re
from collections.abc import Sequence
from typing import Any

from bixse.judging.prompts import ORDERS, PROMPTS, Order, Prompt
from bixse.judging.settings import Pointwise


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Whatever a text must not contain, since the tokenizer would take it for its own."""
    special = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
    return re.compile("|".join(map(re.escape, special)) or r"(?!)")


def broken_up(special: re.Pattern[str], text: str) -> str:
    """The text with special tokens broken up, so that no passage ends its own turn."""
    return special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


class ChatTokenizer:
    """A judge model's tokenizer and chat template: messages in, token ids out.

    Thinking is switched off where the template has a switch. A model without a chat template reads
    the messages and `cue` as plain text.
    """

    def __init__(self, tokenizer: Any, cue: str, document_tokens: int = 0) -> None:
        """`document_tokens` cuts longer passages; 0 cuts none."""
        self._tokenizer = tokenizer
        self._cue = cue
        self._document_tokens = document_tokens
        self._special = special_tokens(tokenizer)

    def ids(self, chats: Sequence[list[dict[str, str]]]) -> list[list[int]]:
        """Each chat, ready for the first token of the answer."""
        return self._ids([self._render(messages) for messages in chats])

    def plain(self, text: str) -> str:
        return broken_up(self._special, text)

    def cut(self, passages: Sequence[str]) -> list[str]:
        """The passages without special tokens, the longer ones cut."""
        texts = [self.plain(passage) for passage in passages]
        if not self._document_tokens or not texts:
            return texts
        found = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        limit = self._document_tokens
        return [
            text if len(offsets) <= limit else text[: offsets[limit - 1][1]]
            for text, offsets in zip(texts, found["offset_mapping"], strict=True)
        ]

    def label_id(self, label: str, chats: Sequence[list[dict[str, str]]], prompt: str) -> int:
        """The token that `label` is at the end of each chat.

        Raises ValueError when it is none or not one, or when the template opens a chain of thought,
        which would stand where the answer is read.
        """
        found = set()
        for messages in chats:
            text = self._render(messages)
            if text.rstrip().endswith("<think>"):
                raise ValueError(
                    f"the chat template of {self._tokenizer.name_or_path} opens a chain of thought "
                    "that cannot be switched off: choose a model that answers at once"
                )
            asked, answered = self._ids([text, text + label])
            if len(answered) != len(asked) + 1 or answered[:-1] != asked:
                raise ValueError(
                    f"grade {label!r} is not one token of {self._tokenizer.name_or_path} where "
                    f"the {prompt} prompt ends: choose another prompt or model"
                )
            found.add(answered[-1])
        if len(found) != 1:
            raise ValueError(f"grade {label!r} is another token in each presentation order")
        return int(found.pop())

    def _render(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            return "\n\n".join(message["content"] for message in messages) + self._cue
        switches = {"enable_thinking": False, "thinking": False}
        template = self._tokenizer.apply_chat_template
        try:
            text = template(messages, tokenize=False, add_generation_prompt=True, **switches)
        except TemplateError:
            # Some templates know no system role: the instructions then open the user's turn.
            whole = "\n\n".join(message["content"] for message in messages)
            messages = [{"role": "user", "content": whole}]
            text = template(messages, tokenize=False, add_generation_prompt=True, **switches)
        return str(text)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        # A chat template writes the special tokens itself.
        plain = self._tokenizer.chat_template is None
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=plain)["input_ids"]
        return ids


class PromptTokenizer:
    """Pairs in the words of one prompt, as token ids."""

    def __init__(self, tokenizer: Any, prompt: Prompt, document_tokens: int = 0) -> None:
        """Raises ValueError as `ChatTokenizer.label_id`."""
        self.prompt = prompt
        self._chat = ChatTokenizer(tokenizer, "\n\nGrade:\n", document_tokens)
        chats = [prompt.messages("query", "passage", order) for order in ORDERS]
        self.label_ids = tuple(
            self._chat.label_id(label, chats, prompt.name) for label in prompt.scale.labels
        )

    @classmethod
    def load(cls, settings: Pointwise) -> "PromptTokenizer":
        """Raises ValueError as the constructor, or when there is no such tokenizer."""
        tokenizer = load_tokenizer(settings)
        return cls(tokenizer, PROMPTS[settings.prompt], settings.document_tokens)

    def encode(
        self, queries: Sequence[str], passages: Sequence[str], order: Order
    ) -> list[list[int]]:
        """The prompt of each pair, ready for the first token of the answer."""
        return self._chat.ids(
            [
                self.prompt.messages(self._chat.plain(query), passage, order)
                for query, passage in zip(queries, self._chat.cut(passages), strict=True)
            ]
        )


def load_tokenizer(settings: Pointwise) -> Any:
    """Raises ValueError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(settings.model, revision=settings.revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no tokenizer of judge model {settings.model!r}: {reason}") from None
