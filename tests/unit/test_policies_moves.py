"""The queue of moves that both worlds share."""

from __future__ import annotations

import pytest

from policies.moves import Move, MoveQueue


def moves_of(pattern: str) -> list[Move]:
    """One move per letter: d is demand, p a prefetch."""
    return [Move(i, i, -1, kind == "d") for i, kind in enumerate(pattern)]


def drain(queue: MoveQueue) -> list[int]:
    order = []
    while len(queue):
        head = queue.peek()
        assert queue.take(head)
        order.append(head.copy)
    return order


def test_demand_goes_first_and_each_kind_in_turn() -> None:
    queue = MoveQueue()
    for move in moves_of("ppdpd"):
        queue.push(move)
    assert drain(queue) == [2, 4, 0, 1, 3]
    with pytest.raises(IndexError, match="no move waits"):
        queue.peek()


def test_what_is_taken_out_of_turn_is_passed_over() -> None:
    queue, moves = MoveQueue(), moves_of("pppdd")
    for move in moves:
        queue.push(move)
    assert queue.take(moves[1])
    assert queue.take(moves[3])
    assert not queue.take(moves[3])
    assert not queue.take(Move(9, 9, -1, False))
    assert len(queue) == 3
    assert drain(queue) == [4, 0, 2]


def test_a_long_queue_costs_no_more_per_move() -> None:
    """Cancelling from the end leaves what comes after it alone, whatever lies before."""
    queue, moves = MoveQueue(), moves_of("p" * 50_000)
    for move in moves:
        queue.push(move)
    for move in reversed(moves[1:]):
        assert queue.take(move)
    assert drain(queue) == [0]
