"""The flat log is RecBole's, and windows carry each target once."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch.nn import functional

from recbole_llm.causality import states
from recbole_llm.sequences import Fields, Log, WindowLoader, pack, pooled, row_positions, windows
from tests.small_logs import NO_DROPOUT, random_log, stock, write_log


@pytest.fixture(autouse=True)
def one_thread(clean_process):
    """On tensors this small, threads only wait for each other."""
    torch.set_num_threads(1)


FIELDS = Fields("item_id_list", "item_length", "user_id")


def log_of(*lengths: int) -> Log:
    """A log whose items count up from 1 over all users."""
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    return Log(torch.arange(1, len(lengths) + 1), torch.arange(1, int(offsets[-1]) + 1), offsets, int(offsets[-1]) + 1)


logs = some.lists(some.integers(1, 40), min_size=1, max_size=8).map(lambda lengths: log_of(*lengths))
sizes = some.integers(1, 12).flatmap(lambda length: some.tuples(some.just(length), some.integers(0, length - 1)))


def tokens(parts, log: Log) -> dict[str, list[str]]:
    """The log in the words of the file."""
    users, items = parts.dataset.field2id_token["user_id"], parts.dataset.field2id_token["item_id"]
    stretches = zip(log.users, log.offsets[:-1], log.offsets[1:], strict=True)
    return {str(users[user]): [str(items[item]) for item in log.items[start:end]] for user, start, end in stretches}


SPLITS = {
    "leave one out": ({"LS": "valid_and_test"}, "user"),
    "ratio of each user": ({"RS": [0.6, 0.2, 0.2]}, "user"),
    "ratio of all rows": ({"RS": [0.6, 0.2, 0.2]}, "none"),
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_log_is_the_beginning_of_every_users_sequence(tmp_path, split):
    sequences = random_log(longest=30)
    data_path = write_log(tmp_path, "small", sequences)
    eval_args = {"split": split[0], "group_by": split[1], "order": "TO", "mode": "full"}
    parts = stock(data_path, "small", eval_args=eval_args, MAX_ITEM_LIST_LENGTH=5)
    log = Log.from_dataset(parts.train._dataset)
    found = tokens(parts, log)
    assert list(found) == sorted(found)
    assert all(found[user] == sequences[user][: len(items)] for user, items in found.items())
    assert len(log.rows()) == len(parts.train._dataset)
    assert log.n_items == parts.dataset.item_num
    if "LS" in split[0]:
        assert found == {user: items[:-2] for user, items in sorted(sequences.items())}


def test_log_does_not_depend_on_the_order_of_the_file(tmp_path):
    sequences = random_log()
    rows = sum(map(len, sequences.values()))
    straight = stock(write_log(tmp_path / "a", "small", sequences), "small")
    order = random.Random(3).sample(range(rows), rows)
    mixed = stock(write_log(tmp_path / "b", "small", sequences, order), "small")
    first, second = (Log.from_dataset(parts.train._dataset) for parts in (straight, mixed))
    assert first.items.tolist() != second.items.tolist()  # internal ids do follow the file
    assert list(tokens(straight, first).items()) == list(tokens(mixed, second).items())


def test_rows_and_their_histories_are_recboles(tmp_path):
    parts = stock(write_log(tmp_path, "small", random_log()), "small", MAX_ITEM_LIST_LENGTH=5)
    dataset = parts.train._dataset
    log, position = Log.from_dataset(dataset), row_positions(dataset)
    assert position.sort().values.tolist() == log.rows().tolist()
    items, length = log.history(position, 5)
    assert torch.equal(items, dataset.inter_feat["item_id_list"])
    assert torch.equal(length, dataset.inter_feat["item_length"])
    assert torch.equal(log.items[position], dataset.inter_feat["item_id"])
    assert torch.equal(log.users[log.user_index(position)], dataset.inter_feat["user_id"])


def test_rows_that_are_no_prefixes_are_refused(tmp_path):
    parts = stock(write_log(tmp_path, "small", random_log()), "small")
    dataset = parts.train._dataset
    dataset.inter_feat["item_id"][3] = dataset.inter_feat["item_id"][3] % 20 + 1
    with pytest.raises(ValueError, match="dataset=small.*positions=last"):
        Log.from_dataset(dataset)


def test_histories_are_right_padded_and_end_before_the_position():
    items, length = log_of(4, 3).history(torch.tensor([0, 2, 3, 4, 6]), 2)
    assert items.tolist() == [[0, 0], [1, 2], [2, 3], [0, 0], [5, 6]]
    assert length.tolist() == [0, 2, 2, 0, 2]


def test_windows_by_hand():
    cut = windows(log_of(1, 3, 12), 5, 2)
    assert cut.start.tolist() == [1, 4, 7, 10]
    assert cut.end.tolist() == [3, 9, 12, 15]
    assert cut.first.tolist() == [2, 5, 10, 13]


@given(logs, sizes)
def test_every_target_has_loss_once_and_its_context(log, size):
    length, overlap = size
    cut = windows(log, length, overlap)
    with_loss = [p for first, end in zip(cut.first, cut.end, strict=True) for p in range(first, end + 1)]
    assert sorted(with_loss) == log.rows().tolist()
    read = cut.end - cut.start
    assert (read >= 1).all() and (read <= length).all() and (cut.first <= cut.end).all()
    user = log.user_index(cut.start)
    assert (cut.end < log.offsets[user + 1]).all()
    context = cut.first - 1 - cut.start
    available = cut.first - 1 - log.offsets[user]
    assert context.tolist() == available.clamp(max=overlap).tolist()


@pytest.mark.parametrize("overlap", [-1, 5, 6])
def test_an_overlap_that_does_not_fit_is_refused(overlap):
    with pytest.raises(ValueError, match=f"window_overlap={overlap}: .*0 to 4"):
        windows(log_of(9), 5, overlap)


@given(logs, sizes, some.integers(1, 30), some.integers(0, 3))
def test_batches_hold_what_the_windows_say(log, size, limit, seed):
    cut = windows(log, *size)
    loader = WindowLoader(log, cut, FIELDS, limit, seed)
    announced, batches = len(loader), list(loader)
    assert announced == len(batches)
    rows = torch.cat([batch["row_list"].flatten() for batch in batches]) if batches else torch.empty(0)
    assert sorted(rows[rows >= 0].tolist()) == log.rows().tolist()
    for batch in batches:
        items, target, row, length = (
            batch[name] for name in ("item_id_list", "target_list", "row_list", "item_length")
        )
        assert items.shape == target.shape == row.shape and items.shape[1] == length.max()
        assert ((items > 0).sum(1) == length).all() and torch.equal(target > 0, row >= 0)
        assert torch.equal(target[row >= 0], log.items[row[row >= 0]])
        # the item read at a position stands just before its target in the log
        assert torch.equal(items[row >= 0], log.items[row[row >= 0] - 1])
        assert torch.equal(batch["user_id"], log.users[log.user_index(row.max(1).values)])
        assert (row >= 0).sum() <= limit or len(batch) == 1


def test_batches_are_filled_greedily():
    runs = pack(torch.arange(6), torch.tensor([3, 2, 5, 9, 1, 1]), 5)
    assert [run.tolist() for run in runs] == [[0, 1], [2], [3], [4, 5]]


def test_windows_of_like_length_come_together_within_their_pool():
    order, length = torch.tensor([3, 0, 4, 1, 2, 5]), torch.tensor([5, 9, 1, 4, 7, 1])
    assert pooled(order, length, 3).tolist() == [3, 0, 4, 2, 5, 1]
    assert pooled(order, length, 100).tolist() == [2, 5, 3, 0, 4, 1]


def test_batches_are_of_like_windows_and_come_in_any_order():
    """Among users of very different lengths, padding is a small part of a batch, and short batches are not all first."""
    generator = torch.Generator().manual_seed(0)
    log = log_of(*torch.randint(2, 60, (400,), generator=generator).tolist())
    loader = WindowLoader(log, windows(log, 60, 5), FIELDS, 300, seed=4)
    batches = list(loader)
    padded = sum(batch["item_id_list"].numel() for batch in batches)
    assert padded < 1.4 * sum(int(batch["item_length"].sum()) for batch in batches)
    longest = torch.tensor([batch["item_id_list"].shape[1] for batch in batches]).float()
    assert torch.corrcoef(torch.stack([longest, torch.arange(len(longest)).float()]))[0, 1].abs() < 0.5
    assert len(longest) > 20


def epoch_of(loader):
    return [batch["row_list"].tolist() for batch in loader]


def test_an_epochs_order_is_seeded_and_can_be_taken_up_again():
    log = log_of(9, 8, 7, 6, 5, 4, 20)
    cut = windows(log, 4, 1)

    def make(seed):
        return WindowLoader(log, cut, FIELDS, 6, seed)

    loader, same = make(1), make(1)
    epochs = [epoch_of(loader) for _ in range(3)]
    assert epochs == [epoch_of(same) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epoch_of(make(2)) not in epochs
    taken = make(7)
    first = make(1)
    epoch_of(first)
    taken.set_state(first.state())
    assert [epoch_of(taken), epoch_of(taken)] == epochs[1:]
    straight = WindowLoader(log, cut, FIELDS, 6, 1, shuffle=False)
    assert epoch_of(straight) == epoch_of(straight)
    abandoned = make(1)
    next(iter(abandoned))
    assert epoch_of(abandoned) == epochs[0]


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec"])
def test_window_loss_is_recboles_row_loss(tmp_path, model):
    """For users with at most L + 1 items, sum over targets of the loss is the same (dropout off)."""
    parts = stock(
        write_log(tmp_path, "small", random_log(longest=11)), "small", model, MAX_ITEM_LIST_LENGTH=8, **NO_DROPOUT
    )
    dataset = parts.train._dataset
    log = Log.from_dataset(dataset)
    assert log.offsets.diff().max() == 9  # the longest user fills a window
    loader = WindowLoader(log, windows(log, 8, 3), Fields.of(parts.model), 40)
    total = 0.0
    for batch in loader:
        target = batch["target_list"]
        logits = states(parts.model, batch)[target > 0] @ parts.model.item_embedding.weight.T
        total = total + functional.cross_entropy(logits, target[target > 0], reduction="sum")
    own = parts.model.calculate_loss(dataset.inter_feat) * len(dataset)
    assert torch.allclose(total, own, rtol=1e-5)
    gradients = [torch.autograd.grad(loss, list(parts.model.parameters())) for loss in (total, own)]
    assert all(torch.allclose(a, b, atol=2e-4) for a, b in zip(*gradients, strict=True))


def test_window_states_are_those_of_prefixes_cut_at_the_window_start(tmp_path):
    parts = stock(write_log(tmp_path, "small", random_log()), "small", MAX_ITEM_LIST_LENGTH=6, **NO_DROPOUT)
    log = Log.from_dataset(parts.train._dataset)
    cut = windows(log, 6, 2)
    assert len(cut.start) > len(log.users)
    batch = WindowLoader(log, cut, Fields.of(parts.model), 40).batch(torch.arange(len(cut.start)))
    every = states(parts.model, batch)
    window, at = (batch["row_list"] >= 0).nonzero(as_tuple=True)
    prefix = torch.where(torch.arange(6) <= at[:, None], batch["item_id_list"][window], 0)
    alone = parts.model(prefix, at + 1)
    assert torch.allclose(every[window, at], alone, atol=1e-5)
