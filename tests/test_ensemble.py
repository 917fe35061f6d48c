"""Two finished models as one: the mathematics, the choice on validation rows, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from recbole_llm import Config, ensemble
from recbole_llm.ensemble import Part, Ranker, best, mixture, part_of_run, part_of_teacher, standard
from recbole_llm.quick_start import load_data, run_recbole_llm
from recbole_llm.report import row_metric, summary
from tests.pipelines import ring_settings

INF = float("inf")


def test_standard_scores_are_deviations_of_real_items():
    scores = torch.tensor([[100.0, 1, 2, 3], [-INF, 10, 10, 40]])
    expected = [[-INF, -1.224745, 0, 1.224745], [-INF, -0.707107, -0.707107, 1.414214]]
    assert_close(standard(scores), torch.tensor(expected), atol=1e-5, rtol=0)


def test_an_item_without_a_score_stands_below_all_that_have_one():
    found = standard(torch.tensor([[0.0, 5, -INF, 3]]))
    assert torch.isfinite(found[:, 1:]).all() and found[0, 2] < found[0, 3] < found[0, 1]


def test_a_mixture_is_the_weighted_sum_of_log_probabilities():
    a, b = torch.tensor([[-INF, 0.0, 0.0]]), torch.tensor([[-INF, 0.0, 1.0986123]])
    # ln(1/2), and ln(1/4), ln(3/4)
    expected = torch.tensor([[-INF, 0.75 * -0.693147 + 0.25 * -1.386294, 0.75 * -0.693147 + 0.25 * -0.287682]])
    assert_close(mixture(a, b, 0.25, "log-probability"), expected, atol=1e-5, rtol=0)


def test_probabilities_are_told_although_the_padding_item_is_at_minus_infinity():
    sure = torch.tensor([[-INF, 0.9, 0.1]])
    flat = torch.tensor([[-INF, 3.0, 3.0]])
    found = mixture(sure, flat, 0.5, "log-probability")
    assert float(found[0, 1] - found[0, 2]) == pytest.approx(0.5 * 2.197225, abs=1e-5)


@pytest.mark.parametrize("norm", ensemble.NORMS)
def test_at_both_ends_one_model_keeps_its_scores_to_the_bit(norm):
    a, b = torch.randn(2, 3, 9).unbind()
    a[0, 4] = a[0, 5]
    for weight, alone in ((0.0, a), (1.0, b)):
        found = mixture(a, b, weight, norm)
        assert torch.equal(found, alone) and found.data_ptr() != alone.data_ptr()
    assert torch.equal(mixture(a, b, 0.3, norm)[:, 0], torch.full((3,), -INF))


def test_the_first_of_equals_is_chosen_whichever_direction_is_better():
    found = {("x", 0.0): 0.2, ("x", 0.5): 0.7, ("y", 0.5): 0.7, ("y", 1.0): 0.1}
    assert best(found, bigger=True) == ("x", 0.5) and best(found, bigger=False) == ("y", 1.0)


def test_pieces_hold_every_row_once_and_no_more_scores_than_allowed(monkeypatch):
    monkeypatch.setattr(ensemble, "SCORES_AT_ONCE", 100)
    pieces = list(ensemble.batches(torch.arange(11), 25))
    assert torch.cat(pieces).tolist() == list(range(11)) and max(map(len, pieces)) == 4
    assert [len(piece) for piece in ensemble.batches(torch.arange(2), 1000)] == [1, 1]


# On the ring ----------------------------------------------------------------------------------------------------------


class Setup:
    """SASRec and GRU4Rec, hardly trained and with histories of different length, and the data of a run."""

    def __init__(self, data_path, **more):
        more = {"topk": [1, 5, 10], "valid_metric": "MRR@10", "epochs": 2, **more}
        settings = {
            "SASRec": ring_settings(data_path, "SASRec", **more, learning_rate=0.001),
            "GRU4Rec": ring_settings(data_path, "GRU4Rec", **more, learning_rate=0.01) | {"MAX_ITEM_LIST_LENGTH": 3},
        }
        self.runs = [run_recbole_llm(model, "ring", config_dict=each) for model, each in settings.items()]
        self.lines = [run["lines"][0] for run in self.runs]
        self.parts = [part_of_run(run["folder"]) for run in self.runs]
        self.config = Config("SASRec", "ring", None, settings["SASRec"], read_argv=False)
        self.data = load_data(self.config)

    def ensemble(self, folder="both", parts=None):
        """The line of both."""
        return ensemble.ensemble(self.config, self.data, parts or self.parts, "both", Path(folder))

    def scores(self, split: str) -> list[torch.Tensor]:
        """What each model says of all rows of a split, by the shortest way."""
        found = []
        for part in self.parts:
            ranker = Ranker(part, self.data)
            dataset = ranker.loaders[split]._dataset
            with torch.no_grad():
                scores = ranker.trainer.model.full_sort_predict(dataset[torch.arange(len(dataset))])
            found.append(scores.view(len(dataset), -1))
        return found

    def ranks(self, split: str, norm: str, weight: float) -> list[int]:
        """Ranks of the targets under a choice, counted: how many real items, not seen if that is asked for, are better."""
        a, b = self.scores(split)
        if norm == "standard":
            a, b = ((x - x[:, 1:].mean(1, keepdim=True)) / x[:, 1:].std(1, correction=0, keepdim=True) for x in (a, b))
        scores = (1 - weight) * a + weight * b
        dataset = getattr(self.data, split)._dataset
        scores[:, 0] = -INF
        if self.config["seen_items"] == "mask":
            for row, batch in enumerate(dataset[torch.arange(len(dataset))]["item_id_list"]):
                scores[row, batch] = -INF
        target = dataset.inter_feat["item_id"]
        ranks = (scores > scores.gather(1, target[:, None])).sum(1)
        return [rank if rank < 10 else -1 for rank in ranks.tolist()]


@pytest.fixture
def setup(ring):
    """Both models on the ring."""
    return Setup(ring)


@pytest.mark.parametrize("seen", ["keep", "mask"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_at_the_ends_of_the_grid_a_line_is_that_of_one_model(ring, monkeypatch, weight, seen):
    setup = Setup(ring, seen_items=seen)
    monkeypatch.setattr(ensemble, "WEIGHTS", (weight,))
    line, alone = setup.ensemble(), setup.lines[int(weight)]
    assert line.ranks == alone.ranks and line.metrics == alone.metrics and line.valid == alone.valid
    assert len(set(line.ranks)) > 3 and setup.lines[0].ranks != setup.lines[1].ranks, "nothing to tell apart"


@pytest.mark.parametrize("seen", ["keep", "mask"])
def test_norm_and_weight_are_the_best_on_validation_rows(ring, seen):
    setup = Setup(ring, seen_items=seen, MAX_ITEM_LIST_LENGTH=12)  # all that was seen can be read off a row
    line = setup.ensemble()
    tried = {}
    for norm in ensemble.NORMS:
        for place, weight in enumerate(ensemble.WEIGHTS):
            tried[norm, weight] = float(row_metric(setup.ranks("valid", norm, weight), "mrr", 10).mean())
            assert line.notes["tried"][norm][place] == pytest.approx(tried[norm, weight], abs=1e-6)
    norm, weight = best(tried, bigger=True)
    assert (line.notes["norm"], line.notes["weight"]) == (norm, weight) and 0 < weight < 1
    assert line.valid["mrr@10"] == pytest.approx(tried[norm, weight], abs=1e-6)
    assert line.ranks == setup.ranks("test", norm, weight) and line.rows is None
    assert line.metrics["mrr@10"] == pytest.approx(row_metric(line.ranks, "mrr", 10).mean(), abs=1e-6)
    assert line.notes["validation_rows"] == 60 and set(line.seconds) == {"choose", "test"}
    assert f"both: weight of GRU4Rec={weight}, norm={norm}." in summary([line], ["MRR"], [10], "MRR@10")


def test_test_rows_have_no_say_in_the_choice(setup, monkeypatch):
    """The second model knows all answers of the test and is wrong about all validation rows."""
    plain = Ranker.scored

    def scored(self, split, rows):
        batch, scores, places, targets = plain(self, split, rows)
        if self.part.name == "GRU4Rec":
            scores[places, targets] = 1e6 if split == "test" else -1e6
        return batch, scores, places, targets

    monkeypatch.setattr(Ranker, "scored", scored)
    line = setup.ensemble()
    assert line.notes["weight"] == 0 and line.ranks == setup.lines[0].ranks and line.metrics["recall@1"] < 1


def test_each_model_scores_each_row_once_in_batches(setup, monkeypatch):
    plain, asked = Ranker.scored, []

    def scored(self, split, rows):
        asked.append((self.part.name, split, rows))
        return plain(self, split, rows)

    with monkeypatch.context() as patch:
        patch.setattr(ensemble, "ROWS_AT_ONCE", 7)
        patch.setattr(Ranker, "scored", scored)
        line = setup.ensemble()
    for name in ("SASRec", "GRU4Rec"):
        for split in ("valid", "test"):
            rows = [some for who, where, some in asked if (who, where) == (name, split)]
            assert torch.cat(rows).tolist() == list(range(60)) and max(map(len, rows)) == 7
    assert setup.ensemble("whole").ranks == line.ranks


def test_a_finished_ensemble_is_taken_from_its_folder_unless_something_is_another(setup, monkeypatch):
    line = setup.ensemble()
    with monkeypatch.context() as patch:
        patch.setattr(ensemble, "Ranker", None)
        again = setup.ensemble()
        assert again.cached and not line.cached and replace(again, cached=False) == line
        for change in ({"resume": False}, {"topk": [1, 10]}, {"seen_items": "mask"}):
            before = {key: setup.config[key] for key in change}
            for key, value in change.items():
                setup.config[key] = value
            with pytest.raises(TypeError):  # both models are wanted
                setup.ensemble()
            for key, value in before.items():
                setup.config[key] = value
        with pytest.raises(TypeError):
            setup.ensemble(parts=setup.parts[::-1])
    assert setup.ensemble(parts=setup.parts[::-1]).notes["key"] != line.notes["key"]


def test_a_teacher_that_is_tested_on_a_sample_restricts_the_ensemble_to_it(ring, tiny_lm, monkeypatch):
    settings = ring_settings(ring, "DLLM2Rec", tiny_lm)
    config = Config("DLLM2Rec", "ring", None, settings, read_argv=False)
    data = load_data(config)
    with pytest.raises(
        ValueError, match="^teacher=BIGRec: no finished teacher of these settings in .*; there is one after"
    ):
        part_of_teacher(config, data)
    run = run_recbole_llm("DLLM2Rec", "ring", config_dict=settings)
    taught, _, student = run["lines"]
    parts = [part_of_run(run["folder"]), part_of_teacher(config, data)]
    assert [part.name for part in parts] == ["SASRec distilled", "BIGRec (teacher)"]
    for weight, ranks in ((0.0, student.on(taught.rows)), (1.0, taught.ranks)):
        monkeypatch.setattr(ensemble, "WEIGHTS", (weight,))
        line = ensemble.ensemble(config, data, parts, "student + teacher", Path(f"both-{weight}"))
        assert line.rows == taught.rows and len(line.rows) == 8 and line.ranks == ranks
        assert line.notes["validation_rows"] == 8
    assert student.on(taught.rows) != taught.ranks


def test_a_folder_without_a_finished_run_is_refused(setup):
    with pytest.raises(
        ValueError, match=r"^folder=gone: no finished run there .*there is one when.*Name a folder in saved/runs\.$"
    ):
        part_of_run("gone")
    folder = Path(setup.runs[0]["folder"])
    (folder / "metrics.json").rename(folder / "kept.json")
    with pytest.raises(ValueError, match="no finished run there"):
        part_of_run(folder)
    (folder / "kept.json").rename(folder / "metrics.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no finished run there"):
        part_of_run(folder)


def test_models_of_other_rows_and_wrong_setups_are_refused(setup, ring):
    with pytest.raises(ValueError, match="1 models; there are ensembles of two"):
        setup.ensemble(parts=setup.parts[:1])
    with pytest.raises(ValueError, match="there is mode full with a validation split"):
        ensemble.refuse_setup(setup.data._replace(valid=None), setup.parts)
    a, b = setup.parts
    with pytest.raises(ValueError, match=r"parts=GRU4Rec .*: holds a SASRec, not a GRU4Rec"):
        setup.ensemble(parts=[a, Part(b.name, b.config, a.file)])
    file = ring / "ring/ring.inter"
    rows = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(row for row in rows if not row.startswith("u59")) + "\n", encoding="utf-8")
    setup.data = load_data(setup.config)
    with pytest.raises(ValueError, match=r"parts=SASRec .*: it was trained on 540 rows that are not this run's"):
        setup.ensemble()
    item = ring / "ring/ring.item"
    file.write_text("\n".join([rows[0], *reversed(rows[1:])]) + "\n", encoding="utf-8")
    item.write_text(item.read_text(encoding="utf-8"), encoding="utf-8")
    setup.data = load_data(setup.config)
    with pytest.raises(ValueError, match="its items are not those of these data, or stand in another order"):
        setup.ensemble()


def test_a_teacher_of_other_texts_is_refused(ring, tiny_lm):
    settings = ring_settings(ring, "BIGRec", tiny_lm)
    parts = [part_of_run(run_recbole_llm("BIGRec", "ring", config_dict=settings)["folder"])] * 2
    config = Config("BIGRec", "ring", None, settings | {"shuffle_text": 1}, read_argv=False)
    with pytest.raises(ValueError, match="it reads item texts under shuffle_text=None, not 1"):
        ensemble.ensemble(config, load_data(config), parts, "both", Path("both"))
