"""The backbone: every family reads with either mask, padding means nothing on either side, and what is trained is what was asked."""

import pytest
import torch
import transformers

from recbole_llm.backbone import Backbone, causal_by_training, configuration, reads_causally
from tests.families import FAMILIES, make_family

LENGTHS = torch.tensor([9, 4, 1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_lm):
    """A folder per family."""
    return {name: make_family(name, tmp_path_factory.mktemp(name), tiny_lm) for name in FAMILIES}


@pytest.fixture(params=sorted(FAMILIES))
def folder(request, folders):
    """The folder of each family."""
    return str(folders[request.param])


def right_padded(folder):
    """Vectors [3, 9, width] for a family, noise where there is padding, and what is real."""
    real = torch.arange(9) < LENGTHS[:, None]
    width = 16 if "electra" in str(folder) else 32
    return torch.randn(3, 9, width, generator=torch.Generator().manual_seed(0)), real


@pytest.mark.parametrize("causal", [True, False])
def test_padding_may_stand_on_either_side_and_says_nothing(folder, causal):
    backbone = Backbone.load(folder, causal=causal).eval()
    vectors, real = right_padded(folder)
    states = backbone(vectors, real)
    noise = torch.where(real[..., None], vectors, 7.0)
    assert torch.allclose(backbone(noise, real)[real], states[real], atol=1e-5)
    left, left_real = torch.full_like(vectors, -3.0), real.flip(1)
    left[left_real] = vectors[real]
    assert torch.allclose(backbone(left, left_real)[left_real], states[real], atol=1e-5)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = backbone(vectors[row : row + 1, :length], real[row : row + 1, :length])
        assert torch.allclose(alone[0], states[row, :length], atol=1e-5)


def test_a_causal_mask_hides_what_comes_later_and_the_other_one_does_not(folder):
    vectors, real = right_padded(folder)
    changed = vectors.clone()
    changed[0, 5:] = 2.0
    for causal in (True, False):
        backbone = Backbone.load(folder, causal=causal).eval()
        moved = (backbone(vectors, real) - backbone(changed, real))[0].abs().amax(dim=1)
        assert moved[5:].min() > 1e-3
        assert moved[:5].max() == 0 if causal else moved[:5].min() > 1e-4


def test_tokens_are_read_as_their_vectors_are(folder):
    backbone = Backbone.load(folder, causal=False).eval()
    tokens, (_, real) = torch.arange(2, 29).view(3, 9), right_padded(folder)
    table = backbone.network.get_input_embeddings()
    assert torch.allclose(backbone.read(tokens, real)[real], backbone(table(tokens), real)[real], atol=1e-5)


def test_fewer_layers_are_the_first_ones(folder):
    whole, short = Backbone.load(folder, causal=True), Backbone.load(folder, causal=True, layers=1)
    kept = dict(whole.named_parameters())
    assert all(torch.equal(weight, kept[name]) for name, weight in short.named_parameters())
    assert sum(weight.numel() for weight in short.parameters()) < sum(weight.numel() for weight in whole.parameters())
    with pytest.raises(
        ValueError, match=r"lite_rec_layers=3: .* has 2 layers; there is 0 \(all\) to 2. Set lite_rec_layers"
    ):
        Backbone.load(folder, causal=True, layers=3)


def test_without_the_table_of_tokens_vectors_are_read_as_before(folder):
    vectors, real = right_padded(folder)
    backbone = Backbone.load(folder, causal=True).eval()
    before = backbone(vectors, real)
    assert torch.equal(backbone.without_tokens()(vectors, real), before)


def test_weights_may_be_drawn_and_dropout_set(folder):
    torch.manual_seed(0)
    drawn = Backbone.load(folder, causal=True, pretrained_weights=False, dropout=0.0)
    loaded = Backbone.load(folder, causal=True, dropout=0.3)
    there = dict(drawn.named_parameters())
    assert any(not torch.equal(weight, there[name]) for name, weight in loaded.named_parameters())
    shares = {module.p for module in loaded.modules() if isinstance(module, torch.nn.Dropout)}
    assert shares <= {0.3}
    vectors, real = right_padded(folder)
    drawn.train()
    assert torch.equal(drawn(vectors, real), drawn(vectors, real))


@pytest.mark.parametrize("how", ["full", "partial", "lora", "frozen"])
def test_what_is_trained_is_what_was_asked(folder, how):
    backbone = Backbone.load(folder, causal=False)
    vectors, real = right_padded(folder)
    before = backbone.eval()(vectors, real)
    backbone.train_only(how, layers=1, rank=2)
    trained = {name for name, weight in backbone.named_parameters() if weight.requires_grad}
    everything = {name for name, _ in backbone.named_parameters()}
    if how == "full":
        assert trained == everything
    elif how == "frozen":
        assert not trained
    elif how == "partial":
        assert trained and all(".1." in name for name in trained)
        with pytest.raises(ValueError, match="lite_item_layers=3: the Item LLM has 2 layers; there is 1 to 2"):
            backbone.train_only(how, layers=3)
    else:
        assert trained and all("lora_" in name for name in trained)
    assert torch.allclose(backbone.eval()(vectors, real), before, atol=1e-6)


@pytest.mark.parametrize("reads", ["vectors", "tokens"])
def test_a_family_whose_attention_takes_no_mask_of_ours_is_refused_by_name(tmp_path, tiny_lm, reads):
    small = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.DebertaV2Config(**small, vocab_size=110, relative_attention=True, pos_att_type=["p2c", "c2p"])
    transformers.DebertaV2Model(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="lite_rec_llm=.*: a model of the family deberta-v2 cannot be read with masks of ours"
    ):
        Backbone.load(str(tmp_path), causal=False, key="lite_rec_llm", reads=reads)


def test_an_encoder_decoder_whose_encoder_cannot_be_had_is_refused_by_name(tmp_path):
    config = transformers.BartConfig(
        vocab_size=110, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    transformers.BartModel(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="llm=.*: a model of the family bart cannot be read.*its encoder cannot be had alone"
    ):
        Backbone.load(str(tmp_path), causal=False)


def test_a_family_that_reads_ahead_or_in_padding_is_found_out(folders):
    backbone = Backbone.load(str(folders["bert"]), causal=True)
    assert backbone.fault_of_reading("vectors") is None is backbone.fault_of_reading("tokens")
    masked = backbone._mask
    backbone._mask = lambda allowed: masked(torch.ones_like(allowed))
    assert backbone.fault_of_reading("vectors") == "what stands in padding changes what it says"
    backbone._mask = lambda allowed: masked(allowed | torch.tensor([True, False])[:, None, None, None])
    assert backbone.fault_of_reading("tokens") == "it reads what comes later"


def test_positions_are_those_that_a_row_may_use(folders):
    positions = {
        family: Backbone.load(str(folders[family]), causal=True).positions for family in ("bert", "roberta", "t5")
    }
    assert positions == {"bert": 64, "roberta": 63, "t5": None}
    roberta = Backbone.load(str(folders["roberta"]), causal=True)
    assert roberta(torch.randn(1, 63, 32), torch.ones(1, 63, dtype=torch.bool)).shape == (1, 63, 32)


def test_a_causal_model_saved_without_its_head_is_read_as_it_was_trained(tmp_path):
    small = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 110,
    }
    transformers.MistralModel(transformers.MistralConfig(**small, num_key_value_heads=2)).save_pretrained(tmp_path)
    config = configuration(tmp_path)
    assert config.architectures == ["MistralModel"] and reads_causally(config) and not causal_by_training(config)
    bert = transformers.BertConfig(**small, architectures=["BertModel"])
    assert not reads_causally(bert)


@pytest.mark.parametrize(("family", "wanted"), [("t5", torch.bfloat16), ("bert", torch.float16)])
def test_a_t5_stays_out_of_float16_whatever_enable_amp_asks_for(folders, family, wanted):
    backbone, seen = Backbone.load(str(folders[family]), causal=True), []
    layer = next(module for module in backbone.network.modules() if isinstance(module, torch.nn.Linear))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.float16):
        backbone(torch.randn(1, 3, 32), torch.ones(1, 3, dtype=torch.bool))
    backbone(torch.randn(1, 3, 32), torch.ones(1, 3, dtype=torch.bool))
    assert seen == [wanted, torch.float32]
