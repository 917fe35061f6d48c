"""The Item LLM: an item is read once however often it occurs, chunks change nothing, and vectors on disk are those of the texts."""

import shutil

import pytest
import torch

from recbole_llm import item_reader
from recbole_llm.artifacts import read_tensors, write_tensors
from recbole_llm.item_reader import ItemReader, item_vectors, width_of
from tests.families import FAMILIES, make_family

TEXTS = ["", "blue otter", "a very long green salmon", "tiger", "blue otter"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_lm):
    """A folder per family."""
    return {name: make_family(name, tmp_path_factory.mktemp(name), tiny_lm) for name in FAMILIES}


def reader(folder, **more):
    return ItemReader.load(str(folder), TEXTS, more.pop("pool", "mean"), more.pop("longest", 64), dropout=0.0, **more)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_a_vector_depends_on_its_own_text_alone(folders, family, pool):
    whole = reader(folders[family], pool=pool).table()
    small = reader(folders[family], pool=pool, tokens_at_once=1).table()
    assert whole.shape == (5, 32) and torch.allclose(whole, small, atol=1e-5)
    assert torch.equal(whole[0], torch.zeros(32)) and torch.allclose(whole[1], whole[4], atol=1e-6)
    assert (whole[1] - whole[2]).abs().max() > 1e-3


def test_mean_is_over_the_tokens_and_last_is_the_last_one(folders):
    model = reader(folders["bert"]).eval()
    tokens, count = model.tokens[3], int(model.length[3])
    states = model.backbone.read(tokens[None, :count], torch.ones(1, count, dtype=torch.bool))[0]
    assert torch.allclose(model.table()[3], states.mean(dim=0), atol=1e-6)
    model.pool = "last"
    assert torch.allclose(model.table()[3], states[-1], atol=1e-6)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_gradients_equal_those_of_reading_every_position_by_itself(folders, checkpointed):
    """Items once per batch, in chunks of like length, activations computed anew: loss and gradients as without all that."""
    sequence = torch.tensor([[1, 2, 1], [3, 2, 4]])
    weight = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))

    def gradients(read):
        model = reader(folders["bert"], tokens_at_once=30, checkpointed=checkpointed).train()
        loss = (read(model) * weight).tanh().sum()
        loss.backward()
        return loss.detach(), {name: grad.grad for name, grad in model.named_parameters() if grad.grad is not None}

    def once(model):
        items, place = sequence.unique(return_inverse=True)
        return model(items)[place]

    def naive(model):
        return torch.stack([torch.stack([model(item.view(1))[0] for item in row]) for row in sequence])

    (loss, ours), (wanted, theirs) = gradients(once), gradients(naive)
    assert torch.allclose(loss, wanted, rtol=1e-5) and ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-3, atol=1e-5), name


def test_texts_are_cut_behind_and_it_is_said(folders, caplog):
    short = reader(folders["bert"], longest=4)
    assert int(short.length.max()) == 4
    assert "4 of 5 texts are longer than 4 tokens and are cut" in caplog.text
    assert torch.equal(short.tokens[2], reader(folders["bert"]).tokens[2, :4])


class Reads:
    """Counts how often an Item LLM is loaded."""

    def __init__(self, monkeypatch):
        self.count = 0
        load = ItemReader.load.__func__

        def counted(cls, *args, **kwargs):
            self.count += 1
            return load(cls, *args, **kwargs)

        monkeypatch.setattr(item_reader.ItemReader, "load", classmethod(counted))


def vectors(folder, texts=TEXTS, pool="mean"):
    return item_vectors(str(folder), None, texts, pool, 64, "vectors", "cpu", False)


def test_vectors_are_read_once_and_anew_where_weights_or_texts_are_others(folders, tmp_path, monkeypatch):
    reads = Reads(monkeypatch)
    first = vectors(folders["bert"])
    assert torch.equal(first, vectors(folders["bert"])) and reads.count == 1
    permuted = vectors(folders["bert"], ["", TEXTS[3], TEXTS[2], TEXTS[1], TEXTS[4]])
    assert reads.count == 1 and torch.equal(permuted[1], first[3])
    changed = vectors(folders["bert"], [*TEXTS[:3], "lion", TEXTS[4]])
    assert (
        reads.count == 2 and not torch.equal(changed[3], first[3]) and torch.allclose(changed[1], first[1], atol=1e-5)
    )
    vectors(folders["bert"], pool="last")
    assert reads.count == 3
    other = shutil.copytree(folders["bert"], tmp_path / "other")
    state = read_tensors(other / "model.safetensors")
    name = next(key for key in state if key.endswith("attention.self.value.weight"))
    write_tensors(other / "model.safetensors", state | {name: state[name] * 2}, {"format": "pt"})
    assert not torch.allclose(vectors(other), first, atol=1e-3) and reads.count == 4


def test_a_damaged_file_of_vectors_is_read_anew(folders, tmp_path, monkeypatch):
    first = vectors(folders["bert"])
    (file,) = (tmp_path / "vectors").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    reads = Reads(monkeypatch)
    assert torch.equal(vectors(folders["bert"]), first) and reads.count == 1


def test_the_width_is_told_without_the_weights(folders):
    assert all(width_of(str(folder)) == 32 for folder in folders.values())
