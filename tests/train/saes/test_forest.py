"""Which latent is whose child."""

from __future__ import annotations

import torch

from train.saes.forest import LEAF, MID, TOP, Forest


def test_halves_have_two_leaves_and_one_child_each() -> None:
    forest = Forest(8, "halves")
    assert forest.sizes == (2, 2, 4)
    assert forest.parent().tolist() == [-1, -1, 0, 1, 2, 2, 3, 3]
    assert forest.n_siblings().tolist() == [1, 1, 1, 1, 2, 2, 2, 2]


def test_fanout_has_four_children_each_and_leaves_left_over() -> None:
    assert Forest(168, "fanout").sizes == (8, 32, 128)
    forest = Forest(24, "fanout")
    assert forest.sizes == (1, 4, 19)
    assert forest.parent().tolist() == [-1, 0, 0, 0, 0] + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4 + [-1] * 3


def test_sums_go_up_and_values_go_down_the_edges() -> None:
    forest = Forest(9, "halves")  # 2, 2, 5: the last leaf has no parent
    leaves = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert forest.gathered(leaves, MID).tolist() == [3, 7]
    assert forest.gathered(torch.tensor([8.0, 9.0]), TOP).tolist() == [8, 9]
    assert forest.handed_down(torch.tensor([8.0, 9.0]), LEAF).tolist() == [8, 8, 9, 9, 0]


def test_edges_as_a_matrix_are_those_of_the_parents() -> None:
    forest = Forest(9, "halves")
    assert forest.as_matrix(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), LEAF).tolist() == [
        [1, 2, 0, 0, 0],
        [0, 0, 3, 4, 0],
    ]
    assert forest.as_matrix(torch.tensor([6.0, 7.0]), MID).tolist() == [[6, 0], [0, 7]]
