"""LSC4Rec as a whole: its ranking is what its account says, asked and evaluated, whatever the device model."""

import pytest
import torch
from recbole.quick_start import run_recbole

from recbole_llm.cloud import most_recent, proposed
from recbole_llm.collaboration import policy_of
from recbole_llm.evaluation import POINTER
from recbole_llm.recommend import load_recommender
from recbole_llm.report import row_metric
from tests.collaborations import SMALL, fitted, prepared
from tests.pipelines import ring_settings


def test_recboles_metrics_are_those_of_the_replay(source):
    for more in (
        {},
        {"lsc_evaluation": "stream", "lsc_steps": 3},
        {"seen_items": "mask", "lsc_candidates": 40},
        {"lsc_policy": "always"},
        {"lsc_own_candidates": 20, "lsc_alpha": 0.4},
        # so few that seen items would crowd out the device's own, if they were among them
        {"lsc_own_candidates": 3, "lsc_candidates": 6, "seen_items": "mask", "lsc_alpha": 0.0},
    ):
        run = fitted(source, **more)
        result = run.trainer.evaluate(run.data[2])
        last = run.trainer.outcome.rank[:, -1].tolist()
        assert result["ndcg@5"] == pytest.approx(row_metric(last, "ndcg", 5).mean(), abs=1e-4)
        assert len(run.trainer.ranks) == len(last)
        # the user who has met every item has nothing left to be shown
        if "lsc_own_candidates" not in more:
            assert result["short_lists"] == (1 / len(last) if more.get("seen_items") else 0)


def test_lists_on_disk_are_what_the_cloud_says_when_asked(source):
    run = fitted(source)
    run.trainer.evaluate(run.data[2])
    replay, timeline, cloud = run.trainer.replay("test"), run.trainer.timeline, run.trainer.cloud.model
    for view in (replay.start, replay.targets[:, 0]):
        items, length = timeline.log.history(view, 30)
        live, score = proposed(cloud, items, length, 12)
        known, known_score = replay.lists.at(view)
        assert torch.equal(live, known) and torch.allclose(score, known_score, atol=1e-5)


@pytest.mark.parametrize("own", [0, 15])
def test_asked_for_a_history_it_ranks_as_in_the_evaluation_without_requests(source, own):
    run = fitted(source, lsc_policy="never", lsc_own_candidates=own)
    run.trainer.evaluate(run.data[2])
    dataset = run.data[2]._dataset
    # the batches hold the last 12 items, of which the cloud reads the first 10 at most
    batch = dataset[torch.arange(len(dataset))]
    live = run.model.full_sort_predict(batch)
    at = run.trainer.timeline.of_pointers(dataset.row_pointers)
    known = torch.isin(at, run.trainer.timeline.shown)
    batch[POINTER] = dataset.row_pointers
    assert torch.equal(live[known], run.model.full_sort_predict(batch[known.nonzero()[:, 0]]))


def test_a_model_of_before_shares_had_ages_is_read(source):
    model = prepared(source).model
    model.load_other_parameter({"alpha": 0.3, "norm": "rank", "cloud_file": None})
    assert model.alpha == [0.3]


def test_what_is_beyond_the_list_stands_below_it_by_popularity(source):
    run = fitted(source)
    batch = run.data[2]._dataset[torch.arange(4)]
    scores, popularity = run.model.full_sort_predict(batch), run.model.popularity
    assert ((scores > 0).sum(dim=1) == 12).all()
    for row in scores:
        rest = (row < 0).nonzero()[1:, 0]
        assert torch.equal(row[rest].argsort(stable=True), popularity[rest].argsort(stable=True))


@pytest.mark.parametrize("device", ["GRU4Rec", "DIN", "NARM"])
def test_other_device_models(source, device):
    sizes = {
        "GRU4Rec": {"device_embedding_size": 8},
        "NARM": {"device_embedding_size": 8},
        "DIN": {"device_embedding_size": 4},
    }[device]
    own = {key: value for key, value in SMALL.items() if key != "device_hidden_size"}
    config = own | sizes | {"data_path": str(source), "device_model": device, "checkpoint_dir": device}
    result = run_recbole("LSC4Rec", "log", config_dict=config, saved=False)
    assert 0 <= result["test_result"]["ndcg@5"] <= 1 and result["test_result"]["request_rate"] < 0.5


def test_code_mode_trains_and_fuses_as_the_authors_code(source):
    run = fitted(source, lsc_mode="code", lsc_rate=0.4)
    settings = run.model.settings
    assert (settings.independent_loss, settings.hard, settings.inject, settings.list_lag) == (
        "bce",
        "digits",
        "always",
        0,
    )
    run.trainer.evaluate(run.data[2])
    groups = run.trainer.outcome.asked[:, 0].split(16)
    assert all(bool((group == group[0]).all()) for group in groups)
    # thresholds are quantiles of all users' scores, of whom the first floor(0.4 * groups) groups may ask
    assert sum(bool(group[0]) for group in groups) <= int(0.4 * len(groups))
    for name in ("consistency", "confidence", "learned"):
        for rate in (0.1, 0.5):
            asks = policy_of(name, rate, run.trainer.trial, run.model.fusion, settings, run.config)
            assert run.trainer.trial("valid").run(asks.on_valid, run.model.fusion, "ndcg", 5)[0] <= rate


def test_without_a_lag_no_policy_means_anything_in_one_step(source):
    run = fitted(source, lsc_lag=0, lsc_policy="always")
    for name in ("random", "consistency", "learned", "oracle"):
        found = policy_of(name, 0.2, run.trainer.trial, run.model.fusion, run.trainer.settings, run.config)
        assert found == "no list is behind"
    assert run.trainer.evaluate(run.data[2])["staleness"] == 0


def test_a_sample_of_users_is_evaluated(source):
    run = fitted(source, lsc_users=7)
    run.trainer.evaluate(run.data[2])
    assert len(run.trainer.evaluated_rows) == len(run.trainer.ranks) == 7


def test_a_threshold_covers_the_rate_it_was_set_to(source):
    """On other users' last step, within the binomial interval of three standard errors of both samples."""
    run = fitted(source)
    trial, test = (run.trainer.trial(part) for part in ("valid", "test"))
    for rate in (0.2, 0.5):
        asks = policy_of("confidence", rate, run.trainer.trial, run.model.fusion, run.trainer.settings, run.config)
        asked, _ = test.run(asks.policy, run.model.fusion, "ndcg", 5)
        assert abs(asked - rate) < 3 * (2 * rate * (1 - rate) / len(trial.replay.targets)) ** 0.5


def test_a_saved_model_works_without_the_data(source, monkeypatch):
    """The cloud must be there; the atomic files need not."""
    run = fitted(source)
    batch = run.data[2]._dataset[torch.arange(3)]
    expected = run.model.eval().full_sort_predict(batch)
    moved = source.rename(source.with_name("elsewhere"))
    try:
        recommender = load_recommender(run.trainer.saved_model_file)
        assert torch.equal(recommender.model.full_sort_predict(batch), expected)
    finally:
        moved.rename(source)


def test_a_cloud_that_was_moved_away_is_named(source):
    run = fitted(source)
    recommender = load_recommender(run.trainer.saved_model_file)
    recommender.model.cloud_file = "elsewhere.safetensors"
    with pytest.raises(
        FileNotFoundError, match="cloud_file=elsewhere.safetensors: the cloud that this model asks is not there"
    ):
        recommender.recommend([recommender.tokens[1], recommender.tokens[2]], k=3)


def test_the_last_items_of_padded_histories():
    items = torch.tensor([[1, 2, 3, 4, 0], [5, 0, 0, 0, 0]])
    assert most_recent(items, torch.tensor([4, 1]), 3).tolist() == [[2, 3, 4], [5, 0, 0]]
    assert most_recent(items, torch.tensor([2, 1]), 3).tolist() == [[1, 2, 0], [5, 0, 0]]
    assert most_recent(items, torch.tensor([4, 1]), 7).tolist() == [[1, 2, 3, 4, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0]]


def test_on_the_ring_everybody_is_right(ring, tiny_lm):
    settings = ring_settings(ring, "LSC4Rec", tiny_lm, lsc_independent_epochs=15, lsc_policy="never")
    result = run_recbole("LSC4Rec", "ring", config_dict=settings, saved=False)
    assert result["test_result"]["ndcg@1"] == 1.0
