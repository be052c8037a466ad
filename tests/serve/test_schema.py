"""Hostile bodies, without Ray: each is one error, which is short."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from bixse.retrieval.filters import MOST_CONDITIONS, MOST_VALUES
from serve.access import Keys, Places
from serve.api import application
from serve.metrics import Metrics
from serve.schema import ChangeRequest, EmbeddingsRequest, RetrieveRequest, SearchRequest
from serve.settings import MOST_TEXTS, ServeArgs

MANY = 100_000
WRONG: list[Any] = [1] * MANY
NAMES = {f"field {n}": 1 for n in range(MANY)}


def filtered(said: object) -> dict[str, object]:
    return {"query": "x", "filter": said}


@pytest.mark.parametrize(
    "kind, body",
    [
        (SearchRequest, {"queries": WRONG}),
        (SearchRequest, {"queries": [1] * MOST_TEXTS}),
        (SearchRequest, {"queries": [""] * MOST_TEXTS}),
        (RetrieveRequest, {"queries": WRONG}),
        (EmbeddingsRequest, {"model": "m", "input": WRONG}),
        (EmbeddingsRequest, {"model": "m", "input": [[1, 2]] * MOST_TEXTS}),
        (SearchRequest, {"query": "x", **NAMES}),
        (SearchRequest, {"query": "x", "feedback": NAMES}),
        (SearchRequest, filtered(NAMES)),
        (SearchRequest, filtered({"or": WRONG})),
        (SearchRequest, filtered({"or": [1] * (MOST_CONDITIONS - 1)})),
        (SearchRequest, filtered({"price": {"in": WRONG}})),
        (SearchRequest, filtered({"price": {"in": [[]] * MOST_VALUES}})),
        (SearchRequest, filtered({"price": NAMES})),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_body_of_many_errors_is_answered_as_one(kind: type[BaseModel], body: object) -> None:
    """4 MB of `{"queries":[1,1,…]}` was a million errors, and a minute of the event loop."""
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(body)
    assert refused.value.error_count() == 1


def test_the_document_allows_one_text_where_one_is_taken() -> None:
    """Clients made from it could not send what OpenAI's send."""
    said = EmbeddingsRequest.model_json_schema()["properties"]["input"]
    assert {"type": "string"} in said["anyOf"]
    assert EmbeddingsRequest.model_validate({"input": "a", "model": "m"}).input == ["a"]


@pytest.mark.parametrize("keys", [Keys({b"a-key-of-the-tests": "search"}), Keys()])
def test_the_document_says_where_a_key_is_asked_for(keys: Keys) -> None:
    """Clients made from it sent none, and had no place for one."""
    nobody: Any = None
    args = ServeArgs(index="i", encoder="e")
    said = application(nobody, args, keys, Metrics(), Places(1), None).openapi()
    asked = {
        path
        for path, methods in said["paths"].items()
        for operation in methods.values()
        if operation.get("security") == [{"key": []}]
    }
    assert asked == (set(said["paths"]) - {"/livez", "/readyz"} if keys else set())
    schemes = said["components"].get("securitySchemes", {})
    assert [(s["type"], s["scheme"]) for s in schemes.values()] == [("http", "bearer")] * bool(keys)


@pytest.mark.parametrize("kind", [SearchRequest, ChangeRequest])
def test_the_document_says_what_each_field_does(kind: type[BaseModel]) -> None:
    """Of a deadline, a partial answer and the least coverage it said the name alone."""
    fields = kind.model_json_schema()["properties"]
    bare = {
        name
        for name, said in fields.items()
        if "description" not in said
        and not any("description" in option for option in said.get("anyOf", ()))
    }
    assert bare == set()


def test_many_texts_are_refused_unread() -> None:
    with pytest.raises(ValidationError, match="at most 65536 texts"):
        SearchRequest.model_validate({"queries": ["x"] * (MOST_TEXTS + 1)})
    SearchRequest.model_validate({"queries": ["x"] * MOST_TEXTS})


@pytest.mark.parametrize(
    "route, body",
    [
        ("/search", {"query": "x", "n" * (1 << 20): 1}),
        ("/search", filtered({"n" * (1 << 20): {"like": 1}})),
        ("/search", {"query": "x", "mode": "m" * (1 << 20)}),
        ("/search", {"query": "x", **{f"{n}" + "n" * 1000: 1 for n in range(100)}}),
        ("/retrieve", {"queries": WRONG}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_error_does_not_repeat_what_was_sent(route: str, body: object) -> None:
    async def ask() -> httpx.Response:
        nobody: Any = None
        app = application(
            nobody, ServeArgs(index="i", encoder="e"), Keys(), Metrics(), Places(1), None
        )
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            headers = {"Content-Type": "application/json"}
            return await client.post(route, content=json.dumps(body), headers=headers)

    reply = asyncio.run(ask())
    assert reply.status_code == 422
    assert reply.json()["error"]["type"] == "invalid_request"
    assert len(reply.content) < 5000
