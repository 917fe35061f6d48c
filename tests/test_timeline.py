"""Which interactions are historical, in real time, validated on and shown; and that nobody sees more than that."""

import pytest
import torch

import recbole_llm
from recbole_llm.sequences import Log
from recbole_llm.timeline import Timeline
from tests.small_logs import random_log, stock, write_log


@pytest.fixture
def data(tmp_path):
    return stock(write_log(tmp_path, "log", random_log()), "log", make=recbole_llm.create_dataset)


def numbered(tmp_path, lengths, **settings):
    """Users whose k-th item is called after its user and its place, counted from 1."""
    sequences = {
        f"u{user}": [f"{user}.{place}" for place in range(1, length + 1)] for user, length in enumerate(lengths)
    }
    return stock(
        write_log(tmp_path, "log", sequences), "log", make=recbole_llm.create_dataset, **settings
    ).train._dataset


def tokens(timeline, positions):
    names = timeline.dataset.field2id_token["item_id"]
    return [str(names[item]) for item in timeline.log.items[positions.flatten()].tolist()]


def test_static_cuts_one_step_before_the_end(tmp_path):
    """Section 1.3 of the method document: real time i_(n-4) to i_(n-2), validation i_(n-1), test i_n."""
    timeline = Timeline.of(numbered(tmp_path, [12]), steps=1)
    assert tokens(timeline, timeline.shown) == ["0.12"]
    assert tokens(timeline, timeline.valid) == ["0.11"]
    assert tokens(timeline, timeline.real_time) == ["0.8", "0.9", "0.10"]
    assert tokens(timeline, timeline.history_valid) == ["0.7"]
    assert tokens(timeline, timeline.train) == [f"0.{place}" for place in range(2, 7)]


def test_a_stream_moves_every_cut_by_its_steps(tmp_path):
    timeline = Timeline.of(numbered(tmp_path, [14]), steps=4)
    assert tokens(timeline, timeline.shown) == ["0.11", "0.12", "0.13", "0.14"]
    assert tokens(timeline, timeline.valid) == ["0.10"]
    assert tokens(timeline, timeline.real_time) == ["0.7", "0.8", "0.9"]
    assert tokens(timeline, timeline.history_valid) == ["0.6"]


def test_users_with_too_few_interactions_are_counted_out(tmp_path):
    dataset = numbered(tmp_path, [7, 8, 9, 6])
    assert Timeline.of(dataset, 1).left_out == 1
    timeline = Timeline.of(dataset, 3)
    assert timeline.left_out == 3 and tokens(timeline, timeline.shown) == ["2.7", "2.8", "2.9"]


def test_whoever_has_one_historical_target_is_trained_on_it(tmp_path):
    timeline = Timeline.of(numbered(tmp_path, [7, 8]), 1)
    assert tokens(timeline, timeline.train) == ["0.2", "1.2"]
    assert tokens(timeline, timeline.history_valid) == ["1.3"]


def test_no_one_is_left(tmp_path):
    with pytest.raises(
        ValueError, match=r"lsc_steps=30: no user has the 36 interactions it takes .* the longest has 9"
    ):
        Timeline.of(numbered(tmp_path, [9, 7]), 30)


def test_the_parts_have_nothing_in_common_and_are_in_order(data):
    timeline = Timeline.of(data.train._dataset, 1)
    parts = [
        timeline.train,
        timeline.history_valid,
        timeline.real_time.flatten(),
        timeline.valid,
        timeline.shown.flatten(),
    ]
    together = torch.cat(parts)
    assert len(together.unique()) == len(together)
    for user in range(len(timeline.users)):
        own = [part[timeline.log.user_index(part) == timeline.users[user]] for part in parts]
        ends = [(int(part.min()), int(part.max())) for part in own if len(part)]
        assert all(before[1] < after[0] for before, after in zip(ends, ends[1:], strict=False))


def test_a_stale_view_ends_before_what_the_cloud_has_not_seen(tmp_path):
    """For i_n the stale history is i_1 ... i_(n-3), the fresh one i_1 ... i_(n-1)."""
    timeline = Timeline.of(numbered(tmp_path, [9]), 1)
    for lag, last in ((2, "0.6"), (0, "0.8")):
        view = timeline.view(timeline.shown[:, 0], lag)
        history, length = timeline.log.history(view, 20)
        assert tokens(timeline, view - 1) == [last] and int(length) == int(last[2:])
    assert timeline.view(timeline.log.offsets[:1] + 1, 5).tolist() == [1]


def test_any_split_of_the_data_gives_the_same_timeline(data):
    one, other = (Timeline.of(part._dataset, 1) for part in (data.train, data.test))
    assert torch.equal(one.log.items, other.log.items) and torch.equal(one.train, other.train)


def test_a_split_has_the_rows_that_recbole_makes(data):
    """The targets of the end are RecBole's test rows, column for column."""
    timeline = Timeline.of(data.train._dataset, 1)
    ours, theirs = timeline.split(timeline.shown.flatten()), data.test._dataset
    assert list(ours.inter_feat.interaction) == list(theirs.inter_feat.interaction)
    by_user = [dataset[torch.arange(len(dataset))] for dataset in (ours, theirs)]
    order = [batch["user_id"].argsort() for batch in by_user]
    for name in theirs.inter_feat.interaction:
        assert torch.equal(by_user[0][name][order[0]], by_user[1][name][order[1]])


def test_the_historical_rows_are_a_log_whose_places_are_known(data):
    timeline = Timeline.of(data.train._dataset, 1)
    log = Log.from_dataset(timeline.split(timeline.train))
    places = timeline.places(log)
    assert torch.equal(timeline.log.items[places], log.items)
    assert torch.equal(places[log.rows()], timeline.train)


def test_rows_are_found_by_their_pointers(data):
    timeline = Timeline.of(data.train._dataset, 1)
    assert torch.equal(timeline.of_pointers(timeline.pointer[timeline.train]), timeline.train)


def test_rows_without_a_log_are_refused(tmp_path):
    from recbole.data import create_dataset

    data = stock(write_log(tmp_path, "log", random_log()), "log", make=create_dataset)
    with pytest.raises(ValueError, match="dataset=log: .* there is recbole_llm.create_dataset"):
        Timeline.of(data.train._dataset)
