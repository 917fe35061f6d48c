"""Settings: which layer wins, and every fault told at once with a guess at what was meant."""

import re
import sys
from pathlib import Path

import pytest
import recbole
import yaml
from recbole.config import Config as RecBoleConfig
from recbole.model.sequential_recommender import SASRec
from recbole.utils.argument_list import dataset_arguments, evaluation_arguments, general_arguments, training_arguments

from recbole_llm import config as config_file
from recbole_llm.config import Config, check_topk, choice, guess, role_config, sequential_models
from recbole_llm.model import PROPERTIES, model_files
from recbole_llm.model.dllm2rec import Distillation
from recbole_llm.terms import Collaboration
from tests.conftest import ROOT
from tests.oracle import prepared, student

# a benchmark's file holds rows, not settings (test_benchmark.py)
YAMLS = sorted(path for path in PROPERTIES.rglob("*.yaml") if path.parent.name != "benchmark")


@pytest.fixture
def base(ring):
    """Settings that every Config of the ring needs."""
    return {"data_path": str(ring), "state": "error", "show_progress": False}


def make(base, model="DLLM2Rec", files=None, argv=False, kind=Config, **settings):
    options = {"read_argv": argv} if kind is Config else {}
    if any(key.startswith("teacher_") for key in settings):
        settings.setdefault("teacher", "BIGRec")
    return kind(model=model, dataset="ring", config_file_list=files, config_dict=base | settings, **options)


def faults(base, **settings) -> str:
    """The message that some settings are refused with."""
    with pytest.raises(ValueError) as refused:
        make(base, **settings)
    return str(refused.value)


def command_line(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["script.py", *words])


def test_every_layer_wins_over_the_weaker_ones(base, tmp_path, monkeypatch):
    """`probe` is declared by one layer after the other; each time its value is the newest."""
    properties = tmp_path / "properties"
    for folder in ("model", "dataset"):
        (properties / folder).mkdir(parents=True)
    for name in ("overall.yaml", "model/DLLM2Rec.yaml"):
        (properties / name).write_text((PROPERTIES / name).read_text())
    monkeypatch.setattr(config_file, "PROPERTIES", properties)
    key = "inner_size"  # RecBole's SASRec.yaml has 256, no layer of ours has it
    assert make(base)[key] == 256

    def grow(name, value):
        path = properties / name
        path.write_text((path.read_text() if path.exists() else "") + f"\n{key}: {value}\n")

    for value, name in enumerate(["overall.yaml", "model/DLLM2Rec.yaml", "dataset/ring.yaml"], start=1):
        grow(name, value)
        assert make(base)[key] == value
    files = [tmp_path / "one.yaml", tmp_path / "two.yaml"]
    for value, file in enumerate(files, start=4):
        file.write_text(f"{key}: {value}\n")
    assert make(base, files=[str(files[0])])[key] == 4
    assert make(base, files=[str(file) for file in files])[key] == 5
    assert make(base, files=[str(file) for file in files], **{key: 6})[key] == 6
    command_line(monkeypatch, f"--{key}=7")
    assert make(base, files=[str(files[0])], argv=True, **{key: 6})[key] == 7
    assert make(base, files=[str(files[0])], argv=False, **{key: 6})[key] == 6


def test_the_student_brings_its_own_recbole_yaml(base):
    assert make(base)["n_heads"] == 2 and make(base)["num_layers"] is None
    gru = make(base, student="GRU4Rec")
    assert gru["num_layers"] == 1 and gru["n_heads"] is None
    assert gru["hidden_size"] == 128 and gru["dropout_prob"] == 0.3
    assert gru["student"] == "GRU4Rec" and gru["model"] == "DLLM2Rec"
    assert "n_heads" in faults(base, student="GRU4Rec", n_heads=2)


def test_our_layers_change_recboles_defaults_for_every_model_under_our_config(base):
    ours = make(base, "SASRec", train_neg_sample_args=None)
    assert (
        ours["metrics"] == ["Recall", "NDCG", "MRR"] and ours["topk"] == [10, 20] and ours["metric_decimal_place"] == 8
    )
    theirs = make(base, "SASRec", kind=RecBoleConfig, train_neg_sample_args=None)
    assert theirs["topk"] == [10] and theirs["metric_decimal_place"] == 4 and theirs["positions"] is None


def test_a_dataset_yaml_reaches_only_models_that_know_its_keys(tmp_path):
    big = Config("BIGRec", "ml-100k", None, {"state": "error"}, read_argv=False)
    assert big["train_rows"] == 384 and "watched" in big["prompt_instruction"] and big["title_field"] == "movie_title"
    small = Config("DLLM2Rec", "ml-100k", None, {"state": "error"}, read_argv=False)
    assert small["teacher_rows"] == 1200 and small["train_rows"] is None and small["prompt_lead"] is None


@pytest.mark.parametrize("given", [{}, {"loss_type": "CE"}])
def test_full_softmax_draws_no_negatives(base, given):
    assert make(base, "SASRec", **given)["train_neg_sample_args"]["distribution"] == "none"


def test_a_loss_with_negatives_keeps_recboles(base):
    chosen = make(base, "SASRec", loss_type="BPR")["train_neg_sample_args"]
    assert chosen == make(base, "SASRec", kind=RecBoleConfig, loss_type="BPR")["train_neg_sample_args"]
    assert chosen["distribution"] == "uniform"
    asked = {"distribution": "popularity", "sample_num": 2}
    assert (
        make(base, "SASRec", loss_type="BPR", train_neg_sample_args=asked)["train_neg_sample_args"]["sample_num"] == 2
    )


def test_a_bare_off_of_a_yaml_file_is_the_mode_off(base, tmp_path):
    (tmp_path / "off.yaml").write_text("distill_mode: off\n")
    assert yaml.safe_load("mode: off") == {"mode": False}
    config = make(base, files=["off.yaml"])
    assert config["distill_mode"] == "off" and Distillation.from_config(config).ranking == "none"


def test_all_unknown_keys_are_told_at_once_with_a_guess(base):
    message = faults(base, distil_weight=0.5, lerning_rate=1)
    assert message == (
        "2 settings that DLLM2Rec on ring does not have:\n"
        "  distil_weight=0.5 (did you mean 'distill_weight'?)\n"
        "  lerning_rate=1 (did you mean 'learning_rate'?)"
    )


def test_one_unknown_key_and_no_guess(base):
    assert faults(base, qqqqqq=1) == "1 setting that DLLM2Rec on ring does not have:\n  qqqqqq=1"


@pytest.mark.parametrize("kind", [Config, RecBoleConfig])
def test_unknown_keys_of_every_source_are_refused(base, tmp_path, monkeypatch, kind):
    (tmp_path / "a.yaml").write_text("distil_mode: paper\n")
    command_line(monkeypatch, "--distill_tpok=3")
    with pytest.raises(ValueError) as refused:
        make(base, files=["a.yaml"], argv=True, kind=kind, distil_base="bce")
    for line in (
        "3 settings that DLLM2Rec",
        "distil_mode=paper (did you mean 'distill_mode'?)",
        "distil_base=bce (did you mean 'distill_base'?)",
        "distill_tpok=3 (did you mean 'distill_topk'?)",
    ):
        assert line in str(refused.value)


def test_the_command_line_form_of_the_specification(base, monkeypatch):
    command_line(monkeypatch, "--distil_weight=0.5", "--lerning_rate=1")
    with pytest.raises(
        ValueError,
        match="2 settings that DLLM2Rec on ring does not have:\n  distil_weight=0.5 .did you mean 'distill_weight'",
    ):
        make(base, argv=True)


def test_every_fault_is_in_one_message(base, tmp_path):
    message = faults(
        base, student="SASrec", distil_weight=1, teacher_lerning_rate=1, data_path=str(tmp_path / "nowhere")
    )
    assert "student=SASrec: no such sequential model; did you mean 'SASRec'?" in message
    assert "2 settings that" in message and "'distill_weight'" in message and "'teacher_learning_rate'" in message
    assert "dataset=ring: no ring.inter in" in message


def test_flags_of_somebodys_own_script_pass_unless_they_look_like_a_setting(base, monkeypatch):
    command_line(monkeypatch, "--my_cluster_flag=3", "--distill_weight=0.25", "--verbose")
    config = make(base, kind=RecBoleConfig)
    assert config["distill_weight"] == 0.25
    command_line(monkeypatch, "--my_cluster_flag=3", "--distil_weight=0.25")
    with pytest.raises(ValueError, match="^1 setting that .*\n  distil_weight=0.25") as refused:
        make(base, kind=RecBoleConfig)
    assert "my_cluster_flag" not in str(refused.value)
    # under our own command there is no script of somebody else's
    command_line(monkeypatch, "--my_cluster_flag=3")
    with pytest.raises(ValueError, match="my_cluster_flag=3"):
        make(base, argv=True)


def test_a_key_in_a_call_is_refused_under_a_stock_config_too(base):
    with pytest.raises(ValueError, match="zzz_zzz=1"):
        make(base, kind=RecBoleConfig, zzz_zzz=1)


def test_stock_models_under_a_stock_config_are_left_alone(base):
    assert make(base, "SASRec", kind=RecBoleConfig, train_neg_sample_args=None, lerning_rate=1)["lerning_rate"] == 1


def test_stock_models_under_our_config_are_checked(base):
    assert "1 setting that SASRec on ring" in faults(base, model="SASRec", lerning_rate=1)


def test_allow_keys_lets_ones_own_keys_through(base):
    assert make(base, allow_keys=["zzz_zzz"], zzz_zzz=1)["zzz_zzz"] == 1
    assert "yyy_yyy" in faults(base, allow_keys=["zzz_zzz"], zzz_zzz=1, yyy_yyy=1)


@pytest.mark.parametrize("model", ["SASRec", "DLLM2Rec", "BIGRec"])
def test_every_argument_that_recbole_declares_is_known(base, model):
    declared = {*general_arguments, *training_arguments, *evaluation_arguments, *dataset_arguments}
    needed = {"data_path", "state", "show_progress", "benchmark_filename", "train_neg_sample_args"}
    plain = RecBoleConfig(model="SASRec", dataset="ring", config_dict=base | {"train_neg_sample_args": None})
    make(base, model, **{key: plain[key] for key in declared - needed})


def test_unknown_model(base):
    with pytest.raises(ValueError, match="model=DLMM2Rec: no such model; did you mean 'DLLM2Rec'"):
        make(base, "DLMM2Rec")


def test_unknown_student(base):
    message = faults(base, student="lightsan")
    assert message.startswith("student=lightsan: no such sequential model; did you mean 'LightSANs'? Set student to")
    assert "student=Zq: no such sequential model. Set student" in faults(base, student="Zq")
    assert "student=BPR: no such sequential model" in faults(base, student="BPR")


@pytest.mark.parametrize("name", ["S3Rec", "FDSA", "GRU4RecF", "SASRecF", "GRU4RecKG", "KSR", "DIEN"])
def test_a_student_that_needs_more_than_sequences_is_refused_before_any_data_are_read(base, name):
    message = faults(base, student=name)
    assert message.startswith(f"student={name}: it has ") and "Set student to SASRec, GRU4Rec" in message


def test_unknown_teacher(base):
    assert "  teacher=BigRec: no such model; did you mean 'BIGRec'?" in faults(base, teacher="BigRec")
    assert make(base, teacher="GRU4Rec")["teacher"] == "GRU4Rec"


def test_unknown_dataset_says_which_files_to_put_where(base, ring):
    with pytest.raises(ValueError) as refused:
        Config("DLLM2Rec", "rang", None, base, read_argv=False)
    message = str(refused.value)
    assert message.startswith(f"dataset=rang: no rang.inter in {ring}/rang/; data sets there: ring.")
    for part in (
        f"{ring}/rang/rang.inter",
        f"{ring}/rang/rang.item",
        "user_id:token",
        "item_id:token",
        "timestamp:float",
        "data_path",
    ):
        assert part in message


def test_a_dataset_in_parts_is_looked_for_by_its_parts(base, ring):
    assert "no ring.one.inter or ring.two.inter" in faults(base, benchmark_filename=["one", "two", "one"][:2])
    for part in ("one", "two"):
        (ring / "ring" / f"ring.{part}.inter").write_text((ring / "ring" / "ring.inter").read_text())
    make(base, benchmark_filename=["one", "two"])


def test_no_data_folder_at_all(base, tmp_path):
    assert "there is no data set there" in faults(base, data_path=str(tmp_path / "none"))


def test_a_config_file_that_is_not_there(base):
    with pytest.raises(ValueError, match="config_files=none.yaml: no such file"):
        make(base, files=["none.yaml"])


def test_choice_and_guess():
    assert choice({"a": "x"}, "a", ("x", "y")) == "x"
    with pytest.raises(
        ValueError, match="^a=softmx: no such choice; did you mean 'softmax'. There is softmax, bce. Set a.$"
    ):
        choice({"a": "softmx"}, "a", ("softmax", "bce"))
    assert guess("sasrec", ["SASRec"]) == "; did you mean 'SASRec'?" and guess("zz", ["SASRec"]) == "."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distill_mode": "bets"}, "distill_mode=bets: no such choice; did you mean 'best'?"),
        ({"distill_ranking": "sotfmax"}, "distill_ranking=sotfmax: no such choice; did you mean 'softmax'?"),
        ({"distill_base": "BPR"}, "distill_base=BPR: no such choice"),
        ({"distill_embedding": "both"}, "distill_embedding=both: no such choice"),
        ({"distill_negative": True}, "distill_negative=True: needs the negative of distill_base=bce"),
    ],
)
def test_values_that_a_setting_cannot_have(base, settings, message):
    with pytest.raises(ValueError) as refused:
        Distillation.from_config(make(base, **settings))
    assert message in str(refused.value)


def test_prefixed_settings_reach_the_teacher_under_its_own_names(base):
    config = make(
        base,
        teacher_learning_rate=0.5,
        teacher_llm="some/model",
        teacher_train_rows=7,
        teacher_ground_metric="cosine",
        teacher_history=4,
        teacher_eval_rows=3,
        teacher_seed=99,
        teacher_rows=5,
    )
    teacher = role_config(config, "teacher")
    assert teacher["model"] == "BIGRec" and teacher["learning_rate"] == 0.5 and teacher["llm"] == "some/model"
    assert teacher["train_rows"] == 7 and teacher["ground_metric"] == "cosine"
    assert teacher["teacher_history"] == 4 and teacher["teacher_eval_rows"] == 3
    assert teacher["seed"] == teacher["teacher_seed"] == 99
    assert config["learning_rate"] == 0.001, "the student's own must stay"


def test_a_teacher_inherits_data_and_protocol_but_no_training(base):
    training = {
        "learning_rate": 0.3,
        "epochs": 77,
        "train_batch_size": 9,
        "stopping_step": 66,
        "weight_decay": 0.1,
        "seed": 5,
    }
    config = make(
        base,
        teacher="BIGRec",
        topk=[3],
        valid_metric="MRR@3",
        title_field="title",
        MAX_ITEM_LIST_LENGTH=17,
        threads=1,
        **training,
    )
    teacher, fresh = role_config(config, "teacher"), Config("BIGRec", "ring", None, base, read_argv=False)
    for key in set(training) - {"seed"}:
        assert teacher[key] == fresh[key] != training[key], key
    assert teacher["seed"] == 2024
    assert (teacher["topk"], teacher["valid_metric"], teacher["title_field"], teacher["threads"]) == (
        [3],
        "MRR@3",
        "title",
        1,
    )
    assert teacher["data_path"] == config["data_path"]


def test_a_second_config_never_reads_the_command_line(base, monkeypatch):
    command_line(monkeypatch, "--learning_rate=0.77", "--epochs=55", "--teacher_epochs=3")
    config = make(base, argv=True)
    assert config["learning_rate"] == 0.77 and config["epochs"] == 55
    teacher = role_config(config, "teacher")
    assert teacher["learning_rate"] == 1e-3 and teacher["epochs"] == 3
    assert Config("SASRec", "ring", None, base, read_argv=False)["epochs"] != 55


def test_a_recbole_model_as_teacher_takes_its_own_yaml(base):
    teacher = role_config(
        make(base, teacher="GRU4Rec", teacher_hidden_size=48, teacher_eval_batch_size=32, n_heads=1), "teacher"
    )
    assert teacher["model"] == "GRU4Rec" and teacher["hidden_size"] == 48 and teacher["num_layers"] == 1
    assert teacher["eval_batch_size"] == 32


def test_a_teachers_own_file_stands_under_its_prefixed_settings(base, tmp_path):
    (tmp_path / "t.yaml").write_text("lora_rank: 2\nepochs: 9\n")
    teacher = role_config(make(base, teacher_config="t.yaml", teacher_epochs=4), "teacher")
    assert teacher["lora_rank"] == 2 and teacher["epochs"] == 4


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("teacher_lerning_rate", "teacher_learning_rate"),
        ("teacher_rowss", "teacher_rows"),
        ("teacher_histroy", "teacher_history"),
        ("teacher_lora_rnak", "teacher_lora_rank"),
    ],
)
def test_unknown_settings_of_a_teacher_are_refused(base, key, meant):
    assert f"  {key}=1 (did you mean '{meant}'?)" in faults(base, **{key: 1})


def test_settings_of_one_teacher_are_not_those_of_another(base):
    make(base, teacher_lora_rank=2)
    assert "teacher_lora_rank=2" in faults(base, teacher="SASRec", teacher_lora_rank=2)


def test_cutoffs_beyond_the_catalogue_are_refused_if_the_user_set_them(base):
    for settings in ({"topk": [5, 30]}, {"distill_topk": 30}):
        key = next(iter(settings))
        with pytest.raises(
            ValueError,
            match=rf"^{key}=.*: more than the catalogue holds; there are 24 items. Set {key} to 24 or less.$",
        ):
            check_topk(make(base, **settings), 25)
    config = make(base, topk=[5, 24], valid_metric="NDCG@5", distill_topk=24)
    check_topk(config, 25)
    assert config["topk"] == [5, 24] and config["distill_topk"] == 24


def test_our_own_cutoffs_shrink_to_a_small_catalogue(base):
    config = make(base)
    check_topk(config, 9)
    assert config["topk"] == [8] and config["distill_topk"] == 8 and config["valid_metric"] == "NDCG@8"
    check_topk(config, 25)
    assert config["topk"] == [8]
    untouched = make(base)
    check_topk(untouched, 25)
    assert untouched["topk"] == [10, 20] and untouched["valid_metric"] == "NDCG@10"


def test_the_selecting_metric_follows_the_cutoffs_unless_it_was_set(base):
    config = make(base, topk=[3, 7])
    check_topk(config, 25)
    assert config["valid_metric"] == "NDCG@7"
    with pytest.raises(ValueError, match="valid_metric=MRR@10: not among topk="):
        check_topk(make(base, topk=[3, 7], valid_metric="MRR@10"), 25)


def test_a_small_catalogue_runs_with_the_defaults(ring):
    """The ring has 24 items: the default cut-off 20 fits, and is refused only beyond them."""
    with pytest.raises(ValueError, match="topk=.*there are 24 items"):
        student(prepared(ring, topk=[1, 50]))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_key_says_its_type_and_what_it_is(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"[\w\"]+:", line)]
    assert len(lines) == len(yaml.safe_load(path.read_text(encoding="utf-8")))
    for line in lines:
        assert re.search(
            r"# \((str|int|float|bool|list|dict)\) [A-Z1-9].*\.( |$)|# \((str|int|float|bool|list|dict)\) \S.*\.", line
        ), line


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_types_are_those_of_the_values(path):
    text = path.read_text(encoding="utf-8")
    kinds = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
    for key, value in yaml.load(text, Loader=RecBoleConfig._build_yaml_loader(None)).items():
        said = re.search(rf'^"?{key}"?:.*?# \((\w+)\)', text, flags=re.M)[1]
        either = (float, int, str) if key == "distill_temperature" else (int, float) if said == "float" else kinds[said]
        assert value is None or isinstance(value, either), f"{key}={value!r} is no {said}"
        assert said == "bool" or not isinstance(value, bool), f"{key}={value!r} is a bool"


def test_every_declared_key_is_read_somewhere():
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "recbole_llm").rglob("*.py"))
    folder = Path(recbole.__file__).parent
    host = "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    host_keys = {*general_arguments, *training_arguments, *evaluation_arguments, *dataset_arguments}
    read_by_name = {f"distill_{name}" for name in Distillation.__dataclass_fields__} | {
        f"{role}_{name}" for role in ("teacher", "cloud", "device") for name in ("seed", "config")
    }
    read_by_name |= {f"lsc_{name}" for name in Collaboration.__dataclass_fields__}
    declared = {key for path in YAMLS for key in yaml.safe_load(path.read_text(encoding="utf-8"))}
    assert "teacher_trained_rows" in declared and "student" in declared
    unread = {
        key
        for key in declared - read_by_name - host_keys - {f"teacher_{handed_on}" for handed_on in host_keys}
        if not re.search(rf"\[\"{key}\"\]|(choice|shared)\((self\.)?config, \"{key}\"|given\.get\(\"{key}\"", code)
        and not re.search(rf"config\[\"{key}\"\]", host)
    }
    assert not unread


def test_a_seed_of_shuffled_texts_is_checked_and_handed_to_all_models_of_a_run(base):
    said = faults(base, shuffle_text="yes", lerning_rate=1)
    assert "shuffle_text=yes: is no seed; there are whole numbers from 0 upwards, and empty for texts" in said
    assert "lerning_rate=1" in said
    assert "  teacher_shuffle_text=3" in faults(base, teacher_shuffle_text=3)
    assert config_file.role_config(make(base, shuffle_text=3), "teacher")["shuffle_text"] == 3
    assert config_file.role_config(make(base), "teacher")["shuffle_text"] is None


def test_modes_set_the_same_fields_and_every_empty_key():
    ours = yaml.safe_load((PROPERTIES / "model" / "DLLM2Rec.yaml").read_text())
    modes = ours["distill_modes"]
    assert set(modes) == {"best", "paper", "code", "off"}
    empty = {
        key.removeprefix("distill_") for key, value in ours.items() if key.startswith("distill_") and value is None
    }
    for name, mode in modes.items():
        assert set(mode) == empty, name


def test_dataset_yamls_name_only_keys_that_some_model_has():
    known = {*general_arguments, *training_arguments, *evaluation_arguments, *dataset_arguments}
    for path in (PROPERTIES / "overall.yaml", *(PROPERTIES / "model").glob("*.yaml")):
        known |= set(yaml.safe_load(path.read_text()))
    for path in (PROPERTIES / "dataset").glob("*.yaml"):
        assert set(yaml.safe_load(path.read_text())) <= known, path.name


def test_model_files_are_found_without_importing_them(monkeypatch):
    for module in model_files().values():
        monkeypatch.delitem(sys.modules, module, raising=False)
    names = [path.stem for path in (PROPERTIES / "model").glob("*.yaml")]
    assert {"BIGRec", "DLLM2Rec"} <= set(names)
    assert model_files.__wrapped__() == {name: f"recbole_llm.model.{name.lower()}" for name in names}
    assert not set(model_files().values()) & set(sys.modules)


def test_every_yaml_has_its_module():
    assert {path.stem for path in (PROPERTIES / "model").glob("*.yaml")} == set(model_files())


def test_sequential_models_are_recboles(base):
    names = sequential_models()
    assert {"SASRec", "GRU4Rec", "NARM", "STAMP", "Caser", "LightSANs"} <= set(names)
    assert not {"BPR", "LightGCN", "DLLM2Rec", "FM"} & set(names)


def test_the_values_in_the_yaml_are_the_ones_that_arrive(base):
    config = make(base)
    for path in (PROPERTIES / "overall.yaml", PROPERTIES / "model" / "DLLM2Rec.yaml"):
        for key, value in yaml.load(path.read_text(), Loader=RecBoleConfig._build_yaml_loader(None)).items():
            if key not in {"train_neg_sample_args"}:
                assert config[key] == value, key


def test_a_class_in_place_of_a_name_is_taken(base):
    config = Config(SASRec, "ring", None, base | {"train_neg_sample_args": None}, read_argv=False)
    assert config["model"] == "SASRec" and config.model_class is SASRec


def test_words_of_prompts_are_handed_on_to_the_teacher(base):
    words = {"prompt_lead": "Seen so far:"}
    assert role_config(make(base, teacher="BIGRec", **words), "teacher")["prompt_lead"] == "Seen so far:"
    assert "prompt_lead=Seen so far:" in faults(base, model="SASRec", **words)


def test_the_teacher_keeps_its_own_evaluation_batches(base):
    config = make(base, teacher="BIGRec")
    assert config["eval_batch_size"] == 4096 and role_config(config, "teacher")["eval_batch_size"] == 64


def test_the_ranking_term_of_a_mode_fits_the_base_that_was_set(base):
    def ranking(**settings):
        return Distillation.from_config(make(base, **settings)).ranking

    assert ranking(distill_mode="paper") == "sigmoid"
    assert ranking(distill_mode="paper", distill_base="softmax") == "softmax"
    assert ranking(distill_mode="paper", distill_base="softmax", distill_ranking="kl") == "kl"
    assert ranking() == "none"


def test_positions_are_checked_before_any_work(base):
    assert "positions=al: no such choice; did you mean 'all'" in faults(base, model="SASRec", positions="al")


def test_the_data_sets_of_the_readme_have_their_yaml():
    """An ignore rule once kept them out of every clone."""
    assert {"ml-100k", "ml-1m", "amazon-beauty", "amazon-games"} <= {p.stem for p in (PROPERTIES / "dataset").iterdir()}
