"""Language models that behave: functions at the seam where jobs put an engine."""

import json
import random
from collections.abc import Callable, Mapping, Sequence

from bixse.reading.chats import Messages
from bixse.synthesis.settings import Generator
from bixse.synthesis.writing import Completion
from tests.encoders import WORDS


class Stub:
    """Answers each chat by a function of its last turn and its sampling seed; counts the asking."""

    def __init__(self, answer: Callable[[str, random.Random], object]) -> None:
        self._answer = answer
        self.chats: list[Messages] = []

    def __call__(self, chats: Sequence[Messages], seeds: Sequence[int]) -> list[Completion]:
        self.chats += chats
        return [self._reply(chat, seed) for chat, seed in zip(chats, seeds, strict=True)]

    def _reply(self, chat: Messages, seed: int) -> Completion:
        answer = self._answer(chat[-1]["content"], random.Random(seed))
        if isinstance(answer, Completion):
            return answer
        return Completion(answer if isinstance(answer, str) else json.dumps(answer))


class StubWriter(Stub):
    """What an actor builds in place of an engine: queries of the document's own words.

    One in ten answers is no JSON, one in ten asks about something else.
    """

    def __init__(self, settings: Generator, schema: Mapping[str, object]) -> None:
        super().__init__(grounded)
        assert schema["type"] == "object"

    def cut(self, text: str) -> str:
        return text


def grounded(turn: str, draw: random.Random) -> object:
    """The answer to a request for a query."""
    words = turn.split("\n")[1].split()
    chance = draw.random()
    if chance < 0.1:
        return "I would rather not"
    if chance < 0.2:
        return {"query": " ".join(draw.choices(WORDS, k=5))}
    return {"query": " ".join(draw.sample(words, max(2, len(words) - draw.randint(1, 3))))}
