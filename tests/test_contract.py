"""What every model of this package keeps; a new one is tested by standing in the folder, without touching a test file."""

import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from recbole_llm.checkpoint import read_checkpoint
from recbole_llm.model import model_files
from tests.pipelines import ring_settings
from tests.ring import shuffled


class Trained:
    """A model trained on the ring, and the data it was trained on."""

    def __init__(self, name, data_path, tiny_lm, **more):
        self.config = Config(model=name, dataset="ring", config_dict=ring_settings(data_path, name, tiny_lm, **more))
        init_seed(self.config["seed"], self.config["reproducibility"])
        self.data = data_preparation(self.config, create_dataset(self.config))
        init_seed(self.config["seed"], self.config["reproducibility"])
        self.model = get_model(name)(self.config, self.data[0]._dataset).to(self.config["device"])
        self.trainer = get_trainer(self.config["MODEL_TYPE"], name)(self.config, self.model)

    def fit(self, **options):
        """Train, and leave the model as the trainer's last epoch left it."""
        self.trainer.fit(self.data[0], self.data[1], show_progress=False, **options)
        self.model.eval()
        return self

    def batch(self, count=6):
        """The first rows of the test split."""
        dataset = self.data[2]._dataset
        return dataset[torch.arange(count)]

    def scores(self, batch):
        """Scores of every item, without gradient."""
        with torch.no_grad():
            return self.model.full_sort_predict(batch.to(self.model.device)).view(len(batch), -1)


@pytest.fixture(params=sorted(model_files()))
def name(request):
    """Name of each model in the folder."""
    return request.param


@pytest.fixture
def trained(name, ring, tiny_lm):
    """Each model in the folder, trained."""
    return Trained(name, ring, tiny_lm).fit()


def test_scores_are_finite_and_predict_is_a_part_of_them(trained):
    batch = trained.batch()
    scores = trained.scores(batch)
    assert scores.shape == (len(batch), trained.model.n_items) and torch.isfinite(scores).all()
    assert scores.std(dim=1).min() > 0
    with torch.no_grad():
        own = trained.model.predict(batch)
    assert torch.allclose(own, scores.gather(1, batch[trained.model.ITEM_ID].unsqueeze(1)).squeeze(1), atol=1e-5)


def test_scores_depend_on_neither_batch_mates_nor_padding(trained):
    batch, model = trained.batch(), trained.model
    together = trained.scores(batch)
    alone = torch.cat([trained.scores(batch[torch.tensor([row])]) for row in range(len(batch))])
    assert torch.allclose(together, alone, atol=1e-4)
    longest = int(batch[model.ITEM_SEQ_LEN].max())
    trimmed = trained.batch()
    trimmed.interaction[model.ITEM_SEQ] = trimmed[model.ITEM_SEQ][:, :longest]
    assert torch.allclose(together, trained.scores(trimmed), atol=1e-4)


def test_saved_and_loaded_it_scores_the_same(trained):
    trained.trainer.evaluate(trained.data[2], load_best_model=True)
    expected = trained.scores(trained.batch())
    saved = read_checkpoint(trained.trainer.saved_model_file)
    model = get_model(type(trained.model).__name__)(saved["config"], trained.data[0]._dataset).to(
        saved["config"]["device"]
    )
    model.load_state_dict(saved["state_dict"])
    model.load_other_parameter(saved["other_parameter"])
    with torch.no_grad():
        again = model.eval().full_sort_predict(trained.batch()).view(*expected.shape)
    assert torch.allclose(again, expected, atol=1e-5)


def test_two_runs_with_one_seed_agree(name, ring, tiny_lm):
    first = Trained(name, ring, tiny_lm, checkpoint_dir="one").fit()
    second = Trained(name, ring, tiny_lm, checkpoint_dir="two").fit()
    assert torch.equal(first.scores(first.batch()), second.scores(second.batch()))


class Killed(Exception):
    """Stands for a process that ends in the middle."""


def test_killed_and_resumed_equals_uninterrupted(name, ring, tiny_lm, monkeypatch):
    whole = Trained(name, ring, tiny_lm, checkpoint_dir="whole")
    whole.trainer.keep_in("whole/run")
    whole.fit()
    stopped = Trained(name, ring, tiny_lm, checkpoint_dir="parts")
    stopped.trainer.keep_in("parts/run")

    def kill(epoch, score):
        raise Killed

    with pytest.raises(Killed):
        stopped.fit(callback_fn=kill)
    resumed = Trained(name, ring, tiny_lm, checkpoint_dir="parts")
    resumed.trainer.keep_in("parts/run")
    resumed.fit()
    assert torch.equal(whole.scores(whole.batch()), resumed.scores(resumed.batch()))
    assert whole.trainer.best_valid_score == resumed.trainer.best_valid_score


def test_an_unknown_setting_is_refused(name, ring, tiny_lm):
    with pytest.raises(ValueError, match=r"lerning_rate=1 \(did you mean 'learning_rate'\?\)"):
        Trained(name, ring, tiny_lm, lerning_rate=1)


def test_the_order_of_the_files_changes_nothing(name, ring, tiny_lm, tmp_path):
    """Scores by item token, for the user of one token, after the rows of both files were permuted."""
    other = shuffled(ring, tmp_path / "other")
    here = Trained(name, ring, tiny_lm, checkpoint_dir="here", epochs=1)
    there = Trained(name, other, tiny_lm, checkpoint_dir="there", epochs=1)
    if name == "DLLM2Rec":  # a student's own tables are drawn by internal id; what it learns from must be the same
        from recbole_llm.attached import attach
        from recbole_llm.knowledge import ensure

        known = [ensure(run.config, *run.data[:2]) for run in (here, there)]
        assert known[0].manifest["fingerprint"] == known[1].manifest["fingerprint"]
        assert torch.equal(known[0].items, known[1].items) and torch.equal(known[0].score, known[1].score)
        attach(known[0], there.data[0]._dataset, topk=10, history=2)
        return
    for run in (here, there):
        init_seed(run.config["seed"], run.config["reproducibility"])  # dropout draws, and two models were built
        run.fit()
    for token in ("u05", "u31"):
        assert torch.allclose(*(_scores_of(run, token) for run in (here, there)), atol=1e-4)


def _scores_of(run, token):
    dataset = run.data[2]._dataset
    user = dataset.token2id(dataset.uid_field, token)
    row = (dataset.inter_feat[dataset.uid_field] == user).nonzero()[:, 0]
    tokens = dataset.field2id_token[dataset.iid_field]
    order = sorted(range(1, len(tokens)), key=lambda item: tokens[item])
    return run.scores(dataset[row])[0][order]
