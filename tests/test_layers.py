"""Faster layers are the same functions, and only while they are asked for."""

import pytest
import torch
from recbole.model.layers import FeedForward
from torch import nn

from recbole_llm.layers import dropout, fast_layers, fuse_optimizer
from tests.small_logs import random_log, stock, write_log


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_dropout_zeroes_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    inputs = torch.ones(1001, 333, requires_grad=True)  # no multiple of the four numbers of a word
    outputs = dropout(inputs, p)
    dropped = outputs == 0
    assert dropped.float().mean().item() == pytest.approx(p, abs=0.003)
    # each of the four numbers of a word, and neighbours, are independent
    flat = dropped.flatten()[: 4 * (dropped.numel() // 4)].view(-1, 4).float()
    assert flat.mean(dim=0).tolist() == pytest.approx([p] * 4, abs=0.005)
    if 0 < p < 1:
        assert torch.corrcoef(flat.T).fill_diagonal_(0).abs().max() < 0.02
        assert outputs[~dropped].unique().item() == pytest.approx(1 / (1 - p))
    (outputs * 2).sum().backward()
    assert torch.equal(inputs.grad, outputs.detach() * 2)


def test_dropout_draws_from_torchs_generator_and_rounds_p_finely():
    torch.manual_seed(3)
    first = dropout(torch.ones(64), 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(torch.ones(64), 0.5))
    torch.manual_seed(0)
    assert dropout(torch.ones(10**7), 0.001).eq(0).float().mean().item() == pytest.approx(0.001, abs=1e-4)


def test_a_models_layers_are_faster_only_for_a_while(tmp_path):
    parts = stock(write_log(tmp_path, "small", random_log()), "small")
    model, batch = parts.model, parts.train._dataset.inter_feat[torch.arange(8)]
    gelu = next(module for module in model.modules() if isinstance(module, FeedForward))
    assert gelu.intermediate_act_fn == gelu.gelu
    model.eval()
    own = model.full_sort_predict(batch)
    with fast_layers(model):
        assert gelu.intermediate_act_fn is torch.nn.functional.gelu
        assert torch.allclose(model.full_sort_predict(batch), own, atol=1e-6)  # no dropout outside of training
        model.train()
        assert not torch.allclose(model.full_sort_predict(batch), own, atol=1e-3)
    assert gelu.intermediate_act_fn == gelu.gelu
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_a_fused_step_is_the_same_step(kind):
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(20, 30)
        optimizer = kind(layer.parameters(), lr=0.1, weight_decay=0.01)
        if fused:
            fuse_optimizer(optimizer)
        assert bool(optimizer.param_groups[0].get("fused")) is (fused and kind is not torch.optim.SGD)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(4, 20)).square().sum().backward()
            optimizer.step()
        weights.append(layer.weight.detach())
    assert torch.allclose(*weights, atol=1e-5)


def test_layers_come_back_after_an_error_and_unknown_ones_are_left():
    class Mine(nn.Dropout):
        pass

    model = nn.Sequential(nn.Dropout(0.5), Mine(0.5))

    def fail():
        with fast_layers(model):
            assert "forward" in vars(model[0]) and "forward" not in vars(model[1])
            raise RuntimeError("in the middle of an epoch")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert "forward" not in vars(model[0])
