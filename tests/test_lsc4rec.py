"""LSC4Rec as a whole: what its phases learn from, what they leave alone, and that its ranking is what its account says."""

import json
import pathlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.quick_start import run_recbole
from recbole.utils import get_model, get_trainer, init_seed

from recbole_llm.account import Account, area_over, share_kept
from recbole_llm.checkpoint import read_checkpoint
from recbole_llm.cloud import most_recent, proposed
from recbole_llm.collaboration import policy_of
from recbole_llm.evaluation import POINTER
from recbole_llm.model.lsc4rec import cloud_config
from recbole_llm.phases import PhaseTrainer, digit_neighbours, list_loss
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.recommend import load_recommender
from recbole_llm.report import row_metric
from recbole_llm.seeds import together
from recbole_llm.terms import Collaboration
from tests.pipelines import ring_settings
from tests.small_logs import random_log, write_log

SMALL = {
    "cloud": "SASRec", "cloud_epochs": 2, "cloud_hidden_size": 16, "cloud_MAX_ITEM_LIST_LENGTH": 10,
    "device_hidden_size": 8, "device_MAX_ITEM_LIST_LENGTH": 10, "device_train_batch_size": 128, "device_learning_rate": 0.01,
    "lsc_independent_epochs": 3, "lsc_cooperative_epochs": 2, "lsc_retrain_epochs": 2, "lsc_candidates": 12, "lsc_list": 16,
    "lsc_list_cloud": 8, "topk": [1, 5], "valid_metric": "NDCG@5", "MAX_ITEM_LIST_LENGTH": 12, "show_progress": False, "state": "warning",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("data"), "log", sequences())


def sequences():
    """Forty random users, and before them one who meets every item once, so that a changed log numbers the items alike."""
    log = random_log(users=40, items=40, longest=24, seed=3)
    return {"0": [f"i{item}" for item in range(40)]} | log


def prepared(source, **more) -> SimpleNamespace:
    config = Config("LSC4Rec", "log", config_dict=SMALL | {"data_path": str(source)} | more)
    init_seed(config["seed"], config["reproducibility"])
    data = data_preparation(config, create_dataset(config))
    model = get_model("LSC4Rec")(config, data[0]._dataset).to(config["device"])
    return SimpleNamespace(
        config=config, data=data, model=model, trainer=get_trainer(config["MODEL_TYPE"], "LSC4Rec")(config, model)
    )


def fitted(source, **more) -> SimpleNamespace:
    run = prepared(source, **more)
    run.best = run.trainer.fit(run.data[0], run.data[1])
    return run


def changed(target, choose):
    """A copy of the log in which `choose(place from the end)` says which items of each user become another one."""
    log = sequences()
    for user, sequence in log.items():
        for place in range(len(sequence)):
            if user != "0" and choose(len(sequence) - place):
                sequence[place] = f"i{(int(sequence[place][1:]) + 7) % 40}"
    return write_log(target, "log", log)


def test_no_real_time_interaction_reaches_an_earlier_phase(source, tmp_path):
    """Changing what happened after the historical rows changes neither the cloud nor the first two phases, and does change the third."""
    other = changed(tmp_path / "other", lambda from_end: from_end <= 4)
    settings = {"lsc_keep_better": False, "lsc_stopping_step": 100}
    here, there = (fitted(path, checkpoint_dir=name, **settings) for path, name in ((source, "here"), (other, "there")))

    def same(phase):
        tables = [run.trainer.phases.weights[phase] for run in (here, there)]
        return all(torch.equal(tables[0][name], tables[1][name]) for name in tables[0])

    assert same("independent") and same("cooperative") and not same("retrain")
    assert torch.equal(*(run.trainer.cloud.model.item_embedding.weight for run in (here, there)))


def test_what_is_shown_at_the_end_trains_and_chooses_nothing(source, tmp_path):
    other = changed(tmp_path / "other", lambda from_end: from_end == 1)
    here, there = (fitted(path, checkpoint_dir=name) for path, name in ((source, "here"), (other, "there")))
    assert here.best == there.best
    assert (here.model.alpha, here.model.norm) == (there.model.alpha, there.model.norm)


def test_recboles_metrics_are_those_of_the_replay(source):
    for more in (
        {},
        {"lsc_evaluation": "stream", "lsc_steps": 3},
        {"seen_items": "mask", "lsc_candidates": 40},
        {"lsc_policy": "always"},
        {"lsc_own_candidates": 20, "lsc_alpha": 0.4},
        {"lsc_own_candidates": 20, "lsc_candidates": 6, "seen_items": "mask", "lsc_policy": "always"},
    ):
        run = fitted(source, **more)
        result = run.trainer.evaluate(run.data[2])
        last = run.trainer.outcome.rank[:, -1].tolist()
        assert result["ndcg@5"] == pytest.approx(row_metric(last, "ndcg", 5).mean(), abs=1e-4)
        assert len(run.trainer.ranks) == len(last)
        # the user who has met every item has nothing left to be shown
        assert result["short_lists"] == (1 / len(last) if more.get("seen_items") else 0)


def test_requests_and_costs_stand_in_recboles_results(source):
    run = fitted(source, lsc_policy="random", lsc_rate=0.5)
    result = run.trainer.evaluate(run.data[2])
    wanted = {
        "request_rate",
        "candidate_recall",
        "staleness",
        "up_bytes",
        "down_bytes",
        "latency_ms",
        "latency_p95_ms",
        "short_lists",
    }
    assert wanted < set(result) and 0.2 < result["request_rate"] < 0.8
    assert result["up_bytes"] == pytest.approx(result["request_rate"] * (200 + 2 * 4), rel=1e-6)
    assert result["down_bytes"] == pytest.approx(result["request_rate"] * (200 + 12 * 6), rel=1e-6)


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


def test_what_is_beyond_the_list_stands_below_it_by_popularity(source):
    run = fitted(source)
    batch = run.data[2]._dataset[torch.arange(4)]
    scores, popularity = run.model.full_sort_predict(batch), run.model.popularity
    assert ((scores > 0).sum(dim=1) == 12).all()
    for row in scores:
        rest = (row < 0).nonzero()[1:, 0]
        assert torch.equal(row[rest].argsort(stable=True), popularity[rest].argsort(stable=True))


def test_phases_may_be_left_out(source):
    run = fitted(source, lsc_phases=["retrain", "independent"])
    assert list(run.trainer.phases.weights) == ["independent", "retrain"]


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


def test_a_phase_that_is_no_better_is_not_kept(ring, tiny_lm):
    """On the ring the independent phase leaves nothing to be gained."""
    weights = []
    for keep in (True, False):
        settings = ring_settings(
            ring, "LSC4Rec", tiny_lm, lsc_independent_epochs=20, lsc_keep_better=keep, checkpoint_dir=f"keep-{keep}"
        )
        config = Config("LSC4Rec", "ring", config_dict=settings)
        data = data_preparation(config, create_dataset(config))
        trainer = get_trainer(config["MODEL_TYPE"], "LSC4Rec")(config, get_model("LSC4Rec")(config, data[0]._dataset))
        trainer.fit(data[0], data[1])
        weights.append(
            [trainer.phases.weights[phase]["item_embedding.weight"] for phase in ("independent", "cooperative")]
        )
    assert torch.equal(*weights[0]) and not torch.equal(*weights[1])


def test_replayed_history_is_trained_on_again(source):
    plain, more = (
        fitted(source, lsc_replay=replay, lsc_keep_better=False, checkpoint_dir=f"replay-{replay}")
        for replay in (0.0, 2.0)
    )
    assert not torch.equal(*(run.trainer.phases.weights["retrain"]["item_embedding.weight"] for run in (plain, more)))


def test_a_cloud_that_knows_more_than_history_is_refused(source):
    """One trained on RecBole's training rows has seen real-time data."""
    settings = {key: value for key, value in SMALL.items() if not key.startswith(("cloud", "device", "lsc_"))}
    settings |= {
        "data_path": str(source),
        "epochs": 1,
        "hidden_size": 16,
        "checkpoint_dir": "more",
        "train_neg_sample_args": None,
    }
    more = run_recbole_llm("SASRec", "log", config_dict=settings)["folder"] + "/model.safetensors"
    with pytest.raises(
        ValueError, match=r"cloud_checkpoint=.*: it was trained on \d+ rows that are not the \d+ historical ones"
    ):
        fitted(source, cloud_checkpoint=more)
    with pytest.raises(ValueError, match="cloud_checkpoint=nowhere.safetensors: no such file"):
        fitted(source, cloud_checkpoint="nowhere.safetensors")


def test_a_cloud_of_the_historical_rows_is_taken(source):
    first = fitted(source)
    again = fitted(source, cloud_checkpoint=str(first.trainer.cloud.file), checkpoint_dir="again")
    assert again.best == first.best


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lsc_mode": "paper"}, "lsc_mode=paper: no such choice"),
        ({"lsc_policy": "consistncy"}, "lsc_policy=consistncy: no such choice; did you mean 'consistency'"),
        ({"lsc_rate": 1.5}, "lsc_rate=1.5: not possible; there is numbers from 0.0 to 1.0"),
        ({"lsc_rates": [0.1, 2.0]}, "lsc_rates=2.0: not possible"),
        ({"lsc_alpha": -1.0}, "lsc_alpha=-1.0: not possible"),
        ({"lsc_fusion": "code", "lsc_alpha": 0.9}, "lsc_fusion=code: has neither an alpha nor a scale"),
        (
            {"lsc_fusion": "code", "lsc_own_candidates": 5},
            "lsc_own_candidates=5: the authors' fusion ranks the cloud's",
        ),
        ({"lsc_alpha_by_age": "age"}, "lsc_alpha_by_age=age: is neither true nor false"),
        ({"lsc_keep_better": "no"}, "lsc_keep_better=no: is neither true nor false; there are True and False"),
        ({"lsc_lag": -1}, "lsc_lag=-1: not possible; there is whole numbers from 0 upwards"),
        ({"lsc_phases": ["cooperate"]}, "lsc_phases=cooperate: no such choice; did you mean 'cooperative'"),
        ({"lsc_measure": "kendall"}, "lsc_measure=kendall: no such choice"),
        ({"device_model": "SASRek"}, "device_model=SASRek: no such model; did you mean 'SASRec'"),
        ({"cloud": "LiteLLM"}, "cloud=LiteLLM: no such model; did you mean 'LiteLLM4Rec'"),
        ({"device_hiden_size": 3}, r"device_hiden_size=3 \(did you mean 'device_hidden_size'\?\)"),
        ({"cloud_epohcs": 3}, r"cloud_epohcs=3 \(did you mean 'cloud_epochs'\?\)"),
    ],
)
def test_values_that_a_setting_cannot_have(source, settings, message):
    with pytest.raises(ValueError, match=message):
        prepared(source, **settings)


def test_a_split_that_is_not_leave_one_out_is_refused(source):
    run = prepared(
        source, eval_args={"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": "user", "mode": "full"}
    )
    with pytest.raises(ValueError, match="eval_args=.*there is split: {LS: valid_and_test}"):
        run.trainer.fit(run.data[0], run.data[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_model": "DIN", "lsc_hard": "device"}, "lsc_hard=device: DIN scores one item at a time"),
        ({"device_model": "DIN", "lsc_policy": "history-drift"}, "lsc_policy=history-drift: DIN has no item vectors"),
        ({"device_model": "DIN", "lsc_own_candidates": 5}, "lsc_own_candidates=5: DIN scores one item at a time"),
        ({"cloud": "DIN"}, "cloud=DIN: scores one item at a time"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(source, settings, message):
    own = {key: None for key in SMALL if key.startswith(("device_hidden", "cloud_hidden"))}
    config = {key: value for key, value in SMALL.items() if key not in own} | {"data_path": str(source)} | settings
    with pytest.raises(ValueError, match=message):
        run_recbole_llm("LSC4Rec", "log", config_dict=config)
    assert not pathlib.Path("saved/teachers").exists()


def test_periodic_means_nothing_in_one_step(source):
    with pytest.raises(
        ValueError, match="lsc_policy=periodic: means nothing in one step; there is lsc_evaluation=stream"
    ):
        prepared(source, lsc_policy="periodic")


def test_a_policy_that_means_nothing_for_the_lists_is_refused(source):
    run = fitted(source, lsc_policy="invalid-count")
    with pytest.raises(
        ValueError, match="lsc_policy=invalid-count: means nothing here, since no list lacks a candidate"
    ):
        run.trainer.evaluate(run.data[2])


def test_recboles_validation_rows_are_validated_on_or_refused(source):
    run = fitted(source)
    assert 0 <= run.trainer.evaluate(run.data[1])["ndcg@5"] <= 1
    stream = fitted(source, lsc_evaluation="stream", lsc_steps=3, checkpoint_dir="stream")
    with pytest.raises(ValueError, match="evaluate: these rows are neither .* there are the test rows"):
        stream.trainer.evaluate(stream.data[1])


def test_a_stream_trains_and_chooses_on_nothing_that_it_shows(source, tmp_path):
    """Its last steps changed, everything that is trained or chosen stays: weights, fusion, thresholds, what a learned policy says."""
    other = changed(tmp_path / "other", lambda from_end: from_end <= 4)
    settings = {"lsc_evaluation": "stream", "lsc_steps": 4}
    here, there = (fitted(path, checkpoint_dir=name, **settings) for path, name in ((source, "here"), (other, "there")))
    assert here.best == there.best and (here.model.alpha, here.model.norm) == (there.model.alpha, there.model.norm)
    for name in ("consistency", "history-drift", "learned"):
        walked = []
        for run in (here, there):
            asks = policy_of(name, 0.3, run.trainer.trial, run.model.fusion, run.trainer.settings, run.config)
            walked.append(run.trainer.trial("valid").run(asks.on_valid, run.model.fusion, "ndcg", 5))
        assert walked[0][0] == walked[1][0] and (walked[0][1] == walked[1][1]).all()


def test_what_a_stream_validates_on_trains_nobody(source):
    run = prepared(source, lsc_evaluation="stream", lsc_steps=3)
    run.trainer._know(run.data[0])
    timeline = run.trainer.timeline
    valid = run.trainer.targets("valid").flatten()
    trained = torch.cat([timeline.train, timeline.history_valid, timeline.real_time.flatten()])
    assert not torch.isin(valid, trained).any()


def test_a_sample_of_users_is_evaluated(source):
    run = fitted(source, lsc_users=7)
    run.trainer.evaluate(run.data[2])
    assert len(run.trainer.evaluated_rows) == len(run.trainer.ranks) == 7


def test_without_validation_data_every_phase_runs_to_its_end(source):
    run = prepared(source, lsc_stopping_step=0)
    run.trainer.fit(run.data[0])
    assert list(run.trainer.phases.weights) == ["independent", "cooperative", "retrain"]


def test_without_files_a_phase_that_gets_worse_is_taken_back(ring, tiny_lm):
    settings = ring_settings(ring, "LSC4Rec", tiny_lm, lsc_independent_epochs=20, lsc_cooperative_rate=30.0)
    config = Config("LSC4Rec", "ring", config_dict=settings)
    data = data_preparation(config, create_dataset(config))
    trainer = get_trainer(config["MODEL_TYPE"], "LSC4Rec")(config, get_model("LSC4Rec")(config, data[0]._dataset))
    trainer.fit(data[0], data[1], saved=False)
    before, after = (trainer.phases.weights[phase]["item_embedding.weight"] for phase in ("independent", "cooperative"))
    assert torch.equal(before, after)


def test_a_threshold_covers_the_rate_it_was_set_to(source):
    """On other users' last step, within the binomial interval of three standard errors of both samples."""
    run = fitted(source)
    trial, test = (run.trainer.trial(part) for part in ("valid", "test"))
    for rate in (0.2, 0.5):
        asks = policy_of("confidence", rate, run.trainer.trial, run.model.fusion, run.trainer.settings, run.config)
        asked, _ = test.run(asks.policy, run.model.fusion, "ndcg", 5)
        assert abs(asked - rate) < 3 * (2 * rate * (1 - rate) / len(trial.replay.targets)) ** 0.5


def test_a_list_is_never_longer_than_it_may_be(source):
    run = prepared(
        source, lsc_list=4, lsc_list_cloud=8, lsc_inject="always", lsc_base_weight=0.0, lsc_keep_better=False
    )
    widths = []
    score = run.model.scorer.scores
    run.model.scorer.scores = lambda batch, items, states=None: (
        widths.append(items.shape[1]) or score(batch, items, states)
    )
    run.trainer.fit(run.data[0], run.data[1])
    assert set(widths) == {4}


def test_what_no_training_depends_on_trains_nothing_anew(source, caplog):
    """Another policy, fusion or network is another run of the same device model; another list size is not."""
    settings = SMALL | {"data_path": str(source), "state": "info"}
    first = run_recbole_llm("LSC4Rec", "log", config_dict=settings)
    for more, taken in (
        ({"lsc_policy": "learned", "lsc_rate": 0.5, "lsc_own_candidates": 5, "lsc_rtt_ms": 9}, 3),
        ({"lsc_list": 4}, 0),
    ):
        caplog.clear()
        other = run_recbole_llm("LSC4Rec", "log", config_dict=settings | more)
        assert other["folder"] != first["folder"]
        assert sum("taken from saved/devices/SASRec-log-" in message for message in caplog.messages) == taken
    caplog.clear()
    run_recbole_llm("LSC4Rec", "log", config_dict=settings | {"resume": False})
    assert not any("taken from saved/devices" in message for message in caplog.messages)


def test_the_plan_counts_lists_that_are_trained_on_only(source):
    for more, rows in (
        ({}, r"[1-9]\d*"),
        ({"lsc_phases": ["independent"]}, "0"),
        ({"lsc_list_cloud": 0}, "0"),
        ({"lsc_list_rows": 7}, "7"),
    ):
        steps = run_recbole_llm("LSC4Rec", "log", config_dict=SMALL | {"data_path": str(source)} | more, estimate=True)[
            "plan"
        ]
        assert any(re.search(f"gives lists for {rows} historical rows and", step.what) for step in steps), more


def test_the_plan_names_cloud_lists_and_phases(source):
    steps = run_recbole_llm("LSC4Rec", "log", config_dict=SMALL | {"data_path": str(source)}, estimate=True)["plan"]
    assert [step.what.split(" on ")[0].split(" gives ")[0] for step in steps] == [
        "Train SASRec (cloud)", "SASRec", "Train SASRec", "Train SASRec", "Train SASRec",
    ]  # fmt: skip


def test_the_words_of_prompts_reach_a_cloud_that_is_prompted(source):
    settings = {key: value for key, value in SMALL.items() if not key.startswith("cloud_")}
    settings |= {"cloud": "BIGRec", "prompt_lead": "Seen:", "data_path": str(source), "title_field": None}
    assert cloud_config(Config("LSC4Rec", "log", config_dict=settings))["prompt_lead"] == "Seen:"


def test_list_loss_by_hand():
    """Section 2.2 of the method document: mean binary cross entropy over the list; padding counts for nothing."""
    scores, there = torch.tensor([[2.0, 0.0, 5.0]]), torch.tensor([[True, True, False]])
    assert float(list_loss(scores, there, "bce")) == pytest.approx((0.126928 + 0.693147) / 2, abs=1e-5)
    assert float(list_loss(scores, there, "listwise")) == pytest.approx(0.126928, abs=1e-5)


def test_neighbours_by_digits_are_made_of_the_lists_pieces():
    """Section 2.2: {7391, 1208, 11954} gives pieces F = {0, 1}, S = {73, 12, 19}, T = {91, 8, 54}."""
    made = digit_neighbours(torch.tensor([[7391, 1208, 11954], [0, 0, 0]]), 500, torch.Generator().manual_seed(0))
    possible = {
        first * 10_000 + middle * 100 + last for first in (0, 1) for middle in (73, 12, 19) for last in (91, 8, 54)
    }
    assert set(made[0].tolist()) == possible and not made[1].any()


def test_hard_negatives_are_what_they_are_called(source):
    found = {}
    for hard in ("random", "popular", "device"):
        run = prepared(
            source, lsc_hard=hard, lsc_phases=["cooperative"], lsc_cooperative_epochs=1, checkpoint_dir=f"hard-{hard}"
        )
        seen = found.setdefault(hard, [])
        original = PhaseTrainer._hard

        def spy(self, *arguments, seen=seen, original=original):
            made = original(self, *arguments)
            seen.append((made, arguments[2]))
            return made

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PhaseTrainer, "_hard", spy)
            run.trainer.fit(run.data[0], run.data[1])
        found[hard] = seen, run.trainer.phases.popularity
    counts = {
        hard: torch.bincount(torch.cat([made.flatten() for made, _ in seen]), minlength=41)[1:]
        for hard, (seen, _) in found.items()
    }
    popularity = found["popular"][1][1:].double()
    correlations = {hard: float(np.corrcoef(counts[hard].double(), popularity)[0, 1]) for hard in ("random", "popular")}
    assert correlations["popular"] > 0.6 > correlations["random"]
    made, hidden = found["device"][0][0]
    assert made.shape[1] == 7 and len(made[0].unique()) == 7  # the best ones, none twice


def test_users_with_too_few_interactions_are_named(source, caplog):
    run = fitted(source)
    left_out = run.trainer.timeline.left_out
    assert left_out > 0 and f"{left_out} users have fewer than the 7 interactions" in caplog.text
    run.trainer.evaluate(run.data[2])
    assert len(run.trainer.evaluated_rows) == 41 - left_out


def test_one_rate_and_one_phase_need_no_brackets(source):
    settings = prepared(source, lsc_rates=0.2, lsc_phases="independent").model.settings
    assert settings.rates == (0.2,) and settings.phases == ("independent",)


def test_modes_fill_every_empty_setting(source):
    modes = prepared(source).config["lsc_modes"]
    assert {frozenset(mode) for mode in modes.values()} == {frozenset(modes["clean"])}
    for name in modes:
        config = prepared(source, lsc_mode=name).config
        assert all(getattr(Collaboration.from_config(config), key) is not None for key in modes[name])


def test_a_run_writes_its_account_and_pictures_and_is_taken_from_its_folder(source):
    settings = SMALL | {"data_path": str(source), "lsc_evaluation": "stream", "lsc_steps": 3, "lsc_rates": [0.2, 0.5]}
    first = run_recbole_llm("LSC4Rec", "log", config_dict=settings)
    folder = first["folder"]
    names = {path.name for path in pathlib.Path(folder).iterdir()}
    for picture in ("rate", "alpha", "scale", "latency", "bytes_up", "bytes_down"):
        assert {f"{picture}.png", f"{picture}.html"} <= names
    for words in (
        "in the cloud, up to date",
        "on the device, re-ranking",
        "never asked",
        "always asked",
        "after phase retrain",
    ):
        assert words in first["table"]
    for policy in ("random", "periodic", "consistency", "confidence", "history-drift", "learned", "oracle"):
        assert f"| {policy}" in first["table"]
    account = Account.load(pathlib.Path(folder))
    assert json.loads((pathlib.Path(folder) / "account.json").read_text())["chosen"]["steps"] == 3
    again = run_recbole_llm("LSC4Rec", "log", config_dict=settings)
    assert again["test_result"] == first["test_result"] and len(account.rows) == 14
    assert (
        "invalid-count: n/a, no list lacks a candidate" in first["table"]
        and "The target is among the 12 candidates" in first["table"]
    )
    assert all(line.cached for line in again["lines"])
    # over the best of cloud and device alone, from the same numbers
    alone = max(
        (line for line in account.lines if not line.name.startswith("both") and "up to date" not in line.name),
        key=lambda line: f"the strongest on validation is {line.name} (" in first["table"],
    )
    for row in account.rows:
        assert (
            row.over[0] == pytest.approx(row.score / alone.metrics["ndcg@5"] - 1)
            and row.over[1] <= row.over[0] <= row.over[2]
        )
    assert "over the strongest alone: " in first["table"] and "over the best alone" in first["table"]


def test_runs_of_several_seeds_are_one_table(source):
    settings = SMALL | {"data_path": str(source), "lsc_rates": [0.5]}
    folders = [
        pathlib.Path(run_recbole_llm("LSC4Rec", "log", config_dict=settings | {"seed": seed})["folder"])
        for seed in (1, 2)
    ]
    text = together(folders)
    assert "2 seeds, 38 users" in text and "| random" in text and " ±" in text
    assert "both (LSC4Rec), never asked against SASRec alone, whole catalogue, after phase retrain, ndcg@5: " in text
    scores = [Account.load(folder).lines[0].metrics["ndcg@5"] for folder in folders]
    assert f"{np.mean(scores):.4f} ±{np.std(scores, ddof=1):.4f}" in text
    with pytest.raises(ValueError, match="a seed stands twice"):
        together([folders[0], folders[0]])
    with pytest.raises(ValueError, match="nowhere: no finished run of LSC4Rec there"):
        together([pathlib.Path("nowhere")])


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


def test_a_finished_phase_is_a_checkpoint_of_the_device_model(source):
    run = fitted(source)
    file = run.trainer.phases.folder / "retrain" / "model.safetensors"
    saved = read_checkpoint(file)
    assert saved["config"]["model"] == "SASRec"
    assert load_recommender(file).recommend([run.data[0]._dataset.field2id_token["item_id"][3]], k=3)


def test_the_last_items_of_padded_histories():
    items = torch.tensor([[1, 2, 3, 4, 0], [5, 0, 0, 0, 0]])
    assert most_recent(items, torch.tensor([4, 1]), 3).tolist() == [[2, 3, 4], [5, 0, 0]]
    assert most_recent(items, torch.tensor([2, 1]), 3).tolist() == [[1, 2, 0], [5, 0, 0]]
    assert most_recent(items, torch.tensor([4, 1]), 7).tolist() == [[1, 2, 3, 4, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0]]


def test_the_share_of_the_gain_and_its_interval():
    base, most = np.zeros(200), np.full(200, 0.5) + np.arange(200) % 2 * 0.1
    share, low, high = share_kept(most * 0.6, base, most)
    assert share == pytest.approx(0.6) and low == pytest.approx(0.6) and high == pytest.approx(0.6)
    assert np.isnan(share_kept(most, most, most)[0])


def test_the_area_between_two_curves():
    """A policy with all of the gain at half of the requests: 3/4 against the 1/2 of a straight line."""
    none, half, full = np.zeros(50), np.full(50, 0.5), np.ones(50)
    area, low, high = area_over([(none, none), (half, full), (full, full)], [(none, none), (half, half), (full, full)])
    assert area == pytest.approx(0.25) and low == pytest.approx(0.25) and high == pytest.approx(0.25)


def test_on_the_ring_everybody_is_right(ring, tiny_lm):
    settings = ring_settings(ring, "LSC4Rec", tiny_lm, lsc_independent_epochs=15, lsc_policy="never")
    result = run_recbole("LSC4Rec", "ring", config_dict=settings, saved=False)
    assert result["test_result"]["ndcg@1"] == 1.0
