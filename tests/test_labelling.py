"""Labels of whole windows: the same as row by row, whatever the shards, from any causal model whose scores are products."""

import dataclasses

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.utils import get_model, init_seed

from recbole_llm import labelling
from recbole_llm.config import role_config
from recbole_llm.knowledge import Knowledge
from recbole_llm.labelling import Labeller, reads_windows
from recbole_llm.sequences import Log, windows
from recbole_llm.teacher import log_probability, rank
from tests.oracle import Killed, Oracle, prepared
from tests.test_contract import Trained


def teacher_of(parts, name, **settings):
    """A RecBole model with random weights that are large enough to tell items apart."""
    config = role_config(prepared(parts.data_path, teacher=name, **settings).config, "teacher")
    init_seed(7, True)
    model = get_model(name)(config, parts.train._dataset).eval()
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.mul_(20)
    return model


@pytest.fixture
def parts(ring):
    """The ring's data, with rows of up to twelve items."""
    made = prepared(ring)
    made.data_path = ring
    return made


def row_by_row(teacher, log, rows, k, length=None):
    """Labels as `rank` gives them for the prefix of each row, cut to its last `length` items if that is given."""
    position = log.rows()[rows]
    seen, lengths = log.history(position, length or teacher.max_seq_length)
    columns = {teacher.ITEM_SEQ: seen, teacher.ITEM_SEQ_LEN: lengths, teacher.ITEM_ID: log.items[position]}
    columns[teacher.USER_ID] = log.users[log.user_index(position)]
    with torch.no_grad():
        return rank(teacher, Interaction(columns), k)


def all_labels(labeller):
    """Every shard's columns, put together in the order of the rows."""
    shards = [labeller.label(chosen, rows) for chosen, rows in labeller.shards()]
    row = torch.cat([shard["row"] for shard in shards])
    order = row.argsort()
    return row[order], {key: torch.cat([shard[key] for shard in shards])[order] for key in shards[0]}


@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec"])
def test_labels_of_windows_are_those_of_the_prefixes(parts, name):
    """Users of the ring have ten training items, so that one window of twelve holds them all."""
    log, teacher = Log.from_dataset(parts.train._dataset), teacher_of(parts, name)
    rows = torch.arange(len(log.rows()))[::3]
    labeller = Labeller(teacher, log, rows, 5, 64, 10)
    assert labeller.windows is not None
    row, ours = all_labels(labeller)
    items, score, target_score = row_by_row(teacher, log, rows, 5)
    assert torch.equal(row, rows) and torch.equal(ours["items"], items)
    assert torch.allclose(ours["score"], score, atol=1e-4)
    assert torch.allclose(ours["target_score"], target_score, atol=1e-4)
    assert bool((ours["score"] <= 0).all()) and bool((ours["score"].diff(dim=1) <= 0).all())


def test_of_long_users_they_are_those_of_prefixes_cut_at_the_window(parts):
    log = Log.from_dataset(parts.train._dataset)
    teacher = teacher_of(parts, "SASRec", MAX_ITEM_LIST_LENGTH=4)
    rows = torch.arange(len(log.rows()))
    labeller = Labeller(teacher, log, rows, 3, 64, 1)
    _, ours = all_labels(labeller)
    cut = windows(log, 4, 1)
    positions = log.rows()
    for start, end, first in zip(*(column.tolist() for column in cut), strict=True):
        for position in range(first, end + 1):
            row = int(torch.searchsorted(positions, position))
            items, _, target = row_by_row(teacher, log, torch.tensor([row]), 3, length=position - start)
            assert torch.equal(ours["items"][row], items[0])
            assert torch.allclose(ours["target_score"][row], target[0], atol=1e-4)


def test_every_row_is_in_one_shard_and_shards_do_not_change_labels(parts, monkeypatch):
    log, teacher = Log.from_dataset(parts.train._dataset), teacher_of(parts, "SASRec")
    rows = torch.arange(0, len(log.rows()), 2)
    _, whole = all_labels(Labeller(teacher, log, rows, 5, 64, 10))
    monkeypatch.setattr(labelling, "LEAST_ROWS_OF_A_SHARD", 20)
    labeller = Labeller(teacher, log, rows, 5, 1, 10)
    shards = [own for _, own in labeller.shards()]
    assert len(shards) > 10 and max(map(len, shards)) <= 20
    assert torch.equal(torch.cat(shards).sort().values, rows)
    _, small = all_labels(labeller)
    assert torch.equal(whole["items"], small["items"]) and torch.allclose(whole["score"], small["score"], atol=1e-5)


def test_a_shard_of_windows_is_one_percent_of_many_rows(parts, monkeypatch):
    monkeypatch.setattr(labelling, "LEAST_ROWS_OF_A_SHARD", 12)
    log, teacher = Log.from_dataset(parts.train._dataset), teacher_of(parts, "SASRec")
    labeller = Labeller(teacher, log, torch.arange(len(log.rows())), 5, 1, 10)
    assert max(len(own) for _, own in labeller.shards()) <= 12
    labeller.rows = labeller.rows.repeat(5)  # 1 % are 27
    assert 12 < max(len(own) for _, own in labeller.shards()) <= 27
    monkeypatch.setattr(labelling, "MOST_ROWS_OF_A_SHARD", 20)
    assert max(len(own) for _, own in labeller.shards()) <= 20


def test_equal_histories_come_together_whatever_the_order_of_the_ids(parts):
    log, teacher = Log.from_dataset(parts.train._dataset), Oracle(parts.config, parts.train._dataset)
    rows = torch.arange(len(log.rows()))
    histories = log.history(log.rows(), teacher.history_length)[0]
    shuffled = torch.cat(
        [torch.zeros(1, dtype=torch.long), torch.randperm(24, generator=torch.Generator().manual_seed(0)) + 1]
    )
    for numbers in (None, shuffled):
        order = torch.cat([own for _, own in Labeller(teacher, log, rows, 5, 20, None, numbers).shards()])
        assert torch.equal(order.sort().values, rows)
        in_order = [tuple(row) for row in histories[order].tolist()]
        changes = sum(one != other for one, other in zip(in_order, in_order[1:], strict=False)) + 1
        assert changes == len(set(in_order)) < len(in_order)
    internal = torch.empty_like(shuffled)
    internal[shuffled] = torch.arange(25)
    renamed = dataclasses.replace(log, items=internal[log.items])  # the same log from a file in another order
    other = torch.cat([own for _, own in Labeller(teacher, renamed, rows, 5, 20, None, shuffled).shards()])
    same = torch.cat([own for _, own in Labeller(teacher, log, rows, 5, 20, None, torch.arange(25)).shards()])
    assert torch.equal(other, same)


def test_models_that_look_ahead_or_score_otherwise_are_asked_row_by_row(parts):
    assert reads_windows(teacher_of(parts, "SASRec")) and reads_windows(teacher_of(parts, "GRU4Rec"))
    for name in ("NARM", "STAMP", "CORE", "BERT4Rec"):
        assert not reads_windows(teacher_of(parts, name)), name
    log, teacher = Log.from_dataset(parts.train._dataset), teacher_of(parts, "NARM")
    rows = torch.arange(30)
    _, ours = all_labels(Labeller(teacher, log, rows, 5, 8, 10))
    items, score, _ = row_by_row(teacher, log, rows, 5)
    assert torch.equal(ours["items"], items) and torch.allclose(ours["score"], score, atol=1e-4)


def test_scores_of_recboles_models_become_log_probabilities():
    scores = torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    found = log_probability(scores)
    assert float(found[0, 1:].exp().sum()) == pytest.approx(1) and found[0, 0] == float("-inf")
    assert torch.allclose(log_probability(scores + 5)[0, 1:], found[0, 1:], atol=1e-5)


def test_scores_that_are_probabilities_are_taken_as_such(parts):
    """Of RepeatNet, whose scores sum to 1: another softmax would flatten them."""
    found = log_probability(torch.tensor([[0.1, 0.7, 0.2, 0.0]]))
    assert found[0, 1:3].exp().tolist() == pytest.approx([0.7 / 0.9, 0.2 / 0.9], abs=1e-4)
    assert torch.isfinite(found[0, 3])
    some = log_probability(torch.tensor([[0.1, 0.5, 0.0, 0.3]]))  # a model may set what was met to 0
    assert (some[0, 1] - some[0, 3]).exp() == pytest.approx(5 / 3, rel=1e-4)
    log, teacher = Log.from_dataset(parts.train._dataset), teacher_of(parts, "RepeatNet")
    _, score, _ = row_by_row(teacher, log, torch.arange(12), 24)
    batch = Labeller(teacher, log, torch.arange(12), 24, 8, 10)._batch(torch.arange(12))
    with torch.no_grad():
        said = teacher.full_sort_predict(batch)[:, 1:]
    said = (said / said.sum(dim=1, keepdim=True)).sort(dim=1, descending=True).values
    assert torch.allclose(score.exp(), said, atol=1e-5)


def test_labelling_by_windows_goes_on_where_it_was_stopped(parts, monkeypatch):
    monkeypatch.setattr(labelling, "LEAST_ROWS_OF_A_SHARD", 40)
    dataset, teacher = parts.train._dataset, teacher_of(parts, "SASRec")
    rows = torch.arange(len(Log.from_dataset(dataset).rows()))
    options = {"history": 10, "shard_rows": 1, "overlap": 10, "provenance": {}, "progress": False}
    whole = Knowledge.build(teacher, dataset, rows, 5, "whole", options)
    label, calls = Labeller.label, []

    def dies(self, *args):
        if len(calls) == 3:
            raise Killed
        calls.append(args)
        return label(self, *args)

    monkeypatch.setattr(Labeller, "label", dies)
    with pytest.raises(Killed):
        Knowledge.build(teacher, dataset, rows, 5, "parts", options)
    monkeypatch.setattr(Labeller, "label", lambda self, *args: calls.append(args) or label(self, *args))
    again = Knowledge.build(teacher, dataset, rows, 5, "parts", options)
    assert len(calls) == len(again.manifest["parts"]) - 1, "no shard was labelled twice"
    assert again.manifest["parts"] == whole.manifest["parts"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lite_head": "tied+bias"},
        {"lite_head": "free"},
        {"lite_rec_pool": "mean"},
        {"lite_item_train": "full", "lite_unfreeze_rate": 1.0, "lite_unfreeze_epochs": 1},
        {"lite_rec_mask": "bidirectional"},
    ],
    ids=str,
)
def test_lite_llm4rec_labels_whole_windows_where_it_is_causal(ring, tiny_lm, settings):
    trained = Trained("LiteLLM4Rec", ring, tiny_lm, epochs=2, **settings).fit()
    log, teacher = Log.from_dataset(trained.data[0]._dataset), trained.model.eval()
    labeller = Labeller(teacher, log, torch.arange(0, len(log.rows()), 3), 5, 64, 10)
    assert (labeller.windows is not None) == ("lite_rec_mask" not in settings)
    row, ours = all_labels(labeller)
    items, score, target_score = row_by_row(teacher, log, row, 5)
    assert torch.equal(ours["items"], items)
    assert torch.allclose(ours["score"], score, atol=1e-4)
    assert torch.allclose(ours["target_score"], target_score, atol=1e-4)
