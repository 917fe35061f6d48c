"""Lite-LLM4Rec's items: where a score comes from, what is kept for serving, and items that come later."""

import copy

import pytest
import torch

from recbole_llm.tables import TextTable

VECTORS = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 30


def table(head="tied", own=True):
    torch.manual_seed(0)
    made = TextTable(7, 5, width=4, head_width=3, head=head, own_vectors=own, spread=0.1)
    made.begin_with(VECTORS)
    return made


def test_what_goes_in_is_projected_text_and_an_own_vector():
    made = table()
    items = torch.tensor([[3, 0, 6]])
    wanted = made.projector(VECTORS[items]) + made.own[items]
    assert torch.allclose(made(items)[0, [0, 2]], wanted[0, [0, 2]]) and torch.equal(made(items)[0, 1], torch.zeros(4))
    alone = table(own=False)
    assert torch.allclose(alone(items)[0, 0], alone.projector(VECTORS[3]))
    assert float(alone.inputs()[1:].detach().std()) == pytest.approx(0.1, rel=1e-4), (
        "whatever the scale of the text vectors"
    )


@pytest.mark.parametrize("head", ["tied", "tied+bias", "free"])
def test_the_head_scores_with_the_vectors_that_went_in_or_with_its_own(head):
    made = table(head)
    weight = made.weight
    if head == "free":
        assert weight is made.free
    else:
        assert torch.allclose(weight[:, :3], made.to_head(made.inputs())) and weight.shape[1] == 3 + (
            head == "tied+bias"
        )
    if head == "tied+bias":
        assert torch.equal(weight[:, 3], made.bias)
    weight.sum().backward()
    assert (made.projector.weight.grad is None) == (head == "free")


def test_what_is_kept_in_evaluation_is_let_go_by_training_loading_and_new_vectors():
    made, other = table().eval(), table()
    with torch.no_grad():
        assert made.weight is made.weight
        before = made.weight.clone()
        made.train().projector.weight.mul_(2)
        assert not torch.allclose(made.eval().weight, before)
        other.projector.weight.mul_(3)
        expected = other.eval().weight.clone()
        assert made.weight is made.weight
        made.load_state_dict(other.state_dict())
        assert torch.equal(made.weight, expected)
        made.hold(VECTORS + 1)
        assert not torch.allclose(made.weight, expected)
    assert made.weight.requires_grad, "nothing is kept where a gradient may be wanted"
    copy.deepcopy(made)


def test_vectors_in_use_carry_their_gradient_and_keep_their_values():
    made = table()
    vectors = (VECTORS + 1).requires_grad_()
    made.use(vectors)
    made(torch.tensor([2])).sum().backward()
    assert vectors.grad[2].abs().sum() > 0 and vectors.grad[3].abs().sum() == 0
    assert torch.equal(made.vectors, vectors.detach())
    copy.deepcopy(made)


@pytest.mark.parametrize("head", ["tied", "tied+bias"])
def test_a_new_item_with_an_old_text_scores_as_that_one_up_to_its_own_vector(head):
    made = table(head, own=False).eval()
    made.add(VECTORS[[2, 5]])
    with torch.no_grad():
        weight = made.weight
    assert weight.shape[0] == 9 and torch.allclose(weight[7], weight[2]) and torch.allclose(weight[8], weight[5])
    fused = table(head).eval()
    fused.add(VECTORS[[2]])
    assert torch.allclose(fused.own[7], fused.own[1:7].mean(dim=0))


def test_a_free_head_refuses_new_items():
    with pytest.raises(
        ValueError, match="lite_head=free: scores only items that it was trained on; there is lite_head=tied"
    ):
        table("free").add(VECTORS[[1]])


def test_first_values_follow_the_tokens_not_the_numbers():
    here, there = table("free"), table("free")
    names = ["[PAD]", "f", "a", "c", "e", "b", "d"]
    here.put_in_order(["[PAD]", *sorted(names[1:])])
    there.put_in_order(names)
    for number, name in enumerate(names[1:], start=1):
        other = 1 + sorted(names[1:]).index(name)
        assert torch.equal(there.own[number], here.own[other]) and torch.equal(there.free[number], here.free[other])
