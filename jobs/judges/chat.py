"""A language model behind a chat-completions endpoint: one request a pair and order."""

from collections.abc import Sequence

from bixse.judging.asked import Answers, Asked, Cost, Refused
from bixse.judging.endpoint import Unreadable, read, request, verdict
from bixse.judging.pointwise import unreadable
from bixse.judging.prompts import ORDERS, PROMPTS
from bixse.judging.settings import ChatEndpoint
from jobs.endpoint import Cut, Endpoint, check_endpoint, endpoint_name
from jobs.judges.seam import Judge


def chat(settings: ChatEndpoint) -> Judge:
    """Raises ValueError when the address, the model or the key is missing.

    Nobody here can see the weights behind a name: the address is part of the identity.
    """
    check_endpoint(settings)
    prompt = PROMPTS[settings.prompt]
    return Judge(
        build=ChatJudge,
        arguments=(settings,),
        scale=prompt.scale,
        origin="llm",
        config={"prompt": prompt.hash},
        inputs={"judge": endpoint_name(settings)},
        signature={
            "judge": "openai",
            "model": endpoint_name(settings),
            "prompt": prompt.hash,
            "scale": prompt.scale.record,
            "min_grade_mass": settings.min_grade_mass,
        },
        plan=ChatPlan,
        planned=("requests", "characters"),
    )


class ChatJudge:
    """Requests, what came of them, and the reading of the answers."""

    def __init__(self, settings: ChatEndpoint) -> None:
        self._settings = settings
        self._prompt = PROMPTS[settings.prompt]
        self._endpoint = Endpoint(settings)
        self._signature = (self._prompt, endpoint_name(settings), settings.min_grade_mass)

    def __call__(self, asked: Sequence[Asked]) -> Answers:
        settings, labels = self._settings, self._prompt.scale.labels
        orders = ORDERS[: settings.orders]
        bodies = [
            request(settings, self._prompt, pair.query, pair.passage, order)
            for pair in asked
            for order in orders
        ]
        try:
            replies, cut = self._endpoint.ask(bodies, settings.votes or 1), None
        except Cut as error:
            replies, cut = error.replies, error
        found = replies.found
        by_pair = [found[at : at + len(orders)] for at in range(0, len(found), len(orders))]
        verdicts = {
            row: verdict(
                asked[row].query_id,
                asked[row].doc_id,
                [r if isinstance(r, Unreadable) else read(r, settings, labels) for r in whole],
                *self._signature,
            )
            for row, of_pair in enumerate(by_pair)
            if len(whole := [reply for reply in of_pair if reply is not None]) == len(orders)
        }
        if cut is not None:
            raise Refused(str(cut), verdicts, replies.usage)
        answered = list(verdicts.values())
        return Answers(answered, replies.usage, unreadable(answered))


class ChatPlan:
    """Counts requests and what they say. Tokens are the endpoint's own and nobody here knows them;
    requests that are repeated, or asked again for missing votes, come on top.
    """

    def __init__(self, settings: ChatEndpoint) -> None:
        self._prompt, self._orders = PROMPTS[settings.prompt], ORDERS[: settings.orders]

    def __call__(self, asked: Sequence[Asked]) -> list[Cost]:
        return [
            Cost(requests=len(self._orders), characters=self._characters(pair)) for pair in asked
        ]

    def _characters(self, pair: Asked) -> int:
        chats = [self._prompt.messages(pair.query, pair.passage, order) for order in self._orders]
        return sum(len(message["content"]) for chat in chats for message in chat)
