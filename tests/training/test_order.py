"""The order of a run: a function of seed, epoch and step, that visits every row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bixse.training.order import Plan, Turns, rate_factor, share, shares

rows = st.integers(2, 300)
batch_sizes = st.integers(2, 64)


def plan(rows: int, batch_size: int, epochs: int = 2, max_steps: int | None = None) -> Plan:
    return Plan(rows, batch_size, epochs, max_steps, seed=3)


@given(rows, batch_sizes)
def test_every_epoch_visits_every_row_once_in_another_order(rows: int, batch_size: int) -> None:
    steps = plan(rows, batch_size)
    batches = [steps.rows_of(step) for step in range(steps.steps)]
    epochs = np.split(np.arange(steps.steps), 2)
    for epoch in epochs:
        visited = np.concatenate([batches[step] for step in epoch])
        assert sorted(visited.tolist()) == list(range(rows))
    sizes = [len(batch) for batch in batches]
    assert min(sizes) >= 2
    assert max(sizes) <= (batch_size if batch_size > 2 else 3)
    assert max(sizes) - min(sizes) <= 1
    if rows > 20:
        assert [list(b) for b in batches[: len(epochs[0])]] != [
            list(b) for b in batches[len(epochs[0]) :]
        ]


def test_the_order_is_pinned() -> None:
    # A resumed run of an older build must meet the same batches.
    found = [plan(10, 4).rows_of(step).tolist() for step in range(3)]
    assert found == [[3, 8, 9], [7, 4, 6], [1, 2, 0, 5]]


def turns(sizes: list[int], batch_size: int = 4, max_steps: int | None = None) -> Turns:
    return Turns(tuple(plan(rows, batch_size, max_steps=max_steps) for rows in sizes))


@given(st.lists(rows, min_size=1, max_size=4), batch_sizes)
def test_sets_take_turns_and_each_has_the_batches_it_has_alone(
    sizes: list[int], batch_size: int
) -> None:
    mixed = turns(sizes, batch_size)
    taken = [mixed.turn(step) for step in range(mixed.steps)]
    for number, alone in enumerate(mixed.plans):
        assert [own for whose, own in taken if whose == number] == list(range(alone.steps))
    for epoch in range(2):
        begin = epoch * mixed.steps_per_epoch
        visited = [
            (number, row)
            for number, own in taken[begin : begin + mixed.steps_per_epoch]
            for row in mixed.plans[number].rows_of(own).tolist()
        ]
        every = [(number, row) for number, size in enumerate(sizes) for row in range(size)]
        assert sorted(visited) == every
    assert mixed.rows == sum(sizes)


def test_the_turns_are_pinned() -> None:
    # A resumed run of an older build must meet the same batches.
    mixed = turns([10, 6])
    assert [mixed.turn(step) for step in range(10)] == [
        *((0, 0), (1, 0), (0, 1), (1, 1), (0, 2)),
        *((0, 3), (0, 4), (1, 2), (0, 5), (1, 3)),
    ]
    assert [mixed.epoch_of(step) for step in range(10)] == [0] * 5 + [1] * 5
    assert turns([10, 6], max_steps=7).steps == 7


def test_turns_are_spread_over_an_epoch() -> None:
    mixed = turns([400, 400])
    first = [mixed.turn(step)[0] for step in range(100)]
    assert 30 < sum(first) < 70
    assert first != [mixed.turn(200 + step)[0] for step in range(100)]


def test_max_steps_ends_a_run_early() -> None:
    assert plan(100, 10, epochs=3).steps == 30
    assert plan(100, 10, epochs=3, max_steps=7).steps == 7
    assert plan(100, 10, epochs=1, max_steps=70).steps == 10


def test_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="2 rows or more, found 1"):
        plan(1, 4)


@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_are_a_partition(count: int, parts: int) -> None:
    pieces = [range(count)[share(count, part, parts)] for part in range(parts)]
    assert [i for piece in pieces for i in piece] == list(range(count))
    assert shares(count, parts) == [*map(len, pieces)]
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_the_rate_rises_then_falls_to_nothing() -> None:
    factors = [rate_factor(step, 20, 0.2) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[4:] == pytest.approx([(20 - step) / 16 for step in range(4, 20)])
    assert rate_factor(0, 1, 0.1) == 1
