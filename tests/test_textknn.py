"""TextKNN: cosines of the item reader's vectors, texts that items share, and ranking without a language model."""

import sys

import torch
from torch import tensor
from torch.nn import functional

from recbole_llm import load_recommender
from recbole_llm.item_reader import item_vectors
from recbole_llm.model.textknn import place_within
from tests.test_contract import Trained


def test_the_place_within_a_group():
    assert place_within(tensor([0, 1, 2, 1, 1]), tensor([0, 4, 3, 1, 2])).tolist() == [0, 2, 0, 0, 1]


def test_scores_are_cosines_of_the_decayed_history(ring, tiny_lm):
    run = Trained("TextKNN", ring, tiny_lm, textknn_decay=0.5, counting_repeats=True).fit()
    batch, model = run.batch(2), run.model
    vectors = item_vectors(str(tiny_lm), None, model.texts, "mean", 64, "vectors", "cpu", False)
    vectors = functional.normalize(vectors, dim=1)
    for scores, history in zip(run.scores(batch), batch[model.ITEM_SEQ].tolist(), strict=True):
        seen = [item for item in history if item][::-1]
        wanted = sum(0.5**age * vectors[item] for age, item in enumerate(seen))
        cosines = functional.normalize(wanted, dim=0) @ vectors.T
        assert torch.allclose(scores - 2, cosines, atol=1e-5)


def test_items_of_one_text_are_ranked_by_popularity(ring, tiny_lm):
    file = ring / "ring/ring.item"
    head, *rows = file.read_text(encoding="utf-8").splitlines()
    rows = [row.split("\t")[0] + "\tone title" for row in rows]
    file.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    run = Trained("TextKNN", ring, tiny_lm, textknn_decay=0, counting_repeats=True).fit()
    order = run.scores(run.batch(1))[0, 1:].argsort()
    assert order.tolist() == run.model.place[1:].argsort().tolist()
    assert len(run.model.vectors) == 2


def test_a_saved_model_ranks_without_its_llm(ring, tiny_lm, monkeypatch):
    run = Trained("TextKNN", ring, tiny_lm, textknn_decay=0.5, counting_repeats=True).fit()
    best = run.scores(run.batch(1))[0, 1:].argmax() + 1
    monkeypatch.setitem(sys.modules, "recbole_llm.item_reader", None)  # importing it raises
    found = load_recommender(run.trainer.saved_model_file)
    history = [token for token in run.batch(1)[run.model.ITEM_SEQ][0].tolist() if token]
    assert found.recommend([found.tokens[item] for item in history], k=1)[0].token == found.tokens[best]
