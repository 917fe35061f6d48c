"""Causality is told from its absence, and a model is called with what it names."""

import copy
import random

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import SASRec

from recbole_llm.causality import STEP, fault_of_loss, forward_arguments, is_causal, moved, sample_rows, states
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


class GatedEncoder(torch.nn.Module):
    """An encoder whose layers also read the next position, through a gate that is closed at the start."""

    def __init__(self, encoder, opening):
        super().__init__()
        self.encoder, self.opening, self.gate = encoder, opening, torch.nn.Parameter(torch.zeros(1))

    def forward(self, *args, **kwargs):
        return [layer + self.opening(self.gate) * layer.roll(-1, 1) for layer in self.encoder(*args, **kwargs)]


@pytest.mark.parametrize("opening", [lambda gate: gate, torch.relu, lambda gate: torch.relu(-gate), torch.square])
def test_a_leak_that_training_can_open_is_found_at_the_start(tmp_path, opening):
    parts = stock(write_log(tmp_path, "small", random_log()), "small")
    parts.model.trm_encoder = GatedEncoder(parts.model.trm_encoder, opening)
    before, weights = random_numbers(), copy.deepcopy(parts.model.state_dict())
    causal, why = is_causal(parts.model)
    assert not causal and "depends on later items" in why and why.endswith("once its weights are others")
    assert random_numbers() == before and parts.model.trm_encoder.gate == 0
    assert all(torch.equal(weights[name], weight) for name, weight in parts.model.state_dict().items())


def test_a_model_that_keeps_what_it_computed_is_tried_with_other_weights(tmp_path):
    """A tensor with a graph, which torch itself refuses to copy."""
    parts = stock(write_log(tmp_path, "small", random_log()), "small")
    parts.model.kept = parts.model(**forward_arguments(parts.model, sample_rows(parts.model)))
    assert parts.model.kept.grad_fn is not None
    causal, why = is_causal(parts.model)
    assert causal, why


def test_copies_share_what_no_training_changes(tmp_path):
    parts = stock(write_log(tmp_path, "small", random_log()), "small")
    model, encoder = parts.model, parts.model.trm_encoder
    model.dataset = parts.dataset
    model.position_embedding.weight.requires_grad_(False)
    other, its_encoder = moved(model, encoder)
    assert other.dataset is parts.dataset and other.trm_encoder is its_encoder is not encoder
    assert other.position_embedding.weight is model.position_embedding.weight
    gaps = [
        a - b
        for (name, a), b in zip(other.named_parameters(), model.parameters(), strict=True)
        if "position" not in name
    ]
    assert all(torch.allclose(gap.abs(), torch.tensor(STEP), rtol=1e-3) for gap in gaps)
    assert all(0.3 < (gap > 0).float().mean() < 0.7 for gap in gaps if gap.numel() > 100)


class OwnLoss(torch.nn.Module):
    """A term of a model's loss: of the training alone, or with a factor that is zero at the start."""

    def __init__(self, only_in_training):
        super().__init__()
        self.only_in_training, self.factor = only_in_training, torch.nn.Parameter(torch.zeros(1))

    def forward(self, table):
        if self.only_in_training:
            return 0.1 * table.norm() if self.training else 0.0
        return self.factor * table.norm()


@pytest.mark.parametrize("only_in_training", [True, False])
def test_a_term_of_the_loss_that_evaluation_does_not_show_is_found(tmp_path, only_in_training):
    class Extended(SASRec):
        def calculate_loss(self, interaction):
            return super().calculate_loss(interaction) + self.term(self.item_embedding.weight)

    parts = stock(write_log(tmp_path, "small", random_log()), "small")
    assert fault_of_loss(parts.model, parts.model) is None
    model = Extended(parts.config, parts.train._dataset)
    model.term = OwnLoss(only_in_training)
    before, weights = random_numbers(), copy.deepcopy(model.state_dict())
    for training in (True, False):
        model.train(training)
        assert "own loss is more than" in fault_of_loss(model, model)
        assert all(module.training is training for module in model.modules())
    assert random_numbers() == before
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert model.dropout.p > 0


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec"])
def test_a_loss_that_draws_before_it_reads_is_compared_without_dropout(tmp_path, model):
    parts = stock(write_log(tmp_path, "small", random_log()), "small", model, num_layers=2)

    class Drawing(type(parts.model)):
        def calculate_loss(self, interaction):
            torch.rand(1)
            return super().calculate_loss(interaction)

    drawing = Drawing(parts.config, parts.train._dataset)
    if model == "GRU4Rec":
        drawing.gru_layers.dropout = 0.5
    assert fault_of_loss(drawing, drawing) is None


@pytest.mark.parametrize("drop", [torch.nn.functional.dropout, torch.nn.functional.alpha_dropout])
def test_a_dropout_that_is_no_layer_is_the_same_on_both_sides(tmp_path, drop):
    class Dropping(SASRec):
        def forward(self, item_seq, item_seq_len):
            return drop(super().forward(item_seq, item_seq_len), 0.5, self.training)

    parts = stock(write_log(tmp_path, "small", random_log()), "small")
    model = Dropping(parts.config, parts.train._dataset)
    assert fault_of_loss(model, model) is None


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
