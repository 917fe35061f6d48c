"""Draws of the authors' code of LSC4Rec: which targets, which starts, and batches that every model reads."""

import pytest
import torch
from recbole.quick_start import run_recbole

from recbole_llm.draws import DrawnLoader, drawn_windows
from recbole_llm.phases import Phases, PhaseTrainer
from recbole_llm.sequences import Fields, Log
from tests.collaborations import SMALL, fitted, prepared

FIELDS = Fields("items", "length", "user")


def a_log():
    """Users of 10 and of 3 items, numbered through."""
    return Log(torch.tensor([1, 2]), torch.arange(1, 14), torch.tensor([0, 10, 13]), 14)


def loader(**more):
    """Of the first user's items 5 to 7 and the second one's item 1."""
    settings = {"length": 4, "draws": 6, "rows_per_batch": 5, "seed": 1} | more
    return DrawnLoader(a_log(), torch.tensor([5, 6, 7, 11]), FIELDS, "target", **settings)


def test_every_user_is_drawn_equally_often_from_one_of_the_first_three_items():
    """Section 1.3: a start s of 1, 2 or 3, at least one item before the target."""
    generator = torch.Generator().manual_seed(0)
    start, end, first = drawn_windows(a_log(), torch.tensor([5, 6, 7, 11]), torch.tensor([3, 1]), 300, generator)
    of_first = end < 10
    assert of_first.sum() == 300 and torch.equal(end, first)
    assert set(end[of_first].tolist()) == {5, 6, 7} and set(start[of_first].tolist()) == {0, 1, 2}
    assert set(end[~of_first].tolist()) == {11} and set(start[~of_first].tolist()) == {10}
    for drawn in (start[of_first], end[of_first]):  # each of three is expected 100 times, with a deviation of 8
        assert all(65 < int(count) < 135 for count in drawn.unique(return_counts=True)[1])


def test_a_batch_is_rows_of_history_and_target():
    made = loader()
    made.plan()
    batch = made.batch(torch.arange(12))
    assert batch["items"].shape == (12, 4) and set(batch["user"].tolist()) == {1, 2}
    for items, length, target, row in zip(
        *(batch[name].tolist() for name in ("items", "length", "target", "row_list")), strict=True
    ):
        assert target == row + 1 and items[:length] == list(range(target - length, target)) and not any(items[length:])
        assert length <= 4


def test_an_epoch_depends_on_the_seed_and_its_number_alone():
    first, again, other = loader(), loader(), loader(seed=2)

    def rows(made):
        return [batch["row_list"].tolist() for batch in made]

    one, two = rows(first), rows(first)
    assert one != two and sum(map(len, one)) == 12 and max(map(len, one)) == 5
    again.set_state({"epoch": 1, "seed": 1})
    assert rows(again) == two and rows(other) != one


def test_code_mode_trains_on_the_last_three_targets_for_ten_ten_and_eight_epochs(source):
    """Section 1.3 and 2: i_{n-4} to i_{n-2} in the first and last phase, i_{n-7} to i_{n-5} between."""
    batches = {}
    more = {f"lsc_{name}_epochs": None for name in ("independent", "cooperative", "retrain")}
    run = prepared(source, lsc_mode="code", **more)
    original = DrawnLoader.batch

    def spy(self, chosen):
        made = original(self, chosen)
        batches.setdefault((self.draws, len(self.targets)), []).append(made["row_list"])
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DrawnLoader, "batch", spy)
        run.trainer.fit(run.data[0], run.data[1])
    timeline = run.trainer.timeline

    def places(rows):
        return set((timeline.log.offsets[timeline.log.user_index(rows) + 1] - rows).tolist())

    rows = {draws: torch.cat(parts) for (draws, _), parts in batches.items()}
    assert places(rows[5]) == {3, 4, 5} and len(rows[5]) == 5 * len(timeline.users) * (10 + 8)
    assert places(rows[1]) == {6, 7, 8} and len(rows[1]) == len(timeline.users) * 10
    assert max(map(len, batches[next(key for key in batches if key[0] == 5)])) <= 128
    assert max(map(len, batches[next(key for key in batches if key[0] == 1)])) <= 32
    assert [run.trainer.phases.settings.retrain_rate, run.trainer.phases.settings.select] == [1.0, "last"]


@pytest.mark.parametrize("targets", ["all", "drawn"])
@pytest.mark.parametrize("data", ["history", "real_time"])
def test_no_phase_is_validated_on_what_it_trains_on(source, targets, data):
    run = prepared(source, lsc_targets=targets, lsc_independent_data=data, lsc_list_cloud=0)
    trained = []
    original = Phases._phase

    def spy(self, name):
        trained.append(original(self, name))
        return trained[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Phases, "_phase", spy)
        run.trainer.fit(run.data[0], run.data[1])
    assert len(trained) == 3
    for phase in trained:
        assert len(phase.valid) and not torch.isin(phase.valid, phase.targets).any()


def test_code_mode_goes_on_exactly_after_a_kill(source):
    """A phase that stops after its first epoch and is run again ends with the weights of one that did not stop."""
    settings = {"lsc_mode": "code", "lsc_phases": ["independent"]}
    whole = fitted(source, checkpoint_dir="whole", **settings)
    stopped = prepared(source, checkpoint_dir="stopped", **settings)

    original = PhaseTrainer._write_resume

    def stop(self, epoch):
        original(self, epoch)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhaseTrainer, "_write_resume", stop)
        with pytest.raises(KeyboardInterrupt):
            stopped.trainer.fit(stopped.data[0], stopped.data[1])
    again = fitted(source, checkpoint_dir="stopped", **settings)
    first, second = (run.trainer.phases.weights["independent"] for run in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_code_mode_trains_the_vector_of_padding_where_it_is_not_told_otherwise(source, monkeypatch):
    """Where pieces of numbers give fewer items than a list has places; here they give none."""
    monkeypatch.setattr(
        PhaseTrainer, "_hard", lambda self, count, items, *_: torch.zeros_like(items)[:, :1].repeat(1, count)
    )
    for more, trained in (({}, True), ({"lsc_train_padding": False}, False)):
        run = prepared(source, lsc_mode="code", lsc_phases=["cooperative"], checkpoint_dir=f"trained-{trained}", **more)
        before = run.model.device_model.item_embedding.weight[0].clone()
        run.trainer.fit(run.data[0], run.data[1])
        assert torch.equal(run.model.device_model.item_embedding.weight[0], before) != trained


@pytest.mark.parametrize(
    ("device", "size"), [("DIN", {"device_embedding_size": 4}), ("NARM", {"device_embedding_size": 8})]
)
def test_other_devices_read_draws(source, device, size):
    own = {key: value for key, value in SMALL.items() if key != "device_hidden_size"}
    config = (
        own | size | {"data_path": str(source), "device_model": device, "checkpoint_dir": device, "lsc_mode": "code"}
    )
    result = run_recbole("LSC4Rec", "log", config_dict=config, saved=False)
    assert 0 <= result["test_result"]["ndcg@5"] <= 1
