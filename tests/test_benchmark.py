"""A benchmark's file: rows by axes, whose settings win, and what is said of a wrong one."""

from pathlib import Path

import pytest
import yaml

from recbole_llm.benchmark import Benchmark, names_in
from tests.conftest import ROOT

SMALL = {
    "what": "A test.",
    "seeds": [1, 2],
    "settings": {"epochs": 5, "topk": [10]},
    "datasets": {"ring": {"dataset": "ring", "topk": [1]}, "other": {"dataset": "ring"}},
    "axes": {
        "student": {"SASRec": {"student": "SASRec", "epochs": 6}, "GRU4Rec": {"student": "GRU4Rec"}},
        "teacher": {"BIGRec": {"teacher": "BIGRec"}},
    },
    "rows": {
        "{student}": {"role": "baseline", "settings": {"model": "DLLM2Rec"}},
        "{student} of {teacher}": {"against": "{student}", "where": ["ring"], "settings": {"model": "DLLM2Rec", "epochs": 7}},
        "{student} + {teacher}": {"role": "control", "ensemble": ["{student}", "teacher of {student} of {teacher}"], "where": ["ring"]},
    },
}  # fmt: skip


def write(tmp_path, **changes):
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL | changes, sort_keys=False))
    return file


def load(tmp_path, overrides=None, **changes):
    return Benchmark.load(write(tmp_path, **changes), overrides)


def test_rows_stand_once_for_every_value_of_their_axes(tmp_path):
    benchmark = load(tmp_path)
    assert benchmark.datasets == ["ring", "other"]
    assert [row.name for row in benchmark.on("other")] == ["SASRec", "GRU4Rec"]
    assert [row.name for row in benchmark.on("ring")] == [
        "SASRec", "GRU4Rec", "SASRec of BIGRec", "GRU4Rec of BIGRec", "SASRec + BIGRec", "GRU4Rec + BIGRec",
    ]  # fmt: skip
    taught = benchmark.on("ring")[3]
    assert taught.against == ("GRU4Rec",) and taught.axes == {
        "student": "GRU4Rec",
        "teacher": "BIGRec",
        "dataset": "ring",
    }
    assert benchmark.on("ring")[5].ensemble == ("GRU4Rec", "teacher of GRU4Rec of BIGRec")
    assert taught.seeds == (1, 2)


def test_what_wins_over_what(tmp_path):
    tuned = tmp_path / "tuned-SASRec-ring.yaml"
    tuned.write_text("epochs: 4\nlearning_rate: 0.01\nmodel: SASRec\n")
    axes = SMALL["axes"] | {
        "student": {"SASRec": {"student": "SASRec", "epochs": 6, "config_files": ["tuned-{student}-ring.yaml"]}}
    }
    plain, taught = [row.settings for row in load(tmp_path, axes=axes).on("ring")][:2]
    assert plain == {
        "epochs": 6, "topk": [1], "learning_rate": 0.01, "model": "DLLM2Rec", "student": "SASRec", "dataset": "ring",
    }  # fmt: skip
    assert taught["epochs"] == 7
    assert load(tmp_path, {"epochs": 1}).on("ring")[2].settings["epochs"] == 1


def test_only_names_some_values_of_an_axis(tmp_path):
    rows = SMALL["rows"] | {"{student}, too": {"only": {"student": ["GRU4Rec"]}, "settings": {"model": "SASRec"}}}
    assert [row.name for row in load(tmp_path, rows=rows).on("other")] == ["SASRec", "GRU4Rec", "GRU4Rec, too"]


def test_names_in_a_template():
    assert names_in("{student} and {teacher}, {student}") == ["student", "teacher"]
    assert names_in("SASRec") == []


SAS = {"settings": {"model": "SASRec"}}
TAUGHT = {"settings": {"model": "DLLM2Rec", "teacher": "BIGRec", "distill_mode": "paper"}}
ALONE = {"settings": {"model": "DLLM2Rec", "distill_mode": "off"}}
TEXT_ONLY = {"settings": {"model": "DLLM2Rec", "distill_mode": "best", "teacher_embedding": "some/encoder"}}
SHUFFLED = {"settings": {"model": "SASRec", "shuffle_text": 0}}


def row(name="A", **said):
    return {"rows": {name: SAS | said}}


def pair(a, ensemble=("A", "teacher of A"), **more):
    return {"rows": {"A": a, "C": SAS, "B": {"role": "control", "ensemble": list(ensemble)}} | more}


WRONG = [
    # of one key
    ({"row": {}}, "row: no such key; did you mean 'rows'?"),
    ({"rows": {}}, "rows: is empty; a benchmark needs it"),
    ({"rows": None}, "rows: is empty; a benchmark needs it"),
    ({"rows": ["A"]}, "rows=['A']: holds no keys; write {key: value}"),
    ({"rows": {"A": ["SASRec"]}}, "rows: A=['SASRec']: holds no keys"),
    ({"rows": {1: SAS}}, "rows: 1: is no text; put it into quotes"),
    ({"rows": {"A": {"setings": {}}}}, "rows: A: setings: no such key; did you mean 'settings'?"),
    (row(settings="SASRec"), "rows: A: settings=SASRec: holds no keys"),
    (row(role="basline"), "role=basline: no such choice; did you mean 'baseline'? There is baseline, control, claim"),
    ({"axes": [{"student": {}}]}, "axes=[{'student': {}}]: holds no keys"),
    ({"axes": {"student": ["SASRec"]}}, "axes: student=['SASRec']: holds no keys"),
    ({"axes": {"mode": {False: {}}}}, "axes: mode: False: is no text; put it into quotes"),
    ({"seeds": 2020}, "seeds=2020: is no list of whole numbers from 0 upwards, each once; write [2020, 2021], say"),
    ({"seeds": "2020"}, "seeds=2020: is no list"),
    ({"seeds": []}, "seeds=[]: is no list"),
    ({"seeds": [1.5]}, "seeds=[1.5]: is no list"),
    ({"seeds": ["2020"]}, "seeds=['2020']: is no list"),
    ({"seeds": [True]}, "seeds=[True]: is no list"),
    ({"seeds": [-1]}, "seeds=[-1]: is no list"),
    ({"seeds": [2020, 2020]}, "seeds=[2020, 2020]: is no list"),
    (row(seeds=[]), "rows: A: seeds=[]: is no list"),
    ({"here": "no"}, "here=no: is neither true nor false"),
    ({"minutes": "many"}, "minutes=many: is no number from 0 upwards"),
    ({"tolerance": "1e-3"}, "tolerance=1e-3: is no number from 0 upwards; YAML wants the dot of 1.0e-3"),
    ({"tolerance": {"ring": -1}}, "tolerance: ring=-1: is no number from 0 upwards"),
    ({"tolerance": float("nan")}, "tolerance=nan: is no number from 0 upwards"),
    ({"published": {"ring": {"A": {"hit@20": "much"}}}}, "published: ring: A: hit@20=much: is no number"),
    ({"published": {"ring": {"A": None}}}, "published: ring: A=None: holds no keys"),
    ({"tolerance": {"ring": None}}, "tolerance: ring=None: is no number from 0 upwards"),
    ({"axes": {"student": None}}, "axes: student=None: holds no keys"),
    ({"what": 5}, "what=5: is no text"),
    # of what the file says of its own names
    ({"datasets": {"ring": {"topk": [1]}}}, "datasets: ring: names no data set; give it dataset: ml-100k, say"),
    ({"datasets": {"ring": None}}, "datasets: ring: names no data set"),
    ({"datasets": {"a b": {"dataset": "ring"}, "a+b": {"dataset": "ring"}}}, "datasets: a+b: its results would have the name of"),
    ({"axes": {"student": {}}, "rows": {"{student}": SAS, "A": SAS}}, "axes: student: is empty; give it values"),
    ({"axes": {"dataset": {"A": {}}}}, "axes: dataset: stands for the data set everywhere; give the axis another name"),
    ({"tolerance": {"rng": 0.1}}, "tolerance: rng is no data set; did you mean 'ring'?"),
    ({"published": {"rng": {}}}, "published: rng is no data set; did you mean 'ring'?"),
    ({"rows": {"{studnt}": SAS}}, "rows: {studnt}: studnt is no axis; did you mean 'student'?"),
    ({"rows": {"{student:>9}": SAS}}, "student:>9 is no axis"),
    ({"rows": {"{}": SAS}}, "rows: {}:  is no axis."),
    ({"rows": {"{student": SAS}}, "rows: {student: expected '}' before end of string; write {axis} where a value stands"),
    (row(where=["rng"]), "where: rng is no data set; did you mean 'ring'?"),
    (row(where="ring"), "rows: A: where=ring: is no list of names, each once; write [name, other name]"),
    (row("{student}", only={"studnt": ["SASRec"]}), "only: studnt is no axis of its name; did you mean 'student'?"),
    (row("{student}", only={"teacher": ["BIGRec"]}), "only: teacher is no axis of its name."),
    (row("{student}", only={"student": ["SASrec"]}), "only: SASrec is no value of student; did you mean 'SASRec'?"),
    (row("{student}", only={"student": "SASRec"}), "only: student=SASRec: is no list of names"),
    (row("{student}", only={"student": []}), "only: student=[]: is no list of names"),
    (row("{student}", against="{teacher}"), "rows: {student}: {teacher}: {teacher} is none of what its name is filled in with"),
    (row(ensemble="SASRec"), "rows: A: ensemble=SASRec: is no list of names"),
    (row(ensemble=["A", "{B"]), "rows: A: {B: expected '}' before end of string"),
    (row(settings={"config_files": ["no.yaml"]}), "rows: A: config_files: no.yaml: no such file"),
    (row(settings={"config_files": "no.yaml"}), "rows: A: config_files: no.yaml: no such file"),
    (row(settings={"config_files": [5]}), "rows: A: config_files: 5: no such file"),
    (row("{student}", settings={"config_files": ["a-{x}.yaml"]}), "is filled in with. There is {dataset}, {student}"),
    # of rows beside each other
    (row(settings={"epochs": 1}), "rows: A: has no model"),
    (row(against="B"), "rows: A: B is no row on ring"),
    (row(against=["A"]), "rows: A: against: it is compared with itself"),
    (row(settings={"model": "SASRec", "seed": 1}), "rows: A: settings: seed: is varied by the benchmark"),
    (row(settings={"model": "SASRec", "keep_lists": 1}), "rows: A: settings: keep_lists: is the same in every benchmark"),
    ({"rows": {"A b": SAS, "A, b": SAS}}, "rows: A, b: its results would have the name of those of A b, A-b; rename one of them"),
    ({"rows": {"SASRec": SAS, "{student}": SAS}}, "rows: SASRec: stands twice on ring"),
    (pair(SAS, ["A"]), "ensemble: names 1 rows; there have to be two"),
    (pair(SAS, ["A", "C", "teacher of A"]), "ensemble: names 3 rows; there have to be two"),
    (pair(SAS, ["A", "B"]), "rows: B: ensemble: B: is made of an ensemble; name two rows that are trained"),
    (pair(TAUGHT, D={"ensemble": ["A", "teacher of B"]}), "rows: D: ensemble: teacher of B: is made of an ensemble"),
    (pair(SAS), "rows: B: ensemble: teacher of A: there is none; name a row that distils a teacher"),
    (pair(SAS, ["teacher of A", "A"]), "rows: B: ensemble: teacher of A: there is none"),
    (pair(ALONE), "rows: B: ensemble: teacher of A: there is none"),
    (pair({"settings": ALONE["settings"] | {"distill_mode": False}}), "rows: B: ensemble: teacher of A: there is none"),
    (pair(TEXT_ONLY), "rows: B: ensemble: teacher of A: there is none"),
    ({"rows": {"A": SHUFFLED}}, "rows: A: shuffle_text: only a control may have it, and this is a claim"),
    ({"rows": {"A": SHUFFLED | {"role": "baseline"}}}, "only a control may have it, and this is a baseline"),
    ({"rows": {"{student}": SAS}, "axes": {"student": {"SASRec": {"shuffle_text": 1}}}}, "rows: SASRec: shuffle_text: only a control"),
    ({"rows": {"A": SAS}, "datasets": {"ring": {"dataset": "ring", "shuffle_text": 1}}}, "rows: A: shuffle_text: only a control"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_wrong_file_is_refused_with_what_to_correct(tmp_path, changes, said):
    file = write(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"benchmark=.*small.yaml: \d of its keys") as refused:
        Benchmark.load(file)
    assert said in str(refused.value).replace(f"{tmp_path}/", "")
    assert len(str(refused.value).splitlines()) <= 3, "one fault is told once"


@pytest.mark.parametrize(
    ("changes", "taught"),
    [(TAUGHT, "teacher of A"), (TAUGHT, "C"), (TAUGHT | {"settings": TAUGHT["settings"] | {"distill_weight": "1e-3"}}, "teacher of A")],
)  # fmt: skip
def test_an_ensemble_with_a_teacher_or_another_row_is_taken(tmp_path, changes, taught):
    (both,) = [each for each in load(tmp_path, **pair(changes, ["A", taught])).on("ring") if each.ensemble]
    assert both.ensemble == ("A", taught)


def test_a_shuffled_control_and_an_axis_of_numbers_are_taken(tmp_path):
    rows = {"A": SHUFFLED | {"role": "control"}, "{layers} layers": SAS | {"only": {"layers": [2]}}}
    axes = {"layers": {1: {"n_layers": 1}, 2: {"n_layers": 2}}}
    shuffled, layers = load(tmp_path, rows=rows, axes=axes).on("ring")
    assert shuffled.settings["shuffle_text"] == 0 and layers.name == "2 layers" and layers.settings["n_layers"] == 2


def test_an_empty_value_is_the_default(tmp_path):
    benchmark = load(tmp_path, tolerance=None, here=None, seeds=None, rows={"A": SAS | {"where": None, "role": None}})
    assert benchmark.here is True and benchmark.tolerance == {"ring": 0.0, "other": 0.0}
    assert [(each.seeds, each.role) for each in benchmark.rows] == [((2020,), "claim")] * 2


@pytest.mark.parametrize("key", ["seed", "keep_lists", "model", "dataset", "config_files"])
def test_what_a_benchmark_sets_itself_is_not_overridden(tmp_path, key):
    with pytest.raises(ValueError, match=rf"^{key}=1: .*[^ ]\.$"):
        load(tmp_path, {key: 1})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "holds no keys, but a list"),
        ("just a text", "holds no keys, but a str"),
        ("rows: {A: [", "cannot be read as YAML: while parsing"),
        (b"what: \xff", "cannot be read as YAML: 'utf-8' codec"),
    ],
)
@pytest.mark.parametrize("of_a_row", [False, True], ids=["the file", "a row's config file"])
def test_what_is_no_yaml_of_keys_is_refused(tmp_path, text, said, of_a_row):
    broken = tmp_path / "broken.yaml"
    broken.write_bytes(text.encode() if isinstance(text, str) else text)
    file = write(tmp_path, **row(settings={"config_files": ["broken.yaml"]})) if of_a_row else broken
    with pytest.raises(ValueError, match="benchmark=") as refused:
        Benchmark.load(file)
    assert f"{broken}: {said}" in str(refused.value)


def test_a_file_that_is_not_there_names_those_that_are(tmp_path):
    (tmp_path / "there.yaml").write_text("")
    with pytest.raises(ValueError, match=r"nowhere.yaml: no such file; in .*/ there is there\. Set --benchmark\."):
        Benchmark.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("file", sorted((ROOT / "properties" / "benchmark").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_file_is_understood(file: Path):
    benchmark = Benchmark.load(file)
    assert benchmark.what and benchmark.rows
    assert any(row.role == "baseline" for row in benchmark.rows)
    assert benchmark.minutes or not benchmark.here
