"""A device model scores a list as it would score the catalogue, whatever kind of model it is."""

import pytest
import torch

import recbole_llm
from recbole_llm.device import Device
from recbole_llm.sequences import Log
from tests.small_logs import NO_DROPOUT, random_log, stock, write_log

SIZES = {"mlp_hidden_size": [8, 8], "train_neg_sample_args": None}


@pytest.fixture(params=["SASRec", "GRU4Rec", "NARM", "CORE", "DIN"])
def made(request, tmp_path):
    settings = NO_DROPOUT | ({"loss_type": "BPR", "transform": None} | SIZES if request.param == "DIN" else {})
    if request.param == "CORE":
        settings |= {"dnn_type": "trm"}
    data = stock(write_log(tmp_path, "log", random_log()), "log", request.param, recbole_llm.create_dataset, **settings)
    torch.manual_seed(0)
    log = Log.from_dataset(data.train._dataset)
    positions = log.rows()[::9]
    items = torch.randint(1, log.n_items, (len(positions), 6))
    return Device(data.model.eval()), log, positions, items


def test_scores_of_a_list_are_those_of_the_model(made):
    device, log, positions, items = made
    ours = device.rerank(log, positions, items)
    batch, model = device.batch(log, positions), device.model
    with torch.no_grad():
        if device.ranks_all:
            expected = model.full_sort_predict(batch).view(len(items), -1).gather(1, items)
        else:
            columns = []
            for column in items.T:
                batch[model.ITEM_ID] = column
                columns.append(model.predict(batch).logit())
            expected = torch.stack(columns, dim=1)
    assert torch.allclose(ours, expected, atol=1e-4)


def test_states_serve_any_list(made):
    device, log, positions, items = made
    if device.by_state:
        states = device.states(log, positions)
        assert torch.allclose(device.of_states(states, items), device.rerank(log, positions, items), atol=1e-5)


def test_the_rank_among_all_items_is_that_of_the_full_ranking(made):
    device, log, positions, _ = made
    ranks = device.rank_of(log, positions)
    if not device.ranks_all:
        assert ranks is None
        return
    with torch.no_grad():
        scores = device.model.full_sort_predict(device.batch(log, positions)).view(len(positions), -1)
    scores[:, 0] = float("-inf")
    order = scores.argsort(dim=1, descending=True)
    assert torch.equal(ranks, (order == log.items[positions].unsqueeze(1)).int().argmax(dim=1))


def test_what_was_met_before_is_not_ranked(made):
    device, log, positions, _ = made
    if not device.ranks_all:
        return

    def seen(some):
        rows = [log.items[int(log.offsets[log.user_index(some)][row]) : at] for row, at in enumerate(some.tolist())]
        return torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row) for row in rows])), torch.cat(
            rows
        )

    ranks, plain = device.rank_of(log, positions, seen), device.rank_of(log, positions)
    row, item = seen(positions)
    again = torch.zeros(len(positions), dtype=torch.bool)
    again[row[item == log.items[positions][row]]] = True
    assert again.any() and torch.equal(ranks == -1, again)
    assert bool((ranks <= plain)[~again].all()) and bool((ranks < plain)[~again].any())


def test_a_list_is_scored_with_a_gradient(made):
    device, log, positions, items = made
    device.scores(device.batch(log, positions), items).sum().backward()
    assert any(weight.grad is not None and bool(weight.grad.abs().sum() > 0) for weight in device.model.parameters())


def test_size_and_latency(made):
    device, log, positions, items = made
    assert device.size() == 4 * sum(weight.numel() for weight in device.model.parameters())
    assert device.latency_ms(log, positions[:1], items[:1], repeats=3) > 0


def test_which_models_score_by_states(made):
    device = made[0]
    name = type(device.model).__name__
    assert (device.by_state, device.ranks_all) == {"DIN": (False, False), "CORE": (False, True)}.get(name, (True, True))
    assert (device.item_vectors() is None) == (name == "DIN")
