"""Losses over the catalogue equal their plain forms, and never hold all scores."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch.nn import functional

from recbole_llm import losses
from recbole_llm.distillation import robust_loss
from tests.memory import largest, most_at_a_time


def made_up(targets=23, n_items=31, width=8, dtype=torch.float64, scale=1.0):
    """States [T, d], a table [n_items, d] whose padding row is 0, and targets [T]."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(targets, width, generator=generator, dtype=dtype) * scale
    table = torch.randn(n_items, width, generator=generator, dtype=dtype)
    table[0] = 0
    target = torch.randint(1, n_items, (targets,), generator=generator)
    return states.requires_grad_(), table.requires_grad_(), target


def plain(states, table, target):
    return functional.cross_entropy(states @ table.T, target)


def value_and_gradients(loss, *inputs):
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@given(some.integers(1, 40), some.sampled_from([0.01, 1.0, 30.0]))
def test_chunks_give_the_loss_and_gradients_of_the_whole(rows, scale):
    states, table, target = made_up(scale=scale)
    ours = value_and_gradients(3 * losses.full_softmax_loss(states, table, target, rows), states, table)
    whole = value_and_gradients(3 * plain(states, table, target), states, table)
    for one, other in zip(ours, whole, strict=True):
        assert torch.allclose(one.double(), other, rtol=1e-4, atol=1e-6)


@given(some.integers(1, 40), some.sampled_from([0.01, 1.0, 30.0]), some.booleans(), some.sampled_from([0.0, 0.4, 1.0]))
def test_wanted_items_are_a_weighted_cross_entropy_over_real_items(rows, scale, with_targets, share):
    states, table, target = made_up(scale=scale)
    table.data[0] = 0.3  # a padding row that has scores of its own
    generator = torch.Generator().manual_seed(rows)
    labelled = torch.rand(len(states), generator=generator) < share
    items = torch.randint(1, len(table), (len(states), 3), generator=generator)
    weight = torch.rand(len(states), 3, generator=generator).double()

    def wanted(scores, chunk):
        assert torch.equal(
            scores.argsort(stable=True)[:, -1], (states @ table.T)[chunk].float().argsort(stable=True)[:, -1]
        )
        which = labelled[chunk].nonzero().squeeze(1)
        return which, items[chunk][which], weight[chunk][which].float()

    base, further = losses.soft_target_loss(states, table, target if with_targets else None, rows, wanted)
    scores = states @ table.T
    log_p = scores.gather(1, items) - scores[:, 1:].logsumexp(dim=1, keepdim=True)
    expected = -(weight * log_p)[labelled].sum()
    own = plain(states, table, target) if with_targets else expected.new_zeros(())
    assert base.item() == pytest.approx(own.item(), rel=1e-4, abs=1e-6)
    assert further.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    ours, theirs = (torch.autograd.grad(loss, (states, table)) for loss in (3 * base, 3 * (own + expected)))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=2e-5 * max(1.0, scale))


@pytest.mark.parametrize("with_targets", [False, True])
def test_a_padding_item_that_outweighs_all_hides_no_real_one(with_targets):
    """Scores of -25 beside the padding's 0: their sum is lost in a difference of float32."""
    states = torch.ones(1, 1, requires_grad=True)
    table = torch.tensor([[0.0], [-25.0], [-26.0]], requires_grad=True)
    given = torch.arange(1), torch.tensor([[2]]), torch.ones(1, 1)
    target = torch.tensor([1]) if with_targets else None
    base, further = losses.soft_target_loss(states, table, target, 1, lambda scores, chunk: given)
    assert further.item() == pytest.approx(math.log(1 + math.e), rel=1e-5)
    to_states, to_table = torch.autograd.grad(base, (states, table))
    p = 1 / (1 + math.exp(-1))
    wanted = [0.0, p, -p]  # of the real ones
    assert (to_table - torch.tensor([[1.0], [-1.0], [0.0]]) * with_targets).flatten().tolist() == pytest.approx(
        wanted, abs=1e-5
    )
    assert to_states.item() == pytest.approx(-25 * p + 26 * p + 25 * with_targets, abs=1e-4)


def test_scores_of_a_few_items_are_float32_also_under_autocast():
    states, table, target = made_up(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = losses.scores_of(states, table, target[:, None])
    assert scores.dtype == torch.float32
    assert torch.allclose(scores[:, 0], (states * table[target]).sum(dim=1), atol=1e-5)


def test_a_hopeless_target_has_a_finite_loss():
    """The target's probability is 0 in float32, its logarithm is not."""
    states = torch.tensor([[200.0]], requires_grad=True)
    table = torch.tensor([[0.0], [1.0], [-1.0]], requires_grad=True)
    loss = losses.full_softmax_loss(states, table, torch.tensor([2]), 1)
    assert loss.item() == pytest.approx(400.0)
    assert torch.autograd.grad(loss, states)[0].item() == pytest.approx(2.0)


def test_scores_of_all_targets_never_exist():
    states, table, target = made_up(targets=640, n_items=500, width=4)
    chosen = target[:, None] % 7 + 1

    def terms(scores, chunk):
        return functional.cross_entropy(scores, target[chunk], reduction="sum"), scores.gather(1, chosen[chunk]).sum()

    whole = largest(lambda: plain(states, table, target))
    assert whole == 640 * 500
    assert largest(lambda: losses.full_softmax_loss(states, table, target, 10)) == 10 * 500
    assert largest(lambda: sum(losses.chunked_loss(states, table, terms, 10))) <= 10 * 500

    def wanted(scores, chunk):
        return torch.arange(len(scores)), chosen[chunk], torch.ones(len(scores), 1)

    assert largest(lambda: losses.soft_target_loss(states, table, target, 10, wanted)[0]) == 10 * 500


def test_memory_of_many_terms_stays_within_what_is_said():
    """Cross entropy and DROS over all items, as in DLLM2Rec's code mode, the greediest terms there are."""
    states, table, target = made_up(targets=640, n_items=2000, width=4, dtype=torch.float32)
    propensity = losses.uniform(2000)

    def terms(scores, chunk):
        robust = robust_loss(scores, target[chunk, None], propensity, 1.0)
        return functional.cross_entropy(scores, target[chunk], reduction="sum"), robust.sum()

    rows = losses.rows_at_a_time(1, 2000 * losses.RECORDED, "cpu")
    held = most_at_a_time(lambda: losses.chunked_loss(states, table, terms, rows))
    assert 0.3 < held / 2**20 < 1
    rows = losses.rows_at_a_time(1, 2000, "cpu")
    assert 0.9 < most_at_a_time(lambda: losses.full_softmax_loss(states, table, target, rows)) / 2**20 < 1.4


def test_memory_is_in_mebibytes_of_float32():
    assert losses.rows_at_a_time(1, 1024, "cpu") == 256
    assert losses.rows_at_a_time(0, 1024, "cpu") == 2048
    assert losses.rows_at_a_time(0, 1024, "cuda") == 64 * 1024
    assert losses.rows_at_a_time(0.001, 10**6, "cpu") == 1


@given(some.integers(1, 40))
def test_any_terms_can_be_computed_in_chunks(rows):
    states, table, target = made_up()
    other = (target + 3) % 30 + 1

    def terms(scores, chunk):
        first = functional.cross_entropy(scores, target[chunk], reduction="sum")
        return first, 0.3 * functional.logsigmoid(scores.gather(1, other[chunk, None])).sum()

    parts = losses.chunked_loss(states, table, terms, rows)
    whole = terms(states @ table.T, slice(None))
    assert [part.item() for part in parts] == pytest.approx([part.item() for part in whole], rel=1e-5)
    ours, theirs = (value_and_gradients(sum(each), states, table) for each in (parts, whole))
    assert all(torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_narrow_states_get_narrow_gradients_and_a_scalers_factor_first():
    """Unscaled, these gradients are 0 in float16; a loss scaler multiplies before they become narrow."""
    states, table, target = made_up(targets=4096, n_items=5, dtype=torch.float32)
    narrow = (states.detach() * 1e-4).half().requires_grad_()
    tiny = (table.detach() * 1e-4).requires_grad_()
    loss = losses.full_softmax_loss(narrow, tiny, target, 64) * 65536.0
    to_states, to_table = torch.autograd.grad(loss, (narrow, tiny))
    assert to_states.dtype == torch.float16 and to_table.dtype == torch.float32
    assert (to_states != 0).float().mean() > 0.9


def test_sampled_softmax_of_everything_is_the_full_softmax():
    """With each item drawn once at probability 1/n: the estimate of the denominator is exact."""
    states, table, target = made_up()
    n = len(table) - 1
    drawn = torch.arange(1, n + 1)
    ours = losses.sampled_softmax_loss(states, table, target, drawn, losses.uniform(n + 1).double())
    assert torch.allclose(ours.double(), functional.cross_entropy(states @ table[1:].T, target - 1), rtol=1e-5)


@pytest.mark.parametrize("how", ["uniform", "popularity"])
def test_log_q_makes_the_denominator_unbiased(how):
    states, table, target = made_up(targets=5, scale=0.3)
    counts = torch.arange(len(table)) ** 2
    q = losses.uniform(len(table)) if how == "uniform" else losses.by_popularity(counts)
    generator = torch.Generator().manual_seed(1)
    drawn = losses.draw_negatives(q, 200_000, generator)
    ours = losses.sampled_softmax_loss(states.float(), table.float(), target, drawn, q)
    exact = functional.cross_entropy(states @ table[1:].T, target - 1)
    assert float(ours) == pytest.approx(float(exact), rel=0.01)
    biased = losses.sampled_softmax_loss(states.float(), table.float(), target, drawn, losses.uniform(len(table)) * 5)
    assert float(biased) != pytest.approx(float(exact), rel=0.01)


def test_gbce_by_hand():
    """N = 2 of 4 items, a = 2/3, t = 3/4: beta = 2/3 (3/4 (1 - 3/2) + 3/2) = 3/4; one draw is the target and does not count."""
    states = torch.tensor([[1.0]])
    table = torch.tensor([[0.0], [2.0], [-1.0], [0.5], [0.1]])
    loss = losses.gbce_loss(states, table, torch.tensor([1]), torch.tensor([1, 2]), 0.75)
    expected = -(0.75 * math.log(1 / (1 + math.exp(-2))) + math.log(1 - 1 / (1 + math.exp(1)))) / 3
    assert loss.item() == pytest.approx(expected)


def test_gbce_at_zero_is_binary_cross_entropy():
    states, table, target = made_up()
    drawn = torch.tensor([5, 9, 9])
    target = target.clamp(min=10)
    scores = states @ table.T
    positive = functional.logsigmoid(scores.gather(1, target[:, None]))[:, 0]
    expected = -(positive + functional.logsigmoid(-scores[:, drawn]).sum(dim=1)).mean() / 4
    assert float(losses.gbce_loss(states, table, target, drawn, 0.0)) == pytest.approx(float(expected), rel=1e-5)


def test_draws_never_are_padding_and_follow_popularity():
    counts = torch.tensor([1000, 0, 9, 89])
    q = losses.by_popularity(counts)
    assert q.tolist() == pytest.approx([0, 1 / 101, 10 / 101, 90 / 101])
    drawn = losses.draw_negatives(q, 20_000, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / 20_000
    assert share[0] == 0 and torch.allclose(share, q, atol=0.01)
    assert losses.uniform(5).tolist() == [0, 0.25, 0.25, 0.25, 0.25]
