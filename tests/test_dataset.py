"""The flat data set is RecBole's, value for value, and holds each interaction once."""

import copy
import gc
import math
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import recbole.data
import torch
from hypothesis import given
from hypothesis import strategies as some
from recbole.config import Config
from recbole.data import data_preparation
from recbole.data.dataset import SequentialDataset
from recbole.trainer import Trainer
from recbole.utils import get_model, init_seed

import recbole_llm
from recbole_llm.dataset import (
    FlatLog,
    FlatSequentialDataset,
    ListColumn,
    create_dataset,
    grouped,
    leave_out,
    share_of_ties,
    stable_order,
)
from recbole_llm.quick_start import load_data
from recbole_llm.sequences import Log, row_positions
from tests.small_logs import PLAIN, random_log, write_log

COLUMNS = {
    "inter": ["user_id", "item_id", "timestamp", "rating", "device", "tags", "shape"],
    "user": ["user_id", "age"],
    "item": ["item_id", "title", "year"],
}


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    """Logs with one column of each type in each file, tied times, rows in no order, and users of one or two items."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(1)
    rows = []
    for user in range(30):
        for _ in range(draw.choice([1, 2, 3, 8, 20, 40])):
            tags = " ".join(f"t{draw.randrange(9)}" for _ in range(draw.randrange(4)))
            shape = " ".join(str(draw.random()) for _ in range(draw.randrange(1, 3)))
            fields = (
                f"u{user}",
                f"i{draw.randrange(40)}",
                draw.randrange(60),
                draw.randrange(6),
                f"d{draw.randrange(3)}",
            )
            rows.append("\t".join(map(str, (*fields, tags, shape))))
    draw.shuffle(rows)
    head = "user_id:token item_id:token timestamp:float rating:float device:token tags:token_seq shape:float_seq"
    users = [f"u{user}\t{20 + user % 7}" for user in range(30)]
    items = [
        f"i{item}\t{' '.join(draw.sample(['red', 'blue', 'green'], item % 3))}\t{1990 + item}" for item in range(40)
    ]
    files = {
        "inter": [head.replace(" ", "\t"), *rows],
        "user": ["user_id:token\tage:token", *users],
        "item": ["item_id:token\ttitle:token_seq\tyear:float", *items],
    }
    (folder / "rich").mkdir()
    for suffix, lines in files.items():
        (folder / "rich" / f"rich.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return write_log(folder, "small", random_log())


def prepared(create, data_path, dataset="small", model="SASRec", **settings) -> SimpleNamespace:
    """A data set and its loaders as a RecBole script makes them, `create` being the one line that differs."""
    settings = PLAIN | {"data_path": str(data_path), "loss_type": "CE"} | settings
    if settings["loss_type"] == "CE":
        settings["train_neg_sample_args"] = None
    if dataset == "ml-100k":
        del settings["data_path"]
    config = Config(model=model, dataset=dataset, config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    made = create(config)
    train, valid, test = data_preparation(config, made)
    return SimpleNamespace(config=config, dataset=made, train=train, valid=valid, test=test)


def both(data_path, *args, **settings) -> tuple[SimpleNamespace, SimpleNamespace]:
    stock = prepared(recbole.data.create_dataset, data_path, *args, **settings)
    flat = prepared(create_dataset, data_path, *args, **settings)
    assert type(stock.dataset) is SequentialDataset
    assert type(flat.dataset) is type(flat.train._dataset) is FlatSequentialDataset
    return stock, flat


def assert_same(first, second) -> None:
    """Two Interactions have the same columns, in the same order, of plain tensors of the same type and value."""
    assert first.columns == second.columns
    assert len(first) == len(second)
    for name in first.columns:
        assert type(first[name]) is type(second[name]) is torch.Tensor
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


def assert_same_batches(stock, flat, any_order=False) -> None:
    """Two epochs of training batches, and all valid and test batches, are the same."""
    for part, epochs in (("train", 2), ("valid", 1), ("test", 1)):
        loaders = getattr(stock, part), getattr(flat, part)
        assert len(loaders[0]._dataset) == len(loaders[1]._dataset)
        for _ in range(epochs):
            batches = []
            for loader in loaders:
                init_seed(7, True)
                batches.append(list(loader))
            assert len(batches[0]) == len(batches[1])
            for first, second in zip(*batches, strict=True):
                if part == "train":
                    assert_same(first, second)
                    continue
                columns = [sorted(batch[0].columns) for batch in (first, second)] if any_order else None
                for batch, names in zip((first, second), columns or (), strict=False):
                    # RecBole puts the columns of such batches in the order of a set
                    batch[0].interaction = {name: batch[0][name] for name in names}
                assert_same(first[0], second[0])
                for a, b in zip(first[1:], second[1:], strict=True):
                    assert a is b is None or torch.equal(a, b)


def splits(group_by="user", valid="full", **split):
    return {"eval_args": {"split": split, "group_by": group_by, "order": "TO", "mode": valid}}


RICH = {"dataset": "rich", "load_col": COLUMNS, "MAX_ITEM_LIST_LENGTH": 5}
NEGATIVES = {"loss_type": "BPR", "train_neg_sample_args": {"distribution": "uniform", "sample_num": 2}}
CASES = {
    "leave two out": {},
    "leave one out, valid": splits(LS="valid_only"),
    "leave one out, test": splits(LS="test_only"),
    "ratio of each user": splits(RS=[0.6, 0.2, 0.2]),
    "ratio of all rows": splits("none", RS=[0.6, 0.2, 0.2]),
    "time": splits(TS=[0.7, 0.1, 0.2]),
    "one item": {"MAX_ITEM_LIST_LENGTH": 1},
    "twenty items": {"MAX_ITEM_LIST_LENGTH": 20},
    "three hundred items": {"MAX_ITEM_LIST_LENGTH": 300},
    "every kind of feature": RICH,
    "features, ratio": RICH | splits(RS=[0.6, 0.2, 0.2]),
    "features, time": RICH | splits(TS=[0.7, 0.1, 0.2]),
    "numbers": RICH | {"numerical_features": ["timestamp", "rating", "shape", "year"], "normalize_all": True},
    "buckets": RICH | {"numerical_features": ["rating"], "discretization": {"rating": {"method": "ED", "bucket": 3}}},
    "columns dropped": RICH | {"unused_col": {"inter": ["timestamp", "rating_list", "tags"]}},
    "uniform negatives": RICH | NEGATIVES,
    "popular negatives": NEGATIVES | {"train_neg_sample_args": {"distribution": "popularity", "sample_num": 1}},
    "twenty candidates": RICH | splits(LS="valid_and_test", valid="uni20"),
    "five candidates": splits(RS=[0.6, 0.2, 0.2], valid="uni5"),
    "masked": {"transform": "mask_itemseq", "mask_ratio": 0.3, "ft_ratio": 0.5, "model": "BERT4Rec"},
    "cropped": {"transform": "crop_itemseq", "eta": 0.6},
    "reordered": {"transform": "reorder_itemseq", "beta": 0.6},
    "inverted": {"transform": "inverse_itemseq"},
    "two workers": {"worker": 2},
    "filtered": {"user_inter_num_interval": "[5,inf)", "item_inter_num_interval": "[3,inf)"},
    "the ring": {"dataset": "ring"},
    "a real log": {"dataset": "ml-100k", "user_inter_num_interval": "[200,300]", "train_batch_size": 2048},
}


@pytest.mark.parametrize("case", CASES)
def test_batches_are_recboles(data_path, ring_source, case):
    stock, flat = both(ring_source if case == "the ring" else data_path, **CASES[case])
    assert_same_batches(stock, flat, any_order="candidates" in case)


@pytest.mark.parametrize("case", ["leave two out", "features, ratio", "time"])
def test_rows_counts_and_matrices_are_recboles(data_path, case):
    stock, flat = both(data_path, **CASES[case])
    for ours, theirs in ((flat.dataset, stock.dataset), *((flat.train._dataset, stock.train._dataset),)):
        assert_same(ours.inter_feat.dense(), theirs.inter_feat)
        assert ours.field2seqlen == theirs.field2seqlen and ours.field2type == theirs.field2type
        assert ours.user_counter == theirs.user_counter and ours.item_counter == theirs.item_counter
        assert ours.sparsity == theirs.sparsity and ours.inter_num == theirs.inter_num
        assert ours.avg_actions_of_items == theirs.avg_actions_of_items
        for value in (None, "timestamp"):
            matrices = [dataset.inter_matrix("csr", value) for dataset in (ours, theirs)]
            assert (matrices[0] != matrices[1]).nnz == 0
        histories = []
        for dataset in (ours, theirs):
            torch.manual_seed(0)
            histories.append(dataset.history_item_matrix())
        assert all(torch.equal(a, b) for a, b in zip(*histories, strict=True))


def test_a_list_column_reads_like_a_tensor(data_path):
    stock, flat = both(data_path, **RICH)
    mask = torch.rand(len(stock.train._dataset)) < 0.3
    for name in ("item_id_list", "tags_list", "rating_list"):
        theirs, ours = (parts.train._dataset.inter_feat[name] for parts in (stock, flat))
        assert isinstance(ours, ListColumn) and isinstance(ours, torch.Tensor)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and len(ours) == len(theirs)
        rows = (3, -1, [4, 1], [], np.array([2, 0]), torch.tensor([[1, 2], [3, 4]]), slice(2, 9, 2), range(3), mask)
        for index in (*rows, mask.numpy(), (slice(None), 0), (torch.tensor([1, 2]), 0), (..., 0), None):
            index = list(index) if isinstance(index, range) else index
            assert torch.equal(ours[index], theirs[index]), index
        assert torch.equal(ours[theirs != 0], theirs[theirs != 0])
        assert torch.equal(torch.cat([ours, theirs]), torch.cat([theirs, ours]))
        assert torch.equal(ours != 0, theirs != 0) and torch.equal(1 + ours, 1 + theirs)
        assert np.array_equal(ours.numpy(), theirs.numpy()) and ours.tolist() == theirs.tolist()
        assert str(len(ours)) in repr(ours)


def test_only_the_rows_that_are_read_are_gathered(data_path, monkeypatch):
    gathered, gather = [], FlatLog.gather
    monkeypatch.setattr(FlatLog, "gather", lambda log, *given: gathered.append(len(given[1])) or gather(log, *given))
    dataset = prepared(create_dataset, data_path).train._dataset
    rows = dataset.inter_feat
    rows[rows["item_id"] > 3].sort("item_id")
    column = (
        rows[[3, 4]]["item_id_list"],
        rows["item_id_list"][5:50],
        copy.deepcopy(rows),
        rows["item_id_list"].detach(),
    )
    assert [len(part) for part in column[:2]] == [2, 45] and gathered == []
    for index, count in ((3, 1), (np.int64(3), 1), ([5, 5, 1], 3), (torch.tensor([[1], [2]]), 2), (slice(0, 4), 4)):
        rows["item_id_list"][index].sum()
        assert gathered.pop() == count
    dataset[[1, 7]]
    assert gathered == [2, 2]  # items and times


def test_parts_of_rows_are_rows_and_single_rows_are_plain(data_path):
    stock, flat = both(data_path)
    theirs, ours = stock.train._dataset.inter_feat, flat.train._dataset.inter_feat
    mask = theirs["item_length"] == 1
    for index in ([5, 1], [], range(4), slice(3, 8), np.array([2]), torch.tensor([2, 2]), mask, mask.tolist()):
        part = ours[index]
        assert isinstance(part["item_id_list"], ListColumn) and torch.equal(part.pointer, ours.pointer[as_list(index)])
        assert_same(part.dense(), theirs[list(index) if isinstance(index, range) else index])
    for index in (3, np.int64(3), torch.tensor(3), -1):
        assert_same(ours[index], theirs[index])
    for rows in (theirs, ours):
        rows.sort(["item_id", "timestamp"])
    assert_same(ours.dense(), theirs)
    for rows in (theirs, ours):
        torch.manual_seed(1)
        rows.shuffle()
    assert_same(ours.dense(), theirs)


def as_list(index):
    return list(index) if isinstance(index, range) else index


def test_a_list_column_cannot_be_written_to_but_be_replaced(data_path):
    dataset = prepared(create_dataset, data_path).train._dataset
    rows, before = dataset.inter_feat, dataset.inter_feat["item_id_list"].dense()
    for write in (
        lambda column: column.__setitem__(0, 1),
        lambda column: column.add_(1),
        lambda column: column[2:5].fill_(3),
        lambda column: torch.add(before, 1, out=column),
    ):
        with pytest.raises(TypeError, match="item_id: its list column.*own in its place"):
            write(rows["item_id_list"])
    assert torch.equal(rows["item_id_list"].dense(), before)
    rows["item_id_list"] = before + 1
    rows["row_list"] = torch.arange(len(rows))
    assert torch.equal(dataset[[4, 2]]["item_id_list"], before[[4, 2]] + 1)
    assert dataset[[4, 2]]["row_list"].tolist() == [4, 2]


def test_copies_pickles_and_saved_data_are_the_same(data_path, tmp_path):
    stock = prepared(recbole.data.create_dataset, data_path)
    settings = {"save_dataset": True, "save_dataloaders": True, "checkpoint_dir": str(tmp_path)}
    flat = prepared(create_dataset, data_path, **settings)
    rows = flat.train._dataset.inter_feat
    for twin in (copy.deepcopy(rows), pickle.loads(pickle.dumps(rows)), copy.copy(flat.train._dataset).inter_feat):
        assert_same(twin.dense(), stock.train._dataset.inter_feat)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "small-FlatSequentialDataset.pth",
        "small-for-SASRec-dataloader.pth",
    ]
    again = prepared(create_dataset, data_path, **settings)
    assert again.train._dataset is not flat.train._dataset and again.train._dataset.flat_log is not None
    assert_same_batches(stock, again)
    stock.dataset.sort(
        ["user_id", "timestamp"]
    )  # RecBole leaves the whole data set in this order when it loads loaders
    assert_same(again.dataset.inter_feat.dense(), stock.dataset.inter_feat)


def held(dataset) -> int:
    """Elements of the largest tensor that came into being with a data set and is still there."""
    gc.collect()
    return max(found.numel() for found in gc.get_objects() if type(found) is torch.Tensor and id(found) not in dataset)


def test_no_tensor_grows_with_the_longest_history(data_path):
    gc.collect()
    known = {id(found) for found in gc.get_objects() if isinstance(found, torch.Tensor)}
    sizes = {}
    for length in (1, 300):
        flat = prepared(create_dataset, data_path, MAX_ITEM_LIST_LENGTH=length)
        assert len(next(iter(flat.train))) > 0
        assert held(known) <= len(flat.dataset.flat_log) + 1
        sizes[length] = len(pickle.dumps(flat.train._dataset.inter_feat))
    assert abs(sizes[300] - sizes[1]) < 64


@pytest.mark.parametrize("dataset", ["small", "ring", "ml-100k"])
def test_training_and_evaluation_are_the_same(data_path, ring_source, dataset):
    chosen = {"ml-100k": {"user_inter_num_interval": "[100,150]", "train_batch_size": 2048}}.get(dataset, {})
    results = []
    for parts in both(ring_source if dataset == "ring" else data_path, dataset, **chosen):
        init_seed(parts.config["seed"], True)
        model = get_model("SASRec")(parts.config, parts.train._dataset).to(parts.config["device"])
        trainer = Trainer(parts.config, model)
        best = trainer.fit(parts.train, parts.valid, saved=False, verbose=False)
        results.append((best, trainer.evaluate(parts.test, load_best_model=False)))
    assert results[0] == results[1]


def test_fearec_reads_whole_list_columns(data_path):
    losses = []
    for parts in both(data_path, model="FEARec", epochs=1):
        init_seed(1, True)
        model = get_model("FEARec")(parts.config, parts.train._dataset).to(parts.config["device"])
        losses.append(float(model.calculate_loss(next(iter(parts.train))).detach()))
    assert losses[0] == losses[1]


def test_pointers_say_where_the_targets_stand(data_path):
    flat = prepared(create_dataset, data_path, **CASES["features, ratio"])
    for dataset in (flat.dataset, flat.train._dataset, flat.test._dataset):
        log, pointers, rows = dataset.flat_log, dataset.row_pointers, dataset.inter_feat
        assert torch.equal(log.item[pointers], rows["item_id"]) and torch.equal(log.user[pointers], rows["user_id"])
        assert torch.equal(log.user[dataset.row_begins], rows["user_id"])
        assert torch.equal(log.offsets[rows["user_id"]], dataset.row_begins)
        assert ((pointers - dataset.row_begins).clamp(max=5) == rows["item_length"]).all()


def test_a_batch_tells_its_rows_only_when_asked(data_path):
    flat = prepared(create_dataset, data_path, **splits(LS="valid_and_test", valid="uni5"))
    dataset = flat.train._dataset
    assert dataset.pointer_column is None and "row" not in dataset[[1]].columns
    for loader in (flat.train, flat.test):
        loader._dataset.pointer_column = "row"
        for batch in loader:
            batch = batch if loader is flat.train else batch[0]
            real = loader._dataset.row_pointers
            assert torch.isin(batch["row"], real).all()
            assert torch.equal(dataset.flat_log.user[batch["row"]], batch["user_id"])
    assert dataset[torch.tensor([3, 1])]["row"].tolist() == dataset.row_pointers[[3, 1]].tolist()
    assert dataset[5:7]["row"].tolist() == dataset.row_pointers[5:7].tolist()
    assert flat.valid._dataset.pointer_column is None


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_seen_items_are_all_items_before_the_target(data_path, part):
    flat = prepared(create_dataset, data_path, MAX_ITEM_LIST_LENGTH=3)
    longest = prepared(recbole.data.create_dataset, data_path, MAX_ITEM_LIST_LENGTH=300)
    dataset, rows = getattr(flat, part)._dataset, getattr(longest, part)._dataset.inter_feat
    asked = torch.tensor([4, 0, 7, 4])
    number, item = dataset.seen_items(dataset.row_pointers[asked])
    assert number.tolist() == sorted(number.tolist())
    for place, row in enumerate(asked):
        assert item[number == place].tolist() == rows["item_id_list"][row][: rows["item_length"][row]].tolist()
    assert [len(found) for found in dataset.seen_items(dataset.row_pointers[:0])] == [0, 0]


@pytest.mark.parametrize("case", ["leave two out", "ratio of each user", "ratio of all rows", "one item", "time"])
def test_the_log_is_recovered_without_reading_a_list(data_path, case, monkeypatch):
    stock, flat = both(data_path, **CASES[case])
    expected, positions = Log.from_dataset(stock.train._dataset), row_positions(stock.train._dataset)
    monkeypatch.setattr(ListColumn, "dense", None)
    found = Log.from_dataset(flat.train._dataset)
    for field in ("users", "items", "offsets"):
        assert torch.equal(getattr(found, field), getattr(expected, field))
    assert found.n_items == expected.n_items
    assert torch.equal(row_positions(flat.train._dataset), positions)


def test_rows_that_are_no_prefixes_are_refused_alike(data_path):
    for parts in both(data_path):
        dataset = parts.train._dataset
        holes = dataset.copy(dataset.inter_feat[[row for row in range(len(dataset)) if row != 1]])
        dataset.inter_feat["item_id"][3] = dataset.inter_feat["item_id"][3] % 20 + 1
        for wrong in (dataset, holes, parts.test._dataset):
            with pytest.raises(
                ValueError, match="dataset=small: its training rows are not all the prefixes.*positions=last"
            ):
                Log.from_dataset(wrong)


def test_rows_from_files_stay_recboles(tmp_path):
    head = "user_id:token\titem_id_list:token_seq\titem_id:token"
    rows = ["1\ta b c\td", "1\ta b c d\te", "2\tb\tc", "2\tb c\ta"]
    (tmp_path / "small").mkdir()
    for part, lines in (("train", rows), ("valid", rows[1:3]), ("test", rows[3:])):
        (tmp_path / "small" / f"small.{part}.inter").write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    settings = {"benchmark_filename": ["train", "valid", "test"], "alias_of_item_id": ["item_id_list"]}
    stock, flat = both(tmp_path, load_col={"inter": ["user_id", "item_id_list", "item_id"]}, **settings)
    assert_same_batches(stock, flat)
    dataset = flat.train._dataset
    assert dataset.flat_log is None and dataset.row_pointers.tolist() == [0, 1, 2, 3]
    number, item = dataset.seen_items(torch.tensor([2, 0]))
    assert number.tolist() == [0, 1, 1, 1]
    assert dataset.field2id_token["item_id"][item].tolist() == ["b", "a", "b", "c"]
    dataset.pointer_column = "row"
    assert dataset[np.array([3, 1])]["row"].tolist() == [3, 1]


def test_times_tie_as_the_order_sees_them():
    """RecBole sorts by single precision: there 2^24 + 1 is 2^24, and so the file decides between them."""
    log = pd.DataFrame({"user": [1, 1, 1, 2, 2], "time": [2.0**24, 2.0**24 + 1, 2.0**24 + 4, 2.0**24, 2.0**24 + 2]})
    assert share_of_ties(log, "user", "time") == 2 / 5
    assert share_of_ties(log.assign(time=[7.0, 8.0, 8.0, 8.0, 7.0]), "user", "time") == 2 / 5
    whole = log.assign(time=log["time"].astype(int))  # a column of tokens is sorted by its whole ids
    assert share_of_ties(whole, "user", "time") == 0
    assert math.isnan(share_of_ties(log, "user", "when"))


def test_the_share_of_ties_is_that_of_the_log_that_is_trained_on(tmp_path):
    times = [884673930, 884673931, 884673990, 884674500]  # the first two are one number in single precision
    rows = [f"{user}\ti{nth}\t{time}" for user in (1, 2) for nth, time in enumerate(times)]
    (tmp_path / "small").mkdir()
    text = "\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows])
    (tmp_path / "small" / "small.inter").write_text(text + "\n", encoding="utf-8")
    config = Config(
        model="SASRec", dataset="small", config_dict=PLAIN | {"data_path": str(tmp_path), "train_neg_sample_args": None}
    )
    dataset = create_dataset(config)
    counted = share_of_ties(dataset.inter_feat, "user_id", "timestamp")
    dataset.build()
    log = dataset.flat_log
    _, number = torch.stack([log.user, log.column("timestamp").long()]).unique(dim=1, return_counts=True)
    assert counted == int(number[number > 1].sum()) / len(log) == 0.5


def test_create_dataset_changes_sequential_data_sets_only(data_path):
    ours = {
        "SASRec": "FlatSequentialDataset",
        "BIGRec": "FlatSequentialDataset",
        "DIEN": "DIENDataset",
        "BPR": "Dataset",
    }
    theirs = ours | {"SASRec": "SequentialDataset"}
    for model in ours:
        settings = {"data_path": str(data_path), "load_col": PLAIN["load_col"]}
        settings |= {"train_neg_sample_args": None} if model == "SASRec" else {}
        settings |= {"title_field": None} if model == "BIGRec" else {}
        config = Config(model=model, dataset="small", config_dict=settings)
        assert type(recbole_llm.create_dataset(config)).__name__ == ours[model]
        assert type(recbole.data.create_dataset(config)).__name__ == theirs[model]
    assert recbole.data.dataset.SequentialDataset is SequentialDataset
    assert recbole_llm.FlatSequentialDataset is FlatSequentialDataset


def test_the_runner_keeps_its_log_flat(data_path):
    settings = {"data_path": str(data_path), "load_col": PLAIN["load_col"], "state": "error"}
    data = load_data(recbole_llm.Config("SASRec", "small", None, settings, read_argv=False))
    assert all(type(part._dataset) is FlatSequentialDataset for part in (data.train, data.valid, data.test))


keys = some.lists(some.integers(0, 12), max_size=60).map(lambda keys: np.array(keys, dtype=np.int64))


@given(keys, some.integers(1, 2))
def test_groups_and_what_is_left_out_are_recboles(keys, count):
    theirs = [list(group) for group in SequentialDataset._grouped_index(None, keys)]
    order, sizes = grouped(keys)
    assert sizes.tolist() == [len(group) for group in theirs]
    assert order.tolist() == [place for group in theirs for place in group]
    groups = FlatSequentialDataset._grouped_index(None, keys)
    assert [group.tolist() for group in groups] == theirs
    parts = SequentialDataset._split_index_by_leave_one_out(None, theirs, count)
    ours = FlatSequentialDataset._split_index_by_leave_one_out(None, groups, count)
    assert [part.tolist() for part in ours] == [part.tolist() for part in leave_out(groups, count)] == parts


@given(some.lists(some.integers(0, 2**32 - 1) | some.integers(0, 5) | some.integers(65530, 65540), max_size=50))
def test_sixteen_bits_at_a_time_sort_like_all(numbers):
    numbers = np.array(numbers, dtype=np.int64)
    assert stable_order(numbers).tolist() == np.argsort(numbers, kind="stable").tolist()
