"""Users replayed step by step: who asks, what the cloud has seen, and where the target stands in what is shown."""

import numpy as np
import pytest
import torch

import recbole_llm
from recbole_llm.cloud import Lists
from recbole_llm.collaboration import FUSIONS, Costs, Learned, Trial, best_fusion, policy_of
from recbole_llm.device import Device
from recbole_llm.replay import (
    SIGNALS,
    Replay,
    always,
    at_random,
    by_signal,
    gain_of,
    never,
    oracle,
    periodically,
)
from recbole_llm.request import Network, Threshold
from recbole_llm.timeline import Timeline
from tests.small_logs import NO_DROPOUT, random_log, stock, write_log

BOTH = FUSIONS["linear"](0.5, "rank")
K = 8


class Settings:
    """What the choices read of `lsc_*`."""

    fusion, norm, alpha, rate, steps, measure, threshold = "linear", "auto", None, 0.2, 1, "footrule", "valid"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A timeline of 60 users, a device with drawn weights, and lists in which fresher views have the target more often."""
    folder = write_log(tmp_path_factory.mktemp("data"), "log", random_log(users=60, longest=40))
    data = stock(folder, "log", "SASRec", recbole_llm.create_dataset, **NO_DROPOUT)
    timeline = Timeline.of(data.train._dataset, 5)
    log, generator = timeline.log, torch.Generator().manual_seed(1)
    items = torch.stack([torch.randperm(log.n_items - 1, generator=generator)[:K] + 1 for _ in range(len(log.items))])
    known = torch.rand(len(log.items), generator=generator) < 0.7
    items[known, 3] = log.items[known]
    score = torch.rand(items.shape, generator=generator).sort(dim=1, descending=True).values
    return timeline, Device(data.model.eval()), Lists(items, score, torch.arange(len(log.items)))


def signal_of(step, name):
    return SIGNALS[name](step, "footrule")


def replay_of(made, steps=5, part="shown", **more) -> Replay:
    timeline, device, lists = made
    targets = (
        timeline.shown[:, :steps]
        if part == "shown"
        else timeline.valid.unsqueeze(1) + torch.arange(1 - min(steps, 4), 1)
    )
    return Replay(timeline.log, device, lists, targets, timeline.view(targets[:, 0], 2), **more)


def test_who_never_asks_gets_staler_with_every_step(made):
    outcome = replay_of(made).run(never, BOTH)
    assert outcome.rate == 0
    assert torch.equal(outcome.new_items, torch.arange(2, 7).expand(len(outcome.rank), 5))


def test_who_always_asks_is_up_to_date(made):
    replay = replay_of(made)
    outcome = replay.run(always, BOTH)
    assert outcome.rate == 1 and torch.equal(outcome.view, replay.targets)
    assert torch.equal(outcome.new_items[:, 1:], torch.ones_like(outcome.new_items[:, 1:]))


def test_a_request_renews_the_list_for_what_follows(made):
    asks_once = iter([True, False, False, False, False])

    def policy(now, fresh, generator):
        return torch.full((len(now.items),), next(asks_once))

    replay = replay_of(made)
    outcome = replay.run(policy, BOTH)
    assert torch.equal(outcome.view, replay.targets[:, :1].expand(-1, 5))
    assert outcome.new_items[0].tolist() == [2, 1, 2, 3, 4]


def test_ranks_are_places_in_the_fused_list(made):
    timeline, device, lists = made
    replay = replay_of(made)
    outcome = replay.run(never, BOTH)
    position, view = replay.targets[:, 2], replay.start
    items, cloud = lists.at(view)
    scores = BOTH(cloud, device.rerank(timeline.log, position, items), items > 0)
    for user in range(len(items)):
        order = items[user][scores[user].argsort(descending=True, stable=True)].tolist()
        target = int(timeline.log.items[position[user]])
        assert int(outcome.rank[user, 2]) == (order.index(target) if target in order else -1)
    assert torch.equal(outcome.in_list, outcome.rank >= 0)


@pytest.mark.parametrize("norm", ["rank", "minmax", "softmax", "zscore"])
def test_alpha_1_is_the_clouds_order_and_0_the_devices(made, norm):
    replay = replay_of(made)
    for alpha, order in ((1.0, lambda cloud, device, there: cloud), (0.0, lambda cloud, device, there: device)):
        assert torch.equal(replay.run(always, FUSIONS["linear"](alpha, norm)).rank, replay.run(always, order).rank)


def test_one_step_is_the_first_step_of_a_stream(made):
    one, many = (replay_of(made, steps).run(never, BOTH) for steps in (1, 5))
    assert torch.equal(one.rank[:, 0], many.rank[:, 0])


def test_periodic_asks_at_its_rate_whoever_it_is(made):
    outcome = replay_of(made).run(periodically(0.25), BOTH)
    steps = [asked.nonzero()[:, 0].tolist() for asked in outcome.asked]
    assert {tuple(each) for each in steps} == {(0, 4), (1,), (2,), (3,)}
    assert replay_of(made).run(periodically(0.0), BOTH).rate == 0


def test_random_draws_are_seeded(made):
    replay = replay_of(made)
    first, again, other = (replay.run(at_random(0.3), BOTH, seed).asked for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert abs(float(first.float().mean()) - 0.3) < 0.1


def test_an_oracle_is_not_beaten_at_its_rate(made):
    replay = replay_of(made, 1)
    gain = gain_of(BOTH, "NDCG", 5)
    best = replay.run(oracle(0.2, gain), BOTH).metric("NDCG", 5).mean()
    others = [replay.run(at_random(0.2), BOTH, seed).metric("NDCG", 5).mean() for seed in range(20)]
    assert best > max(others)


def trial_of(made, steps=1, lag=2) -> Trial:
    return Trial(replay_of(made, 1, "valid"), lag, steps)


def test_the_threshold_of_one_step_is_the_quantile_of_validation(made):
    trial = trial_of(made)

    def signal(step):
        return signal_of(step, "confidence")

    threshold = trial.threshold(signal, 0.25)
    assert threshold == Threshold.for_rate(signal(trial.replay.first()), 0.25)
    rate, _ = trial.run(by_signal(signal, threshold), BOTH, "NDCG", 5)
    assert abs(rate - 0.25) < 1 / len(trial.replay.targets)


def test_in_a_stream_the_threshold_is_that_of_all_ages(made):
    """A signal that grows with age alone: whoever waits for age 4 asks at step 3 of a stream of 5 that begins at age 2."""
    trial = trial_of(made, steps=5)

    def signal(step):
        return step.new_items.float()

    threshold = trial.threshold(signal, 0.2)
    rate, _ = trial.run(by_signal(signal, threshold), BOTH, "NDCG", 5)
    assert abs(rate - 0.2) < 0.05
    assert abs(replay_of(made).run(by_signal(signal, threshold), BOTH).rate - 0.2) < 0.1


def test_the_rate_of_a_stream_is_foretold(made):
    """The same device and lists of random age: what one target per user tells is what a replay does, within three standard errors."""
    trial, replay = trial_of(made, steps=5), replay_of(made)

    def signal(step):
        return signal_of(step, "consistency")

    for rate in (0.1, 0.3, 0.6):
        asks = by_signal(signal, trial.threshold(signal, rate))
        assert abs(replay.run(asks, BOTH).rate - rate) < 3 * (rate * (1 - rate) / len(replay.targets)) ** 0.5


def test_ages_grow_and_begin_anew_after_a_request(made):
    seen = []

    def at_age(age):
        seen.append(age)
        return (1.0 if age == 4 else 0.0), float(age)

    rate, mean = trial_of(made, steps=6).over_ages(at_age)
    assert seen == [2, 3, 4, 1] and rate == pytest.approx(1 / 6) and mean == pytest.approx((2 + 3 + 4 + 1 + 2 + 3) / 6)


def test_no_view_of_a_trial_is_older_than_the_real_time_data(made):
    """The cloud was trained on what came next after older ones."""
    trial = trial_of(made, steps=9)
    assert trial.ages == list(range(1, 11)) and trial.oldest == 3
    assert torch.equal(trial.at(7).items, trial.at(3).items) and bool((trial.at(7).new_items == 7).all())
    assert trial_of(made, steps=9, lag=5).oldest == 5


def asked_of(made, name, rate=0.2, **more):
    settings = Settings()
    vars(settings).update(more)
    config = {"valid_metric": "NDCG@5", "seed": 1}
    return policy_of(name, rate, lambda part: trial_of(made, settings.steps), BOTH, settings, config)


def test_policies_that_mean_nothing_say_why(made):
    assert asked_of(made, "invalid-count") == "no list lacks a candidate"
    assert asked_of(made, "periodic") == "one step has no period"
    others = ("random", "consistency", "confidence", "history-drift", "learned", "oracle", "never", "always")
    assert not any(isinstance(asked_of(made, name), str) for name in others)
    assert not isinstance(asked_of(made, "periodic", steps=3), str)


def lacking(made):
    """The same with lists that lack candidates."""
    timeline, device, lists = made
    return timeline, device, Lists(lists.items.masked_fill(lists.items % 5 == 0, 0), lists.score, lists.index)


def test_missing_candidates_are_counted(made):
    step = replay_of(lacking(made), 1).first()
    assert torch.equal(signal_of(step, "invalid-count"), (step.items == 0).sum(dim=1).float())
    assert bool((step.rank(BOTH)[step.target % 5 == 0] == -1).all())


def test_a_policy_set_on_lists_that_lack_candidates_stands_lists_that_lack_none(made):
    asks = asked_of(lacking(made), "invalid-count")
    assert replay_of(made).run(asks.policy, BOTH).rate == 0


def test_users_of_the_authors_code_ask_in_groups(made):
    asks = asked_of(made, "consistency", rate=0.5, measure="code")
    asked = replay_of(made, 1, "valid").run(asks.policy, BOTH).asked[:, 0]
    groups = [bool(part[0]) for part in asked.split(16)]
    assert all(bool((part == part[0]).all()) for part in asked.split(16)) and len(set(groups)) == 2


def test_drift_is_how_far_the_devices_vectors_have_moved(made):
    timeline, device, _ = made
    replay = replay_of(made, 1)
    moved, vectors = signal_of(replay.first(), "history-drift"), device.item_vectors()
    for user in range(5):
        view, target = int(replay.start[user]), int(replay.targets[user, 0])
        begin = max(int(timeline.log.offsets[timeline.log.user_index(replay.start)[user]]), view - 10)
        before, since = (vectors[timeline.log.items[a:b]].mean(dim=0) for a, b in ((begin, view), (view, target)))
        assert float(moved[user]) == pytest.approx(1 - float(torch.cosine_similarity(before, since, dim=0)), abs=1e-5)


def test_what_a_user_has_met_is_no_candidate_if_seen_items_are_masked(made):
    timeline, _, lists = made
    replay = replay_of(made, mask_seen=True)
    step, (items, _) = replay.step(3, replay.start), lists.at(replay.start)
    for user, target in enumerate(replay.targets[:, 3].tolist()):
        met = set(timeline.log.items[int(timeline.log.offsets[timeline.users[user]]) : target].tolist())
        assert step.there[user].tolist() == [item not in met for item in items[user].tolist()]


def test_the_fusion_is_the_best_of_its_curve(made):
    replay = replay_of(made, 1, "valid")
    chosen = best_fusion(Trial(replay, 2, 1), Settings(), "NDCG@5")
    assert chosen.score == max(max(curve) for curve in chosen.curve.values())
    fusion = FUSIONS["linear"](chosen.alpha, chosen.norm)
    assert chosen.score == pytest.approx(replay.run(never, fusion).metric("NDCG", 5).mean())
    ends = {round(curve[0], 9) for curve in chosen.curve.values()}
    assert len(ends) == 1  # alpha = 0 is the device's order on every scale


def test_a_learned_policy_finds_a_gain_that_a_feature_tells(made):
    trial = trial_of(made)

    def gain(now, fresh):
        return signal_of(now, "confidence").double()

    learned = Learned(trial, gain)
    for predicted in (learned(trial.at(2)), learned.out_of_fold(trial.at(2))):
        assert np.corrcoef(predicted, signal_of(trial.at(2), "confidence"))[0, 1] > 0.95


def test_what_a_learned_policy_says_of_its_own_users_is_out_of_fold(made):
    """A gain that no feature tells is fitted in sample, and not out of it."""
    trial, noise = trial_of(made), torch.randn(len(made[0].users), generator=torch.Generator().manual_seed(0)).double()
    learned = Learned(trial, lambda now, fresh: noise)
    within, beyond = (
        np.corrcoef(predicted, noise)[0, 1] for predicted in (learned(trial.at(2)), learned.out_of_fold(trial.at(2)))
    )
    assert within > 0.1 > beyond


def test_costs_are_those_of_the_requests(made):
    replay = replay_of(made, 2)
    network = Network(50.0, 5.0, 20.0, 4, 2, 200)
    costs = Costs(network, device_ms=1.0, cloud_ms=100.0, cloud_reads=50, device_bytes=1000)
    quiet, busy = (costs.of(replay.run(policy, BOTH), replay) for policy in (never, always))
    assert quiet["latency_ms"] == 1.0 and quiet["up_bytes"] == quiet["down_bytes"] == quiet["request_rate"] == 0
    up, down = 200 + 4 * (2 + 1) / 2, 200 + K * 6
    assert busy["up_bytes"] == pytest.approx(up) and busy["down_bytes"] == pytest.approx(down)
    assert busy["latency_ms"] == pytest.approx(1 + 50 + 100 + 1 + up * 8e-3 / 5 + down * 8e-3 / 20)
    assert busy["staleness"] == 0 and quiet["staleness"] == pytest.approx(2.5)
