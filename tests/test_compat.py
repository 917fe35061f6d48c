"""RecBole runs on the installed numpy, pandas, scipy and torch: one test for every known fault of the combination."""

import collections
import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from recbole.config import Config
from recbole.data import create_dataset
from recbole.trainer import Trainer

import recbole_llm
from recbole_llm import compat

REPOSITORY = Path(recbole_llm.__file__).parent.parent
SMALL = {
    "data_path": ".",
    "epochs": 2,
    "topk": [5],
    "valid_metric": "NDCG@5",
    "metrics": ["Recall", "NDCG"],
    "MAX_ITEM_LIST_LENGTH": 5,
    "hidden_size": 8,
    "inner_size": 8,
    "n_layers": 1,
    "embedding_size": 8,
    "train_neg_sample_args": None,
    "show_progress": False,
    "state": "ERROR",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
}
ITEM_COLUMNS = {"item": ["item_id", "title", "price", "kind", "tags", "sizes"]}
# What RecBole needs before its first line runs on the new packages, and nothing else: the yardstick for "same numbers".
BARE = """
import os, sys, types
import numpy as np
for gone, name in (("float_", "float64"), ("complex_", "complex128"), ("unicode_", "str_")):
    vars(np).setdefault(gone, getattr(np, name))
ray = types.ModuleType("ray"); ray.tune = types.ModuleType("ray.tune")
sys.modules.update({"ray": ray, "ray.tune": ray.tune})
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
"""


def write_data(folder: Path) -> None:
    """20 users who walk along 12 items; every title has two words, and some cells of the items are empty."""
    folder.mkdir()
    rows = ["user_id:token\titem_id:token\ttimestamp:float"]
    rows += [f"u{u}\ti{(u + t) % 12}\t{t}" for u in range(20) for t in range(4 + u % 3)]
    (folder / "tiny.inter").write_text("\n".join(rows) + "\n")
    items = ["item_id:token\ttitle:token_seq\tprice:float\tkind:token\ttags:token_seq\tsizes:float_seq"]
    for i in range(12):
        empty = i == 3
        price, kind, tags, sizes = (
            ("", "", "", "") if empty else (str(i), f"k{i % 2}", "x y" if i % 2 else "x", f"{i} 1.5")
        )
        items.append(f"i{i}\tred w{i}\t{price}\t{kind}\t{tags}\t{sizes}")
    (folder / "tiny.item").write_text("\n".join(items) + "\n")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Run in a folder of its own that holds `tiny`; RecBole reads the command line, which is pytest's here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["test"])
    monkeypatch.delenv(compat.TRUST, raising=False)
    write_data(tmp_path / "tiny")


def process(code: str, folder: Path) -> str:
    """Run Python code in a fresh process that finds our package; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run(model: str, **settings) -> dict:
    """RecBole's own run_recbole on `tiny`."""
    from recbole.quick_start import run_recbole

    return run_recbole(model=model, dataset="tiny", config_dict={**SMALL, **settings})


def recbole_load(path, **options):
    """torch.load as a module of RecBole's would call it."""
    space = {"__name__": "recbole.quick_start.quick_start", "torch": torch}
    exec("def ask(path, **options): return torch.load(path, **options)", space)
    return space["ask"](str(path), **options)


def train_sasrec(start: str, folder: Path) -> SimpleNamespace:
    """Checkpoint and result of a stock SASRec that a process of its own trains after it ran `start`."""
    if not (folder / "tiny").exists():
        write_data(folder / "tiny")
    code = f"""{start}
from recbole.quick_start import run_recbole
import glob, json
result = run_recbole(model="SASRec", dataset="tiny", config_dict={SMALL!r})
found = [result["best_valid_result"], result["test_result"], glob.glob("saved/*.pth")[0]]
print("RESULT", json.dumps(found, default=float))
"""
    valid, test, path = result_of(process(code, folder))
    return SimpleNamespace(valid=valid, test=test, path=folder / path, folder=folder)


def result_of(output: str):
    """What a process of ours printed after the word RESULT."""
    return json.loads(next(line for line in output.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A stock SASRec that was trained without our package."""
    return train_sasrec(BARE, tmp_path_factory.mktemp("foreign"))


def test_import_is_light_and_needs_no_ray(tmp_path):
    (tmp_path / "later" / "ray").mkdir(parents=True)
    (tmp_path / "later" / "ray" / "__init__.py").write_text("")
    (tmp_path / "later" / "ray" / "tune.py").write_text(
        "told = []\n\n\ndef report(**result):\n    told.append(result)\n"
    )
    process(
        """
import sys
class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'")
sys.meta_path.insert(0, NoRay())
import recbole_llm
from recbole.quick_start import run_recbole
import recbole.quick_start.quick_start as host
loaded = {name.partition(".")[0] for name in sys.modules} & {"ray", "transformers", "peft", "faiss"}
assert not loaded, loaded
assert host.tune.report(ndcg=1.0) is None
del sys.meta_path[0]
sys.path.insert(0, "later")
from ray import tune  # the user's own ray is the real one again
assert tune.told == []
host.tune.report(ndcg=0.5)
assert tune.told == [{"ndcg": 0.5}]
""",
        tmp_path,
    )


def test_a_ray_that_is_in_use_stays_in_use(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("recbole.quick_start")]:
        monkeypatch.delitem(sys.modules, name)
    ray = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delitem(sys.modules, "ray.tune", raising=False)
    compat.import_quick_start_without_ray()
    assert sys.modules["ray"] is ray
    assert "ray.tune" not in sys.modules
    assert "recbole.quick_start.quick_start" in sys.modules


def test_numpy_has_the_names_that_recbole_and_ray_read():
    assert np.float_ is np.float64 and np.complex_ is np.complex128 and np.unicode_ is np.str_
    assert np.float is np.float64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.bool8 is np.bool_


def test_install_twice_changes_nothing():
    places = [(torch, "load"), (Config, "_load_internal_config_dict"), (Trainer, "_save_checkpoint")]
    before = [getattr(owner, name) for owner, name in places]
    finders = list(sys.meta_path)
    compat.install()
    assert [getattr(owner, name) for owner, name in places] == before
    assert sys.meta_path == finders


def test_stock_sasrec_gives_the_same_numbers_with_and_without_the_package(foreign, tmp_path):
    ours = train_sasrec("import recbole_llm", tmp_path)
    assert (ours.valid, ours.test) == (foreign.valid, foreign.test)
    ours, theirs = recbole_load(ours.path)["state_dict"], recbole_load(foreign.path)["state_dict"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_fresh_process_loads_resumes_and_tests_a_foreign_checkpoint(foreign):
    out = process(
        f"""
import recbole_llm, json
from recbole.config import Config
from recbole.model.sequential_recommender import SASRec
from recbole.quick_start import load_data_and_model
from recbole.trainer import Trainer
from recbole.utils import ModelType
config, model, dataset, train, valid, test = load_data_and_model({str(foreign.path)!r})
assert type(config) is Config and config.model_class is SASRec and config["MODEL_TYPE"] is ModelType.SEQUENTIAL
assert config.yaml_loader.__name__ == "FullLoader"
trainer = Trainer(config, model)
print("RESULT", json.dumps(trainer.evaluate(test, model_file={str(foreign.path)!r}), default=float))
trainer.resume_checkpoint({str(foreign.path)!r})
assert trainer.start_epoch in (1, 2)
""",
        foreign.folder,
    )
    assert result_of(out) == foreign.test


class Call:
    """Pickles as the call of a function with arguments."""

    def __init__(self, function, *arguments):
        self.how = (function, arguments)

    def __reduce__(self):
        return self.how


EVIL = "open('broken-in', 'w').close() or 1"
ATTACKS = {
    "os.system": lambda: Call(os.system, "touch broken-in"),
    "eval": lambda: Call(eval, EVIL),
    "settings are evaluated": lambda: Call(
        Config, "SASRec", "tiny", None, {"x": f"__import__('builtins').eval({EVIL!r})"}
    ),
    "import": lambda: Call(getattr, Call(__import__, "os"), "system"),
    "getattr": lambda: Call(getattr, collections.OrderedDict, "fromkeys"),
    "raw memory": lambda: Call(np.ndarray, (4,)),
    "a model is built": lambda: Call(
        __import__("recbole.model.sequential_recommender", fromlist=["SASRec"]).SASRec, {}, None
    ),
    "partial": lambda: functools.partial(os.system, "touch broken-in"),
    "class of the host": lambda: Call(__import__("recbole.utils.logger", fromlist=["init_logger"]).init_logger, {}),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("attack", ATTACKS)
def test_foreign_checkpoint_that_runs_code_is_refused(attack, protocol):
    torch.save({"config": ATTACKS[attack](), "state_dict": {}}, "evil.pth", pickle_protocol=protocol)
    with pytest.raises(pickle.UnpicklingError, match=rf"^checkpoint=evil\.pth: .*{compat.TRUST}=1"):
        recbole_load("evil.pth")
    assert not Path("broken-in").exists()


def test_old_format_is_restricted_too():
    torch.save({"config": ATTACKS["os.system"]()}, "evil.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(pickle.UnpicklingError, match="system"):
        recbole_load("evil.pth")
    assert not Path("broken-in").exists()


def test_trust_is_an_explicit_environment_variable(monkeypatch):
    torch.save({"config": ATTACKS["os.system"]()}, "evil.pth", pickle_protocol=4)
    monkeypatch.setenv(compat.TRUST, "0")
    with pytest.raises(pickle.UnpicklingError):
        recbole_load("evil.pth")
    monkeypatch.setenv(compat.TRUST, "1")
    assert recbole_load("evil.pth") == {"config": 0}
    assert Path("broken-in").exists()


def test_plain_values_and_arrays_load():
    value = {
        "float": np.float64(0.25),
        "array": np.arange(3.0),
        "tensor": torch.arange(3),
        "half": torch.ones(2, dtype=torch.float16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "set": {1, 2},
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "size": torch.Size([2, 3]),
    }
    for protocol in (2, 4):
        torch.save(value, "plain.pth", pickle_protocol=protocol)
        loaded = recbole_load("plain.pth", map_location="cpu")
        assert loaded.keys() == value.keys()
        assert all(np.array_equal(loaded[key], value[key]) for key in ("float", "array"))
        assert all(torch.equal(loaded[key], value[key]) for key in ("tensor", "half", "parameter"))
        assert all(loaded[key] == value[key] for key in ("set", "device", "dtype", "size"))


def test_own_checkpoint_with_a_whole_module_loads_but_its_copy_does_not():
    columns = {**SMALL["load_col"], "item": ["item_id", "kind"]}
    result = run("SASRecF", load_col=columns, selected_features=["kind"], pooling_mode="sum")
    assert result["test_result"]  # the final test reloads the best checkpoint
    own = next(Path("saved").glob("*.pth"))
    assert recbole_load(own)["other_parameter"]["feature_embed_layer"] is not None
    shutil.copy2(own, "copy.pth")
    with pytest.raises(pickle.UnpicklingError, match="FeatureSeqEmbLayer"):
        recbole_load("copy.pth")
    torch.save({"config": ATTACKS["os.system"]()}, own)  # someone replaced the file that we wrote
    with pytest.raises(pickle.UnpicklingError, match="system"):
        recbole_load(own)


def test_torch_load_of_other_code_is_unchanged(foreign):
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(foreign.path)
    assert type(torch.load(foreign.path, weights_only=False)["config"]) is Config
    torch.save({"w": torch.ones(2)}, "weights.pth")
    assert torch.load("weights.pth")["w"].tolist() == [1, 1]
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        recbole_load(foreign.path, weights_only=True)  # who says what they want, gets it
    space = {"__name__": "recbole_something.else", "torch": torch}
    exec("def ask(path): return torch.load(path)", space)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        space["ask"](foreign.path)


def test_our_checkpoints_reach_recboles_functions(monkeypatch):
    checkpoint = SimpleNamespace(read_checkpoint=lambda path, device: (path, str(device)))
    monkeypatch.setitem(sys.modules, "recbole_llm.checkpoint", checkpoint)
    monkeypatch.setattr(recbole_llm, "checkpoint", checkpoint, raising=False)
    assert recbole_load("run/best.safetensors") == ("run/best.safetensors", "cpu")
    assert recbole_load("best.safetensors", map_location=torch.device("meta")) == ("best.safetensors", "meta")


def features(**settings):
    """Data set `tiny` with every item column, as RecBole's loading leaves it, and its items' frame by token."""
    config = Config(
        "SASRec", "tiny", config_dict={**SMALL, "load_col": {**SMALL["load_col"], **ITEM_COLUMNS}, **settings}
    )
    dataset = create_dataset(config)
    items = dataset.item_feat
    return dataset, items.set_index(pd.Index(dataset.id2token("item_id", items["item_id"].to_numpy())))


def test_titles_of_equal_length_load():
    dataset, items = features()
    for i in range(12):
        assert list(dataset.id2token("title", items["title"][f"i{i}"])) == ["red", f"w{i}"]
    assert list(dataset.id2token("tags", items["tags"]["i1"])) == ["x", "y"]


def test_empty_cells_become_what_recbole_says():
    dataset, items = features()
    prices = [i for i in range(12) if i != 3]
    assert items["price"]["i3"] == pytest.approx(np.mean(prices))
    assert items["price"]["i5"] == 5.0 and not items["price"].isna().any()
    assert items["kind"]["i3"] == 0 and (items["kind"].drop(["i3", "[PAD]"], errors="ignore") > 0).all()
    assert len(items["tags"]["i3"]) == 0 and len(items["sizes"]["i3"]) == 0
    assert list(items["sizes"]["i5"]) == [5.0, 1.5]


def test_users_without_features_get_the_padding_value():
    Path("tiny/tiny.user").write_text("user_id:token\tage:float\tjob:token\nu0\t20\tcook\nu1\t40\tsmith\n")
    columns = {**SMALL["load_col"], "user": ["user_id", "age", "job"]}
    settings = {**SMALL, "load_col": columns, "filter_inter_by_user_or_item": False}
    config = Config("SASRec", "tiny", config_dict=settings)
    users = create_dataset(config).user_feat
    assert len(users) == 21 and not users["age"].isna().any() and not users["job"].isna().any()
    assert users["age"].iloc[-1] == 30.0 and users["job"].iloc[-1] == 0


def test_lists_survive_normalisation_and_discretisation():
    _, plain = features(normalize_field=["sizes"])
    assert [round(x, 4) for x in plain["sizes"]["i11"]] == [1.0, round(1.5 / 11, 4)]
    _, buckets = features(numerical_features=["sizes"], discretization={"sizes": {"method": "ED", "bucket": 2}})
    assert [list(part) for part in buckets["sizes"]["i11"]] == [[1.0, 1.0], [2.0, 1.0]]


def test_benchmark_files_load():
    for part in ("train", "valid", "test"):
        rows = ["user_id:token\titem_id_list:token_seq\titem_id:token"]
        rows += [f"u{u}\ti{u} i{u + 1}\ti{u + 2}" for u in range(8)]
        Path(f"tiny/tiny.{part}.inter").write_text("\n".join(rows) + "\n")
    settings = {
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
        "benchmark_filename": ["train", "valid", "test"],
        "alias_of_item_id": ["item_id_list"],
    }
    dataset = create_dataset(Config("SASRec", "tiny", config_dict={**SMALL, **settings}))
    assert list(dataset.inter_feat["item_length"]) == [2] * 24


def test_pandas_is_as_it_was_outside_of_recboles_loading():
    agg, read_csv = pd.Series.agg, pd.read_csv
    lists = pd.Series([[1, 2], [3]])
    expected = lists.agg(len)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        features()
    assert not compat.PANDAS_3 or not [w for w in told if "copy" in str(w.message) or "inplace" in str(w.message)]
    Path("tiny/tiny.item").write_text("item_id:token\ttitle:wrong\n")
    with pytest.raises(ValueError, match="wrong"):  # a way out of the middle of the loading
        features()
    assert (pd.Series.agg, pd.read_csv) == (agg, read_csv)
    assert np.array_equal(lists.agg(len), expected)


def test_lightgcn_trains():
    assert run("LightGCN", train_neg_sample_args={"distribution": "uniform", "sample_num": 1})["test_result"]


def test_dok_update_fills_the_matrix():
    matrix = scipy.sparse.dok_matrix((2, 2), dtype=np.float32)
    matrix._update({(0, 1): 2.0, (1, 0): 3.0})
    assert matrix.tocsr().toarray().tolist() == [[0, 2], [3, 0]]
