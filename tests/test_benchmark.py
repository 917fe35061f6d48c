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


def load(tmp_path, overrides=None, **changes):
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL | changes, sort_keys=False))
    return Benchmark.load(file, overrides)


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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"row": {}}, "row: no such key; did you mean 'rows'?"),
        ({"rows": {}}, "rows: is empty; a benchmark needs it"),
        ({"rows": {"{studnt}": {"settings": {"model": "SASRec"}}}}, "{studnt}; did you mean 'student'? is no axis"),
        ({"rows": {"A": {"setings": {}}}}, "rows: A: setings: no such key; did you mean 'settings'?"),
        ({"rows": {"A": {"role": "basline", "settings": {"model": "SASRec"}}}}, "role=basline: no such choice; did you mean 'baseline'?"),
        ({"rows": {"A": {"settings": {"epochs": 1}}}}, "rows: A: has no model"),
        ({"rows": {"A": {"against": "B", "settings": {"model": "SASRec"}}}}, "rows: A: B is no row on ring"),
        ({"rows": {"A": {"where": ["rng"], "settings": {"model": "SASRec"}}}}, "where: rng is no data set; did you mean 'ring'?"),
        ({"rows": {"A": {"settings": {"model": "SASRec"}}, "B": {"ensemble": ["A"]}}}, "ensemble: names 1 rows; there have to be two"),
        ({"rows": {"A": {"settings": {"model": "SASRec", "config_files": ["no.yaml"]}}}}, "no.yaml: no such file"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_what_to_correct(tmp_path, changes, said):
    with pytest.raises(ValueError, match=r"benchmark=.*small.yaml: \d of its keys") as refused:
        load(tmp_path, **changes)
    assert said in str(refused.value)


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
