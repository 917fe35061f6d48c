"""Histories read click by click: the scores are those of the whole history, whoever else clicks and however long it gets."""

import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_llm.sessions import Sessions
from tests.families import FAMILIES, make_family
from tests.test_litellm4rec import Run


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_lm):
    """A folder per family."""
    return {name: make_family(name, tmp_path_factory.mktemp(name), tiny_lm) for name in FAMILIES}


def whole(model, history):
    """Scores of one history read as a whole."""
    batch = {model.ITEM_SEQ: torch.tensor([history]), model.ITEM_SEQ_LEN: torch.tensor([len(history)])}
    with torch.no_grad():
        return model.full_sort_predict(Interaction(batch))[0]


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_click_by_click_scores_are_those_of_the_whole_history(ring, folders, family, pool):
    model = Run(ring, folders[family], lite_rec_pool=pool, lite_head="tied+bias").model.eval()
    sessions = Sessions(model, users=3)
    clicks = {0: [3, 4, 5, 6], 2: [9, 2, 7, 7]}
    first = sessions.click(torch.tensor([2]), torch.tensor([9]))
    assert torch.allclose(first[0], whole(model, [9]), atol=1e-4)
    histories = {0: [], 2: [9]}
    for step in range(3):
        users = torch.tensor([2, 0] if step % 2 else [0, 2])
        new = {0: clicks[0][step], 2: clicks[2][step + 1]}
        scores = sessions.click(users, torch.tensor([new[int(user)] for user in users]))
        for user in histories:
            histories[user].append(new[user])
        for row, user in enumerate(users.tolist()):
            assert torch.allclose(scores[row], whole(model, histories[user]), atol=1e-4)


def test_a_history_that_has_become_too_long_goes_on_with_its_later_half(ring, folders):
    model = Run(ring, folders["bert"]).model.eval()  # reads five items
    sessions = Sessions(model, users=2)
    for item in range(1, 6):
        scores = sessions.click(torch.tensor([0, 1]), torch.tensor([item, item + 10]))
    assert torch.allclose(scores[1], whole(model, [11, 12, 13, 14, 15]), atol=1e-4)
    scores = sessions.click(torch.tensor([1]), torch.tensor([16]))
    assert torch.allclose(scores[0], whole(model, [14, 15, 16]), atol=1e-4)
    scores = sessions.click(torch.tensor([1, 0]), torch.tensor([17, 6]))
    assert torch.allclose(scores[0], whole(model, [14, 15, 16, 17]), atol=1e-4)
    assert torch.allclose(scores[1], whole(model, [4, 5, 6]), atol=1e-4)


def test_a_user_may_begin_anew(ring, folders):
    model = Run(ring, folders["llama"]).model.eval()
    sessions = Sessions(model, users=1)
    sessions.click(torch.tensor([0]), torch.tensor([3]))
    sessions.forget(torch.tensor([0]))
    assert torch.allclose(sessions.click(torch.tensor([0]), torch.tensor([8]))[0], whole(model, [8]), atol=1e-4)


def test_a_model_that_reads_both_ways_is_refused(ring, folders):
    model = Run(ring, folders["bert"], lite_rec_mask="bidirectional").model
    with pytest.raises(
        ValueError, match="lite_rec_mask=bidirectional: a new click changes what is read of all earlier ones"
    ):
        Sessions(model, users=1)


def test_a_family_that_cannot_keep_what_it_read_is_refused(ring, folders):
    with pytest.raises(ValueError, match="this family cannot keep what it has read"):
        Sessions(Run(ring, folders["t5"]).model, users=1)
