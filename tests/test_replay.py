"""Users replayed step by step: who asks, what the cloud has seen, and where the target stands in what is shown."""

import numpy as np
import pytest
import torch

import recbole_llm
from recbole_llm.cloud import Lists
from recbole_llm.collaboration import ALPHAS, FUSIONS, Costs, Learned, Trial, best_fusion, policy_of, share_at
from recbole_llm.device import Device
from recbole_llm.policies import SIGNALS, always, at_random, by_signal, gain_of, never, oracle, periodically
from recbole_llm.replay import Policy, Replay
from recbole_llm.report import row_metric
from recbole_llm.request import Network, Threshold
from recbole_llm.timeline import Timeline
from tests.small_logs import NO_DROPOUT, random_log, stock, write_log

BOTH = FUSIONS["linear"]([0.5], "rank")
K = 8


class Settings:
    """What the choices read of `lsc_*`."""

    fusion, norm, alpha, alpha_by_age, policy = "linear", "auto", None, True, "never"
    rate, steps, measure, threshold, budget = 0.2, 1, "footrule", "valid", False


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A timeline of 60 users, a device with drawn weights, and lists in which fresher views have the target more often."""
    folder = write_log(tmp_path_factory.mktemp("data"), "log", random_log(users=60, longest=40))
    data = stock(folder, "log", "SASRec", recbole_llm.create_dataset, **NO_DROPOUT)
    timeline = Timeline.of(data.train._dataset, 5)
    log, generator = timeline.log, torch.Generator().manual_seed(1)
    items = torch.stack([torch.randperm(log.n_items - 1, generator=generator)[:K] + 1 for _ in range(len(log.items))])
    known = torch.rand(len(log.items), generator=generator) < 0.7
    target = log.items.unsqueeze(1)
    swapped = torch.where(items == target, items[:, 3:4], items)  # no item stands twice
    swapped[:, 3:4] = target
    items = torch.where(known.unsqueeze(1), swapped, items)
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
    at_first = Policy(lambda now, fresh, number: torch.full((len(now.items),), float(number == 0)), by_number=True)
    replay = replay_of(made)
    outcome = replay.run(at_first, BOTH)
    assert torch.equal(outcome.view, replay.targets[:, :1].expand(-1, 5))
    assert outcome.new_items[0].tolist() == [2, 1, 2, 3, 4]


def test_ranks_are_places_in_the_fused_list(made):
    timeline, device, lists = made
    replay = replay_of(made)
    outcome = replay.run(never, BOTH)
    position, view = replay.targets[:, 2], replay.start
    items, cloud = lists.at(view)
    scores = BOTH(cloud, device.rerank(timeline.log, position, items), items > 0, position - view)
    for user in range(len(items)):
        order = items[user][scores[user].argsort(descending=True, stable=True)].tolist()
        target = int(timeline.log.items[position[user]])
        assert int(outcome.rank[user, 2]) == (order.index(target) if target in order else -1)
    assert torch.equal(outcome.in_list, outcome.rank >= 0)


@pytest.mark.parametrize("norm", ["rank", "minmax", "softmax", "zscore"])
def test_alpha_1_is_the_clouds_order_and_0_the_devices(made, norm):
    replay = replay_of(made)
    for alpha, order in (
        (1.0, lambda cloud, device, there, age: cloud),
        (0.0, lambda cloud, device, there, age: device),
    ):
        assert torch.equal(replay.run(always, FUSIONS["linear"]([alpha], norm)).rank, replay.run(always, order).rank)


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
    trial = trial_of(made, steps=6)
    users = len(trial.replay.targets)
    walked = trial.walk(lambda age, number: torch.full((users,), float(age == 4)))
    assert {age: (float(there.mean()), float(asked.mean())) for age, (there, asked) in walked.items()} == {
        1: (1, 0), 2: (2, 0), 3: (2, 0), 4: (1, 1),
    }  # fmt: skip


def test_of_a_user_who_asks_at_one_age_only_the_list_never_gets_older(made):
    """Users keep their wishes: half of them ask whenever they can, and the others never do."""
    trial = trial_of(made, steps=6)
    keen = (torch.arange(len(trial.replay.targets)) % 2).float()
    walked = trial.walk(lambda age, number: keen)
    assert torch.equal(walked[1][0], 5 * keen) and torch.equal(walked[2][1], keen)
    assert torch.equal(walked[7][0], 1 - keen) and not bool(walked[7][1].any())


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_a_trial_expects_of_periodic_requests_what_a_replay_has(made, rate):
    trial, replay = trial_of(made, steps=5), replay_of(made)
    asks = periodically(rate)
    assert trial.run(asks, BOTH, "NDCG", 5)[0] == pytest.approx(replay.run(asks, BOTH).rate)


def test_a_trial_of_one_step_is_the_mean_of_its_replays(made):
    trial = trial_of(made)
    rate, users = trial.run(at_random(0.3), BOTH, "NDCG", 5)
    never_asked, always_asked = (trial.replay.run(policy, BOTH).metric("NDCG", 5) for policy in (never, always))
    assert rate == pytest.approx(0.3) and np.allclose(users, 0.7 * never_asked + 0.3 * always_asked)


def test_an_older_list_has_the_drift_of_its_age(made):
    trial = trial_of(made, steps=9)
    moved = [signal_of(trial.at(age), "history-drift") for age in (3, 7)]
    assert not torch.allclose(*moved)
    replay = trial.replay
    target = replay.targets[:, 0]
    exact = replay.step(0, made[0].view(target, 7)).moved
    assert torch.allclose(moved[1], exact)


def test_nobody_asks_for_a_list_that_is_fresh(made):
    trial = trial_of(made, steps=4, lag=0)
    assert trial.run(always, BOTH, "NDCG", 5)[0] == pytest.approx(3 / 4)
    threshold = trial.threshold(lambda step: signal_of(step, "confidence"), 0.3)
    asks = by_signal(lambda step: signal_of(step, "confidence"), threshold)
    assert trial.run(asks, BOTH, "NDCG", 5)[0] == pytest.approx(0.3, abs=0.02)


def test_a_stream_set_to_none_and_to_all_asks_so_whatever_comes(made):
    trial = trial_of(made, steps=5)
    for rate in (0, 1):
        threshold = trial.threshold(lambda step: signal_of(step, "consistency"), rate)
        assert threshold.chance(torch.tensor([-9e9, 9e9])).tolist() == [rate, rate]


def test_too_few_users_teach_nothing(made):
    timeline, device, lists = made
    few = Replay(timeline.log, device, lists, timeline.valid[:3].unsqueeze(1), timeline.view(timeline.valid[:3], 2))
    config = {"valid_metric": "NDCG@5", "seed": 1}
    assert (
        policy_of("learned", 0.2, lambda part: Trial(few, 2, 1), BOTH, Settings(), config)
        == "too few users to learn from"
    )


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_a_device_adds_its_own_best_to_the_clouds_list(made, alpha):
    timeline, device, lists = made
    replay, own = replay_of(made, 2), 10
    wide = replay_of(made, 2, own=own)
    step = wide.step(1, wide.start)
    with torch.no_grad():
        whole = device.model.full_sort_predict(device.batch(timeline.log, wide.targets[:, 1]))
    whole[:, 0] = float("-inf")
    best = whole.topk(own).indices
    narrow = replay.step(1, replay.start)
    assert torch.equal(step.items[:, :K], narrow.items) and torch.equal(step.cloud[:, :K], narrow.cloud)
    for user in range(len(best)):
        proposed, added = set(narrow.items[user].tolist()), step.items[user, K:][step.there[user, K:]].tolist()
        assert added == [item for item in best[user].tolist() if item not in proposed], "what both propose stands once"
    assert torch.equal(step.listed[:, K:], torch.zeros_like(step.there[:, K:]))
    # what the cloud knows of the list is what it was
    for name in SIGNALS:
        assert torch.allclose(signal_of(step, name), signal_of(narrow, name)), name
    fusion = FUSIONS["linear"]([alpha], "minmax")
    rank, alone = wide.run(never, fusion).rank[:, 1], device.rank_of(timeline.log, wide.targets[:, 1])
    if alpha == 0:  # the device's order of the catalogue, as far as its own go
        assert torch.equal(rank[alone < own], alone[alone < own])
    else:
        assert bool((rank[alone < own] >= 0).all())


def test_the_cloud_alone_has_no_candidates_of_the_device(made):
    order = lambda cloud, device, there, age: cloud  # noqa: E731
    assert torch.equal(replay_of(made, own=10).run(never, order).rank, replay_of(made).run(never, order).rank)


def test_a_devices_own_candidates_are_unseen_if_seen_items_are_masked(made):
    timeline, _, _ = made
    replay = replay_of(made, 2, seen=timeline.seen, own=10)
    step = replay.step(1, replay.start)
    for user, target in enumerate(replay.targets[:, 1].tolist()):
        met = set(timeline.log.items[int(timeline.log.offsets[timeline.users[user]]) : target].tolist())
        assert not met & set(step.items[user].tolist())


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


@pytest.mark.parametrize(("steps", "group"), [(1, 1), (4, 1), (1, 7)])
def test_what_a_trial_expects_of_a_budget_is_what_replays_do(made, steps, group):
    """Most users tie, so that chances below 1 meet the budget."""

    def signal(step):
        return (torch.arange(len(step.target)) // group % 7 == 6).float()

    policy = by_signal(signal, Threshold(0.0, 0.3), group, budget=0.25)
    replay = replay_of(made)
    trial = Trial(replay_of(made, steps=1), 2, steps)
    if steps == 1:
        asked = [trial.replay.run(policy, BOTH, seed).rate for seed in range(200)]
        assert trial.run(policy, BOTH, "NDCG", 5)[0] == pytest.approx(sum(asked) / len(asked), abs=0.02)
    else:
        assert trial.run(policy, BOTH, "NDCG", 5)[0] <= 0.25 + 1e-6
        assert max(replay.run(policy, BOTH, seed).asked.float().mean(dim=0).max() for seed in range(20)) <= 0.25


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
    replay = replay_of(made, seen=timeline.seen)
    step, (items, _) = replay.step(3, replay.start), lists.at(replay.start)
    for user, target in enumerate(replay.targets[:, 3].tolist()):
        met = set(timeline.log.items[int(timeline.log.offsets[timeline.users[user]]) : target].tolist())
        assert step.there[user].tolist() == [item not in met for item in items[user].tolist()]


def chosen_for(trial, **more):
    settings = Settings()
    vars(settings).update(more)
    return best_fusion(trial, settings, "NDCG@5")


def test_the_fusion_is_the_best_of_its_curve(made):
    replay = replay_of(made, 1, "valid")
    chosen = chosen_for(Trial(replay, 2, 1))
    assert chosen.score == pytest.approx(max(max(curve[2]) for curve in chosen.curve.values()))
    fusion = FUSIONS["linear"](chosen.alpha, chosen.norm)
    assert chosen.score == pytest.approx(replay.run(never, fusion).metric("NDCG", 5).mean())
    ends = {round(curve[2][0], 9) for curve in chosen.curve.values()}
    assert len(ends) == 1  # alpha = 0 is the device's order on every scale


@pytest.mark.parametrize("steps", [1, 4])
def test_each_age_of_a_list_has_the_share_that_is_best_for_it(made, steps):
    trial = trial_of(made, steps)
    chosen = chosen_for(trial, norm="minmax")
    ages = [0, 2] if steps == 1 else [0, 1, 2, 3]
    assert list(chosen.curve["minmax"]) == ages and len(chosen.alpha) == ages[-1] + 1
    for age in ages:
        curve, step = chosen.curve["minmax"][age], trial.at(age) if age else trial.fresh
        assert curve[round(10 * chosen.alpha[age])] == max(curve)
        ranks = step.rank(FUSIONS["linear"](chosen.alpha, "minmax")).tolist()
        assert row_metric(ranks, "NDCG", 5).mean() == pytest.approx(max(curve))
    if steps == 1:
        assert chosen.alpha[1] == chosen.alpha[2]


@pytest.mark.parametrize("policy", ["never", "random", "always"])
@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("more", [{}, {"alpha_by_age": False}, {"alpha": 0.35}])
def test_the_score_of_a_fusion_is_what_is_expected_of_it(made, policy, steps, more):
    trial = trial_of(made, steps)
    chosen = chosen_for(trial, policy=policy, **more)
    asks = {"never": never, "always": always, "random": at_random(0.2)}[policy]
    fusion = FUSIONS["linear"](chosen.alpha, chosen.norm)
    assert chosen.score == pytest.approx(trial.run(asks, fusion, "NDCG", 5)[1].mean())


def test_beyond_the_ages_that_were_tried_the_share_falls_with_age():
    ages = torch.tensor([0, 1, 3, 4, 12])
    assert share_at([0.4, 0.3, 0.2, 0.2], ages)[:, 0].tolist() == pytest.approx([0.4, 0.3, 0.2, 0.15, 0.05])
    assert share_at([0.4], ages)[:, 0].tolist() == pytest.approx([0.4] * 5)


def test_one_share_for_all_ages_is_the_best_for_those_that_come(made):
    trial = trial_of(made, 4)
    asks = at_random(0.2)
    chosen = chosen_for(trial, alpha_by_age=False, norm="minmax", policy="random")
    assert len(chosen.alpha) == 1
    scores = [trial.run(asks, FUSIONS["linear"]([alpha], "minmax"), "NDCG", 5)[1].mean() for alpha in ALPHAS]
    assert chosen.score == pytest.approx(max(scores)) and chosen.alpha[0] == ALPHAS[int(np.argmax(scores))]


def test_a_share_that_is_given_is_that_of_all_ages(made):
    chosen = chosen_for(trial_of(made, 4), alpha=0.35)
    assert chosen.alpha == [0.35]
    assert all(len(scores) == len(ALPHAS) for scores in chosen.curve[chosen.norm].values())


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
