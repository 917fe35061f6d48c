"""The trainer: windows or rows, checkpoints without pickle, and resume that changes nothing."""

import json
import logging
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.data import create_dataset, data_preparation
from recbole.quick_start import load_data_and_model
from recbole.trainer import Trainer
from recbole.utils import EvaluatorType, InputType, ModelType

from recbole_llm import checkpoint
from recbole_llm.artifacts import DamagedArtifact, digest, tensors_digest
from recbole_llm.dataset import create_dataset as create_flat
from recbole_llm.losses import by_popularity, rows_at_a_time
from recbole_llm.sequences import WindowLoader
from recbole_llm.trainer import SequenceTrainer, config_from_settings, read_checkpoint, write_checkpoint
from tests.memory import largest
from tests.ring import RING
from tests.small_logs import NO_DROPOUT, random_log, stock, write_log

BPR = {"loss_type": "BPR", "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}}
SAMPLED = {"loss_over": "sampled", "loss_negatives": 12, "loss_sampling": "uniform"}
GBCE = {"loss_over": "gbce", "loss_negatives": 12, "loss_gbce_t": 0.75}
WAYS = {
    "windows": ("SASRec", {}),
    "drawn": ("SASRec", SAMPLED),
    "rows": ("SASRec", {"positions": "last"}),
    "negatives": ("SASRec", BPR),
    "not causal": ("STAMP", {}),
}


@pytest.fixture(autouse=True)
def one_thread(clean_process):
    """On tensors this small, threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def small(tmp_path):
    """A data_path with a small random log whose longest users need several windows."""
    return write_log(tmp_path / "data", "small", random_log())


class Killed(Exception):
    """Stands for a process that ends here."""


def killed_after(epoch):
    """A callback that ends the training when an epoch has been evaluated."""

    def callback(now, score):
        if now == epoch:
            raise Killed

    return callback


def log_lines(caplog, parts, **fit):
    """What fit says about itself before the first epoch."""
    trainer = SequenceTrainer(parts.config, parts.model)
    with caplog.at_level(logging.INFO):
        logging.getLogger().setLevel(logging.INFO)
        trainer.fit(parts.train, **fit)
    return trainer, [record.message for record in caplog.records if "Training on the" in record.message]


@pytest.mark.parametrize("way", WAYS)
def test_auto_takes_windows_only_where_they_train_the_models_own_loss(small, caplog, way):
    model, settings = WAYS[way]
    trainer, lines = log_lines(caplog, stock(small, "small", model, epochs=1, **settings), saved=False)
    assert trainer.all_positions is (way in ("windows", "drawn"))
    assert isinstance(trainer.loader, WindowLoader) is (way in ("windows", "drawn"))
    said = {
        "windows": "does not depend on later items",
        "drawn": "does not depend on later items",
        "rows": "positions=last was asked for",
    }
    said |= {"negatives": "loss_type=BPR", "not causal": "STAMP does not run on all positions"}
    assert len(lines) == 1 and said[way] in lines[0] and "CPU threads" in lines[0]


ON_ROWS = {
    "NARM": {},
    "STAMP": {},
    "Caser": {},
    "NextItNet": {"residual_channels": 16, "block_num": 1},
    "LightSANs": {},
    "BERT4Rec": {},
    "FPMC": BPR,
}


@pytest.mark.parametrize("model", ON_ROWS)
def test_models_that_need_their_rows_are_trained_by_the_same_trainer(small, caplog, model):
    parts = stock(small, "small", model, create_flat, epochs=1, **ON_ROWS[model])
    before = [weight.clone() for weight in parts.model.parameters()]
    trainer, lines = log_lines(caplog, parts, saved=False)
    assert not trainer.all_positions and trainer.loader is parts.train
    assert len(lines) == 1 and "last position" in lines[0]
    assert any(not torch.equal(old, new) for old, new in zip(before, parts.model.parameters(), strict=True))
    assert 0 <= trainer.evaluate(parts.test, load_best_model=False)["ndcg@5"] <= 1


def test_a_loss_with_further_terms_keeps_its_rows(small):
    parts = stock(small, "small", epochs=1)
    own = parts.model.calculate_loss
    parts.model.calculate_loss = lambda batch: own(batch) + 0.1 * parts.model.item_embedding.weight.norm()
    trainer = SequenceTrainer(parts.config, parts.model)
    trainer.fit(parts.train, saved=False)
    assert not trainer.all_positions
    assert "own loss is more than" in trainer.fault_of_all()


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("NARM", {"positions": "all"}, "positions=all: NARM does not run .* Set positions to auto or last"),
        ("SASRec", {"positions": "all"} | BPR, "positions=all: loss_type=BPR"),
        ("SASRec", {"positions": "first"}, "positions=first: no such choice. There is auto, all, last"),
        ("SASRec", {"window_overlap": -1}, "window_overlap=-1: "),
        (
            "SASRec",
            {"window_overlap": 60},
            "window_overlap=60: does not fit into windows of 8 items; there is 0 to 7. Change it",
        ),
        ("SASRec", {"window_overlap": 8}, "window_overlap=8: does not fit"),
        ("SASRec", {"window_overlap": 10}, "window_overlap=10: does not fit"),
        ("SASRec", {"loss_over": "sampled"} | BPR, "loss_over=sampled: loss_type=BPR .* there is loss_over=all"),
        ("NPE", {"loss_over": "gbce"}, "loss_over=gbce: NPE"),
        ("SASRec", {"loss_over": "samples"}, "loss_over=samples: no such choice; did you mean 'sampled'"),
        ("SASRec", {"loss_memory": -1}, "loss_memory=-1: not possible; there is 0 .* Set loss_memory"),
        ("SASRec", {"loss_negatives": 0}, "loss_negatives=0: not possible; there is 1 or more"),
        ("SASRec", {"loss_gbce_t": 1.5}, "loss_gbce_t=1.5: not possible; there is 0 to 1"),
    ],
)
def test_positions_that_cannot_be_are_refused(small, model, settings, message):
    parts = stock(small, "small", model, epochs=1, **settings)
    with pytest.raises(ValueError, match=message):
        SequenceTrainer(parts.config, parts.model).fit(parts.train, saved=False)


def test_default_overlap_gives_way_to_short_windows(small):
    parts = stock(small, "small", epochs=1, MAX_ITEM_LIST_LENGTH=4)
    trainer = SequenceTrainer(parts.config, parts.model)
    trainer.fit(parts.train, saved=False)
    context = trainer.loader.windows.first - 1 - trainer.loader.windows.start
    assert context.max() == 2


def test_on_rows_every_number_is_recboles(small):
    results = {}
    for kind in (Trainer, SequenceTrainer):
        parts = stock(small, "small", positions="last", epochs=2)
        trainer = kind(parts.config, parts.model)
        best = trainer.fit(parts.train, parts.valid, saved=False)
        test = trainer.evaluate(parts.test, load_best_model=False)
        results[kind] = (
            best,
            dict(test),
            trainer.train_loss_dict,
            [weight.tolist() for weight in parts.model.parameters()],
        )
    assert results[Trainer] == results[SequenceTrainer]


@pytest.mark.parametrize(
    ("model", "positions", "chosen"),
    [
        ("SASRec", "all", SAMPLED),
        ("SASRec", "all", SAMPLED | {"loss_sampling": "popularity"}),
        ("SASRec", "all", GBCE | {"epochs": 60, "learning_rate": 0.003}),
        ("STAMP", "last", SAMPLED),
    ],
)
def test_the_ring_is_learnt_from_drawn_negatives(ring, model, positions, chosen):
    settings = RING | {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "epochs": 30, "learning_rate": 0.01}
    sizes = {"hidden_size": 32, "embedding_size": 32, "eval_step": 60, **NO_DROPOUT}
    parts = stock(ring, "ring", model, **settings | sizes | chosen | {"positions": positions})
    trainer = SequenceTrainer(parts.config, parts.model)
    trainer.fit(parts.train, saved=False)
    assert trainer.all_positions is (positions == "all")
    assert trainer.evaluate(parts.test, load_best_model=False)["hit@1"] == 1.0


def test_negatives_are_those_of_the_trainers_seed(small):
    losses = []
    for seed in (1, 1, 2):
        parts = stock(small, "small", epochs=1, **SAMPLED | {"loss_negatives": 3}, **NO_DROPOUT)
        trainer = SequenceTrainer(parts.config, parts.model)
        trainer.item_loss.generator.manual_seed(seed)
        trainer.fit(parts.train, saved=False)
        losses.append(trainer.train_loss_dict)
    assert losses[0] == losses[1] != losses[2]


def test_an_epoch_is_fast_quiet_and_in_chunks(tmp_path):
    """Inside an epoch layers are the fast ones and anomaly detection is off; scores of all targets never exist."""
    data_path = write_log(tmp_path / "data", "large", random_log(items=900))
    parts = stock(data_path, "large", epochs=1, loss_memory=0.004)
    trainer, seen = SequenceTrainer(parts.config, parts.model), []
    own = trainer.batch_loss

    def spied(batch):
        fast = "forward" in vars(parts.model.dropout) and trainer.optimizer.param_groups[0]["fused"]
        targets = int((batch["target_list"] > 0).sum())
        seen.append((fast, torch.is_anomaly_enabled(), largest(lambda: own(batch)) / targets))
        return own(batch)

    trainer.batch_loss = spied
    with torch.autograd.set_detect_anomaly(True):
        trainer.fit(parts.train, saved=False)
    assert seen and all(fast and not anomaly for fast, anomaly, _ in seen)
    assert max(per_target for _, _, per_target in seen) < 0.7 * parts.dataset.item_num
    assert "forward" not in vars(parts.model.dropout)


def test_settings_of_the_loss_reach_it(small):
    def prepared(**settings):
        parts = stock(small, "small", epochs=1, **settings, **NO_DROPOUT)
        trainer = SequenceTrainer(parts.config, parts.model)
        trainer.fit(parts.train, saved=False)
        return parts, trainer

    parts, popular = prepared(**SAMPLED | {"loss_sampling": "popularity"})
    counts = torch.bincount(parts.train._dataset.inter_feat["item_id"], minlength=parts.dataset.item_num)
    assert torch.equal(popular.item_loss.probability, by_popularity(counts))
    assert len(prepared(**SAMPLED)[1].item_loss.probability[1:].unique()) == 1
    losses = [prepared(**GBCE | {"loss_gbce_t": t})[1].train_loss_dict[0] for t in (0.0, 1.0)]
    assert losses[0] != pytest.approx(losses[1], rel=0.01)
    by_default = prepared()[1]
    assert (by_default.item_loss.over, by_default.item_loss.count, by_default.item_loss.t) == ("all", 256, 0.75)
    assert by_default.seen_items == "keep"


def test_windows_overlap_by_ten_items_unless_told_otherwise(small):
    parts = stock(small, "small", epochs=1, MAX_ITEM_LIST_LENGTH=15)
    trainer = SequenceTrainer(parts.config, parts.model)
    trainer.fit(parts.train, saved=False)
    context = trainer.loader.windows.first - 1 - trainer.loader.windows.start
    assert sorted(set(context.tolist())) == [0, 10]


def test_a_state_of_before_there_were_negatives_is_taken_up(small):
    parts = stock(small, "small", epochs=2)
    trainer = SequenceTrainer(parts.config, parts.model)
    with pytest.raises(Killed):
        trainer.fit(parts.train, parts.valid, callback_fn=killed_after(0))
    tensors, values = checkpoint.read_resume(trainer.saved_model_file)
    del tensors["generator.negatives"]
    checkpoint.write_resume(trainer.saved_model_file, tensors, values)
    again = SequenceTrainer(parts.config, parts.model)
    again.resume_checkpoint(trainer.saved_model_file)
    again.fit(parts.train, parts.valid)
    assert sorted(again.train_loss_dict) == [0, 1]


def test_memory_of_the_loss_changes_nothing_but_rounding(small):
    losses = []
    for memory in (0, 0.002):
        parts = stock(small, "small", epochs=2, loss_memory=memory, **NO_DROPOUT)
        trainer = SequenceTrainer(parts.config, parts.model)
        trainer.fit(parts.train, saved=False)
        assert trainer.item_loss.memory == memory
        assert (rows_at_a_time(memory, parts.dataset.item_num, "cpu") < 20) is (memory > 0)
        losses.append(list(trainer.train_loss_dict.values()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_row_list_rides_along_for_those_who_want_it(small):
    class Labelled(SequenceTrainer):
        wants_row_list = True
        seen = []

        def batch_loss(self, batch):
            self.seen.append((batch["row_list"], batch["item_id"]))
            return super().batch_loss(batch)

    parts = stock(small, "small", "STAMP", epochs=1)
    trainer = Labelled(parts.config, parts.model)
    trainer.fit(parts.train, saved=False)
    windowed = stock(small, "small", epochs=1)
    other = SequenceTrainer(windowed.config, windowed.model)
    other.fit(windowed.train, saved=False)
    rows, items = (torch.cat(column) for column in zip(*trainer.seen, strict=True))
    assert sorted(rows.tolist()) == other.loader.log.rows().tolist()
    assert torch.equal(other.loader.log.items[rows], items)


def test_the_ring_is_learnt_on_windows(ring):
    parts = stock(
        ring, "ring", **RING | {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}, hidden_size=32, epochs=30,
        learning_rate=0.01, eval_step=10, attn_dropout_prob=0.1, hidden_dropout_prob=0.1, positions="all",
    )  # fmt: skip
    trainer = SequenceTrainer(parts.config, parts.model)
    trainer.fit(parts.train, parts.valid)
    assert trainer.evaluate(parts.test)["hit@1"] == 1.0


def everything(parts, trainer, outcome):
    """All that two equal trainings have in common, exactly; by name, with tensors as digests."""
    result = trainer.evaluate(parts.test)
    return {
        "outcome": (outcome[0], dict(outcome[1] or {})),
        "test": dict(result),
        "losses": trainer.train_loss_dict,
        "cur_step": trainer.cur_step,
        "best epoch": checkpoint.read_weights(trainer.saved_model_file)[1]["epoch"],
        "best weights": tensors_digest(parts.model.state_dict()),
        "optimizer": tensors_digest(checkpoint.pack_optimizer(trainer.optimizer)[0]),
        "last weights": tensors_digest(checkpoint.within("model", checkpoint.read_resume(trainer.saved_model_file)[0])),
        "random": digest([torch.get_rng_state(), random.getstate(), np.random.get_state()[1]]),
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("epochs", "stopping_step", "kill"), [(4, 10, 1), (12, 0, 0)], ids=["to the end", "to the early stop"]
)
def test_killed_and_resumed_is_the_same_as_uninterrupted(small, way, epochs, stopping_step, kill):
    model, settings = WAYS[way]
    settings = settings | {"epochs": epochs, "stopping_step": stopping_step, "learning_rate": 0.01}

    def fresh():
        parts = stock(small, "small", model, **settings)
        return parts, SequenceTrainer(parts.config, parts.model)

    parts, trainer = fresh()
    whole = everything(parts, trainer, trainer.fit(parts.train, parts.valid))
    if stopping_step == 0:
        assert len(trainer.train_loss_dict) < epochs  # it did stop early

    parts, trainer = fresh()
    with pytest.raises(Killed):
        trainer.fit(parts.train, parts.valid, callback_fn=killed_after(kill))
    file = trainer.saved_model_file
    parts, trainer = fresh()
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    trainer.resume_checkpoint(file)
    assert trainer.start_epoch == kill + 1
    assert everything(parts, trainer, trainer.fit(parts.train, parts.valid)) == whole
    assert trainer.saved_model_file == file


def test_a_resumed_training_has_taken_the_seconds_of_all_its_processes(small, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("recbole_llm.trainer.perf_counter", lambda: now[0])

    def fresh():
        parts = stock(small, "small", epochs=2)
        return parts, SequenceTrainer(parts.config, parts.model)

    def a_minute_later(epoch, score):
        now[0] += 60
        if epoch == 0:
            raise Killed

    parts, trainer = fresh()
    now[0] += 40
    with pytest.raises(Killed):
        trainer.fit(
            parts.train, parts.valid, callback_fn=a_minute_later
        )  # what came after the state was written is lost
    now[0] += 9999
    file = trainer.saved_model_file
    parts, trainer = fresh()
    trainer.resume_checkpoint(file)
    trainer.fit(parts.train, parts.valid, callback_fn=a_minute_later)
    assert trainer.seconds == 40 + 60


def test_a_kill_between_evaluations_repeats_from_the_last_one(small):
    def fresh():
        parts = stock(small, "small", epochs=6, eval_step=2, stopping_step=10)
        return parts, SequenceTrainer(parts.config, parts.model)

    parts, trainer = fresh()
    whole = everything(parts, trainer, trainer.fit(parts.train, parts.valid))
    parts, trainer = fresh()

    def die_in_epoch_5(batch, own=trainer.batch_loss):
        if len(trainer.train_loss_dict) == 5:
            raise Killed
        return own(batch)

    trainer.batch_loss = die_in_epoch_5
    with pytest.raises(Killed):
        trainer.fit(parts.train, parts.valid)
    file = trainer.saved_model_file
    parts, trainer = fresh()
    trainer.resume_checkpoint(file)
    assert trainer.start_epoch == 4
    assert everything(parts, trainer, trainer.fit(parts.train, parts.valid)) == whole


def test_without_validation_every_epoch_can_be_resumed(small):
    def fresh(epochs):
        parts = stock(small, "small", epochs=epochs)
        return parts, SequenceTrainer(parts.config, parts.model)

    parts, trainer = fresh(4)
    whole = everything(parts, trainer, trainer.fit(parts.train))
    parts, trainer = fresh(2)
    trainer.fit(parts.train)
    file = trainer.saved_model_file
    parts, trainer = fresh(4)
    trainer.resume_checkpoint(file)
    assert trainer.start_epoch == 2
    assert everything(parts, trainer, trainer.fit(parts.train)) == whole


@pytest.mark.parametrize("stopping_step", [10, 0])
def test_a_training_that_had_ended_is_left_alone(small, stopping_step):
    settings = {"epochs": 3 if stopping_step else 12, "stopping_step": stopping_step, "learning_rate": 0.01}
    parts = stock(small, "small", **settings)
    trainer = SequenceTrainer(parts.config, parts.model)
    outcome = trainer.fit(parts.train, parts.valid)
    result = trainer.evaluate(parts.test)
    files = {path: path.read_bytes() for path in Path("saved").iterdir()}

    parts = stock(small, "small", **settings)
    again = SequenceTrainer(parts.config, parts.model)
    again.resume_checkpoint(trainer.saved_model_file)
    assert again.fit(parts.train, parts.valid, callback_fn=killed_after(0)) == outcome
    assert {path: path.read_bytes() for path in Path("saved").iterdir()} == files
    assert again.train_loss_dict == trainer.train_loss_dict
    assert again.evaluate(parts.test) == result


def test_resume_needs_the_state_of_the_training_and_the_same_positions(small):
    parts = stock(small, "small", epochs=1)
    trainer = SequenceTrainer(parts.config, parts.model)
    trainer.fit(parts.train, parts.valid)
    parts = stock(small, "small", epochs=2, positions="last")
    other = SequenceTrainer(parts.config, parts.model)
    other.resume_checkpoint(trainer.saved_model_file)
    with pytest.raises(ValueError, match="positions=last: .* was on positions=all"):
        other.fit(parts.train, parts.valid)
    checkpoint.resume_file(trainer.saved_model_file).unlink()
    with pytest.raises(FileNotFoundError, match=r"no SASRec-small-.*\.resume\.safetensors beside it"):
        other.resume_checkpoint(trainer.saved_model_file)


def test_generators_of_a_subclass_come_back(small):
    class Drawing(SequenceTrainer):
        def __init__(self, config, model):
            super().__init__(config, model)
            self.own, self.drawn = torch.Generator().manual_seed(5), []

        def generator_states(self):
            return {"own": self.own}

        def batch_loss(self, batch):
            self.drawn.append(float(torch.rand(1, generator=self.own)))
            return super().batch_loss(batch)

    def fresh():
        parts = stock(small, "small", epochs=3)
        return parts, Drawing(parts.config, parts.model)

    parts, trainer = fresh()
    trainer.fit(parts.train, parts.valid)
    parts, first = fresh()
    with pytest.raises(Killed):
        first.fit(parts.train, parts.valid, callback_fn=killed_after(0))
    parts, second = fresh()
    second.resume_checkpoint(first.saved_model_file)
    second.fit(parts.train, parts.valid)
    assert first.drawn + second.drawn == trainer.drawn


def test_a_checkpoint_is_safetensors_and_json_and_names_its_items(small):
    class Titled(SequenceTrainer):
        def extra_meta(self):
            return {"titles": ["", "a title"]}

    parts = stock(small, "small", epochs=1)
    trainer = Titled(parts.config, parts.model)
    trainer.fit(parts.train, parts.valid)
    path = Path(trainer.saved_model_file)
    assert path.name.startswith("SASRec-small-") and path.suffix == ".safetensors"
    assert {file.suffix for file in path.parent.iterdir()} == {".safetensors", ".json"}
    meta = json.loads(path.with_suffix(".json").read_text())
    assert meta["items"] == [str(token) for token in parts.dataset.field2id_token["item_id"]]
    assert meta["titles"] == ["", "a title"] and meta["settings"]["MODEL_TYPE"] == "SEQUENTIAL"
    assert "device" not in meta["settings"]


def test_saved_false_writes_nothing(small):
    parts = stock(small, "small", epochs=1)
    trainer = SequenceTrainer(parts.config, parts.model)
    trainer.fit(parts.train, parts.valid, saved=False)
    assert list(Path("saved").iterdir()) == []


def test_two_trainers_of_one_second_do_not_share_a_file(small):
    parts = stock(small, "small", epochs=1)
    names = set()
    for _ in range(3):
        trainer = SequenceTrainer(parts.config, parts.model)
        trainer._save_checkpoint(0, verbose=False)
        names.add(trainer.saved_model_file)
    assert len(names) == 3


def test_the_best_epoch_is_what_is_tested(small):
    parts = stock(small, "small", epochs=4)
    trainer = SequenceTrainer(parts.config, parts.model)
    scores, states = [0.1, 0.3, 0.2, 0.1], []
    trainer._valid_epoch = lambda data, show_progress: (scores[len(states)], {"ndcg@5": 0.0})

    def note(epoch, score):
        states.append({name: weight.clone() for name, weight in parts.model.state_dict().items()})

    assert trainer.fit(parts.train, parts.valid, callback_fn=note)[0] == 0.3
    last = trainer.evaluate(parts.test, False)
    assert tensors_digest(parts.model.state_dict()) == tensors_digest(states[3])
    best = trainer.evaluate(parts.test)
    assert tensors_digest(parts.model.state_dict()) == tensors_digest(states[1])
    assert best != last and trainer.evaluate(parts.test, True, None, False) == best


def test_recboles_own_checkpoints_can_be_evaluated_and_resumed(small):
    parts = stock(small, "small", epochs=1)
    host = Trainer(parts.config, parts.model)
    host.fit(parts.train, parts.valid)
    result = host.evaluate(parts.test)
    parts = stock(small, "small", epochs=2, seed=7)
    trainer = SequenceTrainer(parts.config, parts.model)
    assert trainer.evaluate(parts.test, model_file=host.saved_model_file) == result
    trainer.resume_checkpoint(host.saved_model_file)
    assert trainer.start_epoch == 1 and trainer.saved_model_file.endswith(".safetensors")
    assert trainer.evaluate(parts.test) == result
    trainer.fit(parts.train)
    assert len(checkpoint.read_weights(trainer.saved_model_file)[1]["items"]) == parts.dataset.item_num


def test_recbole_loads_our_checkpoint(small):
    parts = stock(small, "small", epochs=2)
    trainer = SequenceTrainer(parts.config, parts.model)
    trainer.fit(parts.train, parts.valid)
    result = trainer.evaluate(parts.test)
    config, model, dataset, _, _, test = load_data_and_model(trainer.saved_model_file)
    assert SequenceTrainer(config, model).evaluate(test, load_best_model=False) == result
    assert str(dataset.field2id_token["item_id"].tolist()) == str(parts.dataset.field2id_token["item_id"].tolist())


def test_rebuilt_settings_serve_as_a_config(small, monkeypatch):
    parts = stock(small, "small", epochs=3)
    through_json = json.loads(json.dumps(checkpoint.settings_of(parts.config)))
    monkeypatch.setattr("sys.argv", ["x", "--epochs=99", "--model=GRU4Rec"])
    config = config_from_settings(through_json, parts.config.external_config_dict)
    assert config["epochs"] == 3 and config["model"] == config.model == "SASRec"
    assert config["MODEL_TYPE"] is ModelType.SEQUENTIAL and config["eval_type"] is EvaluatorType.RANKING
    assert config["MODEL_INPUT_TYPE"] is InputType.POINTWISE and config["device"] == parts.config["device"]
    assert config.model_class is type(parts.model) and config["no such key"] is None
    assert config.final_config_dict == parts.config.final_config_dict
    assert sorted(str(config).split("\n")) == sorted(str(parts.config).split("\n"))
    train = data_preparation(config, create_dataset(config))[0]
    assert len(train) == len(parts.train)
    assert config.external_config_dict["epochs"] == 3
    pickle.loads(pickle.dumps(config))


def test_half_of_a_checkpoint_is_never_mixed_with_another(tmp_path):
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, {"a": torch.zeros(2)}, {"epoch": 1})
    old = path.with_suffix(".json").read_text()
    write_checkpoint(path, {"a": torch.ones(2)}, {"epoch": 2})
    assert checkpoint.read_weights(path)[1]["epoch"] == 2
    path.with_suffix(".json").write_text(old)  # the process ended between the two files
    state, meta = checkpoint.read_weights(path)
    assert state["a"].tolist() == [1, 1] and meta["epoch"] == 2
    path.with_suffix(".json").unlink()
    assert checkpoint.read_weights(path)[1]["epoch"] == 2


def test_the_readable_half_may_be_edited(tmp_path):
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, {"a": torch.zeros(2)}, {"settings": {"data_path": "here"}})
    text = path.with_suffix(".json")
    text.write_text(text.read_text().replace("here", "there"))
    assert checkpoint.read_weights(path)[1]["settings"]["data_path"] == "there"


def test_a_damaged_checkpoint_is_not_read(small, tmp_path):
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, {"a": torch.zeros(200)}, {"epoch": 1})
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DamagedArtifact, match=r"model\.safetensors"):
        checkpoint.read_weights(path)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.safetensors")


@pytest.mark.parametrize("learner", ["adam", "sgd", "adagrad", "rmsprop", "adamw"])
def test_every_learner_can_be_packed(learner):
    def make():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        kind = {"adam": "Adam", "sgd": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop", "adamw": "AdamW"}[learner]
        return layer, getattr(torch.optim, kind)(layer.parameters(), lr=0.1)

    def step(layer, optimizer):
        optimizer.zero_grad()
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    layer, optimizer = make()
    step(layer, optimizer)
    tensors, values = checkpoint.pack_optimizer(optimizer)
    weights = {name: weight.clone() for name, weight in layer.state_dict().items()}
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    step(layer, optimizer)
    other, again = make()
    other.load_state_dict(weights)
    checkpoint.unpack_optimizer(again, tensors, json.loads(json.dumps(values)))
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    step(other, again)
    assert torch.equal(layer.weight, other.weight)
