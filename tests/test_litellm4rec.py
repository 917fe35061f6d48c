"""Lite-LLM4Rec: two levels, a head, two phases of training; what each setting of section 1.9 does, and what is refused."""

import copy
import math

import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed
from torch.nn import functional

from recbole_llm import load_recommender, pretrained
from recbole_llm.causality import is_causal, sample_rows
from recbole_llm.checkpoint import read_checkpoint
from tests.families import FAMILIES, make_family
from tests.pipelines import ring_settings
from tests.ring import TITLES, TOKENS, following


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_lm):
    """A folder per family."""
    return {name: make_family(name, tmp_path_factory.mktemp(name), tiny_lm) for name in FAMILIES}


class Run:
    """A model, its data and its trainer on the ring; histories are short, so that every position is trained on."""

    def __init__(self, data_path, llm, **more):
        settings = ring_settings(
            data_path,
            "LiteLLM4Rec",
            llm,
            **{"epochs": 30, "lite_head_width": 16, "MAX_ITEM_LIST_LENGTH": 5, **more},
        )
        self.config = Config(model="LiteLLM4Rec", dataset="ring", config_dict=settings)
        init_seed(self.config["seed"], self.config["reproducibility"])
        self.data = data_preparation(self.config, create_dataset(self.config))
        init_seed(self.config["seed"], self.config["reproducibility"])
        self.model = get_model("LiteLLM4Rec")(self.config, self.data[0]._dataset).to(self.config["device"])
        self.trainer = get_trainer(self.config["MODEL_TYPE"], "LiteLLM4Rec")(self.config, self.model)

    def fit(self, validates=True, **options):
        self.trainer.fit(self.data[0], self.data[1] if validates else None, show_progress=False, **options)
        self.model.eval()
        return self

    def test(self):
        return self.trainer.evaluate(self.data[2], show_progress=False)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_it_learns_the_ring_on_a_backbone_of_every_family(ring, folders, family):
    run = Run(ring, folders[family]).fit(validates=False)  # validation is at its best before the test rows are
    assert run.trainer.all_positions
    assert run.test()["recall@1"] == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        {"lite_head": "free"},
        {"lite_head": "tied+bias", "lite_head_width": 0},
        {"lite_rec_pool": "mean"},
        {"lite_rec_mask": "bidirectional", "lite_rec_pool": "mean"},
        {"lite_rec_mask": "bidirectional"},
        {"lite_item_pool": "last", "lite_use_id_embedding": False},
        {"lite_rec_layers": 1, "lite_rec_pretrained": False},
    ],
    ids=str,
)
def test_it_learns_the_ring_with_every_choice(ring, folders, settings):
    run = Run(ring, folders["bert"], **settings).fit(validates=False)
    assert run.trainer.all_positions == (settings.get("lite_rec_mask") != "bidirectional")
    # a mean over a history does not say which item was the last one
    assert run.test()["recall@1"] >= (0.3 if settings.get("lite_rec_pool") == "mean" else 1.0)


def test_another_model_may_recommend_than_reads_the_items(ring, folders):
    run = Run(ring, folders["bert"], lite_rec_llm=str(folders["llama"]))
    assert type(run.model.rec_llm.network).__name__ == "LlamaModel"
    assert type(run.model.item_reader(["", "a"]).backbone.network).__name__ == "BertModel"


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_padding_may_stand_on_either_side(ring, folders, mask, pool):
    model = Run(ring, folders["bert"], lite_rec_mask=mask, lite_rec_pool=pool).model.eval()
    right = torch.tensor([[3, 4, 5, 0, 0], [9, 0, 0, 0, 0]])
    left = torch.tensor([[0, 0, 3, 4, 5], [0, 0, 0, 0, 9]])
    length = torch.tensor([3, 1])
    with torch.no_grad():
        assert torch.allclose(model(right, length), model(left, length), atol=1e-5)
        assert (model(right, length)[0] - model(right, length)[1]).abs().max() > 1e-3


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_only_the_causal_mask_lets_every_position_be_trained(ring, folders, pool):
    causal = Run(ring, folders["bert"], lite_rec_pool=pool).model
    assert is_causal(causal)[0]
    both = Run(ring, folders["bert"], lite_rec_mask="bidirectional", lite_rec_pool=pool).model
    assert not is_causal(both)[0]
    run = Run(ring, folders["bert"], lite_rec_mask="bidirectional", positions="all")
    with pytest.raises(ValueError, match="positions=all: LiteLLM4Rec"):
        run.fit()


@pytest.mark.parametrize("head", ["tied", "free"])
def test_training_begins_near_the_loss_of_a_guess(ring, folders, head):
    run = Run(ring, folders["bert"], lite_head=head, lite_head_width=0)
    batch = sample_rows(run.model)
    with torch.no_grad():
        assert float(run.model.eval().calculate_loss(batch)) == pytest.approx(math.log(run.model.n_items), rel=0.15)


def test_scores_are_log_probabilities_and_the_padding_item_stands_last(ring, folders):
    run = Run(ring, folders["bert"])
    batch = run.data[2]._dataset[torch.arange(5)]
    with torch.no_grad():
        scores = run.model.eval().full_sort_predict(batch)
    assert torch.allclose(scores[:, 1:].exp().sum(dim=1), torch.ones(5), atol=1e-5)
    assert torch.equal(scores.argmin(dim=1), torch.zeros(5, dtype=torch.long))


def test_the_item_llm_is_frozen_unless_phase_b_is_asked_for(ring, folders):
    run = Run(ring, folders["bert"], epochs=2).fit()
    assert run.trainer.phase == "A" and run.model.item_llm is None
    assert not any(name.startswith("item_llm.") for name in run.model.state_dict())


@pytest.mark.parametrize("how", ["full", "partial", "lora"])
def test_phase_b_trains_the_item_llm_and_is_kept_if_it_is_better(ring, folders, how, caplog):
    """A stops at random weights here, so that B is better for sure."""
    rates = {"lite_unfreeze_rate": 1.0, "lite_unfreeze_epochs": 12, "epochs": 1}
    run = Run(ring, folders["bert"], lite_item_train=how, lite_item_layers=1, **rates)
    before = {name: weight.clone() for name, weight in run.model.item_reader(["", "a"]).named_parameters()}
    caplog.set_level("INFO")
    run.fit()
    assert run.trainer.phase == "B" and "B is kept" in caplog.text
    trained = {name for name, weight in run.model.item_llm.named_parameters() if weight.requires_grad}
    now = dict(run.model.item_llm.named_parameters())
    moved = {name for name in before if not torch.equal(now[name], before[name])}
    assert moved and moved <= trained
    result = run.test()
    saved = read_checkpoint(run.trainer.saved_model_file)
    assert {name.removeprefix("item_llm.") for name in saved["state_dict"] if name.startswith("item_llm.")} == trained
    again = get_model("LiteLLM4Rec")(saved["config"], run.data[0]._dataset)
    again.load_state_dict(saved["state_dict"])
    batch = run.data[2]._dataset[torch.arange(6)]
    with torch.no_grad():
        assert torch.allclose(again.eval().full_sort_predict(batch), run.model.full_sort_predict(batch), atol=1e-5)
    assert torch.allclose(again.item_reader(run.model.texts).table(), run.model.item_llm.table(), atol=1e-6)
    assert result["recall@10"] > 0.5


@pytest.mark.parametrize("rate", [0.0, 1000.0], ids=["equal", "worse"])
def test_phase_a_is_kept_if_phase_b_does_not_improve(ring, folders, caplog, rate):
    caplog.set_level("INFO")
    settings = {"lite_item_train": "full", "lite_unfreeze_rate": rate, "lite_unfreeze_epochs": 1, "epochs": 5}
    run = Run(ring, folders["bert"], **settings).fit()
    assert "A is kept" in caplog.text
    alone = Run(ring, folders["bert"], checkpoint_dir="alone", epochs=5).fit()
    assert run.trainer.best_valid_score == alone.trainer.best_valid_score
    kept, wanted = (read_checkpoint(each.trainer.saved_model_file)["state_dict"] for each in (run, alone))
    assert kept.keys() == wanted.keys() and all(torch.equal(kept[name], wanted[name]) for name in wanted)
    assert run.test() == alone.test()
    texts = run.model.texts
    assert torch.equal(run.model.item_reader(texts).table(), alone.model.item_reader(texts).table())


def test_items_that_are_added_after_phase_b_are_read_by_the_trained_item_llm(ring, folders):
    settings = {"lite_item_train": "full", "epochs": 1, "lite_unfreeze_rate": 1.0, "lite_unfreeze_epochs": 3}
    run = Run(ring, folders["bert"], **settings).fit()
    run.model.add_items([run.model.texts[5]])
    vectors = run.model.item_embedding.vectors
    assert torch.allclose(vectors[-1], vectors[5], atol=1e-5)


@pytest.mark.parametrize("learner", ["adam", "sgd"])
def test_the_rates_rise_for_so_many_steps_with_any_optimizer_and_after_a_resume(ring, folders, learner):
    settings = {"learner": learner, "lite_warmup_steps": 9, "epochs": 2, "train_batch_size": 128}
    run = Run(ring, folders["bert"], **settings)
    run.trainer.keep_in("run")
    rates = []
    run.fit(callback_fn=lambda epoch, score: rates.append(run.trainer.optimizer.param_groups[0]["lr"]))
    steps = run.trainer.optimizer.param_groups[0]["steps"] // 2
    assert 1 < steps < 9 and rates[0] == pytest.approx(0.01 * steps / 9) and rates[1] == pytest.approx(0.01)
    again = Run(ring, folders["bert"], **settings | {"epochs": 3})
    again.trainer.keep_in("run")
    again.fit()
    assert again.trainer.optimizer.param_groups[0]["steps"] == 3 * steps


def test_phase_b_begins_with_the_best_weights_of_phase_a(ring, folders, monkeypatch):
    """A is told that it soon gets worse; whether it does differs from machine to machine."""
    settings = {"lite_item_train": "full", "lite_unfreeze_epochs": 1, "epochs": 4}
    run, begins = Run(ring, folders["bert"], **settings), {}
    begin, validate = type(run.trainer)._begin_b, type(run.trainer)._valid_epoch
    told = iter([0.2, 0.3, 0.1, 0.1])

    def worse(trainer, *args, **more):
        score, result = validate(trainer, *args, **more)
        return next(told, score), result

    def noted(trainer, *args):
        begins["best"] = read_checkpoint(trainer.saved_model_file)
        begins["now"] = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        begins["last"] = len(trainer.train_loss_dict) - 1
        begin(trainer, *args)

    monkeypatch.setattr(type(run.trainer), "_begin_b", noted)
    monkeypatch.setattr(type(run.trainer), "_valid_epoch", worse)
    run.fit()
    best = begins["best"]["state_dict"]
    assert (begins["best"]["epoch"], begins["last"]) == (1, 3) and all(
        torch.equal(begins["now"][name], best[name]) for name in best
    )


@pytest.mark.parametrize(("every", "evaluations"), [(3, 2), (0, 0)])
def test_phase_b_is_validated_whatever_eval_step_is(ring, folders, caplog, every, evaluations):
    """Its epochs may be fewer than eval_step; without any validation nothing is said to be kept."""
    caplog.set_level("INFO")
    settings = {"lite_item_train": "full", "lite_unfreeze_epochs": 2, "epochs": 3, "eval_step": every}
    run, scores = Run(ring, folders["bert"], **settings), []
    run.fit(callback_fn=lambda epoch, score: scores.append(score))
    assert len(scores) == evaluations and (" is kept" in caplog.text) == bool(evaluations)
    assert ("from the best weights" if evaluations else "from the last weights") in caplog.text
    if not evaluations:
        saved = read_checkpoint(run.trainer.saved_model_file)
        assert any(name.startswith("item_llm.") for name in saved["state_dict"])


def test_without_files_nothing_is_said_to_be_kept(ring, folders, caplog):
    caplog.set_level("INFO")
    settings = {"lite_item_train": "full", "lite_unfreeze_rate": 1.0, "lite_unfreeze_epochs": 1, "epochs": 2}
    Run(ring, folders["bert"], **settings).fit(saved=False)
    assert "from the last weights" in caplog.text and "is kept" not in caplog.text and "with phase B" in caplog.text


def test_a_kill_between_the_first_checkpoint_of_phase_b_and_its_state_is_resumed_exactly(ring, folders, monkeypatch):
    settings = {
        "lite_item_train": "full",
        "epochs": 1,
        "lite_unfreeze_epochs": 3,
        "lite_unfreeze_rate": 1.0,
        "lite_dropout": 0.1,
    }
    whole = Run(ring, folders["bert"], checkpoint_dir="whole", **settings)
    whole.trainer.keep_in("whole/run")
    whole.fit()
    stopped = Run(ring, folders["bert"], checkpoint_dir="parts", **settings)
    stopped.trainer.keep_in("parts/run")
    write = stopped.trainer._write_resume

    def dies(epoch):
        if stopped.trainer.phase == "B" and epoch == 0:
            raise KeyboardInterrupt
        write(epoch)

    monkeypatch.setattr(stopped.trainer, "_write_resume", dies)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    resumed = Run(ring, folders["bert"], checkpoint_dir="parts", **settings)
    resumed.trainer.keep_in("parts/run")
    resumed.fit()
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert whole.trainer.best_valid_score == resumed.trainer.best_valid_score


def test_a_run_killed_in_phase_b_goes_on_there_and_ends_the_same(ring, folders):
    settings = {
        "lite_item_train": "full",
        "epochs": 2,
        "lite_unfreeze_epochs": 3,
        "lite_unfreeze_rate": 1.0,
        "lite_dropout": 0.1,
    }
    settings |= {"lite_fresh_items": 9}
    whole = Run(ring, folders["bert"], checkpoint_dir="whole", **settings)
    whole.trainer.keep_in("whole/run")
    whole.fit()
    stopped = Run(ring, folders["bert"], checkpoint_dir="parts", **settings)
    stopped.trainer.keep_in("parts/run")

    def kill(epoch, score):
        if stopped.trainer.phase == "B" and epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.fit(callback_fn=kill)
    resumed = Run(ring, folders["bert"], checkpoint_dir="parts", **settings)
    resumed.trainer.keep_in("parts/run")
    resumed.fit()
    assert resumed.trainer.phase == "B" and whole.trainer.best_valid_score == resumed.trainer.best_valid_score
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def unfrozen(ring, folders, **more):
    """A model in phase B, in training mode without dropout."""
    run = Run(ring, folders["bert"], lite_item_train="full", **more)
    run.model.unfreeze()
    return run.model.train()


@pytest.mark.parametrize(("head", "fresh"), [("free", 0), ("tied", -1), ("tied", 0)])
def test_gradients_of_phase_b_equal_those_of_reading_every_text_in_every_place(ring, folders, head, fresh):
    model = unfrozen(ring, folders, lite_head=head, lite_fresh_items=fresh)
    naive = copy.deepcopy(model)
    batch = sample_rows(model)
    model.calculate_loss(batch).backward()

    history = batch[model.ITEM_SEQ]
    read = torch.stack([naive.item_llm(item.view(1))[0] for item in history.flatten()]).view(*history.shape, -1)
    table = naive.item_embedding
    states = naive.rec_llm(table.projector(read) + table.own[history], history > 0)[:, -1]
    weight = table.free
    if head == "tied":
        own = {*history.flatten().tolist(), *batch[naive.POS_ITEM_ID].tolist()}
        every = [naive.item_llm(torch.tensor([item]))[0] for item in range(1, naive.n_items)]
        if fresh == 0:  # what is not in the batch scores, but is not read for its gradient
            assert len(own) < naive.n_items - 1
            every = [vector if item in own else vector.detach() for item, vector in enumerate(every, start=1)]
        every = torch.stack(every)
        inputs = table.projector(every) + table.own[1:]
        weight = table.to_head(torch.cat([torch.zeros_like(inputs[:1]), inputs]))
    functional.cross_entropy(naive.to_head(states) @ weight.T, batch[naive.POS_ITEM_ID]).backward()
    ours, theirs = (
        {name: weight.grad for name, weight in each.named_parameters() if weight.grad is not None}
        for each in (model, naive)
    )
    assert ours.keys() == theirs.keys()
    assert sum(name.startswith("item_llm.") and bool(grad.any()) for name, grad in ours.items()) > 10
    for name, grad in ours.items():
        assert torch.allclose(grad, theirs[name], rtol=1e-3, atol=1e-6), name


def test_targets_are_read_anew_at_all_positions_too(ring, folders):
    run = Run(ring, folders["bert"], lite_item_train="full")
    run.model.unfreeze()
    run.trainer._prepare(run.data[0])
    seen, read = [], run.model._read_batch
    run.model._read_batch = lambda items: (seen.append((items.clone(), run.model._wanted.clone())), read(items))
    run.trainer._train_epoch(run.data[0], 0)
    assert seen and all(bool((targets > 0).any()) and targets.shape == items.shape for items, targets in seen)


def test_items_outside_the_batch_keep_the_vector_that_was_read_last(ring, folders):
    model = unfrozen(ring, folders)
    before = model.item_embedding.vectors.clone()
    with torch.no_grad():
        for weight in model.item_llm.parameters():
            weight.mul_(1.1)
    batch = torch.tensor([[2, 5, 2, 0]])
    model(batch, torch.tensor([3]))
    changed = (model.item_embedding.vectors != before).any(dim=1).nonzero()[:, 0].tolist()
    assert changed == [2, 5]
    with torch.no_grad():
        model.eval()(batch, torch.tensor([3]))
    assert torch.allclose(model.item_embedding.vectors, model.item_llm.table(), atol=1e-6)


def test_only_so_many_items_are_read_anew_and_all_of_them_every_so_many_steps(ring, folders):
    model = unfrozen(ring, folders, lite_fresh_items=2, lite_refresh_steps=2)
    reads, read = [], model.item_llm.forward
    model.item_llm.forward = lambda items, progress=False: reads.append(len(items)) or read(items, progress)
    for _ in range(3):
        model(torch.tensor([[2, 5, 7, 9]]), torch.tensor([4]))
    assert reads == [2, 2, model.n_items, 2]


def test_one_network_may_be_both_levels(ring, folders, caplog):
    caplog.set_level("INFO")
    settings = {"lite_share_backbones": True, "lite_rec_layers": 0, "lite_item_train": "full", "epochs": 20}
    run = Run(ring, folders["bert"], lite_unfreeze_epochs=1, **settings).fit(validates=False)
    assert run.model.item_llm.backbone.network is run.model.rec_llm.network and "there is no phase A" in caplog.text
    assert len(run.trainer.train_loss_dict) == 20
    assert [group["peak"] for group in run.trainer.optimizer.param_groups] == [0.01, 0.001]
    assert run.test()["recall@1"] == 1.0
    saved = read_checkpoint(run.trainer.saved_model_file)
    assert not any(name.startswith("item_llm.") for name in saved["state_dict"])
    recommender = load_recommender(run.trainer.saved_model_file)
    recommender.add_items(["new"], ["blue otter"])
    assert not any(module.training for module in recommender.model.modules())


def test_one_drawn_network_for_both_levels_reads_the_items_itself(ring, folders):
    settings = {
        "lite_share_backbones": True,
        "lite_rec_layers": 0,
        "lite_item_train": "full",
        "lite_rec_pretrained": False,
    }
    model = Run(ring, folders["bert"], **settings).model.eval()
    model.read_items()
    read = model.item_reader(model.texts).table()
    assert torch.allclose(model.item_embedding.vectors, read, atol=1e-6)


def test_what_is_served_follows_the_model_to_another_number_format(ring, folders):
    model = Run(ring, folders["bert"]).model.eval()
    batch = sample_rows(model)
    with torch.no_grad():
        before = model.full_sort_predict(batch)
        after = model.double().full_sort_predict(batch)
    assert after.dtype == torch.float32 and torch.allclose(before, after, atol=1e-4)


def test_how_it_was_made_is_said_beside_results(ring, folders):
    settings = {"lite_rec_pretrained": False, "lite_item_train": "lora", "lite_lora_rank": 3}
    model = Run(ring, folders["bert"], **settings).model
    said = model.choices()
    assert (said["rec_llm"], said["rec_pretrained"], said["lora_rank"]) == (str(folders["bert"]), False, 3)
    assert (said["history"], said["positions"]) == (5, "all")
    assert model.provenance()["lite_rec_llm"] == "weights drawn at random"
    both = Run(ring, folders["bert"], lite_rec_mask="bidirectional").model
    assert both.choices()["positions"] == "last" and both.provenance()["lite_rec_llm"] == both.provenance()["llm"]


def test_the_revision_is_asked_for_wherever_the_llm_is_looked_for(ring, folders, monkeypatch):
    asked, find = [], pretrained.find
    monkeypatch.setattr(
        pretrained,
        "find",
        lambda name, revision=None, key="llm": asked.append((key, revision)) or find(name, None, key),
    )
    run = Run(ring, folders["bert"], llm_revision="v2", lite_rec_llm=str(folders["llama"]))
    run.model.read_items()
    run.model.provenance()
    run.model.item_reader(["", "a"])
    assert {revision for key, revision in asked if key == "llm"} == {"v2"}
    assert {revision for key, revision in asked if key == "lite_rec_llm"} == {None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lite_head": "tide"}, "lite_head=tide: .*There is tied, tied\\+bias, free"),
        ({"lite_item_train": "all"}, "lite_item_train=all: "),
        ({"lite_rec_mask": "none"}, "lite_rec_mask=none: "),
        ({"MAX_ITEM_LIST_LENGTH": 99}, "MAX_ITEM_LIST_LENGTH=99: the Recommendation LLM reads at most 64 vectors"),
        ({"lite_share_backbones": True}, "lite_share_backbones=True: one network cannot be frozen below"),
        ({"lite_rec_layers": 7}, "lite_rec_layers=7: .* has 2 layers; there is 0 \\(all\\) to 2"),
        ({"lite_rec_layers": -1}, "lite_rec_layers=-1: not possible; there is whole numbers from 0 upwards"),
        ({"lite_item_tokens": 0}, "lite_item_tokens=0: not possible; there is whole numbers from 1 upwards"),
        ({"lite_item_chunk": 0.5}, "lite_item_chunk=0.5: not possible"),
        ({"lite_fresh_items": -2}, "lite_fresh_items=-2: not possible"),
        ({"lite_head_width": -8}, "lite_head_width=-8: not possible"),
        ({"lite_unfreeze_rate": -0.1}, "lite_unfreeze_rate=-0.1: not possible; there is numbers from 0.0 upwards"),
        ({"lite_dropout": 1.5}, "lite_dropout=1.5: not possible; there is numbers from 0.0 to 1.0"),
        ({"lite_item_template": "{brand}"}, "lite_item_template=brand: no such column"),
    ],
)
def test_settings_that_do_not_fit_are_refused(ring, folders, settings, message):
    with pytest.raises(ValueError, match=message):
        Run(ring, folders["bert"], **settings)


def with_a_twin(ring):
    """The ring's item file with one item more, of which nobody has heard, that bears the title of item i05."""
    file = ring / "ring" / "ring.item"
    file.write_text(file.read_text() + f"i99\t{TITLES[5]}\n", encoding="utf-8")
    return ring


def test_a_cold_item_of_the_catalogue_ranks_beside_the_item_it_is_like(ring, folders):
    run = Run(with_a_twin(ring), folders["bert"], lite_use_id_embedding=False).fit()
    dataset = run.data[2]._dataset
    twin, known = dataset.token2id("item_id", "i99"), dataset.token2id("item_id", "i05")
    history = [dataset.token2id("item_id", token) for token in TOKENS[:5]]
    batch = sample_rows(run.model)[:1]
    batch.interaction[run.model.ITEM_SEQ] = torch.tensor([history])
    with torch.no_grad():
        best = run.model.full_sort_predict(batch)[0].topk(2).indices.tolist()
    assert sorted(best) == sorted([twin, known])


@pytest.mark.parametrize("own", [True, False])
def test_an_item_added_to_a_saved_model_is_recommended_without_training(ring, folders, own):
    run = Run(ring, folders["bert"], lite_use_id_embedding=own).fit()
    recommender = load_recommender(run.trainer.saved_model_file)
    history = list(TOKENS[:5])
    first = recommender.recommend(history, k=1)[0]
    assert first.token == following(history[-1])
    recommender.add_items(["new"], [first.title])
    ranked = recommender.recommend(history, k=len(TOKENS) + 1)
    place = [item.token for item in ranked].index("new")
    assert place < len(ranked) // 2, (
        "an item without history is put among those its text is like, also beside own vectors"
    )
    if not own:  # on the ring a title tells nothing that own vectors do not tell better
        assert sorted(item.token for item in ranked[:2]) == sorted(["new", first.token])
    assert next(item.title for item in ranked if item.token == "new") == first.title
    assert recommender.recommend([*history, "new"], k=1)
    with pytest.raises(ValueError, match="tokens: 1 tokens \\(1 of them known already\\), 1 texts"):
        recommender.add_items(["new"], ["again"])


def test_a_free_head_and_a_model_without_text_refuse_new_items(ring, folders):
    run = Run(ring, folders["bert"], lite_head="free", epochs=1).fit()
    with pytest.raises(ValueError, match="lite_head=free: scores only items that it was trained on"):
        load_recommender(run.trainer.saved_model_file).add_items(["new"], ["blue otter"])
