"""Training lists of LSC4Rec: their loss, and negatives made of pieces of numbers."""

import pytest
import torch

from recbole_llm.training_lists import digit_neighbours, list_loss


def test_list_loss_by_hand():
    """Section 2.2 of the method document: mean binary cross entropy over the list; padding counts for nothing."""
    scores, there = torch.tensor([[2.0, 0.0, 5.0]]), torch.tensor([[True, True, False]])
    assert float(list_loss(scores, there, "bce")) == pytest.approx((0.126928 + 0.693147) / 2, abs=1e-5)
    assert float(list_loss(scores, there, "listwise")) == pytest.approx(0.126928, abs=1e-5)


def test_neighbours_by_digits_are_made_of_the_lists_pieces():
    """Section 2.2: {7391, 1208, 11954} gives pieces F = {0, 1}, S = {73, 12, 19}, T = {91, 8, 54}."""
    made = digit_neighbours(torch.tensor([[7391, 1208, 11954], [0, 0, 0]]), 500, torch.Generator().manual_seed(0))
    possible = {
        first * 10_000 + middle * 100 + last for first in (0, 1) for middle in (73, 12, 19) for last in (91, 8, 54)
    }
    assert set(made[0].tolist()) == possible and not made[1].any()


def test_trained_padding_counts_as_a_negative_and_a_second_target_as_a_positive():
    """Section 2.2: label 1 for the target and for any candidate equal to it, 0 for all other places, the mean over all of them."""
    scores = torch.tensor([[2.0, 0.0, 5.0]])
    everywhere, twice = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[True, False, True]])
    assert float(list_loss(scores, everywhere, "bce", twice)) == pytest.approx(
        (0.126928 + 0.693147 + 0.006715) / 3, abs=1e-5
    )
    assert float(list_loss(scores, everywhere, "bce")) == pytest.approx((0.126928 + 0.693147 + 5.006715) / 3, abs=1e-5)
