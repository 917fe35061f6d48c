"""Popularity: numbers of interactions, and that they are all it knows."""

from torch import tensor

from recbole_llm.model.popularity import interactions
from recbole_llm.sequences import Log
from tests.pipelines import step_by_step
from tests.small_logs import write_log
from tests.test_contract import Trained
from tests.test_counting import small

LOG = Log(tensor([1, 2]), tensor([1, 2, 3, 2, 3, 3]), tensor([0, 4, 6]), 5)


def test_interactions_are_counted_all_or_the_last_of_each_user():
    assert interactions(LOG, 0).tolist() == [0, 1, 2, 3, 0]
    assert interactions(LOG, 1).tolist() == [0, 0, 1, 1, 0]
    assert interactions(LOG, 3).tolist() == [0, 0, 2, 3, 0]


def test_scores_are_one_more_than_the_interactions_whatever_the_history(tmp_path):
    users = {"a": ["x", "y", "x", "z", "z"], "b": ["x", "y", "z", "y", "y"], "c": ["x", "x", "y", "z", "z"]}
    data = write_log(tmp_path / "data", "log", users)
    settings = small(data, popularity_last=0, counting_repeats=True)
    _, trainer, test, *_ = step_by_step("Popularity", settings, "log")
    scores = trainer.model.full_sort_predict(test._dataset[[0, 1, 2]])
    ids = [test._dataset.token2id("item_id", token) for token in "xyz"]
    assert scores.round()[:, ids].tolist() == [[6, 4, 2]] * 3


def test_items_of_the_history_stand_behind_all_others(ring):
    run = Trained("Popularity", ring, None, counting_repeats=False).fit()
    batch = run.batch()
    order = run.scores(batch)[:, 1:].argsort(dim=1) + 1
    for row, history in zip(order.tolist(), batch[run.model.ITEM_SEQ].tolist(), strict=True):
        seen = set(history) - {0}
        assert set(row[: len(seen)]) == seen
