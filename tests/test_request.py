"""The request's formulas against numbers worked out by hand; sections are of the LSC4Rec specification."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.request import (
    NORMS,
    Network,
    Threshold,
    code_fusion,
    code_score,
    disagreement_at,
    drawn,
    drift,
    first_come,
    footrule,
    fused,
    normalised,
    places,
    uncertainty,
)

MANY = 50_000
RATES = (0.01, 0.05, 0.3, 0.5, 0.8, 0.99)
NETWORK = {"rtt_ms": 50.0, "up_mbps": 5.0, "down_mbps": 20.0, "id_bytes": 4, "score_bytes": 2, "header_bytes": 200}
SHIFTS = st.floats(-50, 50)
SIZES = st.integers(1, 12)


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def all_there(score: torch.Tensor) -> torch.Tensor:
    """A mask under which every slot is a candidate."""
    return torch.ones_like(score, dtype=torch.bool)


def orders(rows: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Scores without ties, each row in a random order of its own."""
    return torch.rand(rows, size, generator=generator).argsort(dim=1).float()


def widened(score: torch.Tensor, slots: torch.Tensor, width: int, absent: float) -> torch.Tensor:
    """The same candidates in the given slots of longer lists, whose other slots hold `absent`."""
    return torch.full((len(score), width), absent).index_copy(1, slots, score)


def some_slots(size: int, width: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of `size` candidates in lists of `width`, in order, and the mask of one list."""
    slots = torch.randperm(width, generator=generator)[:size].sort().values
    return slots, torch.zeros(1, width, dtype=torch.bool).index_fill(1, slots, True)


def test_places_count_from_the_best_and_put_the_earlier_of_two_equals_first():
    score = torch.tensor([[0.5, 3.0, -1.0, 3.0], [4.0, 3.0, 2.0, 1.0]])
    assert places(score, all_there(score)).tolist() == [[2, 0, 3, 1], [0, 1, 2, 3]]


def test_places_put_what_is_no_candidate_behind_all():
    score = torch.tensor([[99.0, -5.0, math.nan, -9.0, math.inf]])
    there = torch.tensor([[False, True, False, True, False]])
    assert places(score, there).tolist() == [[2, 0, 3, 1, 4]]
    assert places(score, ~all_there(score)).tolist() == [[0, 1, 2, 3, 4]]


@given(seed=st.integers(0, 999), size=SIZES)
def test_places_are_those_of_a_sorted_list(seed, size):
    generator = seeded(seed)
    score = torch.randint(-3, 4, (2, size), generator=generator).float()
    there = torch.rand(2, size, generator=generator) < 0.6
    for row in range(2):
        order = sorted(range(size), key=lambda slot: (not there[row, slot], -score[row, slot] * there[row, slot], slot))
        assert places(score, there)[row].tolist() == [order.index(slot) for slot in range(size)]


@pytest.mark.parametrize(
    "norm, score, expected",
    [
        ("rank", [2, 6, 3], [0, 1, 1 / 2]),
        ("rank", [-1, 7, 7, 0, -2], [1 / 4, 1, 3 / 4, 1 / 2, 0]),
        ("minmax", [2, 6, 3], [0, 1, 1 / 4]),
        ("minmax", [-4, -2, -3.5, -2], [0, 1, 1 / 4, 1]),
        ("softmax", [0, math.log(5), math.log(2)], [1 / 8, 5 / 8, 2 / 8]),
        ("softmax", [1000, 1000 + math.log(3)], [1 / 4, 3 / 4]),
        ("zscore", [2, 4, 4, 4, 5, 5, 7, 9], [-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2]),
        ("zscore", [-1, -5], [1, -1]),
    ],
)
def test_normalised_is_the_named_scale(norm, score, expected):
    score = torch.tensor([score], dtype=torch.float)
    assert normalised(score, all_there(score), norm)[0].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "norm, absent",
    [(norm, absent) for norm in NORMS for absent in (1e6, -1e6)]
    + [(norm, absent) for norm in ("rank", "minmax", "softmax") for absent in (math.inf, -math.inf, math.nan)],
)
@given(seed=st.integers(0, 999), size=SIZES)
def test_normalised_does_not_depend_on_slots_without_candidates(norm, absent, seed, size):
    generator = seeded(seed)
    score = 3 * torch.randn(1, size, generator=generator)
    slots, there = some_slots(size, size + 4, generator)
    made = normalised(widened(score, slots, size + 4, absent), there, norm)
    assert torch.allclose(made[:, slots], normalised(score, all_there(score), norm), atol=1e-5)
    assert made[~there].tolist() == [0] * 4


@pytest.mark.parametrize("norm, equal", [("minmax", 0), ("softmax", 1 / 3), ("zscore", 0)])
def test_equal_scores_stay_equal(norm, equal):
    score = torch.full((1, 3), 2.0)
    assert normalised(score, all_there(score), norm)[0].tolist() == pytest.approx([equal] * 3)


@pytest.mark.parametrize("norm, alone", [("rank", 1), ("softmax", 1), ("zscore", 0)])
def test_lists_of_one_and_of_none_have_numbers(norm, alone):
    score = torch.tensor([[7.0, -3.0], [7.0, -3.0]])
    assert normalised(score, torch.tensor([[False, True], [False, False]]), norm).tolist() == [[0, alone], [0, 0]]


@pytest.mark.parametrize("norm", NORMS)
def test_what_the_cloud_did_not_propose_counts_as_its_lowest(norm):
    cloud = torch.tensor([[3.0, 1.0, -2.0, -math.inf, -math.inf]])
    device, there = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), torch.tensor([[True] * 4 + [False]])
    by_cloud, by_device = (fused(cloud, device, there, alpha, norm)[0] for alpha in (1.0, 0.0))
    assert torch.allclose(by_cloud[:3], fused(cloud[:, :3], device[:, :3], there[:, :3], 1.0, norm)[0])
    assert by_cloud[3] <= by_cloud[:3].min() and by_cloud[4] == -math.inf
    assert by_device[:4].argsort(descending=True).tolist() == [3, 2, 1, 0]


@given(seed=st.integers(0, 999), size=st.integers(2, 12), shift=SHIFTS, factor=st.floats(0.2, 20))
def test_normalised_scales_have_their_range_and_forget_the_scores_own(seed, size, shift, factor):
    score = orders(3, size, seeded(seed))
    there = all_there(score)
    made = {norm: normalised(score, there, norm) for norm in NORMS}
    for norm in ("rank", "minmax"):
        assert made[norm].amin(dim=1).tolist() == [0] * 3 and made[norm].amax(dim=1).tolist() == [1] * 3
    assert made["softmax"].sum(dim=1).tolist() == pytest.approx([1] * 3)
    assert made["zscore"].mean(dim=1).tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert made["zscore"].std(dim=1, correction=0).tolist() == pytest.approx([1] * 3, rel=1e-4)
    for norm in NORMS:
        moved = score + shift if norm == "softmax" else factor * score + shift
        assert torch.allclose(normalised(moved, there, norm), made[norm], atol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
@given(seed=st.integers(0, 999), size=SIZES, absent=st.sampled_from([1e6, -1e6, 0.0]))
def test_fusion_with_alpha_one_is_the_clouds_order_and_with_zero_the_devices(norm, seed, size, absent):
    generator = seeded(seed)
    cloud, device = orders(2, size, generator), orders(2, size, generator)
    slots, there = some_slots(size, size + 3, generator)
    wide = [widened(score, slots, size + 3, absent) for score in (cloud, device)]
    for alpha, score in ((1.0, cloud), (0.0, device)):
        best_first = fused(*wide, there, alpha, norm).argsort(dim=1, descending=True)[:, :size]
        assert best_first.tolist() == slots[score.argsort(dim=1, descending=True)].tolist()


@pytest.mark.parametrize(
    "norm, expected",
    [
        ("rank", [0.25, 0.5, 0.75]),
        ("minmax", [0.25, 0.3125, 0.75]),
        ("softmax", [0.25 * 4 / 7 + 0.75 / 19, 0.25 * 2 / 7 + 0.75 * 2 / 19, 0.25 / 7 + 0.75 * 16 / 19]),
        ("zscore", [0.25 * 1.224745 - 0.75 * 0.980581, -0.75 * 0.392232, -0.25 * 1.224745 + 0.75 * 1.372813]),
    ],
)
def test_fusion_weighs_normalised_scores(norm, expected):
    cloud = math.log(2) * torch.tensor([[2.0, 1.0, 0.0, 50.0]])
    device = math.log(2) * torch.tensor([[0.0, 1.0, 4.0, 50.0]])
    there = torch.tensor([[True, True, True, False]])
    assert fused(cloud, device, there, 0.25, norm)[0].tolist() == pytest.approx([*expected, -math.inf], abs=1e-5)


@pytest.mark.parametrize("kind", [*NORMS, "code"])
@given(seed=st.integers(0, 999), alpha=st.floats(0, 1))
def test_no_candidate_never_outranks_a_candidate(kind, seed, alpha):
    generator = seeded(seed)
    cloud, device = 5 * torch.randn(2, 3, 8, generator=generator)
    there = torch.rand(3, 8, generator=generator) < 0.5
    cloud, device = cloud.masked_fill(~there, 1e6), device.masked_fill(~there, 1e6)
    if kind == "code":
        made = code_fusion(cloud, device, there, 10 * alpha)
    else:
        made = fused(cloud, device, there, alpha, kind)
    assert bool(made[there].isfinite().all()) and bool((made[~there] == -math.inf).all())
    for place, mask in zip(places(made, there), there, strict=True):
        assert sorted(place[mask].tolist()) == list(range(int(mask.sum())))


@pytest.mark.parametrize("weight, expected", [(0.0, [-0.25, -0.5, -0.75]), (1.0, [-0.25, -0.25, -1.0])])
def test_code_fusion_is_formulas_1_and_3_of_section_3_3(weight, expected):
    cloud = torch.tensor([[9.0, 8.0, 7.0, 99.0]])
    device = torch.tensor([[0.0, math.log(3), -math.log(3), 99.0]])
    there = torch.tensor([[True, True, True, False]])
    assert code_fusion(cloud, device, there, weight)[0].tolist() == pytest.approx([*expected, -math.inf])


def test_code_fusion_is_formula_4_of_section_3_3_and_drops_invalid_candidates_before_it_counts():
    cloud = torch.tensor([[99.0, 8.0, 99.0, 9.0, 7.0]])
    device = torch.tensor([[99.0, math.log(3), 99.0, 0.0, -math.log(3)]])
    there = torch.tensor([[False, True, False, True, True]])
    expected = [-math.inf, -0.4 + 0.5, -math.inf, -0.2, -0.6 - 0.5]
    assert code_fusion(cloud, device, there, 2.0)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_code_fusion_of_fifty_slots_lets_an_unsure_device_change_nothing_section_3_3():
    cloud = torch.arange(50.0, 0.0, -1.0).unsqueeze(0)
    made = code_fusion(cloud, torch.zeros(1, 50), all_there(cloud), 2.0)
    assert made[0].tolist() == pytest.approx([-j / 50 for j in range(1, 51)])


@given(seed=st.integers(0, 999), size=SIZES)
def test_footrule_of_equal_orders_is_zero(seed, size):
    score = orders(2, size, seeded(seed))
    assert footrule(score, score.exp() - 7, all_there(score)).tolist() == [0, 0]


@pytest.mark.parametrize("size", [3, 10, 50])
def test_footrule_of_unrelated_orders_is_one_in_the_mean(size):
    generator = seeded(1)
    first, second = orders(20_000, size, generator), orders(20_000, size, generator)
    assert footrule(first, second, all_there(first)).mean().item() == pytest.approx(1, abs=0.015)


@pytest.mark.parametrize("size, expected", [(2, 2.0), (3, 1.5), (4, 1.6), (5, 1.5), (50, 1.5 * 2500 / 2499), (51, 1.5)])
def test_footrule_of_a_reversed_order_is_the_largest(size, expected):
    first = torch.arange(float(size)).unsqueeze(0)
    assert footrule(first, -first, all_there(first)).tolist() == pytest.approx([expected])
    others = orders(500, size, seeded(2))
    assert footrule(first.expand(500, size), others, all_there(others)).max().item() <= expected + 1e-5


def test_footrule_of_a_swap_is_the_distance_over_its_expectation_section_4():
    first = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    second = torch.tensor([[4.0, 5.0, 3.0, 2.0, 1.0]])
    assert footrule(first, second, all_there(first)).tolist() == pytest.approx([(2 / 5) / (24 / 15)])


def test_footrule_of_lists_of_one_and_of_none_is_zero():
    first, second = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    assert footrule(first, second, torch.tensor([[False, True], [False, False]])).tolist() == [0, 0]


@pytest.mark.parametrize("absent", [1e6, -1e6, math.inf, -math.inf, math.nan])
@given(seed=st.integers(0, 999), size=SIZES)
def test_measures_do_not_depend_on_slots_without_candidates(absent, seed, size):
    generator = seeded(seed)
    first, second = orders(2, size, generator), orders(2, size, generator)
    slots, there = some_slots(size, size + 4, generator)
    there = there.expand(2, size + 4)
    wide_first, wide_second = widened(first, slots, size + 4, absent), widened(second, slots, size + 4, 0.5)
    full = all_there(first)
    assert torch.equal(footrule(wide_first, wide_second, there), footrule(first, second, full))
    for k in (1, 3, 10):
        expected = disagreement_at(first, second, full, k)
        assert torch.equal(disagreement_at(wide_first, wide_second, there, k), expected)
    assert torch.allclose(uncertainty(wide_first, there), uncertainty(first, full), atol=1e-6)


@given(seed=st.integers(0, 999), size=SIZES, k=SIZES)
def test_measures_are_symmetric_and_do_not_depend_on_the_order_of_the_slots(seed, size, k):
    generator = seeded(seed)
    first, second = orders(2, size, generator), orders(2, size, generator)
    there = torch.rand(2, size, generator=generator) < 0.8
    mixed = torch.randperm(size, generator=generator)
    for measure in (footrule, code_score, lambda *lists: disagreement_at(*lists, k)):
        value = measure(first, second, there)
        assert torch.equal(measure(second, first, there), value)
        assert torch.equal(measure(first[:, mixed], second[:, mixed], there[:, mixed]), value)


@pytest.mark.parametrize("k, expected", [(1, 1), (2, 1 / 2), (3, 2 / 3), (4, 1 / 4), (5, 0), (9, 0)])
def test_disagreement_is_the_share_of_the_best_that_the_other_does_not_name(k, expected):
    first = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    second = torch.tensor([[4.0, 1.0, 2.0, 3.0, 5.0]])
    assert disagreement_at(first, second, all_there(first), k).tolist() == pytest.approx([expected])


def test_disagreement_of_fewer_candidates_than_k_is_zero():
    first, second = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    there = torch.tensor([[True, False, True, False]])
    assert [disagreement_at(first, second, there, k).item() for k in (1, 2, 3)] == [1, 0, 0]


@pytest.mark.parametrize("missing, expected", [(0, 16.0), (1, 18.49), (2, 21.16), (3, 24.01)])
def test_code_score_grows_with_every_slot_without_a_candidate_as_in_section_4(missing, expected):
    score = orders(16, 50, seeded(3))
    there = all_there(score)
    there.view(-1)[[7, 120, 799][:missing]] = False
    assert code_score(score, score, there).tolist() == pytest.approx([expected] * 16)


def test_code_score_adds_the_mean_distance_over_all_candidates_of_the_batch_section_4():
    first = torch.tensor([[4.0, 3.0, 2.0, 1.0], [9.0, 2.0, 1.0, 9.0]])
    second = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 6.0, 5.0, 0.0]])
    there = torch.tensor([[True, True, True, True], [False, True, True, False]])
    # 3 + 1 + 1 + 3 places over 4 + 2 candidates, and (4 + 0.3 * 2)^2
    assert code_score(first, second, there).tolist() == pytest.approx([8 / 6 + 21.16] * 2)
    assert code_score(first, second, there, group=1).tolist() == pytest.approx([2 + 16, 21.16])


def test_code_score_of_unrelated_orders_is_the_expectation_of_section_4():
    generator = seeded(4)
    first, second = orders(4000, 50, generator), orders(4000, 50, generator)
    score = code_score(first, second, all_there(first))
    assert score.mean().item() == pytest.approx(16 + 16.66, abs=0.1)
    batches = score.view(-1, 16)
    assert bool((batches == batches[:, :1]).all())
    assert batches[:, 0].std().item() == pytest.approx(0.38, abs=0.06)


def test_code_score_is_shared_by_sixteen_users():
    first = torch.arange(4.0).repeat(17, 1)
    second = torch.cat([first[:16], -first[16:]])
    there = all_there(first)
    there[3, 0] = False
    assert code_score(first, second, there).tolist() == pytest.approx([18.49] * 16 + [18.0])


def test_code_score_without_any_candidate_is_a_number():
    score = torch.ones(2, 3)
    assert code_score(score, -score, ~all_there(score)).tolist() == pytest.approx([(4 + 0.3 * 6) ** 2] * 2)


def test_uncertainty_is_what_the_largest_probability_leaves():
    score = torch.tensor([[math.log(3), 0.0, 99.0], [2.0, 2.0, 2.0], [99.0, -4.0, 99.0], [50.0, 0.0, 0.0]])
    there = torch.tensor([[True, True, False], [True, True, True], [False, True, False], [True, True, True]])
    assert uncertainty(score, there).tolist() == pytest.approx([1 / 4, 2 / 3, 0, 0], abs=1e-6)


def test_drift_is_the_cosine_distance_and_zero_when_nothing_came():
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [3.0, 4.0]])
    since = torch.tensor([[7.0, 0.0], [2.0, 2.0], [0.0, 0.1], [-3.0, 0.0], [0.0, 0.0]])
    assert drift(before, since).tolist() == pytest.approx([0, 1 - math.sqrt(0.5), 1, 2, 0], abs=1e-6)


@pytest.mark.parametrize("rate", RATES)
def test_threshold_asks_at_its_rate_on_fresh_scores(rate):
    generator = seeded(5)
    seen, fresh = torch.randn(2, MANY, generator=generator).exp()
    asked = drawn(Threshold.for_rate(seen, rate).chance(fresh), generator)
    assert asked.float().mean().item() == pytest.approx(rate, abs=0.01)
    assert fresh[asked].min() > fresh[~asked].max(), "those with the higher scores ask"


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("levels", [1, 3, 11])
def test_threshold_breaks_ties_at_random_so_that_the_rate_is_met(rate, levels):
    generator = seeded(6)
    seen, fresh = torch.randint(0, levels, (2, MANY), generator=generator) / 10
    threshold = Threshold.for_rate(seen, rate)
    asked = drawn(threshold.chance(fresh), seeded(7))
    assert asked.float().mean().item() == pytest.approx(rate, abs=0.01)
    assert bool(asked[fresh > threshold.above].all()) and not asked[fresh < threshold.above].any()
    assert torch.equal(drawn(threshold.chance(fresh), seeded(7)), asked)
    assert not torch.equal(drawn(threshold.chance(fresh), seeded(8)), asked)


@given(
    scores=st.lists(st.integers(0, 6), min_size=1, max_size=40),
    rate=st.one_of(st.floats(0, 1), st.sampled_from([0.07, 0.1, 0.29, 0.3, 0.58, 0.7])),
)
def test_threshold_and_its_share_of_ties_make_up_the_rate(scores, rate):
    scores = torch.tensor(scores) / 7
    threshold = Threshold.for_rate(scores, rate)
    assert 0 <= threshold.share <= 1
    higher, ties = (scores > threshold.above).sum().item(), (scores == threshold.above).sum().item()
    assert higher + threshold.share * ties == pytest.approx(rate * len(scores), abs=1e-6)


def test_threshold_of_rate_zero_never_asks_and_of_rate_one_always():
    scores = torch.tensor([0.0, 3.0, 3.0, -2.0, math.inf]).repeat(200)
    assert not Threshold.for_rate(scores, 0).chance(scores).any()
    assert bool((Threshold.for_rate(scores, 1).chance(scores) == 1).all())
    assert bool((Threshold.for_rate(scores, 1.0).chance(scores + 1) == 1).all())


def test_threshold_draws_one_number_for_each_row_whatever_its_score():
    threshold = Threshold(above=1.0, share=0.5)
    after, answers = [], []
    for changed in (0.0, 1.0, 2.0):
        generator = seeded(9)
        answers.append(drawn(threshold.chance(torch.tensor([changed] + [1.0] * 99)), generator)[1:].tolist())
        after.append(torch.rand(1, generator=generator).item())
    assert answers[0] == answers[1] == answers[2] and 0 < sum(answers[0]) < 99
    assert after[0] == after[1] == after[2]
    generator = seeded(9)
    torch.rand(100, generator=generator)
    assert torch.rand(1, generator=generator).item() == after[0]


@pytest.mark.parametrize("count, rate", [(0, 0.5), (3, -0.1), (3, 1.01), (3, math.nan)])
def test_threshold_refuses_no_scores_and_what_is_no_share(count, rate):
    message = (
        f"a threshold of {count} scores for the rate {rate}: needs scores that are numbers, and a rate from 0 to 1."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Threshold.for_rate(torch.ones(count), rate)


@pytest.mark.parametrize("upload, expected", [("delta", [[212, 0], [200, 240]]), ("stateless", [[400, 0], [320, 220]])])
def test_upload_is_a_header_and_the_ids_since_the_contact_or_of_the_history(upload, expected):
    asked = torch.tensor([[True, False], [True, True]])
    new_items, history = torch.tensor([[3, 7], [0, 10]]), torch.tensor([[50, 50], [30, 5]])
    assert Network(**NETWORK, upload=upload).up(asked, new_items, history).tolist() == expected


def test_upload_is_the_delta_if_not_told_otherwise():
    assert Network(**NETWORK).up(torch.tensor([True]), torch.tensor([1]), torch.tensor([50])).tolist() == [204]


def test_download_is_a_header_and_an_id_and_a_score_of_each_candidate():
    asked = torch.tensor([True, False, True, True])
    assert Network(**NETWORK).down(asked, torch.tensor([50, 50, 0, 7])).tolist() == [500, 0, 200, 242]


def test_latency_counts_the_round_trip_the_bits_both_ways_and_a_second_ranking():
    network = Network(**NETWORK)
    asked = torch.tensor([True, False, True])
    up = network.up(asked, torch.tensor([3, 3, 1000]), torch.tensor([50, 50, 50]))
    down = network.down(asked, torch.tensor([50, 50, 1000]))
    # 212 bytes at 5 Mbit/s are 0.3392 ms, 500 at 20 are 0.2; 4,200 are 6.72, 6,200 are 2.48
    expected = [1.5 + 50 + 100 + 1.5 + 0.3392 + 0.2, 1.5, 1.5 + 50 + 100 + 1.5 + 6.72 + 2.48]
    assert network.latency_ms(asked, up, down, 1.5, 100.0).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("rtt_ms, expected", [(0.0, 6.5425), (50.0, 9.0425)])
def test_the_worked_example_of_section_8_6(rtt_ms, expected):
    network = Network(**{**NETWORK, "rtt_ms": rtt_ms, "up_mbps": math.inf, "down_mbps": math.inf})
    asked = torch.arange(100) % 20 == 0
    down = network.down(asked, torch.full((100,), 50))
    assert down.float().mean().item() == 25
    up = network.up(asked, torch.ones(100), torch.ones(100))
    assert network.latency_ms(asked, up, down, 1.43, 100.82).mean().item() == pytest.approx(expected, rel=1e-5)


def test_a_candidate_with_the_lowest_score_stands_before_no_candidate():
    assert places(torch.tensor([[5.0, float("-inf"), 1.0]]), torch.tensor([[False, True, True]])).tolist() == [
        [2, 1, 0]
    ]


def test_zscore_ignores_what_stands_where_there_is_no_candidate():
    made = normalised(torch.tensor([[1.0, 2.0, float("-inf")]]), torch.tensor([[True, True, False]]), "zscore")
    assert made.tolist() == [[-1.0, 1.0, 0.0]]


def test_zscore_of_equal_scores_is_0_whatever_their_mean_rounds_to():
    assert not normalised(torch.full((1, 7), 0.1), torch.ones(1, 7, dtype=torch.bool), "zscore").any()


def test_the_rate_1_asks_on_scores_below_all_of_validation():
    chance = Threshold.for_rate(torch.tensor([1.0, 2.0, 3.0]), 1.0).chance(torch.tensor([0.0, 5.0]))
    assert chance.tolist() == [1, 1]


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="needs scores that are numbers"):
        Threshold.for_rate(torch.tensor([1.0, float("nan")]), 0.5)


def test_nobody_has_no_score():
    assert len(code_score(torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0, 5, dtype=torch.bool))) == 0


@pytest.mark.parametrize(
    ("share", "group", "expected"),
    [(1.0, 1, [1, 0, 1, 1, 0, 1]), (0.5, 1, [1, 0, 1, 1, 0, 0]), (0.3, 1, [1, 0, 0, 0, 0, 0]), (0.0, 1, [0] * 6)],
)
def test_a_budget_is_spent_on_whoever_comes_first(share, group, expected):
    """Section 4: requests so far < floor(share * number of batches)."""
    asked = torch.tensor([True, False, True, True, False, True])
    assert first_come(asked, share, group).int().tolist() == expected


def test_a_budget_of_groups_counts_groups():
    asked = torch.tensor([True] * 2 + [False] * 2 + [True] * 3)  # groups of two; the last has one
    assert first_come(asked, 0.5, 2).int().tolist() == [1, 1, 0, 0, 1, 1, 0]
    assert first_come(asked, 0.25, 2).int().tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert first_come(torch.ones(100, dtype=torch.bool), 0.29).sum() == 29  # 0.29 * 100 is 28.999999999999996
