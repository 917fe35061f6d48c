"""A benchmark run for real on the ring: what is written, what is taken from files, and that another run comes to the same."""

import fcntl
import json
import shutil
from pathlib import Path

import pandas
import pytest
import yaml

from recbole_llm import plan, quick_start, runner
from recbole_llm.benchmark import Benchmark, Row
from recbole_llm.charts import training
from recbole_llm.command import main
from recbole_llm.quick_start import run_folder
from recbole_llm.records import PROTOCOL, row_of
from recbole_llm.report import Line
from recbole_llm.results import cells, differences, run_benchmark, verify
from recbole_llm.runner import Entry, Runner, config_of, refuse_mixed_protocols
from recbole_llm.standings import of_ranks
from tests.conftest import ROOT
from tests.pipelines import ring_settings
from tests.smoke import prepare

SMOKE = ROOT / "properties" / "benchmark" / "smoke.yaml"
ONLY = {"only": "ring/SASRec*vectors of LiteLLM4Rec"}
SHIPPED = sorted((ROOT / "properties" / "benchmark").glob("*.yaml"))


@pytest.fixture
def ran(tmp_path):
    """A part of the smoke benchmark, run: the student alone and a taught one, one seed."""
    for only in ("ring/SASRec", ONLY["only"]):
        run_benchmark(SMOKE, only=only, seeds=[2020])
    return tmp_path / "results" / "smoke"


@pytest.mark.timeout(900)
def test_smoke_is_as_committed():
    assert verify(SMOKE, results=ROOT / "results") == []


def test_what_a_benchmark_leaves_behind(ran):
    found = json.loads((ran / "results.json").read_text())["data"]["ring"]
    assert list(found["rows"]) == ["SASRec", "LiteLLM4Rec (teacher)", "SASRec, vectors of LiteLLM4Rec"]
    assert [each["role"] for each in found["rows"].values()] == ["baseline", "teacher", "claim"]
    (comparison,) = found["comparisons"]
    assert (comparison["name"], comparison["against"]) == ("SASRec, vectors of LiteLLM4Rec", "SASRec")
    assert 0 < found["overlap"]["SASRec, vectors of LiteLLM4Rec"]["after"] <= 1
    assert found["met_first"]["SASRec"] == 0.0 and len(found["met_first"]) == 3, "who knows the ring repeats nothing"
    assert found["strongest"] == "SASRec" and ["SASRec", 2021] in found["missing"]
    one = json.loads((ran / "runs" / "ring" / "SASRec-2020.json").read_text())
    assert one["metrics"]["recall@1"] == 1.0 and one["seconds"]["train"] > 0 and 100 < one["peak_mb"] < 10_000
    ranks = pandas.read_parquet(ran / "ranks-ring.parquet")
    assert len(ranks) == 60 and (ranks["SASRec, seed 2020"] == 0).all() and set(ranks["history"]) == {11}
    table = (ran / "table.md").read_text()
    assert "| **SASRec, vectors of LiteLLM4Rec** | claim | 1 | 60 |" in table and "Not run yet: " in table
    assert {file.name for file in ran.glob("*.png")} == {"quality-ring.png", "training-ring.png", "serving-ring.png"}


def test_a_second_run_trains_nothing_and_says_the_same(ran, monkeypatch):
    before = (ran / "results.json").read_text()
    monkeypatch.setattr("recbole_llm.quick_start.trained", lambda *_: pytest.fail("trained again"))
    run_benchmark(SMOKE, **ONLY, seeds=[2020])
    assert json.loads((ran / "results.json").read_text())["data"] == json.loads(before)["data"]


def test_a_killed_benchmark_goes_on(tmp_path, monkeypatch):
    whole, calls = runner.run_recbole_llm, []

    def killed(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    monkeypatch.setattr(runner, "run_recbole_llm", killed)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(SMOKE, only="ring/SASRec")
    assert [file.name for file in (tmp_path / "results/smoke/runs/ring").iterdir()] == ["SASRec-2020.json"]
    monkeypatch.setattr(runner, "run_recbole_llm", whole)
    estimate = Runner(Benchmark.load(SMOKE), only="ring/SASRec").estimate()
    (row,) = [line for line in estimate.splitlines() if "ring/SASRec" in line]
    assert [cell.strip() for cell in row.split("|")][2:4] == ["2", "1"]
    run_benchmark(SMOKE, only="ring/SASRec")
    assert len(list((tmp_path / "results/smoke/runs/ring").iterdir())) == 2


def estimated(**chosen):
    """Row -> runs, there, seconds of what is shared, seconds of training, as the estimate says them."""
    lines = [line.split("|")[1:-1] for line in Runner(Benchmark.load(SMOKE), **chosen).estimate().splitlines()]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in (line for line in lines if line)}


def test_the_estimate_counts_a_teacher_once_and_every_stage_of_each_seed(monkeypatch):
    def steps(config, data, **_):
        teacher = [plan.Step("teach", 1000.0, kept=Path("t")), plan.Step("label", 200.0, kept=Path("k"))]
        return [*(teacher if config["teacher"] else []), plan.Step("phase 1", 10.0), plan.Step("phase 2", 20.0)]

    monkeypatch.setattr(plan, "steps", steps)
    assert list(estimated(only="ring/*BIGRec").values())[1:] == [["2", "0", "20 min", "60 s"], ["2", "0", "-", "60 s"]]


def test_what_a_plan_shares_is_known_by_its_folder():
    """Not by the row's name: two students of one teacher wait for it once."""
    rows = [row for row in Benchmark.load(SMOKE).on("ring") if row.name.endswith("vectors of LiteLLM4Rec")]
    prepare()
    configs = [config_of(row, 2020) for row in rows]
    one, other = (plan.steps(config, quick_start.load_data(config), alone=False) for config in configs)
    assert [(step.kept, step.what) for step in one[:-1]] == [(step.kept, step.what) for step in other[:-1]]
    assert all(step.kept for step in one[:-1]) and one[-1].kept is None


def test_the_estimate_has_ensembles_and_says_what_they_need():
    alone = estimated(only="ml-100k-small/SASRec + *")
    assert alone["ml-100k-small/SASRec + a larger SASRec (not without its parts)"][:3] == ["2", "0", "-"]
    both = estimated(only="ml-100k-small/SASRec*")
    assert "ml-100k-small/SASRec + a larger SASRec" in both


def test_a_failing_run_costs_no_other(tmp_path, monkeypatch, capsys):
    whole = runner.run_recbole_llm

    def fails(model, *arguments, **options):
        if model == "Markov":
            raise OSError("no space left\non the device")
        return whole(model, *arguments, **options)

    monkeypatch.setattr(runner, "run_recbole_llm", fails)
    assert main([f"--benchmark={SMOKE}", "--only=ring/[MH]*"]) == 1
    assert "1 runs failed" in (said := capsys.readouterr().err) and "ring/Markov, seed 2020: no space left\n" in said
    standing = json.loads((tmp_path / "results/smoke/results.json").read_text())["data"]["ring"]
    assert standing["failed"] == [["Markov", 2020, "no space left"]] and list(standing["rows"]) == ["HistoryKNN"]
    assert "Failed: Markov (seed 2020): no space left" in (tmp_path / "results/smoke/table.md").read_text()


def test_a_data_set_without_a_finished_run_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "run_recbole_llm", lambda *given, **more: 1 / 0)
    assert main([f"--benchmark={SMOKE}", "--only=*/Markov"]) == 1
    assert "2 runs failed" in capsys.readouterr().err
    table = (tmp_path / "results/smoke/table.md").read_text()
    assert table.count("No run has ended.") == table.count("Failed: Markov (seed 2020): division by zero") == 2


def test_an_ensemble_of_a_row_that_failed_is_missing(tmp_path, monkeypatch, capsys):
    """And costs no other row."""
    whole = runner.run_recbole_llm
    monkeypatch.setattr(runner, "run_recbole_llm", lambda model, *given, **more: (
        1 / 0 if model == "DLLM2Rec" else whole(model, *given, **more)
    ))  # fmt: skip
    assert main([f"--benchmark={SMOKE}", "--only=ml-100k-small/*ar*", "--seeds=2020"]) == 1
    standing = json.loads((tmp_path / "results/smoke/results.json").read_text())["data"]["ml-100k-small"]
    assert "Markov" in standing["rows"] and all("+" not in name for name, *_ in standing["failed"])


def test_what_was_not_asked_for_is_shown_from_its_files_only(ran, monkeypatch):
    """Even where everything is to be made anew, and the Knowledge is gone: nothing is trained or labelled for it."""
    monkeypatch.setattr(
        runner, "run_recbole_llm", lambda model, *given, whole=runner.run_recbole_llm, **more: (
            whole(model, *given, **more) if model == "Popularity" else pytest.fail(f"{model} again")
        ),
    )  # fmt: skip
    for manifest in (ran.parent.parent / "saved/knowledge").glob("*/manifest.json"):
        manifest.unlink()
    run_benchmark(SMOKE, {"resume": False}, only="ring/Popularity")
    found = json.loads((ran / "results.json").read_text())["data"]["ring"]
    names = ["Popularity", "SASRec", "LiteLLM4Rec (teacher)", "SASRec, vectors of LiteLLM4Rec"]
    assert list(found["rows"]) == names


def test_two_processes_are_not_at_one_run(tmp_path, monkeypatch):
    """Both would write the same checkpoint; the second waits, and finds it finished."""
    whole, locked = quick_start.trained, []

    def watched(config, data, name, folder, *more):
        with open(folder / ".lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked.append(name)
        return whole(config, data, name, folder, *more)

    monkeypatch.setattr(quick_start, "trained", watched)
    run_benchmark(SMOKE, only="ring/SASRec", seeds=[2020])
    assert locked == ["SASRec alone"]


def test_lists_that_are_missing_are_made_without_a_training(ran, monkeypatch):
    """A run of the command line keeps no lists; its time and memory stay what they were."""
    (folder,) = [config_of(row, 2020) for row in Benchmark.load(SMOKE).on("ring") if row.name == "SASRec"]
    folder = run_folder(folder)
    before = json.loads((folder / "metrics.json").read_text())
    (folder / "lists.safetensors").unlink()
    run_benchmark(SMOKE, only="ring/SASRec", seeds=[2020])
    after = json.loads((folder / "metrics.json").read_text())
    assert (folder / "lists.safetensors").exists() and after["metrics"] == before["metrics"]
    assert after["seconds"]["train"] == before["seconds"]["train"] > 0
    assert after["notes"]["peak_mb"] == before["notes"]["peak_mb"]


COMMITTED = sorted(folder.name for folder in (ROOT / "results").iterdir())


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_runs_have_the_settings_of_their_file(name):
    benchmark = Benchmark.load(ROOT / "properties" / "benchmark" / f"{name}.yaml")
    runs = [json.loads(file.read_text()) for file in (ROOT / "results" / name / "runs").glob("*/*.json")]
    assert runs and {run["row"] for run in runs if not row_of(benchmark, run)} == set()


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_runs_are_those_of_the_committed_table(name):
    folder = ROOT / "results" / name
    data = json.loads((folder / "results.json").read_text())["data"]
    table = {
        (dataset, row, int(seed)): run["metrics"]
        for dataset, each in data.items()
        for row, known in each["rows"].items()
        for seed, run in known["runs"].items()
    }
    runs = [json.loads(file.read_text()) for file in (folder / "runs").glob("*/*.json")]
    assert {(run["dataset"], run["row"], run["seed"]): of_ranks(run["metrics"]) for run in runs} == table


def test_what_was_chosen_on_validation_rows_is_recorded(tmp_path):
    run_benchmark(SMOKE, only="ring/Popularity")
    run = json.loads((tmp_path / "results/smoke/runs/ring/Popularity-2020.json").read_text())
    assert run["chosen"].keys() == {"popularity_last", "counting_repeats"}


@pytest.mark.parametrize(
    ("valid", "metrics", "said"),
    [
        ("MAP@10", "[MAP, NDCG]", r"valid_metric=MAP@10: does not follow from one rank per row, .* there is ndcg in metrics="),
        ("NDCG", "[NDCG]", r"valid_metric=NDCG: has no cut-off, "),
        ("MRR@10", "[Recall, NDCG]", r"valid_metric=MRR@10: is not among metrics, .* there is recall, ndcg in metrics="),
    ],
)  # fmt: skip
def test_a_metric_that_no_table_is_made_of_is_refused_before_any_work(valid, metrics, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        run_benchmark(SMOKE, {"valid_metric": valid, "metrics": yaml.safe_load(metrics)}, only="ring/Popularity")
    assert not (tmp_path / "saved/runs").exists()


@pytest.mark.parametrize("differ", [{"lsc_evaluation": "stream"}, {"lsc_steps": 5}], ids=str)
def test_rows_of_lsc4rec_that_are_shown_otherwise_are_refused_beside_each_other(differ):
    of_lsc = {"cloud": "LiteLLM4Rec", "lsc_evaluation": "static", "lsc_steps": 10}
    protocol = dict.fromkeys(PROTOCOL)
    one, other = protocol | of_lsc, protocol | of_lsc | differ
    with pytest.raises(ValueError, match="B: would be tested otherwise than A; what differs: lsc_"):
        refuse_mixed_protocols({"SASRec": protocol | dict.fromkeys(of_lsc), "A": one, "B": other})
    refuse_mixed_protocols({"SASRec": protocol | dict.fromkeys(of_lsc), "A": one, "B": one})


def test_an_ensemble_whose_parts_were_not_run_is_missing(tmp_path):
    text = (
        SMOKE.read_text()
        .replace("    where: [ml-100k-small]\n    ensemble", "    ensemble")
        .replace("teacher of {student}, ranking of a larger SASRec", "Markov")
    )
    (tmp_path / "pairs.yaml").write_text(text)
    table = run_benchmark(tmp_path / "pairs.yaml", only="ring/SASRec + a larger SASRec", seeds=[2020])
    assert "## ring" not in table
    run_benchmark(tmp_path / "pairs.yaml", only="ring/Markov")
    run_benchmark(tmp_path / "pairs.yaml", only="ring/SASRec", seeds=[2020])
    table = run_benchmark(tmp_path / "pairs.yaml", only="ring/SASRec + a larger SASRec", seeds=[2020])
    assert "| SASRec + a larger SASRec | control | 1 | 60 |" in table, (
        "another seed's parts are not taken for this one's"
    )
    run = json.loads((tmp_path / "results/pairs/runs/ring/SASRec-a-larger-SASRec-2020.json").read_text())
    assert len(run["chosen"]) == 2 and run["chosen"]["norm"]


def test_rows_of_one_table_are_tested_alike(tmp_path):
    text = SMOKE.read_text().replace("settings: {model: Markov}", "settings: {model: Markov, seen_items: mask}")
    (tmp_path / "mixed.yaml").write_text(text)
    with pytest.raises(
        ValueError, match=r"Markov: would be tested otherwise than Popularity; .*seen_items \(mask, not keep\)"
    ):
        Runner(Benchmark.load(tmp_path / "mixed.yaml"))


def test_a_wrong_setting_is_told_with_its_row_before_any_work(tmp_path):
    (tmp_path / "wrong.yaml").write_text(SMOKE.read_text().replace("model: Markov}", "model: Markov, markov_lst: 1}"))
    with pytest.raises(ValueError, match=r"ring/Markov: 1 setting that Markov on ring does not have:\n.*markov_last"):
        Runner(Benchmark.load(tmp_path / "wrong.yaml"))
    assert not (tmp_path / "saved" / "runs").exists()


def test_lsc4rec_has_its_account_and_no_times_among_its_metrics(ring, tiny_lm, tmp_path):
    settings = ring_settings(ring, "LSC4Rec", tiny_lm, lsc_users=40)
    rows = {
        "LSC4Rec": {"role": "baseline", "settings": {"model": "LSC4Rec"}},
        "seldom": {"against": "LSC4Rec", "settings": {"model": "LSC4Rec", "lsc_rate": 0.05}},
    }
    file = tmp_path / "lsc.yaml"
    file.write_text(
        yaml.safe_dump({"what": "LSC4Rec.", "datasets": {"ring": settings | {"dataset": "ring"}}, "rows": rows})
    )
    table = run_benchmark(file, only="*/LSC4Rec")
    assert "LSC4Rec, cloud and device:" in table and "| consistency" in table and "by slices" not in table
    run_benchmark(file, only="*/seldom")
    found = json.loads((tmp_path / "results/lsc/results.json").read_text())["data"]["ring"]
    of_account = "LSC4Rec, account: number ", "seldom, account: number "
    assert all("@" in name or " against " in name or name.startswith(of_account) for name, *_ in cells(found))
    numbers = [value for name, value, _ in cells(found) if name.startswith(of_account)]
    assert numbers and all(0 <= value <= 1 for value in numbers), "scores, no percentages and no times"
    assert list(found["rows"]) == ["LSC4Rec", "seldom"] and not found["missing"], "the first is taken from its files"
    (run,) = found["rows"]["LSC4Rec"]["runs"].values()
    assert (
        set(run["metrics"]) == {"recall@1", "ndcg@1", "recall@10", "ndcg@10"}
        and found["rows"]["LSC4Rec"]["test_rows"] == 40
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only=ring/SASRek*"], "only=ring/SASRek*, seeds=[]: no run of smoke is so called; there is ring/Popularity [2020]"),
        (["--seeds=1"], "only=*, seeds=[1]: no run of smoke is so called"),
        (["--seeds=one"], "seeds=one: no list of whole numbers"),
        (["--seed=1"], "seed=1: is varied by the benchmark; there is seeds, and --seeds"),
        (["--lerning_rate=1"], "lerning_rate=1 (did you mean 'learning_rate'?)"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_refused_before_any_work(words, said, capsys):
    assert main([f"--benchmark={SMOKE}", *words]) == 2
    assert said in capsys.readouterr().err


STANDING = {
    "test_rows": 12,
    "metric": "ndcg@10",
    "rows": {
        "B": {"runs": {}},
        "A": {"runs": {"1": {"metrics": {"ndcg@10": 0.5}, "valid": {"ndcg@10": 0.6}}}, "seconds": {"train": 9}},
    },
    "comparisons": [{"name": "B", "against": "A", "gain": 0.2, "p": 0.01}],
    "slices": {"length": {"1 to 5": {"rows": 3, "scores": {"A": 0.25}}}},
    "overlap": {"A": {"before": 0.1, "after": 0.2}},
}


def test_every_quality_number_is_compared_and_no_time():
    assert {name: cell for name, *cell in cells(STANDING)} == {
        "A, seed 1, metrics ndcg@10": [0.5, 1.0],
        "A, seed 1, valid ndcg@10": [0.6, 1.0],
        "B against A": [0.1, 0.5],
        "A, length: group 1": [0.25, 0.25],
        "A, overlap before": [0.1, 1.0],
        "A, overlap after": [0.2, 1.0],
    }


@pytest.mark.parametrize(
    ("change", "tolerance", "said"),
    [
        (lambda now: now["rows"]["A"]["seconds"].update(train=1), 0.0, []),
        (lambda now: now["rows"]["A"]["runs"]["1"]["metrics"].update({"ndcg@10": 0.51}), 0.02, []),
        (
            lambda now: now["rows"]["A"]["runs"]["1"]["metrics"].update({"ndcg@10": 0.51}),
            0.005,
            ["d: A, seed 1, metrics ndcg@10: 0.500000 committed, 0.510000 now, tolerance 0.005"],
        ),
        (lambda now: now["overlap"].clear(), 0.5, ["d: A, overlap before: 0.100000 committed, nothing now"] * 2),
        (
            lambda now: now["slices"]["length"]["1 to 5"]["scores"].update(A=float("nan")),
            0.5,
            ["d: A, length: group 1: 0.250000 committed, nan now, tolerance 2"],
        ),
        (lambda now: now["slices"]["length"].update({"1 to 6": now["slices"]["length"].pop("1 to 5")}), 0.0, []),
        (lambda now: now["slices"]["length"]["1 to 5"]["scores"].update(A=0.28), 0.01, []),
        (
            lambda now: now["comparisons"][0].update(gain=0.3),
            0.02,
            ["d: B against A: 0.100000 committed, 0.150000 now, tolerance 0.04"],
        ),
    ],
)
def test_differences_name_the_cells(change, tolerance, said):
    now = json.loads(json.dumps(STANDING))
    change(now)
    found = differences({"d": STANDING}, {"d": now}, {"d": tolerance})
    assert found == (said if len(said) < 2 else [said[0], said[0].replace("before: 0.1", "after: 0.2")])


def test_verify_exits_with_1_and_the_cells(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "results" / "smoke", tmp_path / "results" / "smoke")
    committed = json.loads((ROOT / "results" / "smoke" / "results.json").read_text())["data"]
    changed = json.loads(json.dumps(committed))
    changed["ring"]["rows"]["SASRec"]["runs"]["2020"]["metrics"]["recall@1"] -= 0.5

    def fake(file, overrides, results, runs):
        folder = type(tmp_path)(results) / "smoke"
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({"data": changed}))

    monkeypatch.setattr("recbole_llm.results.run_benchmark", fake)
    assert main([f"--benchmark={SMOKE}", "--verify"]) == 1
    assert "ring: SASRec, seed 2020, metrics recall@1: 1.000000 committed, 0.500000 now" in capsys.readouterr().err
    changed["ring"] = committed["ring"]
    assert main([f"--benchmark={SMOKE}", "--verify"]) == 0


def test_verify_runs_what_is_committed_and_says_what_is_not(ran, capsys):
    """Which is one seed of two rows here; nothing is told of the others but how many they are."""
    assert main([f"--benchmark={SMOKE}", "--verify"]) == 0
    every = sum(len(row.seeds) for row in Benchmark.load(SMOKE).rows)
    assert f"every number is as committed. {every - 2} of its {every} runs are not committed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda now: now.update(protocol="another"), "protocol: as it is committed, another now"),
        (lambda now: now.update(test_rows=11), "test rows: 12 committed, 11 now"),
        (lambda now: now["rows"]["A"].update(test_rows=6), "A, test rows: 12 committed, 6 now"),
        (lambda now: now["slices"]["length"]["1 to 5"].update(rows=4), "length: rows of the groups: [3] committed, [4] now"),
        (lambda now: now["met_first"].update(A=0.4), "A, met first: 0.300000 committed, 0.400000 now"),
        (lambda now: now["accounts"].update(A="| both | 0.2000 | 5.0% |"), "A, account: number 0: 0.100000 committed, 0.200000 now"),
        (lambda now: now.update(strongest="C"), "strongest: A committed, C now"),
    ],
)  # fmt: skip
def test_verify_compares_how_it_was_tested_and_what_stands_beside_the_scores(change, said):
    more = {
        "protocol": "as it is", "met_first": {"A": 0.3}, "strongest": "A", "accounts": {"A": "| both | 0.1000 | 3.0% |"},
    }  # fmt: skip
    committed = json.loads(json.dumps(STANDING | more))
    committed["rows"]["A"]["test_rows"] = 12
    committed["rows"]["C"] = {"runs": {"1": {"metrics": {"ndcg@10": 0.5}, "valid": {"ndcg@10": 0.5}}}}
    now = json.loads(json.dumps(committed))
    assert differences({"d": committed}, {"d": now}, {"d": 0.01}) == []
    change(now)
    assert any(said in each for each in differences({"d": committed}, {"d": now}, {"d": 0.01}))


def test_what_an_older_file_does_not_have_is_not_compared_and_equally_strong_rows_are_one():
    now = json.loads(json.dumps(STANDING | {"met_first": {"A": 0.3}, "strongest": "A"}))
    assert differences({"d": STANDING}, {"d": now}, {"d": 0.0}) == []
    for each in (now, committed := json.loads(json.dumps(now))):
        each["rows"]["C"] = json.loads(json.dumps(each["rows"]["A"]))
    now["strongest"] = "C"
    assert differences({"d": committed}, {"d": now}, {"d": 0.0}) == []


def test_what_a_taught_row_costs_has_its_teacher_in_it():
    def entry(name, role, seconds, taught_by=None):
        lines = {seed: Line(name, {}, [], seconds=each) for seed, each in enumerate(seconds)}
        return Entry(Row(name, "ring", role, {}, (), (0,)), name, role, lines, {}, taught_by)

    teacher = entry("T", "teacher", [{"train": 100.0, "label": 20.0, "test": 1.0}])
    taught = entry("S", "claim", [{"train": 4.0, "test": 1.0}, {"train": 6.0, "test": 1.0}], "T")
    assert training(taught, {"T": teacher}) == 125.0 and training(teacher, {"T": teacher}) == 120.0
    assert training(entry("S", "claim", [{"train": 4.0}], "gone"), {"T": teacher}) == 4.0


def test_verify_without_committed_results_is_refused(capsys):
    assert main([f"--benchmark={SMOKE}", "--verify"]) == 2
    assert "no committed results to verify; there has to be results/smoke/results.json" in capsys.readouterr().err


@pytest.mark.parametrize("file", [file for file in SHIPPED if file != SMOKE], ids=lambda file: file.stem)
def test_every_row_of_a_shipped_file_has_settings_that_exist(file, shared_data):
    benchmark = Benchmark.load(file, {"data_path": str(shared_data)})
    for dataset in benchmark.datasets:
        rows = [row for row in benchmark.on(dataset) if not row.ensemble]
        refuse_mixed_protocols({row.name: config_of(row, row.seeds[0]) for row in rows})
