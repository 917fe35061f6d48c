"""Paired tests over users: each number by hand, and the correction for many questions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wilcoxon

from recbole_llm.comparisons import Comparison, Question, compare, holm, per_user, ranked, signed_ranks, uncorrected
from recbole_llm.standings import gains


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
    assert signed_ranks(np.zeros(50), True) == 1.0
    rng = np.random.default_rng(0)
    shifted = rng.normal(0.5, 1, 200)
    assert signed_ranks(shifted, True) < 1e-6
    assert signed_ranks(np.concatenate([shifted, np.zeros(1000)]), True) == pytest.approx(signed_ranks(shifted, True))
    assert signed_ranks(shifted, True) == pytest.approx(wilcoxon(shifted, method="approx").pvalue)


def test_ranks_that_point_the_other_way_show_nothing():
    """Most users are a little worse off, some much better: the mean is higher, the ranks say lower."""
    differences = np.concatenate([np.full(3000, -0.1), np.full(600, 1.0)])
    assert differences.mean() > 0 and signed_ranks(-differences, False) == signed_ranks(differences, True) == 1.0
    assert signed_ranks(differences, False) < 1e-9
    theirs = np.full(3600, 0.5)
    (found,) = compare([Question("a", "b", {1: theirs + differences}, {1: theirs})])
    assert found.low > 0 and found.verdict == "none shown"


@pytest.mark.parametrize("ours, theirs", [(1, 1), (3, 3), (3, 1), (1, 3)])
def test_a_model_is_no_better_than_itself_whatever_the_number_of_seeds(ours, theirs):
    """5,000 users of whom a tenth is hit by chance in each run; means of three runs have other values than one run."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(40):
        runs = (rng.random((ours + theirs, 5000)) < 0.1).astype(float)
        pair = (dict(enumerate(part)) for part in (runs[:ours], runs[ours:]))
        wrong += ranked(*pair, better=runs[:ours].mean() > runs[ours:].mean()) < 0.05
    assert wrong <= 6


def test_of_unequally_many_runs_those_of_the_same_seeds_are_compared():
    rng = np.random.default_rng(2)
    ours, theirs = ({seed: rng.random(300) + more for seed in (1, 2, 3)} for more in (0.05, 0.0))
    part = {seed: theirs[seed] for seed in (2, 3)}
    assert ranked(ours, part, True) == ranked({2: ours[2], 3: ours[3]}, part, True) != ranked(ours, theirs, True)


def test_against_a_single_run_the_largest_p_counts():
    rng = np.random.default_rng(2)
    theirs = rng.random(300)
    ours = {1: theirs + 0.1, 2: theirs + rng.normal(0.01, 0.1, 300)}
    assert (
        ranked(ours, {1: theirs}, True) == signed_ranks(ours[2] - theirs, True) > signed_ranks(ours[1] - theirs, True)
    )


def test_a_gain_needs_interval_and_test():
    rng = np.random.default_rng(1)
    theirs = rng.random(400)
    better, same = theirs + 0.05, theirs + rng.normal(0, 0.05, 400)
    asked = [("a", "b", better, theirs), ("c", "b", same, theirs), ("b", "a", theirs, better)]
    up, level, down = compare([Question(one, two, {1: values}, {1: others}) for one, two, values, others in asked])
    assert (up.verdict, level.verdict, down.verdict) == ("gain", "none shown", "loss")
    assert up.gain == pytest.approx(0.05 / theirs.mean()) and up.low <= up.gain <= up.high and up.users == 400
    assert Comparison("a", "b", 0.1, 0.02, 0.2, p=0.06, users=9).verdict == "none shown"
    assert Comparison("a", "b", 0.1, -0.02, 0.2, p=0.01, users=9).verdict == "none shown"
    assert Comparison("a", "b", 0.1, 0.02, 0.2, p=0.01, users=9, missing=1).verdict == "gain so far"
    assert Comparison("a", "b", -0.1, -0.2, -0.02, p=0.01, users=9, missing=1).verdict == "loss so far"
    assert Comparison("a", "b", 0.1, -0.02, 0.2, p=0.01, users=9, missing=1).verdict == "none shown"


def test_what_p_values_were_before_their_correction():
    """What is published has none but the corrected ones; more questions correct them anew."""
    raw = [0.001, 0.3, 0.004, 0.012]
    assert uncorrected(holm(raw)) == pytest.approx([0.001, 0.3, 0.004, 0.012])
    assert uncorrected([0.004, 1.0, 1.0]) == pytest.approx([0.004 / 3, 1.0, 1.0]), "how far above 1 it was is not known"
    tied = holm([0.01, 0.0101, 0.5])
    assert tied[0] == tied[1] and holm(uncorrected(tied)) == pytest.approx(tied)


def test_there_is_no_gain_over_nothing():
    """And no NaN, which JSON does not know."""
    (found,) = compare([Question("A", "B", {1: np.array([1.0, 0.0, 1.0])}, {1: np.zeros(3)})])
    assert (found.gain, found.low, found.high, found.verdict) == (None, None, None, "none shown")
    assert "| A | B | n/a | n/a |" in gains([vars(found) | {"verdict": found.verdict}])
