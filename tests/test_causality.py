"""Causality is told from its absence, and a model is called with what it names."""

import random

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_llm.causality import fault_of_loss, forward_arguments, is_causal, sample_rows, states
from tests.small_logs import random_log, stock, write_log


@pytest.fixture(autouse=True)
def one_thread(clean_process):
    """On tensors this small, threads only wait for each other."""
    torch.set_num_threads(1)


def test_states_put_the_model_back_even_after_an_error(tmp_path):
    parts = stock(write_log(tmp_path, "small", random_log()), "small", "STAMP")
    assert "gather_indexes" not in vars(parts.model)
    with pytest.raises(RuntimeError):
        states(parts.model, sample_rows(parts.model))
    assert "gather_indexes" not in vars(parts.model)

    def mine(output, index):
        return output

    parts.model.gather_indexes = mine
    with pytest.raises(RuntimeError):
        states(parts.model, sample_rows(parts.model))
    assert parts.model.gather_indexes is mine


ON_ROWS = ("SASRec", "GRU4Rec", "NARM", "STAMP", "Caser", "LightSANs", "NextItNet", "SINE", "HGN")
CAUSAL = {name: name in ("SASRec", "GRU4Rec") for name in (*ON_ROWS, "BERT4Rec")}


def random_numbers():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("model", CAUSAL)
def test_causality_is_told_and_nothing_is_left_behind(tmp_path, model):
    settings = {"residual_channels": 16, "block_num": 1} if model == "NextItNet" else {}
    parts = stock(write_log(tmp_path, "small", random_log()), "small", model, **settings)
    before, weights = random_numbers(), [weight.clone() for weight in parts.model.parameters()]
    for training in (True, False):
        parts.model.train(training)
        causal, why = is_causal(parts.model)
        assert causal is CAUSAL[model], why
        assert model in why and "\n" not in why
        assert all(module.training is training for module in parts.model.modules())
    assert random_numbers() == before
    assert all(torch.equal(a, b) for a, b in zip(weights, parts.model.parameters(), strict=True))


def test_a_model_that_peeks_at_later_items_is_caught(tmp_path):
    """A causal model that adds a little of the mean over all positions; its states have the right shape."""
    parts = stock(write_log(tmp_path, "small", random_log()), "small")
    plain_encoder = parts.model.trm_encoder.forward

    def peek(*args, **kwargs):
        layers = plain_encoder(*args, **kwargs)
        return [layer + 0.01 * layer.roll(-1, 1) for layer in layers]

    assert is_causal(parts.model)[0]
    parts.model.trm_encoder.forward = peek
    assert not is_causal(parts.model)[0]


@pytest.mark.parametrize("model", ON_ROWS)
def test_forward_is_called_on_rows_with_what_it_names(tmp_path, model):
    settings = {"residual_channels": 16, "block_num": 1} if model == "NextItNet" else {}
    parts = stock(write_log(tmp_path, "small", random_log()), "small", model, **settings)
    batch = Interaction(
        {name: parts.train._dataset.inter_feat[name] for name in ("user_id", "item_id_list", "item_length")}
    )
    parts.model.eval()
    scores = parts.model(**forward_arguments(parts.model, batch)) @ parts.model.item_embedding.weight.T
    if model not in ("SINE", "HGN"):  # these score by more than a product
        assert torch.allclose(
            scores.view(len(batch), -1), parts.model.full_sort_predict(batch).view(len(batch), -1), atol=1e-5
        )


@pytest.mark.parametrize(
    ("model", "fault"),
    [("SINE", None), ("FEARec", None), ("Caser", "own loss is more than"), ("HGN", "own loss is more than")],
)
def test_a_loss_is_compared_on_rows_as_wide_as_recboles(tmp_path, model, fault):
    """None of these runs on shorter ones."""
    parts = stock(write_log(tmp_path, "small", random_log()), "small", model)
    found = fault_of_loss(parts.model, parts.model)
    assert found is None if fault is None else fault in found


def test_a_forward_that_wants_the_target_is_refused(tmp_path):
    negatives = {"distribution": "uniform", "sample_num": 1}
    parts = stock(
        write_log(tmp_path, "small", random_log()), "small", "FPMC", loss_type="BPR", train_neg_sample_args=negatives
    )
    with pytest.raises(ValueError, match="model=FPMC: its forward wants 'next_item'"):
        forward_arguments(parts.model, sample_rows(parts.model))
