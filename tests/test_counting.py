"""What the counting baselines share: sums, ties, and how settings are chosen on validation rows and on nothing else."""

import math

import pytest
import torch
from recbole.data import create_dataset, data_preparation
from torch import tensor

from recbole_llm import load_recommender
from recbole_llm.artifacts import read_json
from recbole_llm.counting import combined, grid, order_of_ties, sparse_rows, without_ties
from recbole_llm.quick_start import run_recbole_llm
from tests.pipelines import COUNTED, ring_settings, step_by_step
from tests.ring import TOKENS, following
from tests.small_logs import random_log, write_log
from tests.test_contract import Trained

ULP = 2.0**-23
"""From 1 to the next float32."""


def small(data_path, **more):
    """Settings for a log without item file."""
    chosen = {"data_path": str(data_path), "load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    protocol = {"topk": [1, 3], "valid_metric": "NDCG@3", "state": "warning", "show_progress": False}
    return chosen | protocol | {"MAX_ITEM_LIST_LENGTH": 8} | more


def repeaters(data_path, last):
    """Users who meet one item five times, the last time but one for validation, and then another item."""
    users = {f"u{number}": [f"i{number % 4}"] * 5 + [f"i{(number + 1) % 4}"] * last for number in range(12)}
    return write_log(data_path, "repeaters", users)


def test_a_grid_has_every_combination_and_takes_single_values():
    assert grid({"a": [1, 2], "b": 3, "c": [True, False]}) == [
        {"a": 1, "b": 3, "c": True},
        {"a": 1, "b": 3, "c": False},
        {"a": 2, "b": 3, "c": True},
        {"a": 2, "b": 3, "c": False},
    ]


def test_entries_of_one_cell_are_added():
    begin, column, value = sparse_rows(tensor([2, 1, 2, 1]), tensor([3, 2, 3, 1]), tensor([1.0, 4.0, 0.5, 2.0]), 4)
    assert begin.tolist() == [0, 0, 2, 3, 3] and column.tolist() == [1, 2, 3] and value.tolist() == [2.0, 4.0, 1.5]


def test_rows_of_a_history_are_added_with_their_weights():
    """Row 1 is (0, 0, 1, .5), row 2 is (0, 0, 0, 2), row 3 is empty; padding takes row 0, which is empty, too."""
    table = tensor([0, 0, 2, 3, 3]), tensor([2, 3, 3]), tensor([1.0, 0.5, 2.0])
    row, column, value = combined(tensor([[1, 2], [3, 0], [2, 0]]), tensor([[0.5, 1.0], [1, 1], [3, 1]]), *table)
    assert row.tolist() == [0, 0, 2] and column.tolist() == [2, 3, 3] and value.tolist() == [0.5, 2.25, 6.0]


def test_equal_values_are_told_apart_by_the_least_steps_and_none_passes_another():
    row = tensor([0, 0, 0, 0, 1, 1])
    apart = without_ties(row, tensor([1.0, 2.0, 1.0, 1.0 + ULP, 1.0, 0.25]))
    assert apart.tolist() == [1.0, 2.0, 1.0 + ULP, 1.0 + 2 * ULP, 1.0, 0.25]


def test_ties_follow_popularity_and_then_tokens_never_ids():
    tokens, times = ["[PAD]", "a", "b", "c", "d", "e"], [0, 1, 5, 1, 1, 1]
    place = order_of_ties(tensor(times), tokens, seed=3)
    assert place[0] == 0 and place[2] == 5 and sorted(place.tolist()) == [0, 1, 2, 3, 4, 5]
    turned = [0, 5, 4, 3, 2, 1]
    other = order_of_ties(tensor(times)[turned], [tokens[item] for item in turned], seed=3)
    assert other.tolist() == place[turned].tolist()
    assert len({tuple(order_of_ties(tensor(times), tokens, seed).tolist()) for seed in range(5)}) > 1


@pytest.mark.parametrize("model", COUNTED)
def test_no_two_items_have_one_score_and_what_is_unknown_follows_popularity(model, ring, tiny_lm):
    run = Trained(model, ring, tiny_lm, counting_repeats=True).fit()
    scores = run.scores(run.batch())
    assert all(len(row.unique()) == run.model.n_items for row in scores)
    unknown = run.model.unreached()
    assert unknown.min() == -1 and unknown.max() < 0
    assert unknown.argsort().tolist() == run.model.place.argsort().tolist()


@pytest.mark.parametrize("choices", [[True, False], [False, True]])
@pytest.mark.parametrize("saved", [True, False])
def test_validation_chooses_and_test_rows_have_no_say(choices, saved, tmp_path):
    """Everybody's validation target is a repetition, nobody's test target is."""
    settings = small(repeaters(tmp_path / "data", last=1), counting_repeats=choices)
    _, trainer, _, best, result = step_by_step("Markov", settings, "repeaters", saved)
    assert trainer.model.settings["counting_repeats"] == 1 and best == 1.0 and result["recall@1"] == 0.0
    if saved:
        assert read_json(trainer.saved_model_file.replace(".safetensors", ".json"))["choices"]["counting_repeats"] == 1


def test_without_validation_rows_the_first_combination_counts(ring):
    run = Trained("Markov", ring, None, counting_repeats=[True, False], markov_decay=[0.25, 0.5])
    run.trainer.fit(run.data[0], None, saved=False)
    assert run.model.choices() == {
        "markov_gap": 1, "markov_power": 0.5, "markov_last": 10, "markov_decay": 0.25, "counting_repeats": 1
    }  # fmt: skip


def test_combinations_are_compared_on_a_sample_and_the_score_is_of_all_rows(tmp_path):
    data = write_log(tmp_path / "data", "log", random_log(users=40, items=12))
    config, trainer, _, best, _ = step_by_step("Markov", small(data, counting_valid_rows=7), "log")
    valid = data_preparation(config, create_dataset(config))[1]
    assert len(trainer.some_of(valid)._dataset) == 7 < len(valid._dataset)
    assert trainer.evaluate(valid)["ndcg@3"] == best
    assert read_json(trainer.saved_model_file.replace(".safetensors", ".json"))["best_valid_score"] == best


@pytest.mark.parametrize("model", ["Popularity", "Markov", "HistoryKNN"])
def test_validation_and_test_targets_are_not_counted(model, tmp_path):
    """Two logs that differ in everybody's last two items alone make one count."""
    single = {"popularity_last": 0} if model == "Popularity" else {}
    single |= {"markov_gap": 2, "markov_power": 1, "markov_decay": 0.5} if model == "Markov" else {}
    if model == "HistoryKNN":
        single |= {"historyknn_shrinkage": 0.0, "historyknn_neighbours": 3, "historyknn_decay": 0.5}
    log, states = random_log(users=20, items=9), []
    first = {"0": [f"i{item}" for item in range(9)] + ["i0", "i0"]}  # every item is there before any last one
    for number, shift in enumerate((0, 4)):
        ends = {user: [f"i{(int(item[1:]) + shift) % 9}" for item in items[-2:]] for user, items in log.items()}
        whole = first | {user: items[:-2] + ends[user] for user, items in log.items()}
        data = write_log(tmp_path / str(number), "log", whole)
        trainer = step_by_step(model, small(data, counting_repeats=True, **single), "log")[1]
        states.append(trainer.model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("model", "choices"),
    [("Markov", {"markov_gap": [1, 2], "markov_power": 1}), ("HistoryKNN", {"historyknn_neighbours": [1, 2]})],
)
def test_what_changes_a_count_is_counted_anew_and_what_only_reads_it_is_not(model, choices, ring):
    """On the ring, one step or neighbour per item is one entry, and two are two."""
    single = {"historyknn_shrinkage": 0.0} if model == "HistoryKNN" else {}
    counted = Trained(model, ring, None, **choices, **single).fit().model
    tables = []
    for combination in counted.grid:
        counted.count(combination)
        tables.append(counted.value)
    half = len(tables) // 2
    assert {len(table) for table in tables[:half]} == {24} and {len(table) for table in tables[half:]} == {48}
    assert all(table is tables[0] for table in tables[:half])


def test_a_ratio_split_counts_the_earliest_part_of_each_user(tmp_path):
    data = write_log(tmp_path / "data", "log", {"a": ["x", "y", "z", "v", "w"], "b": ["x", "y", "z", "w", "v"]})
    split = {"split": {"RS": [0.5, 0.25, 0.25]}, "group_by": "user", "mode": "full", "order": "TO"}
    _, trainer, test, *_ = step_by_step("Popularity", small(data, popularity_last=0, eval_args=split), "log")
    ids = [test._dataset.token2id("item_id", token) for token in "xyzvw"]
    assert trainer.model.popularity[ids].tolist() == [2, 2, 2, 0, 0]


def test_rows_that_are_no_sequences_are_refused(ring):
    run = Trained("Popularity", ring, None)
    dataset = run.data[0]._dataset
    dataset.inter_feat = dataset.inter_feat[torch.arange(1, len(dataset))]
    with pytest.raises(ValueError, match="model=Popularity: counts sequences, and the training rows are not each"):
        run.fit()


def test_a_saved_model_recommends_without_data(ring):
    _, trainer, *_ = step_by_step("Markov", ring_settings(ring, "Markov"))
    found = load_recommender(trainer.saved_model_file)
    assert [found.recommend([token], k=1)[0].token for token in TOKENS] == [following(token) for token in TOKENS]


def test_seen_items_may_be_masked_and_the_runner_tells_what_was_chosen(ring):
    settings = ring_settings(ring, "Markov", seen_items="mask", counting_repeats=True)
    result = run_recbole_llm("Markov", "ring", config_dict=settings)
    assert result["test_result"]["recall@1"] == 1.0
    assert result["lines"][0].notes["choices"]["markov_last"] == 10
    plan = run_recbole_llm("Markov", "ring", config_dict=settings, estimate=True)["plan"]
    (step,) = plan
    assert step.what.startswith("Count Markov on 540 targets, 12 combinations") and math.isfinite(step.seconds)


def test_a_counting_teacher_has_rankings_to_give_but_no_vectors(ring):
    settings = {"teacher": "Markov", "distill_ranking": "softmax", "teacher_folds": 2, "teacher_rows": 0}
    with pytest.raises(ValueError, match="teacher_embedding=auto: Markov has no item table"):
        run_recbole_llm("DLLM2Rec", "ring", config_dict=ring_settings(ring, "DLLM2Rec", **settings))
    settings |= {"distill_embedding": "none", "epochs": 1}
    result = run_recbole_llm("DLLM2Rec", "ring", config_dict=ring_settings(ring, "DLLM2Rec", **settings))
    assert [line.name for line in result["lines"]] == ["Markov (teacher)", "SASRec alone", "SASRec distilled"]
    assert result["lines"][0].metrics["recall@1"] == 1.0


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("Markov", {"markov_gap": [1, 0]}, "markov_gap=0: not possible"),
        ("Markov", {"markov_decay": []}, "model=Markov: a setting has no choice"),
        ("HistoryKNN", {"historyknn_decay": 1.5}, "historyknn_decay=1.5: not possible"),
        ("Popularity", {"counting_repeats": "often"}, "counting_repeats=often: no such choice"),
        ("Popularity", {"counting_valid_rows": -1}, "counting_valid_rows=-1: not possible"),
        ("Popularity", {"positions": "all"}, "positions=all: Popularity counts them and trains nothing"),
        ("TextKNN", {"textknn_template": "{plot}"}, "textknn_template=plot: no such column"),
        ("DLLM2Rec", {"student": "Markov"}, "student=Markov: no such sequential model"),
    ],
)
def test_what_cannot_work_is_refused(model, settings, message, ring, tiny_lm):
    with pytest.raises(ValueError, match=message):
        run_recbole_llm(model, "ring", config_dict=ring_settings(ring, model, tiny_lm, **settings))
