"""What a benchmark leaves behind in results/NAME, and whether another run of it comes to the same.

Committed are results.json (all numbers), table.md and runs/ (one JSON a run); pictures and the ranks of users (Parquet) are made anew.
"""

import json
import os
import platform
import re
import shlex
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recbole_llm.artifacts import read_json, write_json, write_text
from recbole_llm.benchmark import Benchmark
from recbole_llm.charts import draw_table
from recbole_llm.merging import merged
from recbole_llm.processes import held
from recbole_llm.records import runs_written
from recbole_llm.runner import Runner, RunsFailed, Table
from recbole_llm.standings import markdown

RESULTS = "results"
SCORE = re.compile(r"(?<![\w.+-])\d*\.\d+(?![\w.%])")
"""A score in the text of an account: neither a percentage nor a difference."""


def run_benchmark(
    file: str | Path,
    overrides: Mapping[str, Any] | None = None,
    only: str = "*",
    seeds: Sequence[int] = (),
    results: str | Path = RESULTS,
    runs: Collection[tuple[str, str, int]] | None = None,
) -> str:
    """Run what is missing of a benchmark and write results/NAME; returns its Markdown.

    Args:
        file: Of the benchmark.
        overrides: Settings of every run that win over the file's, such as `data_path` or `threads`.
        only: Pattern of `<data set>/<row>` that is to be run; others are shown as far as they are there.
        seeds: Seeds that are to be run; all of the file where it is empty.
        results: Folder of all benchmarks' results.
        runs: Data sets, rows and seeds of the only ones that are to be run, if not all.

    Raises:
        ValueError: The file or a setting is wrong.
        RunsFailed: Some runs ended in an error; all others were run, and results/NAME is written.
    """
    benchmark = Benchmark.load(file, overrides)
    folder, command = Path(results) / benchmark.folder, command_of(file, benchmark.changed)
    runner = Runner(benchmark, results, only, tuple(seeds), runs)
    tables = runner.run(partial(publish, benchmark, folder, command))
    text = publish(benchmark, folder, command)
    if failed := [
        f"  {each.dataset}/{name}, seed {seed}: {said}" for each in tables for name, seed, said in each.failed
    ]:
        raise RunsFailed(
            "\n".join([f"benchmark={file}: {len(failed)} runs failed; the others are in {folder}/.", *failed])
        )
    return text


def estimate_benchmark(
    file: str | Path, overrides: Mapping[str, Any] | None = None, only: str = "*", seeds: Sequence[int] = ()
) -> str:
    """What `run_benchmark` would run, and about how long that takes, as text."""
    return Runner(Benchmark.load(file, overrides), only=only, seeds=tuple(seeds)).estimate()


def publish(benchmark: Benchmark, folder: Path, command: str, table: Table | None = None) -> str:
    """Write all numbers, the Markdown and the pictures of a benchmark; returns the Markdown.

    What is published is read now, not when the runs began, and stays where it is still of the benchmark: other machines and other
    processes write here, too.

    Args:
        benchmark: What was run.
        folder: Of its results.
        command: That runs it.
        table: What came of one data set; all others stay as they are published.
    """
    with held(folder / ".lock"):
        file = folder / "results.json"
        known = read_json(file) if file.is_file() else {}
        runs = list(runs_written(folder, benchmark))
        standings, before = {}, known.get("data", {})
        for dataset in benchmark.datasets:
            own = table if table and table.dataset == dataset else None
            there = [(row, run) for row, run in runs if row.dataset == dataset]
            if each := merged(benchmark, dataset, own, before.get(dataset), there):
                elsewhere = own is None or "partly" in each  # what is here as a whole was timed here
                timed = before.get(dataset, {}).get("machine", known.get("machine", "")) if elsewhere else ""
                standings[dataset] = each | {"machine": _joined(timed, machine() if own else "")}
        timed = _joined(*(each["machine"] for each in standings.values())) or machine()
        text = markdown(benchmark, standings, timed, command)
        write_json(file, {"benchmark": benchmark.name, "machine": timed, "data": standings})
        write_text(folder / "table.md", text)
    if table and table.entries:
        draw_table(table, folder)
    return text


def _joined(*machines: str) -> str:
    """Names of machines, each once."""
    return "; ".join(dict.fromkeys(name for names in machines for name in names.split("; ") if name))


def command_of(file: str | Path, changed: Mapping[str, Any]) -> str:
    """What has to be typed for a benchmark with these settings changed."""
    words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changed.items()]
    return " ".join(["python run_recbole_llm.py", f"--benchmark={file}", *map(shlex.quote, words)])


def machine() -> str:
    """What the times and the memory belong to."""
    threads = torch.get_num_threads()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    cores = f"{os.cpu_count()} CPU cores ({platform.machine()}), {threads} thread{'s' if threads > 1 else ''}"
    return f"{cores}{gpu}, torch {torch.__version__}"


def committed_runs(benchmark: Benchmark, data: Mapping[str, Any]) -> set[tuple[str, str, int]]:
    """Those runs of a benchmark that its results hold: data set, row, seed. Args: the benchmark; data set -> `standing`."""
    return {
        (row.dataset, row.name, seed)
        for row in benchmark.rows
        for seed in row.seeds
        if str(seed) in data.get(row.dataset, {}).get("rows", {}).get(row.name, {}).get("runs", ())
    }


def uncommitted(file: str | Path, results: str | Path = RESULTS) -> tuple[int, int]:
    """How many runs of a benchmark are not committed, and how many it has."""
    benchmark = Benchmark.load(file)
    there = Path(results) / benchmark.name / "results.json"
    every = sum(len(row.seeds) for row in benchmark.rows)
    return every - len(committed_runs(benchmark, read_json(there)["data"]) if there.is_file() else ()), every


def verify(file: str | Path, overrides: Mapping[str, Any] | None = None, results: str | Path = RESULTS) -> list[str]:
    """Run what is committed of a benchmark from scratch, in a folder of its own, and compare both.

    Args:
        file: Of the benchmark.
        overrides: Settings of every run that win over the file's.
        results: Folder of the committed results.

    Returns:
        The cells that differ by more than the benchmark's tolerance, in words; none where all is as committed.

    Raises:
        ValueError: There are no committed results.
    """
    benchmark = Benchmark.load(file)
    there = Path(results) / benchmark.name / "results.json"
    if not there.is_file():
        raise ValueError(
            f"benchmark={file}: no committed results to verify; there has to be {there}. Run it without --verify first, and commit them."
        )
    committed = read_json(there)["data"]
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        own = dict(overrides or {}) | {"checkpoint_dir": f"{scratch}/saved"}
        run_benchmark(file, own, results=scratch, runs=committed_runs(benchmark, committed))
        now = read_json(Path(scratch) / Benchmark.load(file, overrides).folder / "results.json")
    return differences(committed, now["data"], benchmark.tolerance)


def differences(committed: Mapping[str, Any], now: Mapping[str, Any], tolerance: Mapping[str, float]) -> list[str]:
    """Cells of two results that differ.

    Args:
        committed: Data set -> `standing`; parts that it does not have, as older ones, are not compared.
        now: Another one.
        tolerance: Data set -> how far two means over all test rows may be apart; over a part of them as much further as it is smaller.
    """
    found = []
    for dataset in dict.fromkeys([*committed, *now]):
        first, second = committed.get(dataset, {}), now.get(dataset, {})
        if first:
            second = {key: value for key, value in second.items() if key in first}
        allowed = tolerance.get(dataset, 0.0)
        old, new = ({name: cell for name, *cell in cells(each)} for each in (first, second))
        for name in dict.fromkeys([*old, *new]):
            (was, share), (is_now, _) = old.get(name, (None, 1.0)), new.get(name, (None, 1.0))
            if was is None or is_now is None:
                found.append(f"{dataset}: {name}: {_value(was)} committed, {_value(is_now)} now")
            elif not abs(was - is_now) <= allowed / share + 1e-9:
                found.append(f"{dataset}: {name}: {was:.6f} committed, {is_now:.6f} now, tolerance {allowed / share:g}")
        old, new = dict(facts(first)), dict(facts(second))
        found += [
            f"{dataset}: {name}: {old[name]} committed, {new.get(name, 'nothing')} now"
            for name in old
            if old[name] != new.get(name)
        ]
        if first.get("strongest") != second.get("strongest") and not _as_strong(first, second, allowed):
            found.append(f"{dataset}: strongest: {first.get('strongest')} committed, {second.get('strongest')} now")
    return found


def facts(standing: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All that has to be the same to the letter: how a data set's rows were tested, and how many there are; never a time or a size."""
    yield from ((key.replace("_", " "), standing[key]) for key in ("protocol", "test_rows", "users") if key in standing)
    for name, row in standing.get("rows", {}).items():
        if "test_rows" in row:
            yield f"{name}, test rows", row["test_rows"]
    for what, groups in standing.get("slices", {}).items():
        if not what.startswith("what "):  # those by a teacher's confidence have another row where it is a little surer
            yield f"{what}: rows of the groups", [each["rows"] for each in groups.values()]


def _as_strong(committed: Mapping[str, Any], now: Mapping[str, Any], tolerance: float) -> bool:
    """Whether two names of the strongest baseline may stand for each other: by the tolerance, neither is."""
    names, scores = (committed.get("strongest"), now.get("strongest")), []
    for name in names:
        runs = now.get("rows", {}).get(name, {}).get("runs", {}).values()
        scores.append([run["valid"].get(now["metric"]) for run in runs])
    if not all(scores) or None in [*scores[0], *scores[1]]:
        return False
    one, other = (sum(values) / len(values) for values in scores)
    return abs(one - other) <= 2 * tolerance + 1e-9


def cells(standing: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Every quality number of a data set: its name, its value, and the share of the test rows it is of; never a time or a size."""
    rows = standing.get("rows", {})
    shares = {name: row.get("test_rows", standing["test_rows"]) / standing["test_rows"] for name, row in rows.items()}
    for name, row in rows.items():
        for seed, run in row["runs"].items():
            for kind in ("metrics", "valid"):
                what = f"{name}, seed {seed}, {kind}"
                yield from ((f"{what} {metric}", value, shares[name]) for metric, value in run[kind].items())
    for each in standing.get("comparisons", []):
        runs = rows[each["against"]]["runs"].values()
        base = sum(run["metrics"][standing["metric"]] for run in runs) / len(runs)
        if base:  # as a difference of two means, either of which may be off by the tolerance
            share = min(shares[each["name"]], shares[each["against"]]) / 2
            yield f"{each['name']} against {each['against']}", each["gain"] * base, share
    for what, groups in standing.get("slices", {}).items():
        for number, each in enumerate(groups.values(), start=1):  # a group's name tells its values, which vary
            share = each["rows"] / standing["test_rows"]
            yield from ((f"{name}, {what}: group {number}", value, share) for name, value in each["scores"].items())
    yield from ((f"{name}, met first", share, 1.0) for name, share in standing.get("met_first", {}).items())
    for name, text in standing.get("accounts", {}).items():  # percentages follow from the scores
        yield from ((f"{name}, account: number {at}", float(each), 1.0) for at, each in enumerate(SCORE.findall(text)))
    for name, each in standing.get("overlap", {}).items():
        yield f"{name}, overlap before", each["before"], 1.0
        yield f"{name}, overlap after", each["after"], 1.0


def _value(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.6f}"
