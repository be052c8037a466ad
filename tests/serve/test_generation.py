"""Changing what is served: the decisions alone. `test_withstanding` has the running application."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from serve.generation import (
    Generation,
    Generations,
    HeldOut,
    Report,
    failure,
    ndcg_problem,
    not_loaded,
    not_turned,
    recall_problem,
    to_keep,
    undrained,
)
from serve.ledger import Follower, Ledger, Outcome
from serve.messages import NotHeld
from serve.settings import Canary, ServedIndex


def index_named(name: str, recall: float | None = 1.0) -> ServedIndex:
    return ServedIndex(
        name, name, "e", 3, {"shard-00000": 1}, Canary(query="", doc_id="", score=0), recall
    )


def report(slot: str, *holds: int, current: int | None = None, in_use=()) -> Report:
    return Report(slot, slot, 1, frozenset(holds), {}, current, frozenset(in_use))


FIRST = Generations.first(index_named("a"), "start")


def test_numbers_are_never_given_twice_and_rollback_restores_the_old_one():
    second = FIRST.propose(index_named("b"), "start")
    assert (second.current.number, second.candidate.number) == (1, 2)
    given_up = second.abandon(2)
    assert given_up.candidate is None
    third = given_up.propose(index_named("c"), "other")
    turned = third.promote(3)
    assert (turned.current.number, turned.previous.number) == (3, 1)
    assert turned.candidate is None
    back = turned.roll_back()
    assert back.current == FIRST.current
    assert back.roll_back().current.number == 3
    versions = [g.version for g in (FIRST, second, given_up, third, turned, back)]
    assert versions == sorted(set(versions))


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="no previous generation"):
        FIRST.roll_back()
    second = FIRST.propose(index_named("b"), "start")
    with pytest.raises(ValueError, match="no longer the candidate"):
        second.promote(7)
    assert second.abandon(7) is second


def test_a_change_waits_for_each_replica_of_each_slot():
    slots = ("front", "encoder", "shard-00000")
    some = [report("front", 1, 2), report("encoder", 1)]
    assert not_loaded(2, some, slots) == ["encoder", "shard-00000"]
    late = Report("encoder-2", "encoder", 1, frozenset({1}))
    every = [report("front", 2), report("encoder", 2), late, report("shard-00000", 2)]
    assert not_loaded(2, every, slots) == ["encoder"]
    assert not_loaded(2, [r for r in every if r is not late], slots) == []
    assert failure(2, [*every, Report("x", "encoder", 1, frozenset(), {2: "why"})]) == "why"
    assert failure(1, every) is None


def test_a_generation_is_kept_while_a_request_may_ask_for_it():
    fronts = [report("front", 1, 3, current=3, in_use={1}), report("encoder", 1, 2, 3)]
    now = FIRST.propose(index_named("b"), "s").promote(2).propose(index_named("c"), "s").promote(3)
    assert to_keep(now, fronts) == {1, 2, 3}
    assert to_keep(now, [report("front", 3, current=3)]) == {2, 3}
    assert not_turned(3, [*fronts, report("late", 3, current=2)]) == ["late"]


def test_gates():
    assert recall_problem(index_named("a", 0.95), 0.9) is None
    assert "below 0.9000" in recall_problem(index_named("a", 0.85), 0.9)
    assert "does not say" in recall_problem(index_named("a", None), 0.0)
    assert ndcg_problem(HeldOut(0.50), HeldOut(0.49), 0.02) is None
    assert "from 0.5000 to 0.4700" in ndcg_problem(HeldOut(0.50), HeldOut(0.47), 0.02)
    now = HeldOut(0.50, 0.60)
    assert ndcg_problem(now, HeldOut(0.49, 0.59), 0.02) is None
    said = ndcg_problem(now, HeldOut(0.55, 0.40), 0.02)
    assert said.startswith("nDCG@10 of reranked hits would fall from 0.6000 to 0.4000")
    assert "nDCG@10 would fall" in ndcg_problem(now, HeldOut(0.40, 0.60), 0.02)


def test_a_new_ledger_is_told_by_its_followers_what_held():
    async def run() -> None:
        ledger = Ledger(FIRST, ("front",))
        later = FIRST.propose(index_named("b"), "start").promote(2)
        told, keep = await ledger.sync(report("front", 2, current=2), later, 0.0)
        assert told == later
        assert keep == {1, 2}
        # One that knows less is told more, and changes nothing.
        told, _ = await ledger.sync(report("encoder", 1), FIRST, 0.0)
        assert told == later

    asyncio.run(run())


def test_draining_waits_for_every_replica_to_hear_of_it_and_to_finish():
    def front(version: int, in_flight: int) -> Report:
        return Report(
            f"f{version}{in_flight}", "front", version, frozenset({1}), {}, 1, in_flight=in_flight
        )

    reports = [front(1, 0), front(2, 3), front(2, 0), report("encoder", 1)]
    assert undrained(2, reports) == ["f10", "f23"]
    assert undrained(2, [front(2, 0), report("encoder", 1)]) == []


def test_a_ledger_drains_when_the_last_request_is_answered_or_time_is_over():
    async def run() -> None:
        ledger = Ledger(FIRST, ("front",))
        busy = report("front", 1, current=1)
        await ledger.sync(busy, FIRST, 0.0)
        assert not await ledger.drain(0.1), "the replica has not even heard of it"
        told, _ = await ledger.sync(busy, FIRST, 0.0)
        assert told.draining
        assert told.current == FIRST.current
        draining = asyncio.create_task(ledger.drain(30))
        await asyncio.sleep(0)
        heard = (await ledger.state()).generations.version
        for in_flight in (2, 1):
            await ledger.sync(replace(busy, version=heard, in_flight=in_flight), told, 0.0)
            await asyncio.sleep(0.05)
            assert not draining.done()
        await ledger.sync(replace(busy, version=heard), told, 0.0)
        assert await draining

    asyncio.run(run())


class LedgerHandle:
    """The handle of a ledger in this process."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def __getattr__(self, name: str) -> "LedgerHandle":
        return LedgerHandle(getattr(self._method, name))

    async def remote(self, *ask: Any) -> Any:
        return await self._method(*ask)


def handle_of(ledger: Ledger) -> Any:
    return LedgerHandle(ledger)


@pytest.mark.parametrize(
    "error, reason",
    [
        (NotHeld("the encoder's process died, with -9\nand more"), "the encoder's process died"),
        (ImportError("Install s3fs to access S3"), "Install s3fs to access S3"),
        (AssertionError(), "AssertionError()"),
    ],
    ids=repr,
)
def test_what_cannot_be_loaded_is_refused_at_once_whatever_is_raised(error, reason, monkeypatch):
    """It was tried again until the time to load was over, and refused for being late."""
    tried, dropped = [], []

    async def load(generation: Generation) -> None:
        if generation.number > 1:
            tried.append(generation.number)
            raise error

    async def run() -> Outcome:
        ledger = Ledger(FIRST, ("front",))
        follower = Follower(handle_of(ledger), "front", load, dropped.append)
        await follower.start()
        async with asyncio.timeout(30):
            outcome = await ledger.prepare("b", None, None, 60.0)
        # The follower hears that it is given up, and does not try again.
        await asyncio.sleep(0.1)
        return outcome

    monkeypatch.setattr(ServedIndex, "read", index_named)
    outcome = asyncio.run(run())
    assert outcome.problem is not None
    assert outcome.problem.startswith(reason)
    assert "\n" not in outcome.problem
    assert not outcome.busy, "which would be 503, and tried again"
    assert outcome.generations.candidate is None
    assert tried == dropped == [2], "and what was loaded of it is forgotten"


def test_an_index_that_cannot_be_read_is_refused_whatever_is_raised(monkeypatch):
    """What left the ledger was taken for its death."""

    def read(url: str) -> ServedIndex:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(ServedIndex, "read", read)
    outcome = asyncio.run(Ledger(FIRST, ("front",)).prepare("s3://b/i", None, None, 1.0))
    assert (outcome.problem, outcome.busy) == ("Install s3fs to access S3", False)


def test_a_change_that_nobody_waits_for_any_more_leaves_no_candidate(monkeypatch):
    """Every replica kept it in memory until the next change."""

    async def run() -> None:
        ledger = Ledger(FIRST, ("front",))
        await ledger.sync(report("front", 1, current=1), FIRST, 0.0)
        asked = asyncio.create_task(ledger.prepare("b", None, None, 60.0))
        async with asyncio.timeout(30):
            while (await ledger.state()).generations.candidate is None:
                await asyncio.sleep(0.01)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert (await ledger.state()).generations.candidate is None
        assert not (await ledger.roll_back(30.0)).busy

    monkeypatch.setattr(ServedIndex, "read", index_named)
    asyncio.run(run())


def test_a_candidate_is_kept_for_who_gates_it_and_no_longer(monkeypatch):
    """A second change took its place; and where who gates had died, it stayed in every replica."""

    async def run() -> None:
        ledger = Ledger(FIRST, ("front",))
        gating = replace(report("front", 1, 2, current=1), changing=True)
        await ledger.sync(gating, FIRST, 0.0)
        prepared = await ledger.prepare("b", None, None, 30.0)
        assert prepared.generations.candidate.number == 2
        second = await ledger.prepare("c", None, None, 30.0)
        assert (second.problem, second.busy) == ("another change is under way", True)
        monkeypatch.setattr("serve.ledger.LIVE_S", 1.0)
        await asyncio.sleep(1.1)
        # It lives, and says so before any other replica is heard.
        assert (await ledger.sync(gating, FIRST, 0.0))[0].candidate is not None
        encoder = report("encoder", 1, 2)
        assert (await ledger.sync(encoder, FIRST, 0.0))[0].candidate is not None
        await asyncio.sleep(1.1)
        told, _ = await ledger.sync(encoder, FIRST, 0.0)
        assert told.candidate is None, "nobody has heard of it since"
        assert not (await ledger.prepare("c", None, None, 0.0)).busy

    monkeypatch.setattr(ServedIndex, "read", index_named)
    asyncio.run(run())


def test_a_new_ledger_waits_to_hear_who_gates_what_it_is_told_of():
    async def run() -> None:
        told, _ = await Ledger(FIRST, ("front",)).sync(
            report("encoder", 1, 2), FIRST.propose(index_named("b"), "start"), 0.0
        )
        assert told.candidate is not None

    asyncio.run(run())


def test_a_rollback_to_what_a_replica_could_not_load_is_refused():
    """It was said to be served, and its shard was lost for every request."""

    async def run() -> None:
        ledger = Ledger(FIRST, ("front",))
        later = FIRST.propose(index_named("b"), "start").promote(2)
        await ledger.sync(report("front", 1, 2, current=2), later, 0.0)
        begun_since = Report("shard-2", "shard", 3, frozenset({2}), {1: "a is missing"})
        await ledger.sync(begun_since, later, 0.0)
        refused = await ledger.roll_back(30.0)
        assert (refused.problem, refused.generations.current.number) == ("a is missing", 2)
        # Once that replica holds it, too.
        await ledger.sync(replace(begun_since, holds=frozenset({1, 2}), failed={}), later, 0.0)
        turning = asyncio.create_task(ledger.roll_back(30.0))
        await asyncio.sleep(0)
        await ledger.sync(report("front", 1, 2, current=1), later, 0.0)
        assert (await turning).generations.current.number == 1

    asyncio.run(run())


def test_a_replica_that_begins_during_a_change_answers_by_what_holds_after_it():
    """It began by the generation before, beside replicas that had turned to the new one."""
    loaded, turned = [], []

    async def run() -> None:
        ledger = Ledger(FIRST, ("front",))
        later = FIRST.propose(index_named("b"), "start").promote(2)

        async def load(generation: Generation) -> None:
            loaded.append(generation.number)
            # Meanwhile the others have turned.
            await ledger.sync(report("other", 1, 2, current=2), later, 0.0)

        def turn(generation: Generation) -> None:
            turned.append(generation.number)

        follower = Follower(handle_of(ledger), "front", load, lambda number: None, turn=turn)
        await follower.start()
        assert (loaded, turned) == ([1, 2], [2])

    asyncio.run(run())


def test_a_new_ledger_changes_nothing_before_it_is_told_what_held(monkeypatch):
    """What was asked for while it began was decided by what was served at first, and lost."""

    async def run(method: str, *ask: Any) -> Any:
        ledger = Ledger(FIRST, ("front",))
        later = FIRST.propose(index_named("b"), "start").promote(2)
        asked = asyncio.create_task(getattr(ledger, method)(*ask))
        await asyncio.sleep(0.05)
        # By followers, as soon as they find it.
        told, _ = await ledger.sync(report("front", 1, 2, 3, current=1), later, 0.0)
        while not asked.done():
            await asyncio.sleep(0.01)
            front = report("front", 1, 2, 3, current=told.current.number)
            told, _ = await ledger.sync(replace(front, version=told.version), told, 0.0)
        return await asked, told

    monkeypatch.setattr(ServedIndex, "read", index_named)
    prepared, _ = asyncio.run(run("prepare", "c", None, None, 30.0))
    assert (prepared.problem, prepared.generations.candidate.number) == (None, 3)
    turned, _ = asyncio.run(run("roll_back", 30.0))
    assert (turned.problem, turned.generations.current.number) == (None, 1)
    answered, told = asyncio.run(run("drain", 30.0))
    assert answered
    assert told.draining


def test_a_rollback_waits_for_a_replica_that_has_begun_since_the_change():
    """Its shards were lost to every request until it had loaded what others held."""

    async def run() -> None:
        ledger = Ledger(FIRST, ("front", "shard"))
        later = FIRST.propose(index_named("b"), "start").promote(2)
        await ledger.sync(report("front", 1, 2, current=2), later, 0.0)
        # One that holds nothing is no reason to stay at what it may have died of.
        await ledger.sync(report("dying"), later, 0.0)
        begun_since = report("shard", 2)
        await ledger.sync(begun_since, later, 0.0)
        late = await ledger.roll_back(0.0)
        assert (late.problem, late.generations.current.number) == ("not loaded in time by shard", 2)
        turning = asyncio.create_task(ledger.roll_back(30.0))
        await asyncio.sleep(0)
        assert (await ledger.state()).generations.current.number == 2
        assert (await ledger.roll_back(30.0)).busy
        await ledger.sync(replace(begun_since, holds=frozenset({1, 2})), later, 0.0)
        async with asyncio.timeout(30):
            while (await ledger.state()).generations.current.number != 1:
                await asyncio.sleep(0.01)
        await ledger.sync(report("front", 1, 2, current=1), later, 0.0)
        assert (await turning).problem is None

    asyncio.run(run())


def test_a_replica_begins_while_the_ledger_is_replaced():
    """It has been told what to load, and waits for no ledger to say so again."""
    turned: list[object] = []

    async def run() -> None:
        ledger = Ledger(FIRST, ("front",))

        class Dying(LedgerHandle):
            async def remote(self, *ask: Any) -> Any:
                if turned == ["loaded"]:
                    raise RayActorError
                return await super().remote(*ask)

            def __getattr__(self, name: str) -> LedgerHandle:
                return Dying(getattr(self._method, name))

        async def load(generation: Generation) -> None:
            turned.append("loaded")

        def turn(generation: Generation) -> None:
            turned.append(generation.number)

        dying: Any = Dying(ledger)
        await Follower(dying, "front", load, lambda number: None, turn=turn).start()
        assert turned == ["loaded", 1]

    asyncio.run(run())
