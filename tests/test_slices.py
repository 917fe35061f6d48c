"""What is known of test rows, read off a real split of the ring; groups and overlap by hand."""

import numpy as np
import torch
from recbole.data import data_preparation

from recbole_llm.config import Config
from recbole_llm.dataset import create_dataset
from recbole_llm.slices import Facts, overlap, slices_of, thirds
from tests.pipelines import ring_settings


def split(ring, **more):
    config = Config("SASRec", "ring", None, ring_settings(ring, "SASRec", **more), read_argv=False)
    return data_preparation(config, create_dataset(config))


def test_facts_of_the_ring(ring):
    train, _, test = split(ring, MAX_ITEM_LIST_LENGTH=5)
    facts = Facts.of(train._dataset, test._dataset)
    # 12 items a user, none twice; 11 lie before the test target, of which a model sees 5
    assert facts.history.tolist() == [11] * 60 and not facts.repeat.any()
    # user 7 meets items 7 to 18, is trained on 7 to 16 and tested on 18
    at = facts.user.tolist().index("u07")
    users = np.arange(60) % 24
    met = sum(1 for start in users for step in range(10) if (start + step) % 24 == 18)
    assert facts.popularity[at] == met
    items = {row: train._dataset.token2id("item_id", row) for row in ("i07", "i17", "i18")}
    for token, was_met in (("i07", True), ("i17", True), ("i18", False)):
        assert facts.met(np.full(60, items[token]))[at] == was_met, (
            "the whole history counts, not what a model sees of it"
        )


def test_a_repeat_is_told_though_it_is_older_than_the_model_sees(ring):
    file = ring / "ring" / "ring.inter"
    lines = file.read_text().splitlines()
    last = max(int(line.split("\t")[2]) for line in lines[1:])
    file.write_text("\n".join([*lines, f"u07\ti07\t{last + 1}"]) + "\n")
    train, _, test = split(ring, MAX_ITEM_LIST_LENGTH=5)
    facts = Facts.of(train._dataset, test._dataset)
    assert facts.user[facts.repeat].tolist() == ["u07"]
    groups = slices_of(facts, {})
    assert [(name, int(rows.sum())) for name, rows in groups["the target is"]] == [("new", 59), ("a repeat", 1)]


def test_thirds_keep_equal_values_together():
    groups = thirds(np.array([1, 1, 1, 1, 2, 3]))
    assert [(name, rows.tolist()) for name, rows in groups] == [
        ("1", [True] * 4 + [False] * 2),
        ("2 to 3", [False] * 4 + [True] * 2),
    ]


def test_a_slice_of_one_group_is_none():
    facts = Facts(np.array(["a", "b"]), np.array([1, 9]), np.array([5, 5]), np.array([False, False]), np.array([]), 9)
    assert list(slices_of(facts, {})) == ["training interactions of the target"]
    sure = slices_of(facts, {"T": np.log([0.1, 0.9])})
    assert [name for name, _ in sure["what T gives to its first item"]] == ["0.10", "0.90"]


def test_overlap_counts_items_wherever_they_stand():
    first = torch.tensor([[1, 2, 3], [4, 5, 6]])
    second = torch.tensor([[3, 1, 9], [7, 8, 9]])
    assert overlap(first, second) == 2 / 6 == overlap(second, first)
    assert overlap(first, first) == 1.0


def test_the_chronological_protocol_has_several_rows_of_a_user_and_none_before_training(ring):
    """8:1:1 over all instances by time, as in the papers of BIGRec and DLLM2Rec."""
    chronological = {"split": {"RS": [8, 1, 1]}, "order": "TO", "group_by": "none", "mode": "full"}
    train, valid, test = split(ring, MAX_ITEM_LIST_LENGTH=10, eval_args=chronological)
    times = [part._dataset.inter_feat["timestamp"] for part in (train, valid, test)]
    assert times[0].max() <= times[1].min() and times[1].max() <= times[2].min()
    assert [len(part) for part in times] == [528, 66, 66]
    facts = Facts.of(train._dataset, test._dataset)
    assert len(facts.user) == 66 > len(set(facts.user)) and set(facts.history) == {10, 11}
