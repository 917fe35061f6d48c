"""What is published stays when a part of a benchmark is run where the rest is not, and what is no longer of the file does not."""

import json
import shlex
import shutil

import pytest
import yaml

from recbole_llm import runner
from recbole_llm.benchmark import Benchmark
from recbole_llm.merging import merged
from recbole_llm.records import row_digest, runs_written
from recbole_llm.results import command_of, machine, publish, run_benchmark
from recbole_llm.runner import Runner
from tests.conftest import ROOT

FILES = ROOT / "properties" / "benchmark"
SMOKE = FILES / "smoke.yaml"


def data_of(folder):
    return json.loads((folder / "results.json").read_text())["data"]


@pytest.fixture
def clone(tmp_path):
    """A fresh clone: committed results, and nothing in saved/."""
    shutil.copytree(ROOT / "results" / "dllm2rec", tmp_path / "results" / "dllm2rec")
    return tmp_path / "results" / "dllm2rec"


@pytest.fixture
def pair(tmp_path):
    """A benchmark of the ring whose rows are trained in a second: a student, one of two epochs and one of three."""
    said = yaml.safe_load(SMOKE.read_text())
    student = {
        "model": "DLLM2Rec",
        "distill_mode": "off",
        "student": "SASRec",
        "hidden_size": 16,
        "n_layers": 1,
        "n_heads": 1,
    }
    said["rows"] = {
        "one": {"role": "baseline", "settings": student | {"epochs": 1}},
        "two": {"against": "one", "settings": student | {"epochs": 2}},
        "three": {"against": "one", "settings": student | {"epochs": 3}},
    }
    del said["axes"], said["tolerance"], said["datasets"]["ml-100k-small"]
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    return tmp_path / "pair.yaml"


@pytest.fixture
def moved(pair, tmp_path):
    """Two of its rows were run on another machine: their files in saved/ are gone."""
    run_benchmark(pair, only="ring/one")
    run_benchmark(pair, only="ring/two", seeds=[2020])
    shutil.rmtree(tmp_path / "saved" / "runs")
    return tmp_path / "results" / "pair"


def test_a_part_run_on_a_fresh_clone_keeps_what_is_published(clone, shared_data):
    before = data_of(clone)
    table = run_benchmark(FILES / "dllm2rec.yaml", {"data_path": str(shared_data)}, only="ml-100k/Popularity")
    after = data_of(clone)
    assert sum(len(each["rows"]) for each in before.values()) == 19
    for dataset in before:
        assert after[dataset]["rows"].keys() == before[dataset]["rows"].keys()
        for key in ("strongest", "slices", "met_first", "overlap", "missing"):
            assert after[dataset][key] == before[dataset][key], key
        kept = [each | {"alone": None} for each in after[dataset]["comparisons"]]
        assert kept == [
            each | {"alone": None, "p": pytest.approx(each["p"])} for each in before[dataset]["comparisons"]
        ]
        for key in ("partly", "uncompared"):  # what no machine could compare is no more than it was
            assert after[dataset].get(key, []) == before[dataset].get(key, []), key
    assert "| GRU4Rec | baseline | 3 | 943 |" in table and "## amazon-games" in table


def test_a_published_row_whose_settings_are_others_now_is_missing(moved, pair):
    pair.write_text(pair.read_text().replace("epochs: 2", "epochs: 4"))
    run_benchmark(pair, only="ring/three", seeds=[2020])
    after = data_of(moved)["ring"]
    assert list(after["rows"]) == ["one", "three"] and ["two", 2020] in after["missing"]
    assert all("two" not in group["scores"] for groups in after["slices"].values() for group in groups.values())


def test_seeds_of_two_machines_are_one_row_and_what_needs_ranks_stays_as_published(moved, pair):
    before = data_of(moved)["ring"]
    table = run_benchmark(pair, only="ring/two", seeds=[2021])
    after = data_of(moved)["ring"]
    assert {name: list(each["runs"]) for name, each in after["rows"].items()} == dict.fromkeys(
        ["one", "two"], ["2020", "2021"]
    )
    (was,), (now,) = before["comparisons"], after["comparisons"]
    assert now["gain"] == was["gain"] and now["missing"] == 1, (
        "the ranks of the row that it is compared with are not here"
    )
    assert after["partly"] == {"two": ["2020"]} and after["missing"] == [["three", 2020], ["three", 2021]]
    assert "rest on seeds as follows, two on 2020;" in table
    assert all(
        list(group["scores"]) == ["one", "two"] for groups in after["slices"].values() for group in groups.values()
    )
    again = run_benchmark(pair, only="ring/two", seeds=[2021])
    assert data_of(moved)["ring"] == after and again == table


def test_times_are_told_with_the_machines_that_they_are_of(moved, pair):
    known = json.loads((moved / "results.json").read_text())
    known["machine"] = known["data"]["ring"]["machine"] = "a large one"
    (moved / "results.json").write_text(json.dumps(known))
    table = run_benchmark(pair, only="ring/three", seeds=[2020])
    assert f"Times and memory: a large one; {machine()}." in table
    run_benchmark(pair, only="ring/one")
    assert f"Times and memory: {machine()}." in run_benchmark(pair, only="ring/two", seeds=[2020])


def test_a_pair_that_no_machine_can_compare_is_named(moved, pair):
    table = run_benchmark(pair, only="ring/three", seeds=[2020])
    after = data_of(moved)["ring"]
    assert after["uncompared"] == [["three", "one"]] and after["strongest"] == "one"
    assert "Not compared, as no machine had the ranks of both: three against one." in table
    assert [each["name"] for each in after["comparisons"]] == ["two"]


def test_two_processes_with_parts_of_their_own_do_not_undo_each_other(pair, tmp_path):
    """The first publishes last, with a table that was drawn up before the other one was there."""
    benchmark, folder = Benchmark.load(pair), tmp_path / "results" / "pair"
    (first,) = Runner(benchmark, only="ring/one", seeds=(2020,)).run()
    run_benchmark(pair, only="ring/two", seeds=[2020])
    publish(benchmark, folder, "", first)
    assert list(data_of(folder)["ring"]["rows"]) == ["one", "two"]
    assert [each["name"] for each in data_of(folder)["ring"]["comparisons"]] == ["two"]


def test_what_another_process_finished_meanwhile_is_in_the_table(pair, tmp_path, monkeypatch):
    whole = runner.run_recbole_llm

    def beside(*given, **more):
        monkeypatch.setattr(runner, "run_recbole_llm", whole)
        run_benchmark(pair, only="ring/one", seeds=[2020], results=tmp_path / "others")
        return whole(*given, **more)

    monkeypatch.setattr(runner, "run_recbole_llm", beside)
    run_benchmark(pair, only="ring/two", seeds=[2020])
    assert list(data_of(tmp_path / "results/pair")["ring"]["rows"]) == ["one", "two"]


def test_other_data_are_not_put_into_one_table(moved, pair):
    known = json.loads((moved / "results.json").read_text())
    known["data"]["ring"]["users"] = 900
    (moved / "results.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"ring: what is published was run on other data; .* users \(60, not 900\)"):
        run_benchmark(pair, only="ring/three", seeds=[2020])


@pytest.mark.parametrize("name", ["dllm2rec", "dllm2rec_masked"])
def test_what_is_committed_alone_comes_to_itself(name):
    folder, benchmark = ROOT / "results" / name, Benchmark.load(FILES / f"{name}.yaml")
    runs = list(runs_written(folder, benchmark))
    for dataset, each in data_of(folder).items():
        alone = merged(benchmark, dataset, None, each, [(row, run) for row, run in runs if row.dataset == dataset])
        assert json.loads(json.dumps(alone["rows"])) == each["rows"]
        assert alone["slices"] == each["slices"] and alone["missing"] == each["missing"]
        assert [row["verdict"] for row in alone["comparisons"]] == [row["verdict"] for row in each["comparisons"]]


def test_changed_settings_are_published_as_what_they_are(pair, tmp_path):
    """Under the plain command stand the numbers of the file, whatever was tried beside them."""
    run_benchmark(pair, only="ring/one", seeds=[2020])
    folders = tmp_path / "results"
    before = (folders / "pair/results.json").read_text()
    changed = {"seen_items": "mask", "threads": 2, "title_field": "title"}
    table = run_benchmark(pair, changed, only="ring/one", seeds=[2020])
    assert (folders / "pair/results.json").read_text() == before
    (other,) = (folder for folder in folders.iterdir() if folder.name != "pair")
    assert other.name == Benchmark.load(pair, {"seen_items": "mask"}).folder and other.name.startswith("pair-")
    assert table.startswith("# pair with seen_items=mask\n")
    assert f"`python run_recbole_llm.py --benchmark={pair} --seen_items=mask`" in table
    assert (folders / "pair/table.md").read_text().startswith("# pair\n")
    one, masked = (json.loads((folder / "runs/ring/one-2020.json").read_text()) for folder in (folders / "pair", other))
    assert one["digest"] != masked["digest"] and masked["settings"]["seen_items"] == "mask"


def test_a_command_can_be_typed_again():
    said = command_of(
        "b.yaml", {"eval_args": {"order": "TO"}, "data_note": "a b", "topk": [1, 10], "lsc_fallback": True}
    )
    assert shlex.split(said)[2:] == [
        "--benchmark=b.yaml",
        '--eval_args={"order": "TO"}',
        "--data_note=a b",
        "--topk=[1, 10]",
        "--lsc_fallback=true",
    ]


def test_where_and_how_runs_are_made_is_no_change(tmp_path):
    assert (
        Benchmark.load(SMOKE, {"data_path": "d", "threads": 4, "resume": False, "stopping_step": 3}).folder == "smoke"
    )
    assert Benchmark.load(SMOKE, {"stopping_step": 4}).changed == {"stopping_step": 4}


def test_an_ensemble_is_another_one_when_its_parts_are(tmp_path):
    benchmark = Benchmark.load(SMOKE)
    (both, *_) = [row for row in benchmark.rows if row.ensemble]
    file = tmp_path / "smoke.yaml"
    file.write_text(SMOKE.read_text().replace("teacher_epochs: 8", "teacher_epochs: 9"))
    changed = Benchmark.load(file)
    (now, *_) = [row for row in changed.rows if row.ensemble]
    assert now.settings == both.settings and row_digest(changed, now) != row_digest(benchmark, both)
