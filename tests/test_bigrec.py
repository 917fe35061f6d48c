"""BIGRec: grounding, statistics, repeats, twins and its trainer's settings, on the ring with a tiny random LLM."""

import logging
from pathlib import Path

import pytest
import torch

from recbole_llm.model.bigrec import with_finite_tail
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.teacher import identity, rank
from tests.pipelines import ring_settings
from tests.ring import TITLES, TOKENS
from tests.test_contract import Trained


class Scripted:
    """A language model that writes what it is told and whose vectors are one-hot letters counts."""

    digest, provenance, has_adapter = "scripted", "scripted", False

    def __init__(self, titles):
        self.titles = titles

    def generate(self, prompts, **_):
        """The next scripted titles, as the prompts come."""
        return [f'"{self.titles[number % len(self.titles)]}"\n' for number in range(len(prompts))]

    def answer_tokens(self, texts):
        """Letters."""
        return [list(map(ord, text)) for text in texts]

    def embed(self, texts, **_):
        """Counts of letters [n, 128]."""
        return torch.stack(
            [torch.bincount(torch.tensor([ord(c) for c in text]), minlength=128).float() for text in texts]
        )


@pytest.fixture
def model(ring, tiny_lm):
    """BIGRec on the ring, untrained."""
    return Trained("BIGRec", ring, tiny_lm)


def scripted(trained, titles):
    """Let a model write scripted titles."""
    trained.model.shared.lm = Scripted(titles)
    return trained


def internal(trained, title):
    """Internal id of the ring's item with a title."""
    dataset = trained.data[0]._dataset
    return int(dataset.token2id(dataset.iid_field, TOKENS[TITLES.index(title)]))


def test_a_catalogue_title_is_grounded_at_distance_zero_and_the_score_is_minus_the_distance(model):
    scripted(model, ["coral otter", "coral otters"])
    scores = model.scores(model.batch(2))
    item = internal(model, "coral otter")
    assert scores.argmax(dim=1).tolist() == [item, item]
    assert scores[0, item] == 0 and scores[1, item] == pytest.approx(-1), "one letter more: distance 1, not its square"


def test_reweighting_changes_ranks_but_not_the_scores_that_confidence_rests_on(model):
    scripted(model, ["coral otter"])
    batch = model.batch(4)
    plain_items, plain, target = rank(model.model, batch, 24)
    popular = internal(model, "violet tiger")
    model.model.reweight, model.model.gamma = "popularity", 64.0
    model.model.popularity = torch.zeros(model.model.n_items)
    model.model.popularity[popular] = 1.0
    items, score, again = rank(model.model, batch, 24)
    assert items[0, 0] == plain_items[0, 0], "the nearest item stays first"
    assert items[0, 1] == popular != plain_items[0, 1]
    assert torch.equal(again, target) and score[0, 1] == plain[0][plain_items[0] == popular]


@pytest.mark.parametrize(
    ("key", "value"),
    [("generate_beams", 0), ("generate_beams", 2.5), ("generate_tokens_per_batch", "a"), ("generate_max_new_tokens", 0),
     ("lora_max_length", 0), ("ground_found", 0)],
)  # fmt: skip
def test_numbers_that_it_cannot_write_or_learn_by_are_refused(ring, tiny_lm, key, value):
    with pytest.raises(ValueError, match=f"^{key}={value}: not possible; there is whole numbers from"):
        Trained("BIGRec", ring, tiny_lm, **{key: value})


def test_answers_that_leave_no_room_for_a_prompt_are_refused_before_it_is_tuned(ring, tiny_lm):
    with pytest.raises(
        ValueError, match="^generate_max_new_tokens=100000: .* tokens in all, prompt and answer; there is 1 to"
    ):
        run_recbole_llm(
            "BIGRec", "ring", config_dict=ring_settings(ring, "BIGRec", tiny_lm, generate_max_new_tokens=100_000)
        )


@pytest.mark.parametrize("index", ["exact", "hnsw", "ivfpq"])
def test_candidates_are_those_of_the_full_ranking(ring, tiny_lm, index):
    trained = scripted(
        Trained("BIGRec", ring, tiny_lm, ground_index=index), ["coral otter", "violet tigers", "", "coral"]
    )
    batch, model = trained.batch(4), trained.model
    items, score, target = rank(model, batch, 6)
    scores = trained.scores(batch)
    # letters' counts are whole, so many items are equally far
    assert torch.allclose(score, scores.topk(6).values, atol=1e-5) and torch.allclose(
        scores.gather(1, items), score, atol=1e-5
    )
    assert all(len(set(row)) == 6 and 0 not in row for row in items.tolist())
    assert torch.allclose(target, scores.gather(1, batch[model.ITEM_ID].unsqueeze(1))[:, 0], atol=1e-5)
    assert len(model.outputs) == 8, "what was written is kept both times"


def test_where_an_index_finds_no_more_the_last_score_stands():
    score = torch.tensor([[-1.0, -2.0, -torch.inf], [-3.0, -torch.inf, -torch.inf]])
    assert with_finite_tail(score).tolist() == [[-1.0, -2.0, -2.0], [-3.0, -3.0, -3.0]]


def test_no_title_is_embedded_twice(model, monkeypatch):
    scripted(model, ["coral otters", "no such animal"])
    model.model.item_embeddings()
    asked, embed = [], model.model.lm.embed
    monkeypatch.setattr(model.model.lm, "embed", lambda texts, **how: asked.append(list(texts)) or embed(texts, **how))
    for _ in range(2):
        model.scores(model.batch(4))
    assert asked == [["coral otters", "no such animal"]]
    rank(model.model, model.batch(4), 5)
    assert len(asked) == 2, "what labels it made depends on nothing that it wrote before"


def test_collaborative_statistics_come_from_a_saved_model(ring, tiny_lm):
    folder = Path(run_recbole_llm("SASRec", "ring", config_dict=ring_settings(ring, "SASRec", epochs=25))["folder"])
    file = str(folder / "model.safetensors")
    model = Trained("BIGRec", ring, tiny_lm, ground_reweight="collaborative", ground_collaborator=file)
    scripted(model, ["coral otter"])
    weight = model.model.statistics(model.batch(4))
    assert weight.shape == (4, 25) and weight[:, 1:].amax(dim=1).tolist() == [1] * 4
    assert torch.equal(weight.argmax(dim=1), model.batch(4)[model.model.ITEM_ID]), (
        "SASRec knows what follows on the ring"
    )
    with pytest.raises(ValueError, match="ground_collaborator=None: no such file"):
        Trained("BIGRec", ring, tiny_lm, ground_reweight="collaborative")


def test_gamma_is_chosen_on_validation_and_saved(ring, tiny_lm, caplog):
    with caplog.at_level(logging.INFO):
        trained = Trained("BIGRec", ring, tiny_lm, ground_reweight="popularity", state="info").fit()
    assert "chosen on 4 validation rows" in caplog.text
    assert trained.model.other_parameter()["gamma"] == trained.model.gamma in trained.config["ground_gammas"]
    other = Trained("BIGRec", ring, tiny_lm)
    assert identity(trained.config, labelling=False) != identity(other.config, labelling=False)


def test_repeats_titles_and_distinct_outputs_are_counted(model):
    batch = model.batch(2)
    repeat = model.model.text.of(batch[model.model.ITEM_SEQ][0])[0]
    scripted(model, [repeat, "no such animal"]).scores(batch)
    said = model.model.legality()
    assert (said["rows"], said["catalogue_titles"], said["repeats_history"], said["distinct"]) == (2, 0.5, 0.5, 1.0)


def test_a_target_that_shares_its_title_counts_as_the_first_of_it(ring, tiny_lm):
    file = ring / "ring/ring.item"
    file.write_text(file.read_text(encoding="utf-8").replace("violet tiger", "amber falcon"), encoding="utf-8")
    trained = scripted(Trained("BIGRec", ring, tiny_lm, teacher_eval_rows=0), ["amber falcon"])
    trained.trainer.evaluate(trained.data[2], load_best_model=False)
    targets = trained.data[2]._dataset.inter_feat[trained.model.ITEM_ID].tolist()
    ranks = [r for r, item in zip(trained.trainer.ranks, targets, strict=True) if item in trained.model.duplicates]
    assert ranks and set(ranks) == {0} and trained.trainer.legality["twin_rows"] == len(ranks)


def test_only_catalogue_titles_are_written_when_constrained(ring, tiny_lm):
    settings = {"generate_constrained": True, "generate_max_new_tokens": 40}
    trained = Trained("BIGRec", ring, tiny_lm, **settings)
    trained.scores(trained.batch(4))
    assert trained.model.legality()["catalogue_titles"] == 1.0


def test_loss_on_the_prompt_and_another_encoder_are_settings(ring, tiny_lm):
    answer, prompt = (
        Trained(
            "BIGRec", ring, tiny_lm, lora_train_on_prompt=whole, checkpoint_dir=f"saved_{whole}", learning_rate=0.01
        ).fit()
        for whole in (False, True)
    )
    states = [run.model.lm.adapter_state() for run in (answer, prompt)]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    named = Trained("BIGRec", ring, tiny_lm, ground_encoder=str(tiny_lm))
    assert named.model.encoder is not named.model.lm


def test_an_approximate_index_ranks_what_it_finds_and_puts_the_rest_below(ring, tiny_lm):
    trained = scripted(Trained("BIGRec", ring, tiny_lm, ground_index="hnsw", ground_found=5), ["coral otter"])
    scores = trained.scores(trained.batch(1))[0, 1:]
    assert len(scores.unique()) <= 6 and torch.isfinite(scores).all()
    assert int(scores.argmax()) + 1 == internal(trained, "coral otter")


@pytest.mark.parametrize("key, value", [("ground_metric", "l3"), ("ground_index", "tree"), ("llm_dtype", "fp16")])
def test_wrong_choices_are_told_before_any_tuning(key, value, ring, tiny_lm):
    with pytest.raises(ValueError, match=rf"{key}={value}: no such choice"):
        Trained("BIGRec", ring, tiny_lm, **{key: value})
    with pytest.raises(ValueError, match=rf"{key}={value}: no such choice"):
        run_recbole_llm(
            "DLLM2Rec", "ring", config_dict=ring_settings(ring, "DLLM2Rec", tiny_lm, **{f"teacher_{key}": value})
        )
    assert not Path("saved/teachers").exists()


def test_the_rows_a_given_teacher_was_tuned_on_are_its_own(ring, tiny_lm):
    trained = Trained("BIGRec", ring, tiny_lm, train_rows=100)
    other = Trained("BIGRec", ring, tiny_lm)
    other.model.load_other_parameter(trained.model.other_parameter())
    assert (
        torch.equal(other.model.trained_on(540), trained.model.trained_on(540))
        and other.model.trained_on(540).sum() == 100
    )
