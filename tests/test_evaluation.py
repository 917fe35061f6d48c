"""Ranking in chunks gives RecBole's metrics, and seen items are left out when asked for, however long ago they were seen."""

import pytest
import torch
from recbole.evaluator import Collector
from recbole.trainer import Trainer

from recbole_llm.config import Config
from recbole_llm.dataset import create_dataset
from recbole_llm.evaluation import CollectsHits, by_length
from recbole_llm.trainer import SequenceTrainer
from tests.small_logs import random_log, stock, write_log

METRICS = {"metrics": ["Recall", "NDCG", "MRR", "Precision"], "topk": [1, 5, 10]}


@pytest.fixture(autouse=True)
def one_thread(clean_process):
    """On tensors this small, threads only wait for each other."""
    torch.set_num_threads(1)


def trained(data_path, name="small", model="SASRec", **settings):
    """A model after two epochs, with its trainer."""
    parts = stock(data_path, name, model, create_dataset, **METRICS | settings)
    parts.trainer = SequenceTrainer(parts.config, parts.model)
    parts.trainer.fit(parts.train, saved=False)
    return parts


@pytest.fixture
def small(tmp_path):
    """A log of 90 users and 40 items with up to 30 of them each; histories are longer than L."""
    return write_log(tmp_path / "data", "small", random_log(users=90, items=40))


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "STAMP"])
@pytest.mark.parametrize("eval_batch_size", [7, 4096])
def test_metrics_are_recboles_to_six_digits(small, monkeypatch, model, eval_batch_size):
    monkeypatch.setattr(by_length, "__defaults__", (40,))  # many small pieces
    parts = trained(small, model=model, eval_batch_size=eval_batch_size)
    assert parts.trainer.all_positions is (model != "STAMP")
    widths = []
    score = parts.model.full_sort_predict
    parts.model.full_sort_predict = lambda batch: widths.append(batch["item_id_list"].shape) or score(batch)
    parts.trainer.evaluate(parts.test, load_best_model=False)
    in_pieces = len(widths) > len(parts.test)
    assert in_pieces is (model != "STAMP"), "only a causal model's histories are cut to the longest of their like"
    own = Trainer(parts.config, parts.model)
    own.eval_collector.data_collect(parts.train)
    for part in (parts.valid, parts.test):
        expected = own.evaluate(part, load_best_model=False)
        found = parts.trainer.evaluate(part, load_best_model=False)
        assert dict(found) == pytest.approx(dict(expected), abs=1e-6)
        assert len(parts.trainer.ranks) == len(part._dataset) == 90


def test_all_users_of_ml_1m_are_ranked_with_recboles_metrics(shared_data):
    load = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "normalize_field": ["timestamp"]}
    parts = stock(
        shared_data, "ml-1m", make=create_dataset, **METRICS | load, MAX_ITEM_LIST_LENGTH=50, eval_batch_size=1024
    )
    trainer, own = SequenceTrainer(parts.config, parts.model), Trainer(parts.config, parts.model)
    trainer.all_positions = True  # SASRec is, as other tests show
    with torch.no_grad():  # scores that differ from user to user without a training
        parts.model.item_embedding.weight.mul_(50)
    own.eval_collector.data_collect(parts.train)
    expected = own.evaluate(parts.test, load_best_model=False)
    assert dict(trainer.evaluate(parts.test, load_best_model=False)) == pytest.approx(dict(expected), abs=1e-6)
    assert len(trainer.ranks) == 6040 and expected["recall@10"] > 0


@pytest.mark.parametrize(
    "metrics", [["NDCG"], ["NDCG", "AveragePopularity"], ["AveragePopularity"], ["Recall", "GAUC"]]
)
@pytest.mark.parametrize("several", [False, True])
def test_hits_are_those_of_recboles_table_of_zeros(small, monkeypatch, metrics, several):
    config = stock(small, "small", "SASRec", create_dataset, metrics=metrics, topk=[3, 5]).config
    scores = torch.randn(30, 41).masked_fill(torch.arange(41) == 0, float("-inf"))
    row, target = torch.arange(30), torch.randint(0, 41, (30,))  # 0: a target that cannot be found
    if several:
        row, target = torch.cat([row, row]), torch.cat([target, (target + 3) % 41])
    zeros = []
    monkeypatch.setattr(torch, "zeros_like", lambda *a, made=torch.zeros_like, **k: zeros.append(1) or made(*a, **k))
    found = {}
    for kind in (CollectsHits, Collector):
        zeros.clear()
        collector = kind(config)
        for part in (slice(0, 30), slice(0, 30)):
            collector.eval_batch_collect(scores[part], None, row, target)
        found[kind] = collector.data_struct._data_dict
        if metrics[0] == "NDCG" and not several:
            assert bool(zeros) is (kind is Collector)
    ours, expected = found[CollectsHits], found[Collector]
    assert ours.keys() == expected.keys()
    assert all(
        torch.equal(ours[name], expected[name]) and ours[name].dtype == expected[name].dtype for name in expected
    )


def test_pieces_are_of_like_length_and_have_every_row_once(small):
    batch = trained(small).test._dataset[torch.arange(90)]
    rows, pieces = zip(*by_length(batch, "item_id_list", "item_length", limit=40), strict=True)
    order = torch.cat(rows)
    assert sorted(order.tolist()) == list(range(90)) and len(pieces) > 5
    lengths = [piece["item_length"] for piece in pieces]
    assert torch.cat(lengths).tolist() == batch["item_length"].sort().values.tolist()
    assert all(piece["item_id_list"].shape[1] == length.max() for piece, length in zip(pieces, lengths, strict=True))
    users = torch.cat([piece["user_id"] for piece in pieces])
    assert torch.equal(users, batch["user_id"][order])


@pytest.mark.parametrize("model", ["SASRec", "STAMP"])
@pytest.mark.parametrize("part", ["valid", "test"])
def test_masked_ranks_are_those_of_a_ranking_without_seen_items(small, model, part):
    parts = trained(small, model=model, seen_items="mask", eval_batch_size=16)
    dataset = getattr(parts, part)._dataset
    result = parts.trainer.evaluate(getattr(parts, part), load_best_model=False)
    tokens = parts.dataset.field2id_token["user_id"]
    ids = parts.dataset.field2token_id["item_id"]
    rows = dataset.inter_feat
    with torch.no_grad():
        scores = parts.model.eval().full_sort_predict(dataset[torch.arange(len(dataset))]).view(len(dataset), -1)
    sequences, repeats = random_log(users=90, items=40), 0
    for row, user in enumerate(rows["user_id"].tolist()):
        sequence = [ids[item] for item in sequences[str(tokens[user])]]
        *seen, target = sequence[: -1 if part == "valid" else None]
        assert target == rows["item_id"][row]
        free = [item for item in range(1, parts.dataset.item_num) if item not in seen]
        if target in seen:
            repeats += 1
            assert parts.trainer.ranks[row] == -1, "a target that was seen cannot be found"
            continue
        rank = sum(float(scores[row, item]) > float(scores[row, target]) for item in free)
        assert parts.trainer.ranks[row] == (rank if rank < 10 else -1)
    assert repeats > 0 and max(map(len, sequences.values())) > parts.config["MAX_ITEM_LIST_LENGTH"]
    kept = trained(small, model=model, eval_batch_size=16)
    assert result["recall@10"] != kept.trainer.evaluate(getattr(kept, part), load_best_model=False)["recall@10"]
    assert dataset.pointer_column is None and "row_pointer" not in dataset[torch.arange(2)]


def test_a_seen_target_is_not_found_where_hardly_anything_is_left_unseen(tmp_path):
    """Users who have met nearly all of 12 items: the ten best hold seen items, but never the target if that was seen."""
    sequences = random_log(users=60, items=12, longest=60)
    parts = trained(write_log(tmp_path, "dense", sequences), "dense", seen_items="mask")
    parts.trainer.evaluate(parts.test, load_best_model=False)
    tokens = parts.dataset.field2id_token["user_id"]
    users = [str(tokens[user]) for user in parts.test._dataset.inter_feat["user_id"].tolist()]
    again = [sequences[user][-1] in sequences[user][:-1] for user in users]
    assert sum(again) > 40
    assert all(rank == -1 for rank, seen in zip(parts.trainer.ranks, again, strict=True) if seen)
    assert all(0 <= rank < 12 for rank, seen in zip(parts.trainer.ranks, again, strict=True) if not seen)


@pytest.mark.parametrize(
    ("settings", "make", "message"),
    [
        ({}, None, "seen_items=mask: the data set is RecBole's own.*create_dataset; there is seen_items=keep"),
        (
            {"eval_args": {"order": "TO", "mode": "uni20", "split": {"LS": "valid_and_test"}}},
            create_dataset,
            "seen_items=mask: only a full ranking",
        ),
    ],
)
def test_what_cannot_be_masked_is_refused(small, settings, make, message):
    chosen = {"seen_items": "mask", **settings}
    parts = stock(small, "small", **({"make": make} if make else {}), **chosen)
    with pytest.raises(ValueError, match=message):
        SequenceTrainer(parts.config, parts.model).evaluate(parts.test, load_best_model=False)
    if chosen["seen_items"] == "mask":  # before the first epoch, not after it
        trainer = SequenceTrainer(parts.config, parts.model)
        with pytest.raises(ValueError, match=message):
            trainer.fit(parts.train, parts.valid, saved=False)
        assert not trainer.train_loss_dict


def test_choices_are_refused_with_what_there_is(small):
    settings = {"data_path": str(small), "seen_items": "masked", "loss_over": "some", "loss_sampling": "often"}
    with pytest.raises(ValueError, match="loss_over=some: no such choice") as error:
        Config("SASRec", "small", None, settings, read_argv=False)
    assert "seen_items=masked: no such choice; did you mean 'mask'? There is keep, mask." in str(error.value)
    assert "loss_sampling=often: no such choice" in str(error.value)


@pytest.mark.parametrize("seen_items", ["keep", "mask"])
def test_lists_are_those_that_the_ranks_are_of(small, seen_items):
    parts = trained(small, seen_items=seen_items)
    with parts.trainer.keeping_lists(10) as lists:
        parts.trainer.evaluate(parts.test, load_best_model=False)
    kept, ranks = lists.tensors(), torch.tensor(parts.trainer.ranks)
    targets = parts.test._dataset.inter_feat["item_id"]
    found = ranks >= 0
    assert found.any() and not found.all()
    assert torch.equal(kept["items"][found, ranks[found]].long(), targets[found])
    assert kept["items"].shape == (90, 10) and not (kept["items"] == 0).any()
    assert (kept["items"][~found].long() != targets[~found, None]).all()
    assert (kept["sure"] < 0).all() and parts.trainer.top_lists is None
    parts.trainer.evaluate(parts.valid, load_best_model=False)
    assert len(lists.tensors()["items"]) == 90, "an evaluation outside of the block is not kept"
