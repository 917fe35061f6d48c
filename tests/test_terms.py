"""The terms of LSC4Rec: settings, and what is refused before any work."""

import pathlib
import re

import pytest
from recbole.config import Config

from recbole_llm.model.lsc4rec import cloud_config
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.terms import Collaboration
from tests.collaborations import SMALL, fitted, prepared


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
        ({"lsc_lag": 4}, "lsc_lag=4: lists that far behind .* the cloud was trained on; there is 0 to 3"),
        (
            {"lsc_lag": 0},
            "lsc_policy=consistency: means nothing where no list is behind; there is never and always with",
        ),
        ({"lsc_list_cloud": 0, "lsc_hard": "digits"}, "lsc_hard=digits: makes numbers of the pieces of the cloud's"),
        ({"lsc_phases": []}, r"lsc_phases=\[\]: needs one at least; there is independent, cooperative, retrain"),
        ({"lsc_rates": []}, r"lsc_rates=\[\]: needs one at least; there is 0.2"),
        ({"device_model": "FDSA"}, "device_model=FDSA: it has features of the items as input"),
        ({"lsc_targets": "some"}, "lsc_targets=some: no such choice"),
        ({"lsc_draws": 5}, "lsc_draws=5: needs a number for each phase; there is {'independent': 1"),
        (
            {"lsc_draws": {"independent": 0, "cooperative": 1, "retrain": 1}},
            r"lsc_draws\[independent\]=0: not possible; there is whole numbers from 1",
        ),
        ({"lsc_train_padding": True}, "lsc_train_padding=True: a softmax over a list has one target and no padding"),
        ({"lsc_select": "last"}, "lsc_select=last: nothing is validated, so nobody can say whether a phase got better"),
        ({"lsc_targets": "drawn", "lsc_replay": 0.5}, "lsc_replay=0.5: draws are of a user's last three targets alone"),
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


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        ("cloud", "LSC4Rec", "is cloud and device together"),
        ("device_model", "LSC4Rec", "is cloud and device together"),
        ("device_model", "P5", "has a training of its own"),
        ("device_model", "DLLM2Rec", "has a training of its own"),
    ],
)
def test_not_every_model_can_be_one_of_its_two(source, key, name, message):
    role = f"{key.removesuffix('_model')}_"
    own = {setting: value for setting, value in SMALL.items() if not setting.startswith(role)}
    own["load_col"] = None  # all columns, titles among them
    with pytest.raises(ValueError, match=f"{key}={name}: {message}"):
        run_recbole_llm("LSC4Rec", "log", config_dict=own | {key: name, "data_path": str(source)})


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
        ({"device_MAX_ITEM_LIST_LENGTH": 30}, "device_MAX_ITEM_LIST_LENGTH=30: batches hold the last 12 items"),
        ({"cloud": "DIN"}, "cloud=DIN: scores one item at a time"),
        ({"device_model": "Markov"}, "device_model=Markov: it counts, and a device is trained in phases"),
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


def test_one_rate_and_one_phase_need_no_brackets(source):
    settings = prepared(source, lsc_rates=0.2, lsc_phases="independent").model.settings
    assert settings.rates == (0.2,) and settings.phases == ("independent",)


def test_modes_fill_every_empty_setting(source):
    modes = prepared(source).config["lsc_modes"]
    assert {frozenset(mode) for mode in modes.values()} == {frozenset(modes["clean"])}
    for name in modes:
        config = prepared(source, lsc_mode=name).config
        assert all(getattr(Collaboration.from_config(config), key) is not None for key in modes[name])


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


def test_users_with_too_few_interactions_are_named(source, caplog):
    run = fitted(source)
    left_out = run.trainer.timeline.left_out
    assert left_out > 0 and f"{left_out} users have fewer than the 7 interactions" in caplog.text
    run.trainer.evaluate(run.data[2])
    assert len(run.trainer.evaluated_rows) == 41 - left_out


def test_recboles_validation_rows_are_validated_on_or_refused(source):
    run = fitted(source)
    assert 0 <= run.trainer.evaluate(run.data[1])["ndcg@5"] <= 1
    stream = fitted(source, lsc_evaluation="stream", lsc_steps=3, checkpoint_dir="stream")
    with pytest.raises(ValueError, match="evaluate: these rows are neither .* there are the test rows"):
        stream.trainer.evaluate(stream.data[1])


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
