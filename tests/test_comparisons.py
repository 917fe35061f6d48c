"""Paired tests over users: each number by hand, and the correction for many questions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.comparisons import Comparison, compare, holm, per_user, signed_ranks


def test_holm_by_hand():
    # smallest times 3, next times 2 but no less than that, largest times 1 but no less
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_a_p_and_keeps_their_order(p):
    corrected = holm(p)
    assert all(0 <= before <= after <= 1 for before, after in zip(p, corrected, strict=True))
    assert [corrected[at] for at in np.argsort(p, kind="stable")] == sorted(corrected)


def test_rows_of_one_user_are_added_up():
    users = np.array(["b", "a", "b", "c"])
    assert per_user(np.array([1.0, 2.0, 3.0, 4.0]), users).tolist() == [2.0, 4.0, 4.0]


def test_users_without_a_difference_say_nothing():
    assert signed_ranks(np.zeros(50)) == 1.0
    rng = np.random.default_rng(0)
    shifted = rng.normal(0.5, 1, 200)
    assert signed_ranks(shifted) < 1e-6
    assert signed_ranks(np.concatenate([shifted, np.zeros(1000)])) == pytest.approx(signed_ranks(shifted))


def test_a_gain_needs_interval_and_test():
    rng = np.random.default_rng(1)
    theirs = rng.random(400)
    better, same = theirs + 0.05, theirs + rng.normal(0, 0.05, 400)
    up, level, down = compare([("a", "b", better, theirs), ("c", "b", same, theirs), ("b", "a", theirs, better)])
    assert (up.verdict, level.verdict, down.verdict) == ("gain", "none shown", "loss")
    assert up.gain == pytest.approx(0.05 / theirs.mean()) and up.low <= up.gain <= up.high and up.users == 400
    assert Comparison("a", "b", 0.1, 0.02, 0.2, p=0.06, users=9).verdict == "none shown"
    assert Comparison("a", "b", 0.1, -0.02, 0.2, p=0.01, users=9).verdict == "none shown"
