"""DLLM2Rec's formulas against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.distillation import (
    candidate_confidence,
    consistency,
    kl_loss,
    own_lists,
    position_weight,
    principal_components,
    propensity_scores,
    ranking_loss,
    robust_loss,
    truth_confidence,
)


def test_position_weight_is_equation_6():
    assert position_weight(10, 1.0)[:6].tolist() == pytest.approx([0.632, 0.233, 0.086, 0.032, 0.012, 0.004], abs=6e-4)
    assert position_weight(2, 2.0).tolist() == pytest.approx([1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(0.5))])


@given(k=st.integers(1, 30), beta=st.floats(0.2, 20))
def test_position_weight_falls_and_sums_to_one(k, beta):
    weight = position_weight(k, beta)
    assert weight.sum().item() == pytest.approx(1, abs=1e-5)
    assert bool((weight.diff() <= 0).all())


def test_truth_confidence_is_equation_7_over_its_mean():
    distance = torch.tensor([0.0, math.log(2), math.log(4)])
    assert truth_confidence(-distance, 1.0).tolist() == pytest.approx([12 / 7, 6 / 7, 3 / 7])
    assert truth_confidence(-2 * distance, 2.0).tolist() == pytest.approx([12 / 7, 6 / 7, 3 / 7])


@given(st.lists(st.floats(-80, 80), min_size=2, max_size=20), st.floats(0.5, 10))
def test_truth_confidence_has_mean_one_and_the_order_of_the_scores(scores, temperature):
    scores = torch.tensor(scores)
    confidence = truth_confidence(scores, temperature)
    assert confidence.mean().item() == pytest.approx(1, rel=1e-4)
    assert bool((confidence[scores.argsort()].diff() >= 0).all())
    assert torch.allclose(truth_confidence(scores - 500, temperature), confidence, rtol=1e-3, atol=1e-4)


def test_candidate_confidence_is_the_released_softmax_over_existing_candidates():
    score = -torch.tensor([[0.0, math.log(2), -50.0], [1.0, 1.0, 1.0]])
    valid = torch.tensor([[True, True, False], [False, False, False]])
    assert candidate_confidence(score, valid, 1.0)[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert candidate_confidence(score, valid, 0.5)[0].tolist() == pytest.approx([4 / 5, 1 / 5, 0])
    assert candidate_confidence(score, valid, 1.0)[1].tolist() == [0, 0, 0], "a row without candidates must not be nan"


def test_consistency_marks_the_students_own_top_k_without_gradient():
    logits = torch.tensor([[99.0, 5.0, 4.0, 3.0, 2.0, 1.0], [99.0, 1.0, 2.0, 3.0, 4.0, 5.0]], requires_grad=True)
    items = torch.tensor([[1, 4, 0], [5, 3, 1]])
    marks = consistency(items, own_lists(logits, 3))
    assert marks.tolist() == [[1, 0, 0], [1, 1, 0]]
    assert not marks.requires_grad
    own = own_lists(logits, 10)
    assert consistency(torch.arange(1, 6).repeat(2, 2), own).tolist() == [[1] * 10] * 2, "K beyond the catalogue"


def ranking(logits, items, weight, form, negative=None):
    """`ranking_loss` of scores over all items; where there is no candidate, the weight is 0."""
    total = logits[:, 1:].logsumexp(dim=1) if form == "softmax" else None
    of_negative = None if negative is None else logits.gather(1, negative.unsqueeze(1)).squeeze(1)
    return ranking_loss(logits.gather(1, items), weight * (items > 0), total, of_negative)


def divergence(logits, items, of_teacher, temperature):
    """`kl_loss` of scores over all items."""
    return kl_loss(logits.gather(1, items), of_teacher, items > 0, temperature)


def test_sigmoid_ranking_loss_has_the_gradient_of_equation_9():
    logits = torch.tensor([[0.0, 2.0, -1.0, 0.5, 3.0]], requires_grad=True)
    items, weight = torch.tensor([[1, 3, 0]]), torch.tensor([[0.6, 0.3, 0.1]])
    loss = ranking(logits, items, weight, "sigmoid")
    expected = -0.6 * math.log(1 / (1 + math.exp(-2))) - 0.3 * math.log(1 / (1 + math.exp(-0.5)))
    assert loss.tolist() == pytest.approx([expected])
    loss.sum().backward()
    sigma = torch.sigmoid(torch.tensor([2.0, 0.5])).tolist()
    assert logits.grad[0].tolist() == pytest.approx([0, -0.6 * (1 - sigma[0]), 0, -0.3 * (1 - sigma[1]), 0])


def test_softmax_ranking_loss_pulls_towards_the_weights():
    logits = torch.tensor([[7.0, 2.0, -1.0, 0.5, 3.0]], requires_grad=True)
    items, weight = torch.tensor([[1, 3]]), torch.tensor([[0.6, 0.4]])
    loss = ranking(logits, items, weight, "softmax")
    p = torch.softmax(logits.detach()[0, 1:], dim=0).tolist()
    assert loss.tolist() == pytest.approx([-0.6 * math.log(p[0]) - 0.4 * math.log(p[2])])
    loss.sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([0, p[0] - 0.6, p[1], p[2] - 0.4, p[3]], abs=1e-6)


@given(shift=st.floats(-20, 20).filter(lambda x: abs(x) > 0.1), seed=st.integers(0, 99))
def test_only_the_softmax_form_is_shift_invariant(shift, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 9, generator=generator)
    items = torch.tensor([[1, 2], [3, 4], [8, 0]])
    weight = torch.tensor([[0.7, 0.3]]).expand(3, 2)
    for form, same in (("softmax", True), ("sigmoid", False)):
        before, after = ranking(logits, items, weight, form), ranking(logits + shift, items, weight, form)
        assert torch.allclose(before, after, rtol=1e-4, atol=1e-4) is same


def test_the_released_negative_is_pushed_below_one_with_every_candidate():
    logits = torch.tensor([[0.0, 2.0, -1.0, 1.0]], requires_grad=True)
    items, weight = torch.tensor([[1, 2, 0]]), torch.tensor([[0.5, 0.25, 0.25]])
    plain = ranking(logits, items, weight, "sigmoid")
    shared = ranking(logits, items, weight, "sigmoid", torch.tensor([3]))
    # -log sigma(1 - 1) = log 2, once for either candidate, none for the missing one
    assert (shared - plain).tolist() == pytest.approx([0.75 * math.log(2)])
    (shared - plain).sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([0, 0, 0, 0.75 * 0.5], abs=1e-6)


def test_missing_candidates_weigh_nothing():
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    items, weight = torch.tensor([[3, 0, 0], [0, 0, 0]]), torch.ones(2, 3)
    for form in ("sigmoid", "softmax"):
        loss = ranking(logits, items, weight, form)
        alone = ranking(logits[:1], items[:1, :1], weight[:1, :1], form)
        assert loss.tolist() == pytest.approx([alone.item(), 0])
    assert divergence(logits, items, -torch.ones(2, 3), 1.0).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_kl_over_the_teachers_candidates():
    logits = torch.tensor([[0.0, 1.0, 1.0, 9.0], [0.0, math.log(3), 0.0, 9.0]])
    items = torch.tensor([[1, 2, 0], [1, 2, 0]])
    score = -torch.tensor([[0.0, math.log(3), -9.0]]).expand(2, 3)
    # the teacher says 3/4 and 1/4, the students a half each and the same
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert divergence(logits, items, score, 1.0).tolist() == pytest.approx([expected, 0], abs=1e-6)
    half = divergence(logits, items, 2 * score, 2.0)
    assert half.tolist() == pytest.approx([expected, 0], abs=1e-6)


def test_propensity_scores():
    pi = propensity_scores(torch.tensor([50, 0, 1, 2]))
    assert pi.tolist() == pytest.approx([0, 0.914308, 0.946551, 0.965936], abs=1e-6)


@given(seed=st.integers(0, 200), beta=st.floats(0.5, 4))
def test_robust_loss_is_the_naive_formula(seed, beta):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 8, generator=generator)
    items = torch.randint(1, 8, (3, 2), generator=generator)
    pi = propensity_scores(torch.randint(0, 9, (8,), generator=generator))
    naive = torch.empty(3, 2, dtype=torch.float64)
    for row in range(3):
        for column, item in enumerate(items[row].tolist()):
            s = logits[row].double()
            total = sum(math.exp(pi[j] * s[j] ** 2 / beta) for j in range(1, 8))
            own, moved = math.exp(pi[item] * s[item] ** 2 / beta), math.exp(pi[item] * (s[item] - 1) ** 2 / beta)
            naive[row, column] = math.log(total - own + moved)
    assert torch.allclose(robust_loss(logits, items, pi, beta).double(), naive, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_robust_loss_stays_finite_for_large_logits(size):
    logits = (size * torch.tensor([[0.0, 1.0, -1.0, 0.2], [0.0, 0.1, 1.0, 0.0]])).requires_grad_()
    pi = propensity_scores(torch.tensor([0, 3, 2, 1]))
    loss = robust_loss(logits, torch.tensor([[1, 3], [1, 0]]), pi, 1.0)
    loss.sum().backward()
    assert bool(loss.isfinite().all()) and bool(logits.grad.isfinite().all())
    # the largest other energy rules: item 2, whose score is -size
    assert loss[0, 0].item() == pytest.approx(pi[2].item() * size**2, rel=0.1)


def test_principal_components_have_the_scale_and_span_of_the_first_directions():
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(12, 3, generator=generator))
    size = torch.tensor([9.0, 4.0, 1.0])
    vectors = torch.cat([torch.zeros(1, 12), torch.randn(40, 3, generator=generator) * size @ axes.T + 5])
    table = principal_components(vectors, 2, 0.1)
    assert table.shape == (41, 2) and table.dtype == torch.float32
    assert table[0].tolist() == [0, 0]
    assert table[1:].std().item() == pytest.approx(0.1, rel=1e-4)
    centred = vectors[1:] - vectors[1:].mean(dim=0)
    for column, axis in zip(table[1:].T, axes.T, strict=False):
        assert abs(torch.corrcoef(torch.stack([column, centred @ axis]))[0, 1]) > 0.9
    assert table[1:, 0].std() > 1.5 * table[1:, 1].std(), "whitened components lose their weight"


def test_whitened_components_are_equally_large():
    vectors = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([100.0, 5, 1, 1, 1, 1])
    assert principal_components(vectors, 4, 0.1, whiten=True)[1:].std(dim=0).tolist() == pytest.approx([0.1] * 4)


def test_principal_components_do_not_depend_on_the_signs_of_the_library(monkeypatch):
    vectors = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    before = principal_components(vectors, 4, 0.1)
    svd = torch.linalg.svd

    def turned(matrix, full_matrices):
        left, sizes, right = svd(matrix, full_matrices=full_matrices)
        signs = torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0, -1.0], dtype=right.dtype)
        return left * signs, sizes, right * signs.unsqueeze(1)

    monkeypatch.setattr(torch.linalg, "svd", turned)
    assert torch.allclose(principal_components(vectors, 4, 0.1), before)


def test_principal_components_follow_their_items():
    """The shuffled control: vectors of other items give every item another item's row."""
    vectors = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    order = torch.cat(
        [torch.zeros(1, dtype=torch.long), torch.randperm(19, generator=torch.Generator().manual_seed(2)) + 1]
    )
    table = principal_components(vectors, 4, 0.1)
    assert torch.allclose(principal_components(vectors[order], 4, 0.1), table[order], atol=1e-5)
    assert not torch.allclose(table[order], table, atol=1e-2)


def test_components_that_the_vectors_do_not_have_are_drawn():
    few = torch.randn(20, 2, generator=torch.Generator().manual_seed(1)) @ torch.randn(
        2, 30, generator=torch.Generator().manual_seed(2)
    )
    draw = [principal_components(few, 8, 0.1, False, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0][:, 2:], draw[2][:, 2:])
    assert torch.equal(draw[0][:, :2], draw[2][:, :2]), "the components that exist do not depend on the seed"
    assert draw[0][1:].std(dim=0).min() > 0.05, "a direction that only rounding has is no component"
    assert draw[0][0].tolist() == [0] * 8
