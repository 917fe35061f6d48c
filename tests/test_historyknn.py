"""HistoryKNN: cosines of sets of users by hand, and the ring, whose neighbours have been met already on one side."""

import pytest
from torch import tensor

from recbole_llm.model.historyknn import cosine, nearest, together
from recbole_llm.sequences import Log
from tests.test_contract import Trained

LOG = Log(tensor([1, 2, 3]), tensor([1, 2, 1, 1, 2, 3, 2]), tensor([0, 3, 6, 7]), 5)


def test_pairs_are_users_who_met_both_each_once():
    first, second, both, users = together(LOG)
    pairs = dict(zip(zip(first.tolist(), second.tolist(), strict=True), both.tolist(), strict=True))
    assert pairs == {(1, 2): 2, (2, 1): 2, (1, 3): 1, (3, 1): 1, (2, 3): 1, (3, 2): 1}
    assert users.tolist() == [0, 2, 3, 1, 0]


def test_the_cosine_shrinks_where_few_users_are():
    both, first, second = tensor([2, 1]), tensor([4, 1]), tensor([9, 1])
    assert cosine(both, first, second, 0).tolist() == pytest.approx([2 / 6, 1])
    assert cosine(both, first, second, 4).tolist() == pytest.approx([2 / 10, 1 / 5])


def test_the_nearest_are_kept_and_of_equals_the_more_popular():
    row, place = tensor([1, 1, 1, 2, 2, 2]), tensor([4, 5, 6, 4, 6, 5])
    kept = nearest(row, place, tensor([0.9, 0.5, 0.1, 0.5, 0.5, 0.5]), 2)
    assert sorted(kept.tolist()) == [0, 1, 4, 5]


def test_it_knows_the_ring(ring):
    run = Trained("HistoryKNN", ring, None, historyknn_decay=0.3).fit()
    assert run.trainer.evaluate(run.data[2])["recall@1"] == 1.0
