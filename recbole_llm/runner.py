"""Runs what is missing of a benchmark, and writes what came out: every run as JSON, the ranks of all users as Parquet, one table.

A run's own files stay where every run has them (`saved/runs`), so a benchmark that was killed goes on, and rows share teachers,
Knowledge and item tables with each other and with runs of the command line.
"""

import importlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from recbole_llm import ensemble, knowledge, plan, report
from recbole_llm.artifacts import digest, read_tensors, slug, write_atomically
from recbole_llm.benchmark import TEACHER_OF, Benchmark, Row
from recbole_llm.config import Config
from recbole_llm.quick_start import (
    LISTS,
    devices_folder,
    finished,
    has_teacher,
    load_data,
    run_folder,
    run_recbole_llm,
    teacher_line_folder,
)
from recbole_llm.records import OF_LSC, PROTOCOL, write_run
from recbole_llm.slices import Facts

LIST = 20
"""Items of the lists whose overlap is told."""
ORDER = {"baseline": 0, "teacher": 1, "control": 2, "claim": 3}
"""In which lines of each role stand in a table."""


class RunsFailed(RuntimeError):
    """Some runs of a benchmark ended in an error; everything else was run and written."""


@dataclass
class Entry:
    """A line of a table: a row's runs, or those of a teacher.

    Args:
        row: What was run; of a teacher, the first row that it taught.
        name: The line's.
        role: Of the row; `teacher`.
        lines: Seed -> what came out.
        folders: Seed -> the run's folder, where its lists are.
        taught_by: Name of the entry whose Knowledge it was trained with.
    """

    row: Row
    name: str
    role: str
    lines: dict[int, report.Line] = field(default_factory=dict)
    folders: dict[int, Path] = field(default_factory=dict)
    taught_by: str | None = None

    def lists(self) -> dict[int, dict[str, torch.Tensor]]:
        """Seed -> best items and confidence of every test row, where they are kept."""
        return {
            seed: read_tensors(folder / LISTS) for seed, folder in self.folders.items() if (folder / LISTS).is_file()
        }


@dataclass
class Table:
    """All that was run on one data set, under one protocol.

    Args:
        dataset: Its name in the benchmark's file.
        entries: Its lines, in the order of the file, teachers after the rows that need none.
        facts: What is known of its test rows.
        protocol: How they were evaluated, in words.
        config: Of one of its runs: metrics, cut-offs, the metric that selects.
        missing: Rows and seeds that were not run.
        failed: Rows and seeds that ended in an error, and what it said.
    """

    dataset: str
    entries: list[Entry]
    facts: Facts
    protocol: str
    config: Config
    missing: list[tuple[str, int]] = field(default_factory=list)
    failed: list[tuple[str, int, str]] = field(default_factory=list)


class Runner:
    """Runs a benchmark.

    Args:
        benchmark: What is to be run.
        results: Folder of all benchmarks' results.
        only: Pattern of `<data set>/<row>` that is to be run (`ml-100k/SASRec*`); of others only what is there is shown.
        seeds: Seeds that are to be run; all of the file where it is empty.
        runs: Data sets, rows and seeds of the only ones that are to be run, if not all.

    Raises:
        ValueError: A setting of a row is wrong, or rows of one table are tested differently.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        results: str | Path = "results",
        only: str = "*",
        seeds: tuple[int, ...] = (),
        runs: Collection[tuple[str, str, int]] | None = None,
    ):
        self.benchmark, self.only, self.seeds, self.runs = benchmark, only, seeds, runs
        self.folder = Path(results) / benchmark.folder
        if benchmark.prepare:
            importlib.import_module(benchmark.prepare).prepare()
        self.configs = {
            (row.dataset, row.name): config_of(row, row.seeds[0]) for row in benchmark.rows if not row.ensemble
        }
        if not any(self.chosen(row, seed) for row, seed in self.wanted()):
            there = ", ".join(f"{row.dataset}/{row.name} {list(row.seeds)}" for row in benchmark.rows[:5])
            raise ValueError(
                f"only={only}, seeds={list(seeds)}: no run of {benchmark.name} is so called; there is {there} and so on. Set --only to a "
                "pattern of <data set>/<row>, or leave it out."
            )
        for dataset in benchmark.datasets:
            configs = {row.name: self.config(row) for row in benchmark.on(dataset) if not row.ensemble}
            refuse_mixed_protocols(configs)
            refuse_metric(dataset, next(iter(configs.values())))

    def config(self, row: Row) -> Config:
        """The Config of a row under its first seed."""
        return self.configs[row.dataset, row.name]

    def wanted(self) -> list[tuple[Row, int]]:
        """All runs that are to be made or taken from their files, ensembles after their parts."""
        rows = sorted(
            self.benchmark.rows, key=lambda row: (self.benchmark.datasets.index(row.dataset), bool(row.ensemble))
        )
        return [(row, seed) for row in rows for seed in row.seeds]

    def chosen(self, row: Row, seed: int) -> bool:
        """Whether a run is among those that were asked for."""
        named = fnmatch(f"{row.dataset}/{row.name}", self.only) and (not self.seeds or seed in self.seeds)
        return named and (self.runs is None or (row.dataset, row.name, seed) in self.runs)

    def estimate(self) -> str:
        """What is to be run and about how long it takes, as text."""
        rows: list[list[str]] = []
        once: set[tuple[Path, str]] = set()
        total = 0.0
        for row in self.benchmark.rows:
            seeds = [seed for seed in row.seeds if self.chosen(row, seed)]
            if not seeds:
                continue
            missing, note = self._missing(row, seeds)
            common, own = self._seconds(row, missing, once)
            total += common + own
            there = len(seeds) - len(missing)
            rows.append([f"{row.dataset}/{row.name}{note}", str(len(seeds)), str(there), _spoken(common), _spoken(own)])
        head = ["row", "runs", "there", "teacher and Knowledge", "training"]
        return f"{report.draw(head, rows)}\nIn all about {plan.spoken(total)}.\n{plan.HOW.strip()}"

    def _missing(self, row: Row, seeds: Sequence[int]) -> tuple[list[int], str]:
        """Which runs of a row are not there, and what has to be known of that."""
        if not row.ensemble:
            return [seed for seed in seeds if not finished_run(config_of(row, seed))], ""
        entries, asked = {}, {}
        for other in self.benchmark.on(row.dataset):
            if other.name in (part.removeprefix(TEACHER_OF) for part in row.ensemble):
                made = {seed: config_of(other, seed) for seed in other.seeds}
                folders = {seed: run_folder(config) for seed, config in made.items() if finished_run(config)}
                entries[other.dataset, other.name] = Entry(other, other.name, other.role, {}, folders)
                coming = folders | {seed: Path() for seed in other.seeds if self.chosen(other, seed)}
                asked[other.dataset, other.name] = Entry(other, other.name, other.role, {}, coming)
        missing = [seed for seed in seeds if not self._there(row, seed, entries)]
        apart = any(not self._parts_there(row, seed, asked) for seed in missing)
        return missing, " (not without its parts)" if apart else ""

    def _seconds(self, row: Row, missing: Sequence[int], once: set[tuple[Path, str]]) -> tuple[float, float]:
        """How long the missing runs of a row take: what further runs find made, counted when it is made first, and their own work."""
        if not missing:
            return 0.0, 0.0
        if row.ensemble:
            first = row.ensemble[0].removeprefix(TEACHER_OF)
            data = load_data(self.configs[row.dataset, first])
            choices = len(ensemble.NORMS) * len(ensemble.WEIGHTS)
            sizes = len(data.valid._dataset), len(data.test._dataset), data.train._dataset.item_num
            return 0.0, (plan.mixing(choices, *sizes).seconds or 0.0) * len(missing)
        config = self.config(row)
        data, common, own = load_data(config), 0.0, 0.0
        # the teacher is the same under all seeds, so one of them stands for all; LSC4Rec's devices are found by other rows, too
        seeds = missing if config["cloud"] else missing[:1]
        for config in (config_of(row, seed) for seed in seeds):
            for step in plan.steps(config, data, alone=False):
                seconds, kept = step.seconds or 0.0, step.kept or (devices_folder(config) if config["cloud"] else None)
                if kept and (kept, step.what) in once:
                    continue
                if kept:
                    once.add((kept, step.what))
                common += seconds if step.kept else 0.0
                own += 0.0 if step.kept else seconds * len(missing) / len(seeds)
        return common, own

    def run(self, so_far: Callable[[Table], None] = lambda table: None) -> list[Table]:
        """Run what is missing and write it; a run that ends in an error is written down, and the next one begins.

        Args:
            so_far: Called with a data set's table when all that is to be run on it was.

        Returns:
            The tables, data set by data set.
        """
        wanted = self.wanted()
        count = sum(self.chosen(row, seed) for row, seed in wanted)
        tables: list[Table] = []
        began, done = perf_counter(), 0
        for dataset in self.benchmark.datasets:
            entries: dict[tuple[str, str], Entry] = {}
            missing: list[tuple[Row, int]] = []
            failed: list[tuple[str, int, str]] = []
            for row, seed in wanted:
                if row.dataset != dataset:
                    continue
                asked = self.chosen(row, seed) and self._parts_there(row, seed, entries)
                if not asked and not self._there(row, seed, entries):
                    missing.append((row, seed))
                    continue
                if asked:
                    logging.getLogger().info(
                        f"{self.benchmark.name}: {row.dataset}/{row.name}, seed {seed}{_left(began, done, count)}"
                    )
                try:
                    self._one(row, seed, entries, asked)
                except Exception as error:  # of whatever kind: hours of other runs must not depend on it
                    logging.getLogger().exception(f"{row.dataset}/{row.name}, seed {seed}: this run failed.")
                    failed.append((row.name, seed, str(error).partition("\n")[0]))
                done += asked
            missing = [each for each in missing if not self._made_meanwhile(*each, entries)]
            entries = {key: entry for key, entry in entries.items() if entry.lines}
            if entries or failed:
                tables.append(self._table(dataset, entries, [(row.name, seed) for row, seed in missing], failed))
                so_far(tables[-1])
        return tables

    def _there(self, row: Row, seed: int, entries: Mapping[tuple[str, str], Entry]) -> bool:
        """Whether a run that was not asked for is finished."""
        if not row.ensemble:
            return finished_run(config_of(row, seed)) is not None
        return self._parts_there(row, seed, entries) and finished(self._ensemble_folder(row, seed, entries)) is not None

    def _made_meanwhile(self, row: Row, seed: int, entries: dict[tuple[str, str], Entry]) -> bool:
        """Whether another process has finished a run while this one was at others; then it is taken, too."""
        if there := self._there(row, seed, entries):
            self._one(row, seed, entries, False)
        return there

    @staticmethod
    def _parts_there(row: Row, seed: int, entries: Mapping[tuple[str, str], Entry]) -> bool:
        """Whether all that an ensemble is made of under a seed was run; a row that is none needs no others."""
        for part in row.ensemble:
            other = entries.get((row.dataset, part.removeprefix(TEACHER_OF)))
            # a teacher is the same under every seed of its student, and so is a row that has other seeds
            if (
                other is None
                or not other.folders
                or not (part.startswith(TEACHER_OF) or seed in other.folders or seed not in other.row.seeds)
            ):
                return False
        return True

    def _one(self, row: Row, seed: int, entries: dict[tuple[str, str], Entry], asked: bool) -> None:
        """Run a row under a seed, or take it from its files, and write what came out; what was not asked for is only taken."""
        entry = entries.setdefault((row.dataset, row.name), Entry(row, row.name, row.role))
        config = None if row.ensemble else config_of(row, seed)
        if config is None:
            entry.lines[seed] = self._ensemble(row, seed, entries)
        elif (line := finished_run(config)) and (not asked or config["resume"] and not has_teacher(config)):
            entry.lines[seed], entry.folders[seed] = line, run_folder(config)
            if has_teacher(config):
                entry.taught_by = self._teacher(row, config, None, entries)
        else:
            settings = settings_of_run(row, seed)
            result = run_recbole_llm(settings.pop("model"), settings.pop("dataset"), None, settings, alone=False)
            *before, entry.lines[seed] = result["lines"]
            entry.folders[seed] = Path(result["folder"])
            if before and has_teacher(config):
                entry.taught_by = self._teacher(row, config, before[0], entries)
        write_run(self.folder, self.benchmark, entry, seed)

    def _teacher(
        self, row: Row, config: Config, line: report.Line | None, entries: dict[tuple[str, str], Entry]
    ) -> str | None:
        """The entry of the teacher of a row, one per Knowledge; its name, or None where its line is not there any more."""
        folder = teacher_line_folder(config, knowledge.Request.of(config, load_data(config).train._dataset))
        for (dataset, name), entry in entries.items():
            if entry.role == "teacher" and dataset == row.dataset and folder in entry.folders.values():
                return name
        if (line := line or finished(folder, LIST)) is None:
            return None
        name = f"{row.axes.get('teacher', config['teacher'])} (teacher)"
        if (row.dataset, name) in entries:
            name = f"{name.removesuffix(')')} of {row.name})"
        seed = config["teacher_seed"]
        entries[row.dataset, name] = Entry(row, name, "teacher", {seed: line}, {seed: folder})
        write_run(self.folder, self.benchmark, entries[row.dataset, name], seed)
        return name

    def _ensemble_folder(self, row: Row, seed: int, entries: Mapping[tuple[str, str], Entry]) -> Path:
        """Where an ensemble's line is kept, named by the runs that it is made of."""
        parts = [(part, str(self._part(row, part, seed, entries)[1])) for part in row.ensemble]
        checkpoints = Path(self.config(self.benchmark.on(row.dataset)[0])["checkpoint_dir"])
        return checkpoints / "runs" / f"ensemble-{slug(row.dataset)}-{digest(parts, 10)}"

    def _part(self, row: Row, part: str, seed: int, entries: Mapping[tuple[str, str], Entry]) -> tuple[Row, Path, int]:
        """The row that a part of an ensemble names, the folder of its run, and its seed: the same one, if it has that."""
        other = entries[row.dataset, part.removeprefix(TEACHER_OF)]
        own_seed = seed if seed in other.folders else min(other.folders)
        return other.row, other.folders[own_seed], own_seed

    def _ensemble(self, row: Row, seed: int, entries: Mapping[tuple[str, str], Entry]) -> report.Line:
        """Two rows' scores added up."""
        parts, config = [], None
        for part in row.ensemble:
            other, folder, own_seed = self._part(row, part, seed, entries)
            config = config_of(other, own_seed)
            data = load_data(config)
            of_teacher = part.startswith(TEACHER_OF)
            parts.append(ensemble.part_of_teacher(config, data) if of_teacher else ensemble.part_of_run(folder))
        return ensemble.ensemble(config, data, parts, row.name, self._ensemble_folder(row, seed, entries))

    def _table(
        self,
        dataset: str,
        entries: Mapping[tuple[str, str], Entry],
        missing: list[tuple[str, int]],
        failed: list[tuple[str, int, str]],
    ) -> Table:
        """Everything on one data set; writes the ranks of its rows."""
        here = list(entries.values())
        here.sort(key=lambda entry: ORDER[entry.role])
        configs = [self.config(row) for row in self.benchmark.on(dataset) if not row.ensemble]
        config, lengths = configs[0], [each["MAX_ITEM_LIST_LENGTH"] for each in configs]
        data = load_data(config)
        facts = Facts.of(data.train._dataset, data.test._dataset)
        known = data.ties, config["data_note"]
        protocol = report.protocol_sentence(config["eval_args"], config["seen_items"], *known, lengths=lengths)
        table = Table(dataset, here, facts, protocol, config, missing, failed)
        if here:
            write_ranks(self.folder / f"ranks-{slug(dataset)}.parquet", table)
        return table


def settings_of_run(row: Row, seed: int) -> dict[str, Any]:
    """All settings of a run, `model` and `dataset` among them."""
    return row.settings | {"seed": seed, "keep_lists": LIST}


def config_of(row: Row, seed: int) -> Config:
    """The Config of a run. Raises: ValueError, which names the row."""
    settings = settings_of_run(row, seed)
    try:
        return Config(settings.pop("model"), settings.pop("dataset", None), None, settings, read_argv=False)
    except ValueError as error:
        raise ValueError(f"{row.dataset}/{row.name}: {error}") from error


def finished_run(config: Config) -> report.Line | None:
    """The line of a run that is finished; with its lists, but for LSC4Rec, which has none."""
    return finished(run_folder(config), 0 if config["cloud"] else LIST)


def refuse_mixed_protocols(configs: Mapping[str, Config]) -> None:
    """Refuse rows of one table that are tested differently. Args: row -> its Config. Raises: ValueError."""
    refuse_other(configs, PROTOCOL)
    if clouds := {name: config for name, config in configs.items() if config["cloud"]}:
        refuse_other(clouds, OF_LSC)


def refuse_other(configs: Mapping[str, Config], keys: Sequence[str]) -> None:
    """Refuse rows that differ in some settings. Args: row -> its Config; the settings. Raises: ValueError."""
    first_name, first = next(iter(configs.items()))
    for name, config in configs.items():
        differ = [f"{key} ({config[key]}, not {first[key]})" for key in keys if config[key] != first[key]]
        if differ:
            raise ValueError(
                f"{name}: would be tested otherwise than {first_name}; what differs: {', '.join(differ)}. Put such settings under the "
                "data set in the benchmark's file, once per protocol."
            )


def refuse_metric(dataset: str, config: Config) -> None:
    """Refuse a metric that tables cannot be made of. Raises: ValueError."""
    metric, _, cut = str(config["valid_metric"]).lower().partition("@")
    there = [name for name in map(str.lower, config["metrics"]) if name in report.SINGLE_TARGET]
    faults = {
        "does not follow from one rank per row": metric not in report.SINGLE_TARGET,
        "is not among metrics": metric not in there,
        "has no cut-off": not cut.isdecimal(),
    }
    if what := next((fault for fault, wrong in faults.items() if wrong), None):
        raise ValueError(
            f"valid_metric={config['valid_metric']}: {what}, and tables of {dataset} are made of it; there is "
            f"{', '.join(there) or 'none'} in metrics={config['metrics']}, of {', '.join(report.SINGLE_TARGET)}, at {config['topk']}. Set "
            "valid_metric and metrics."
        )


def write_ranks(file: Path, table: Table) -> None:
    """Write the rank of every test row under every run as Parquet, and what is known of the rows; -1 beyond the largest cut-off."""
    import pandas

    facts = table.facts
    columns: dict[str, Any] = {
        "user": facts.user, "popularity": facts.popularity, "history": facts.history, "repeat": facts.repeat,
    }  # fmt: skip
    for entry in table.entries:
        for seed, line in entry.lines.items():
            ranks = pandas.array([pandas.NA] * len(facts.user), dtype="Int16")
            ranks[np.arange(len(facts.user)) if line.rows is None else line.rows] = line.ranks
            columns[f"{entry.name}, seed {seed}"] = ranks
    write_atomically(file, lambda name: pandas.DataFrame(columns).to_parquet(name, index=False))


def _left(began: float, done: int, count: int) -> str:
    passed = perf_counter() - began
    left = f", about {plan.spoken(passed / done * (count - done))} left" if done else ""
    return f", run {done + 1} of {count}{left}."


def _spoken(seconds: float) -> str:
    return plan.spoken(seconds) if seconds else "-"
