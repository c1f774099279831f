"""Blocks for clients that each say how many they can perturb, and that may change it."""

import numpy as np
import pytest

from fedforward.config.schema import PlanningSection
from fedforward.directions import Layout
from fedforward.planning.allocator import BlockAllotment, ClientBlocks, in_turn

LAYOUT = Layout.of(
    {"0.w": (4,), "1.w": (4,), "2.w": (4,)}, {"0": ["0.w"], "1": ["1.w"], "2": ["2.w"]}
)


def clients(*active: int | None) -> list[ClientBlocks]:
    return [ClientBlocks(f"site-{n}", 10 + n, count) for n, count in enumerate(active)]


@pytest.mark.parametrize(
    ("active", "uncovered"), [((1, 1), 1), ((1, 2), 0), ((None, 1), 0), ((9,), 0), ((1,), 2)]
)
def test_blocks_that_nobody_can_perturb(active: tuple[int | None, ...], uncovered: int) -> None:
    assert (
        BlockAllotment(PlanningSection(), LAYOUT, equal=False).uncovered(clients(*active))
        == uncovered
    )


def test_every_block_is_covered_and_no_client_has_more_than_it_can() -> None:
    allotment = BlockAllotment(PlanningSection(), LAYOUT, equal=True)
    matrix = allotment.allot(clients(1, 2, None), [0, 1, 2], 0)
    assert matrix.any(axis=0).all() and matrix[0].sum() <= 1 and matrix[1].sum() <= 2


def test_who_says_something_else_is_planned_for_again() -> None:
    allotment = BlockAllotment(PlanningSection(), LAYOUT, equal=False)
    first = allotment.allot(clients(1, 2), [0, 1], 0)
    assert (first == allotment.allot(clients(1, 2), [0, 1], 1)).all()
    later = allotment.allot(clients(2, 1), [0, 1], 2)
    assert first.sum(axis=1).tolist() == [1, 2] and later.sum(axis=1).tolist() == [2, 1]


def test_in_turn_every_block_comes_up() -> None:
    allotment = BlockAllotment(PlanningSection(), LAYOUT, equal=False)
    rounds = [allotment.allot(clients(1, 1), [0, 1], number) for number in range(3)]
    assert [matrix.sum() for matrix in rounds] == [2, 2, 2]
    assert (np.sum(rounds, axis=(0, 1)) == 2).all()
    assert (rounds[1] == in_turn(1, [1, 1], 3)).all()
