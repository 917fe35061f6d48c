"""The command's flags beside a benchmark: which go together, and what is said of those that do not. No benchmark is run here."""

import pytest

from recbole_llm import results
from recbole_llm.command import main
from tests.conftest import ROOT

FILES = ROOT / "properties" / "benchmark"
SMOKE, PAPER = f"--benchmark={FILES / 'smoke.yaml'}", f"--benchmark={FILES / 'dllm2rec_paper.yaml'}"


@pytest.fixture
def asked(monkeypatch):
    """What the command asked for: name of the function and what it was given after the file."""
    calls = []
    for name, result in (("run_benchmark", "table"), ("estimate_benchmark", "plan"), ("verify", [])):

        def note(file, *arguments, name=name, result=result):
            calls.append((name, *arguments))
            return result

        monkeypatch.setattr(results, name, note)
    monkeypatch.setattr("recbole_llm.quick_start.run_recbole_llm", lambda **given: calls.append(("one run", given)))
    return calls


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only=ring/*"], "--only: is for a benchmark, and none is named. Set --benchmark="),
        (["--only=*"], "--only: is for a benchmark"),
        (["--seeds=2020"], "--seeds: is for a benchmark"),
        (["--verify"], "--verify: is for a benchmark"),
        (["--here", "--model=SASRec"], "--here: is for a benchmark"),
        ([SMOKE, "--verify", "--only=ring/*"], "--verify --only: do not go together; all of a benchmark is compared"),
        ([SMOKE, "--verify", "--seeds=2020"], "--verify --seeds: do not go together"),
        ([SMOKE, "--verify", "--estimate"], "--verify --estimate: do not go together"),
        ([SMOKE, "--model=Nonsense"], "model=Nonsense: every row has its own; --only=<data set>/<row> chooses among them."),
        ([SMOKE, "--dataset=ring"], "dataset=ring: every data set of the file has its own"),
        ([SMOKE, "--config_files=mine.yaml"], "config_files=mine.yaml: rows name theirs in the benchmark's file"),
        ([SMOKE, "--estimate", "--model=SASRec"], "model=SASRec: every row has its own"),
        ([SMOKE, "--verify", "--model=SASRec"], "model=SASRec: every row has its own"),
        ([SMOKE, "--keep_lists=5"], "keep_lists=5: is the same in every benchmark"),
        ([SMOKE, "--fast"], "--fast: not of the form --key=value"),
        ([SMOKE, "--data_note=a: b: c"], "data_note=a: b: c: cannot be read as YAML"),
        ([SMOKE, "--seeds="], "seeds=: no list of whole numbers; there is 2020,2021, say. Set --seeds."),
        ([SMOKE, "--seeds=2020,"], "seeds=2020,: no list of whole numbers"),
        ([SMOKE, "--seeds=\u00b2"], "seeds=\u00b2: no list of whole numbers"),
        (["--benchmark="], "benchmark=.: no such file"),
        ([PAPER], "dllm2rec_paper.yaml: is not meant for a small machine (its file says here: false). The paper's setting"),
        ([PAPER, "--only=*SASRec"], "or --here to run it anyway"),
        ([PAPER, "--verify"], "or --here to run it anyway"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_refused_before_anything_is_run(words, said, asked, capsys):
    assert main(words) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told
    assert asked == []


def test_an_unknown_setting_is_refused_by_the_rows(capsys):
    assert main([SMOKE, "--estimate", "--only=ring/Markov", "--nonsense=1"]) == 2
    assert "1 setting that Popularity on ring does not have:\n  nonsense=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ([SMOKE], ("run_benchmark", {}, "*", [])),
        ([SMOKE, "--only=ring/*", "--seeds=2020, 2021", "--data_path=d"], ("run_benchmark", {"data_path": "d"}, "ring/*", [2020, 2021])),
        ([SMOKE, "--here"], ("run_benchmark", {}, "*", [])),
        ([SMOKE, "--estimate", "--only=ring/*"], ("estimate_benchmark", {}, "ring/*", [])),
        ([SMOKE, "--verify", "--threads=2"], ("verify", {"threads": 2})),
        ([PAPER, "--here"], ("run_benchmark", {}, "*", [])),
        ([PAPER, "--here", "--verify"], ("verify", {})),
        ([PAPER, "--estimate"], ("estimate_benchmark", {}, "*", [])),
    ],
)  # fmt: skip
def test_what_is_asked_of_a_benchmark(words, call, asked):
    assert main(words) == 0
    assert asked == [call]


def test_the_help_tells_how_a_benchmark_at_the_size_of_a_paper_is_run(capsys):
    assert main(["--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "--here run a benchmark also where its file says here: false" in told


@pytest.mark.parametrize("words", [["--model=SASRec"], [SMOKE]], ids=["one run", "benchmark"])
def test_a_fault_of_another_package_keeps_its_traceback(words, asked, monkeypatch):
    def fails_there(*_, **__):  # this module is none of the package's
        return int("x")

    monkeypatch.setattr("recbole_llm.quick_start.run_recbole_llm", fails_there)
    monkeypatch.setattr(results, "run_benchmark", fails_there)
    with pytest.raises(ValueError, match="invalid literal"):
        main(words)
