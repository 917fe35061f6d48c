"""Which rows a teacher labels: each policy by hand, blind to the rows' targets and to the order of the file."""

from math import log as ln

import pytest
import torch

from recbole_llm import knowledge as knowledge_file
from recbole_llm.knowledge import Request, asked_rows, ensure
from recbole_llm.rows import POLICIES, at_random, disagreement, doubt, first, recent
from recbole_llm.sequences import Log
from tests.oracle import Oracle, prepared
from tests.ring import shuffled
from tests.small_logs import random_log, write_log


def log_of(*sequences: list[int]) -> tuple[Log, list[str]]:
    """A log of item numbers, and the tokens of its users."""
    lengths = torch.tensor([0, *map(len, sequences)])
    items = torch.tensor([item for sequence in sequences for item in sequence])
    users = [f"u{number}" for number in range(len(sequences))]
    return Log(torch.arange(len(users)) + 1, items, lengths.cumsum(0), int(items.max()) + 1), users


def chosen(data_path, policy: str, count: int = 60, **settings) -> list[int]:
    """The rows that a policy gives to a teacher that was tuned on none."""
    parts = prepared(data_path, teacher_rows=count, teacher_rows_by=policy, **settings)
    return asked_rows(parts.config, None, parts.train._dataset).tolist()


def test_recent_takes_the_last_row_of_every_user_before_all_others():
    log, users = log_of([1, 2, 3, 4], [5, 6, 7], [8, 9])  # rows 0 to 2, 3 and 4, 5
    for seed in range(5):
        order = recent(log, users, seed).tolist()
        assert [set(order[:3]), set(order[3:5]), order[5]] == [{2, 4, 5}, {1, 3}, 0]
    assert len({tuple(recent(log, users, seed).tolist()) for seed in range(20)}) > 2, "ties are dealt by the seed"


def test_doubt_is_the_entropy_of_counts_and_popularity_together():
    """1 is followed twice by 2 and once by 3, 2 once by 3; both are equally popular as followers."""
    found = doubt(torch.tensor([1, 1, 1, 2]), torch.tensor([2, 2, 3, 3]), 4).tolist()
    of_1 = -(0.6 * ln(0.6) + 0.4 * ln(0.4))  # (2 + 2 / 2) / 5 and (1 + 2 / 2) / 5
    of_2 = -(0.25 * ln(0.25) + 0.75 * ln(0.75))  # (0 + 1 / 2) / 2 and (1 + 1 / 2) / 2
    assert found == pytest.approx([ln(2), of_1, of_2, ln(2)])


def test_doubt_equals_the_entropy_of_the_whole_matrix():
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randint(12, (2, 80), generator=generator)
    counts = torch.zeros(15, 15, dtype=torch.float64).index_put_(
        (before, after), torch.tensor(1.0).double(), accumulate=True
    )
    popular, different = counts.sum(0) / counts.sum(), (counts > 0).sum(1, keepdim=True)
    whole = counts.sum(1, keepdim=True) + different
    p = torch.where(whole > 0, (counts + different * popular) / whole.clamp_min(1), popular)
    assert torch.allclose(doubt(before, after, 15), torch.special.entr(p).sum(1), atol=1e-12)
    nothing = torch.tensor([], dtype=torch.long)
    assert doubt(nothing, nothing, 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("target", [3, 4])
def test_disagreement_is_told_by_other_users_and_never_by_the_target(target):
    """Others always go from 1 to 2, so the last user's row is the surest one, whatever its target; it unsettles theirs."""
    log, users = log_of([1, 2], [1, 2], [1, 2], [1, target])
    for seed in range(5):
        assert disagreement(log, users, seed)[-1] == 3


def test_disagreement_takes_rows_after_which_anything_came():
    sure, unsure = [[1, 2]] * 6, [[3, item] for item in (4, 5, 6, 7, 8)]
    log, users = log_of(*sure, *unsure, [2, 1], [2, 1], [2, 1])
    assert set(disagreement(log, users, 0)[:5].tolist()) == set(range(6, 11))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_orders_all_rows_and_the_same_each_time(policy):
    log, users = log_of(*([int(item[1:]) + 1 for item in items] for items in random_log().values()))
    order = POLICIES[policy](log, users, 7)
    assert torch.equal(order.sort().values, torch.arange(len(log.rows())))
    assert torch.equal(order, POLICIES[policy](log, users, 7)) and not torch.equal(
        order, POLICIES[policy](log, users, 8)
    )


def test_a_single_user_leaves_nothing_to_tell_rows_by():
    log, users = log_of([1, 2, 3, 1])
    assert torch.equal(disagreement(log, users, 3), at_random(log, users, 3))


def test_late_rows_come_only_where_there_are_no_others():
    order, late = torch.tensor([4, 2, 0, 3, 1]), torch.tensor([False, False, True, False, True])
    assert first(order, 2, late).tolist() == [0, 3] and first(order, 4, late).tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_order_of_the_file_changes_no_choice(ring, tmp_path, policy):
    log = random_log()
    rows = sum(map(len, log.values()))
    plain = {"dataset": "log", "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "title_field": None}
    moved = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).tolist()
    paths = [write_log(tmp_path / "a", "log", log), write_log(tmp_path / "b", "log", log, moved)]
    one, two = (chosen(path, policy, **plain) for path in paths)
    assert one == two and len(one) == 60
    assert chosen(ring, policy) == chosen(shuffled(ring, tmp_path / "moved"), policy)


def test_the_last_rows_of_the_ring_are_the_last_targets_of_its_users(ring):
    """540 rows of 60 users, nine each."""
    assert chosen(ring, "recent") == list(range(8, 540, 9))
    assert set(chosen(ring, "recent", 90)) > set(range(8, 540, 9))
    assert len({tuple(chosen(ring, policy)) for policy in POLICIES}) == 3


def test_an_unknown_policy_is_refused_before_any_work(ring):
    parts = prepared(ring, teacher_rows_by="newest")
    said = "^teacher_rows_by=newest: no such choice. There is random, recent, disagreement. Set teacher_rows_by.$"
    with pytest.raises(ValueError, match=said):
        Request.of(parts.config, parts.train._dataset)


def test_each_policy_has_a_knowledge_of_its_own_and_random_keeps_the_one_it_had(ring, monkeypatch):
    keys = []
    digest = knowledge_file.digest
    monkeypatch.setattr(knowledge_file, "digest", lambda key: keys.append(key) or digest(key))

    def folder(**settings):
        parts = prepared(ring, **settings)
        return Request.of(parts.config, parts.train._dataset).folder

    assert len({folder(), *(folder(teacher_rows_by=policy) for policy in POLICIES)}) == 3
    assert [key.get("rows by") for key in keys] == [None, None, "recent", "disagreement"]
    assert folder(teacher_rows=0) == folder(teacher_rows=0, teacher_rows_by="recent"), "all rows are all rows"


def test_the_rows_of_a_policy_are_what_the_teacher_labels(ring, monkeypatch):
    monkeypatch.setattr(
        knowledge_file, "ready", lambda config, dataset, valid_data, checkpoint=None: Oracle(config, dataset)
    )
    parts = prepared(ring, teacher_rows=60, teacher_rows_by="recent")
    known = ensure(parts.config, parts.train, parts.valid)
    assert known.row.tolist() == list(range(8, 540, 9)) and known.manifest["provenance"]["rows_by"] == "recent"
