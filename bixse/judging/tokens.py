"""Pairs in, the token ids of their prompts out; grades as single tokens, checked before any pair.

A judge's answer is the distribution of its first token, so each label of the scale must be exactly
one token where the prompt ends ("2" and " 2" differ). Loaded once, called often; no engine needed.
"""

import re
from collections.abc import Sequence
from typing import Any

from bixse.judging.prompts import ORDERS, PROMPTS, Order, Prompt
from bixse.judging.settings import Pointwise


class PromptTokenizer:
    """A judge model's tokenizer and chat template, put to one prompt.

    Thinking is switched off where the template has a switch. A model without a chat template reads
    the instructions, the pair and `Grade:` as plain text.
    """

    def __init__(self, tokenizer: Any, prompt: Prompt, document_tokens: int = 0) -> None:
        """`document_tokens` cuts longer passages; 0 cuts none.

        Raises ValueError when a label is not one token, or when the template opens a chain of
        thought, which would stand where the grade is read.
        """
        self.prompt = prompt
        self._tokenizer = tokenizer
        self._document_tokens = document_tokens
        special = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self.label_ids = tuple(self._label_id(label) for label in prompt.scale.labels)

    @classmethod
    def load(cls, settings: Pointwise) -> "PromptTokenizer":
        """Raises ValueError as the constructor, or when there is no such tokenizer."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(settings.model, revision=settings.revision)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"no tokenizer of judge model {settings.model!r}: {reason}") from None
        return cls(tokenizer, PROMPTS[settings.prompt], settings.document_tokens)

    def encode(
        self, queries: Sequence[str], passages: Sequence[str], order: Order
    ) -> list[list[int]]:
        """The prompt of each pair, ready for the first token of the answer."""
        cut = self._cut([self._plain(passage) for passage in passages])
        texts = [
            self._render(self.prompt.messages(self._plain(query), passage, order))
            for query, passage in zip(queries, cut, strict=True)
        ]
        return self._ids(texts)

    def _render(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            return "\n\n".join(message["content"] for message in messages) + "\n\nGrade:\n"
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

    def _plain(self, text: str) -> str:
        """The text with special tokens broken up, so that no passage ends its own turn."""
        return self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def _cut(self, passages: Sequence[str]) -> list[str]:
        if not self._document_tokens or not passages:
            return list(passages)
        found = self._tokenizer(
            list(passages), add_special_tokens=False, return_offsets_mapping=True
        )["offset_mapping"]
        limit = self._document_tokens
        return [
            passage if len(offsets) <= limit else passage[: offsets[limit - 1][1]]
            for passage, offsets in zip(passages, found, strict=True)
        ]

    def _label_id(self, label: str) -> int:
        """The token that `label` is at the end of a prompt, the same in both orders."""
        found = set()
        for order in ORDERS:
            text = self._render(self.prompt.messages("query", "passage", order))
            if text.rstrip().endswith("<think>"):
                raise ValueError(
                    f"the chat template of {self._tokenizer.name_or_path} opens a chain of thought "
                    "that cannot be switched off: choose a model that answers at once"
                )
            prompt, answered = self._ids([text, text + label])
            if len(answered) != len(prompt) + 1 or answered[:-1] != prompt:
                raise ValueError(
                    f"grade {label!r} is not one token of {self._tokenizer.name_or_path} where "
                    f"the {self.prompt.name} prompt ends: choose another prompt or model"
                )
            found.add(answered[-1])
        if len(found) != 1:
            raise ValueError(f"grade {label!r} is another token in each presentation order")
        return int(found.pop())
