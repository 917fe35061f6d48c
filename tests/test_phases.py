"""Phases of the device model: what they learn from, what they leave alone, and what is kept of them."""

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer

from recbole_llm.checkpoint import read_checkpoint
from recbole_llm.collaboration import policy_of
from recbole_llm.phases import PhaseTrainer
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.recommend import load_recommender
from tests.collaborations import SMALL, changed, fitted, prepared
from tests.pipelines import ring_settings


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


def test_phases_may_be_left_out(source):
    run = fitted(source, lsc_phases=["retrain", "independent"])
    assert list(run.trainer.phases.weights) == ["independent", "retrain"]


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


def test_lists_without_the_clouds_items_are_as_long_and_as_hard(source):
    run = prepared(
        source, lsc_list=7, lsc_list_cloud=0, lsc_hard="device", lsc_phases=["cooperative"], lsc_base_weight=0.0
    )
    widths = []
    score = run.model.scorer.scores
    run.model.scorer.scores = lambda batch, items, states=None: (
        widths.append(items.shape[1]) if torch.is_grad_enabled() else None,
        score(batch, items, states),
    )[1]
    run.trainer.fit(run.data[0], run.data[1])
    assert set(widths) == {7}


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


def test_a_finished_phase_is_a_checkpoint_of_the_device_model(source):
    run = fitted(source)
    file = run.trainer.phases.folder / "retrain" / "model.safetensors"
    saved = read_checkpoint(file)
    assert saved["config"]["model"] == "SASRec"
    assert load_recommender(file).recommend([run.data[0]._dataset.field2id_token["item_id"][3]], k=3)


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
