"""Markov: transitions by hand, and the ring, which it knows whole."""

import pytest
from torch import tensor

from recbole_llm.model.markov import transitions
from recbole_llm.sequences import Log
from tests.pipelines import step_by_step
from tests.small_logs import write_log
from tests.test_contract import Trained
from tests.test_counting import small

LOG = Log(tensor([1, 2]), tensor([1, 2, 3, 2, 3]), tensor([0, 3, 5]), 5)


def test_transitions_stay_within_a_user_and_weigh_less_from_afar():
    before, after, weight = transitions(LOG, 2)
    assert list(zip(before.tolist(), after.tolist(), weight.tolist(), strict=True)) == [
        (1, 2, 1.0), (2, 3, 1.0), (2, 3, 1.0), (1, 3, 0.5)
    ]  # fmt: skip
    assert len(transitions(LOG, 1)[0]) == 3


@pytest.mark.parametrize(("power", "expected"), [(0, (0.5, 2.25)), (1, (1 / 3, 7 / 6)), (0.5, (0.408248, 1.618338))])
def test_a_score_is_the_decayed_sum_of_transitions_over_a_power_of_all(power, expected, tmp_path):
    """Trained on are p q r, q r and s p: T(p) is q 1, r 1/2; T(q) is r 2. After s p q, q has .5 T(p, q), r .5 T(p, r) + T(q, r)."""
    users = {"a": ["p", "q", "r", "s", "s"], "b": ["q", "r", "s", "s"], "c": ["s", "p", "q", "r"]}
    data = write_log(tmp_path / "data", "log", users)
    own = {"markov_gap": 2, "markov_power": power, "markov_last": 2, "markov_decay": 0.5, "counting_repeats": True}
    _, trainer, test, *_ = step_by_step("Markov", small(data, **own), "log")
    dataset = test._dataset
    ids = {token: dataset.token2id("item_id", token) for token in "pqrs"}
    batch = dataset[[0]]
    batch["item_id_list"][:] = 0
    batch["item_id_list"][0, :3] = tensor([ids["s"], ids["p"], ids["q"]])
    scores = trainer.model.full_sort_predict(batch)[0]
    assert [float(scores[ids[token]]) for token in "qr"] == pytest.approx(expected, abs=1e-5)


def test_it_knows_the_ring(ring):
    run = Trained("Markov", ring, None).fit()
    assert run.trainer.evaluate(run.data[2])["recall@1"] == 1.0


def test_of_equal_transitions_the_one_to_the_more_popular_item_is_surer(tmp_path):
    """After p came q, r and t once each; r is the most popular of them, q the least."""
    users = {"a": ["p", "q", "s", "s"], "b": ["p", "r", "s", "s"], "c": ["p", "t", "s", "s"]}
    users |= {"d": ["r", "r", "t", "s", "s"]}
    own = {"markov_gap": 1, "markov_power": 0, "markov_decay": 0, "counting_repeats": True}
    _, trainer, test, *_ = step_by_step("Markov", small(write_log(tmp_path / "data", "log", users), **own), "log")
    ids = {token: test._dataset.token2id("item_id", token) for token in "pqrt"}
    batch = test._dataset[[0]]
    batch["item_id_list"][:] = 0
    batch["item_id_list"][0, 0] = ids["p"]
    scores = trainer.model.full_sort_predict(batch)[0]
    q, t, r = (float(scores[ids[token]]) for token in "qtr")
    assert 1.0 == q < t < r < 1.000001
