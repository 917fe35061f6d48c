"""RecBole's own look-ups find our models, and only ours change."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import recbole.data.dataset
import recbole.trainer
from recbole.config import Config
from recbole.data import create_dataset
from recbole.model.sequential_recommender import SASRec
from recbole.utils import get_model, get_trainer

import recbole_llm
import recbole_llm.model
from recbole_llm import hooks
from recbole_llm.dataset import FlatSequentialDataset
from recbole_llm.model import model_files

REPOSITORY = Path(recbole_llm.__file__).parent.parent
SMALL = {
    "data_path": ".",
    "epochs": 1,
    "topk": [5],
    "valid_metric": "NDCG@5",
    "metrics": ["Recall", "NDCG"],
    "MAX_ITEM_LIST_LENGTH": 5,
    "hidden_size": 8,
    "inner_size": 8,
    "n_layers": 1,
    "train_neg_sample_args": None,
    "show_progress": False,
    "state": "ERROR",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
}
MODEL = """
from recbole.data.dataset import SequentialDataset
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer


class Planted(SASRec):
    pass


class PlantedTrainer(Trainer):
    pass


class PlantedDataset(SequentialDataset):
    pass
"""
PLAIN_MODEL = """
from recbole.model.sequential_recommender import SASRec


class Bare(SASRec):
    pass
"""
# Stands in for config.py: RecBole's own layers of SASRec, plus one key that shows that ours were asked.
LAYERS = """
def load_layers(config, model, model_class, dataset, original):
    original(config, "SASRec", model_class, dataset)
    config.internal_config_dict["planted_layer"] = model
"""


@pytest.fixture(autouse=True)
def planted(tmp_path, monkeypatch):
    """Two models of ours, `Planted` (with trainer and data set) and `Bare`, in their own folder, and a data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["test"])
    models, data = tmp_path / "models", tmp_path / "tiny"
    models.mkdir()
    data.mkdir()
    (models / "planted.py").write_text(MODEL)
    (models / "bare.py").write_text(PLAIN_MODEL)
    (tmp_path / "layers.py").write_text(LAYERS)
    rows = ["user_id:token\titem_id:token\ttimestamp:float"]
    rows += [f"u{u}\ti{(u + t) % 12}\t{t}" for u in range(20) for t in range(5)]
    (data / "tiny.inter").write_text("\n".join(rows) + "\n")
    files = {"Planted": "recbole_llm.model.planted", "Bare": "recbole_llm.model.bare", **model_files()}
    monkeypatch.setattr(hooks, "model_files", lambda: files)
    monkeypatch.setattr(recbole_llm.model, "__path__", [*recbole_llm.model.__path__, str(models)])
    space = {}
    exec(LAYERS, space)
    layers = SimpleNamespace(load_layers=space["load_layers"])
    monkeypatch.setitem(sys.modules, "recbole_llm.config", layers)
    monkeypatch.setattr(recbole_llm, "config", layers, raising=False)
    before = set(sys.modules)
    yield
    for name in {name for name in sys.modules if name.endswith((".planted", ".bare"))} - before:
        del sys.modules[name]


def test_get_model_gives_one_class_in_one_module():
    found = get_model("Planted")
    module = importlib.import_module("recbole_llm.model.planted")
    assert found is get_model("Planted") is module.Planted
    assert sys.modules["recbole.model.sequential_recommender.planted"] is module
    assert found.__module__ == module.__name__ == module.__spec__.name == "recbole_llm.model.planted"
    assert importlib.util.find_spec("recbole.model.sequential_recommender.planted") is module.__spec__


def test_a_model_is_found_before_and_after_its_own_import():
    module = importlib.import_module("recbole_llm.model.planted")
    assert get_model("Planted") is module.Planted
    assert module.__spec__.name == "recbole_llm.model.planted"
    assert importlib.reload(module) is module


def test_names_of_the_host_stay_the_hosts(monkeypatch):
    finder = next(finder for finder in sys.meta_path if isinstance(finder, hooks.ModelFinder))
    assert finder.find_spec("recbole.model.sequential_recommender.sasrec") is None
    assert finder.find_spec("recbole.model.general_recommender.planted") is None
    assert finder.find_spec("planted") is None
    monkeypatch.setattr(hooks, "model_files", lambda: {"SASRec": "recbole_llm.model.sasrec"})
    monkeypatch.delitem(sys.modules, "recbole.model.sequential_recommender.sasrec")
    assert importlib.util.find_spec("recbole.model.sequential_recommender.sasrec").origin.endswith("sasrec.py")


def test_trainer_and_dataset_are_those_beside_the_model():
    module = importlib.import_module("recbole_llm.model.planted")
    config = Config("Planted", "tiny", config_dict=dict(SMALL))
    assert get_trainer(config["MODEL_TYPE"], "Planted") is module.PlantedTrainer
    assert type(create_dataset(config)) is module.PlantedDataset


def test_a_model_without_trainer_or_dataset_gets_recboles_trainer_and_flat_rows():
    config = Config("Bare", "tiny", config_dict=dict(SMALL))
    assert get_trainer(config["MODEL_TYPE"], "Bare") is recbole.trainer.Trainer
    assert type(create_dataset(config)) is FlatSequentialDataset


def test_a_stock_model_gets_recboles_dataset():
    config = Config("SASRec", "tiny", config_dict=SMALL | {"train_neg_sample_args": None})
    assert type(create_dataset(config)) is recbole.data.dataset.SequentialDataset


@pytest.mark.parametrize("module, name", [(recbole.trainer, "NobodyTrainer"), (recbole.data.dataset, "NobodyDataset")])
def test_unknown_attributes_are_attribute_errors(module, name):
    with pytest.raises(AttributeError, match=rf"module '{module.__name__}' has no attribute '{name}'"):
        getattr(module, name)
    assert not hasattr(module, "Planted") and not hasattr(module, "__wrapped__")


def test_config_of_our_model_gets_our_layers_and_a_stock_one_does_not():
    ours = Config("Planted", "tiny", config_dict=dict(SMALL))
    assert ours["planted_layer"] == "Planted"
    assert ours["hidden_act"] == "gelu"  # RecBole's yaml for SASRec, which the layers asked for
    assert Config(get_model("Planted"), "tiny", config_dict=dict(SMALL))["planted_layer"] == "Planted"
    stock = Config("SASRec", "tiny", config_dict=dict(SMALL))
    assert "planted_layer" not in stock and stock.model_class is SASRec


def test_run_recbole_trains_tests_and_reloads_our_model():
    from recbole.quick_start import load_data_and_model, run_recbole

    result = run_recbole(model="Planted", dataset="tiny", config_dict=dict(SMALL))
    assert set(result["test_result"]) == {"recall@5", "ndcg@5"}
    config, model, *_ = load_data_and_model(str(next(Path("saved").glob("Planted-*.pth"))))
    assert type(model) is get_model("Planted") and config["planted_layer"] == "Planted"


def test_hooks_work_after_quick_start_was_imported_first(tmp_path):
    code = """
import sys, types
import numpy as np
for gone, name in (("float_", "float64"), ("complex_", "complex128"), ("unicode_", "str_")):
    vars(np).setdefault(gone, getattr(np, name))
ray = types.ModuleType("ray"); ray.tune = types.ModuleType("ray.tune")
sys.modules.update({"ray": ray, "ray.tune": ray.tune})
from recbole.quick_start import run_recbole, load_data_and_model
import recbole_llm, recbole_llm.model
from recbole_llm import hooks
import layers
sys.modules["recbole_llm.config"] = layers
recbole_llm.model.__path__.append("models")
hooks.model_files = lambda: {"Planted": "recbole_llm.model.planted"}
sys.argv.append("--epochs=2")
"""
    run = f'assert run_recbole(model="Planted", dataset="tiny", config_dict={SMALL!r})["test_result"]\n'
    load = 'import glob; assert load_data_and_model(glob.glob("saved/*.pth")[0])[0]["epochs"] == 2\n'
    done = subprocess.run(
        [sys.executable, "-c", code + run + load],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("how", ["argument", "settings", "command line"])
def test_typo_in_the_models_name_is_answered_with_names(how, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["test", "--model=SASRecc"] if how == "command line" else ["test"])
    settings = {**SMALL, "model": "SASRecc"} if how == "settings" else dict(SMALL)
    with pytest.raises(ValueError) as error:
        Config("SASRecc" if how == "argument" else None, "tiny", config_dict=settings)
    message = str(error.value)
    assert message.startswith("model=SASRecc: no such model; did you mean 'SASRec'?")
    assert "Planted" in message and "GRU4Rec" in message and "--model" in message


def test_case_and_our_own_names_are_guessed():
    assert "did you mean 'SASRec'?" in hooks.unknown_model("sasrec")
    assert "did you mean 'Planted'?" in hooks.unknown_model("Plantd")
    assert "did you mean" not in hooks.unknown_model("qqqqqqqq")
    with pytest.raises(ValueError, match="did you mean 'SASRec'"):
        Config("sasrec", "tiny", config_dict=dict(SMALL))


def test_a_model_whose_imports_fail_says_so_itself(monkeypatch):
    (Path("models") / "bare.py").write_text("import a_library_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        Config("Bare", "tiny", config_dict=dict(SMALL))
    with pytest.raises(KeyError, match="dataset need to be specified"):
        Config("SASRec", None, config_dict=dict(SMALL))
