"""What a benchmark shows: tables of means over seeds, gains with intervals and tests, slices of the test rows, overlap of lists.

All of it is first a plain dict (results.json, which `results.verify` compares with a committed one), then Markdown.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recbole_llm.benchmark import Benchmark
from recbole_llm.comparisons import Comparison, Question, compare, per_user
from recbole_llm.report import row_metric
from recbole_llm.runner import Entry, Table
from recbole_llm.seeds import together
from recbole_llm.slices import overlap, slices_of


def standing(table: Table, wanted: Sequence[tuple[str, str]] | None = None) -> dict[str, Any]:
    """All numbers of one data set that was run here.

    Args:
        table: What was run.
        wanted: Pairs of rows that are compared; those that the rows themselves ask for, if not given.

    Returns:
        `protocol`, `test_rows`, `users`, `metric`, `rows` (each with its runs), `strongest` (the baseline that did best on
        validation), `comparisons`, `slices`, `overlap`, `met_first`, `accounts` (of LSC4Rec, as text), `missing`,
        `failed`.
    """
    frame, rows = frame_of(table), {entry.name: numbers(entry) for entry in table.entries}
    strongest = strongest_baseline(rows, frame["metric"])
    wanted = pairs(rows, strongest) if wanted is None else wanted
    return {
        **frame,
        "rows": rows,
        "strongest": strongest,
        "comparisons": [vars(each) | {"verdict": each.verdict} for each in comparisons(table, wanted)],
        "slices": sliced(table),
        "overlap": overlaps(table),
        "met_first": met_first(table),
        "accounts": accounts(table),
        "missing": [list(each) for each in table.missing],
        "failed": [list(each) for each in table.failed],
    }


def frame_of(table: Table) -> dict[str, Any]:
    """What all lines of a data set have in common."""
    metric, k = metric_of(table)
    return {
        "protocol": table.protocol,
        "test_rows": len(table.facts.user),
        "users": len(np.unique(table.facts.user)),
        "metric": f"{metric}@{k}",
    }


def metric_of(table: Table) -> tuple[str, int]:
    """The metric that selects, and its cut-off."""
    metric, _, k = str(table.config["valid_metric"]).lower().partition("@")
    return metric, int(k)


def numbers(entry: Entry) -> dict[str, Any]:
    """Metrics of every run of a line, times and memory."""
    runs = {
        seed: {
            "metrics": line.metrics,
            "valid": line.valid,
            "test_rows": len(line.ranks),
            "seconds": line.seconds,
            "peak_mb": line.notes.get("peak_mb"),
        }
        for seed, line in entry.lines.items()
    }
    return numbers_of(entry.role, entry.row.against, runs)


def numbers_of(role: str, against: Sequence[str], runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The same from the runs as they are written. Args: the line's role; what its row names; seed -> `records.record`."""
    first = next(iter(runs.values()))
    return {
        "role": role,
        "against": list(against) if role != "teacher" else [],
        "test_rows": first["test_rows"],
        "runs": {
            str(seed): {"metrics": of_ranks(run["metrics"]), "valid": of_ranks(run["valid"])}
            for seed, run in runs.items()
        },
        "seconds": {
            stage: mean_of([run["seconds"].get(stage) for run in runs.values()]) for stage in ("train", "label", "test")
        },
        "peak_mb": mean_of([run["peak_mb"] for run in runs.values()]),
    }


def of_ranks(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that have a cut-off; what LSC4Rec adds (rates, bytes, milliseconds) stands in its account."""
    return {name: value for name, value in metrics.items() if "@" in name}


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def strongest_baseline(rows: Mapping[str, Mapping[str, Any]], metric: str) -> str | None:
    """The baseline that did best on validation rows, seeds averaged; None if there is no baseline with validation scores."""
    scored = {
        name: statistics.mean(run["valid"][metric] for run in each["runs"].values())
        for name, each in rows.items()
        if each["role"] == "baseline" and all(metric in run["valid"] for run in each["runs"].values())
    }
    return max(scored, key=scored.__getitem__) if scored else None


def pairs(rows: Mapping[str, Mapping[str, Any]], strongest: str | None) -> list[tuple[str, str]]:
    """Every line and the rows that it names, and claims and the strongest baseline, as far as they are there."""
    found = []
    for name, each in rows.items():
        others = [*each["against"], *([strongest] if each["role"] == "claim" and strongest else [])]
        found += [(name, other) for other in dict.fromkeys(others) if other in rows and other != name]
    return found


def runs_of(entry: Entry, metric: str, k: int, rows: Sequence[int] | None = None) -> dict[int, np.ndarray]:
    """Seed -> a metric of every row, or of some [R]."""
    return {seed: row_metric(line.on(rows), metric, k) for seed, line in entry.lines.items()}


def values_of(entry: Entry, metric: str, k: int) -> np.ndarray:
    """A metric of every row, averaged over seeds [R]."""
    return np.mean(list(runs_of(entry, metric, k).values()), axis=0)


def common_rows(*entries: Entry) -> list[int] | None:
    """The test rows that all lines have; None if these are all."""
    parts = [set(line.rows) for entry in entries for line in entry.lines.values() if line.rows is not None]
    return sorted(set.intersection(*parts)) if parts else None


def comparisons(table: Table, wanted: Sequence[tuple[str, str]]) -> list[Comparison]:
    """Pairs of rows compared as far as both were run here, corrected together."""
    metric, k = metric_of(table)
    by_name = {entry.name: entry for entry in table.entries}
    questions = []
    for name, other in wanted:
        if name not in by_name or other not in by_name:
            continue
        both = by_name[name], by_name[other]
        rows = common_rows(*both)
        users = table.facts.user if rows is None else table.facts.user[rows]
        pair = (
            {seed: per_user(values, users) for seed, values in runs_of(each, metric, k, rows).items()} for each in both
        )
        missing = sum(len(each.row.seeds) - len(each.lines) for each in both if each.role != "teacher")
        questions.append(Question(name, other, *pair, missing))
    return compare(questions)


def sliced(table: Table) -> dict[str, dict[str, Any]]:
    """The metric that selects, by what is known of the rows: slice -> group -> {rows, scores by line}; lines with all rows only."""
    metric, k = metric_of(table)
    whole = [entry for entry in table.entries if common_rows(entry) is None]
    if not whole:
        return {}
    values = {entry.name: values_of(entry, metric, k) for entry in whole}
    sure = {
        entry.name: next(iter(kept.values()))["sure"].numpy()
        for entry in whole
        if entry.role == "teacher" and (kept := entry.lists())
    }
    return {
        what: {
            name: {"rows": int(rows.sum()), "scores": {line: float(each[rows].mean()) for line, each in values.items()}}
            for name, rows in groups
        }
        for what, groups in slices_of(table.facts, sure).items()
    }


def overlaps(table: Table) -> dict[str, dict[str, float]]:
    """Share of a teacher's list that the student has, before and after it was taught: student -> {teacher, before, after}."""
    by_name = {entry.name: entry for entry in table.entries}
    found = {}
    for entry in table.entries:
        teacher, before = by_name.get(entry.taught_by or ""), by_name.get(next(iter(entry.row.against), ""))
        if not teacher or not before or common_rows(teacher, entry, before) is not None:
            continue
        lists = [each.lists() for each in (teacher, before, entry)]
        if not all(lists):
            continue
        taught_by = next(iter(lists[0].values()))["items"]
        shares = [statistics.mean(overlap(taught_by, kept["items"]) for kept in each.values()) for each in lists[1:]]
        found[entry.name] = {"teacher": teacher.name, "before": shares[0], "after": shares[1]}
    return found


def met_first(table: Table) -> dict[str, float]:
    """Share of test rows whose best item is one that the user had met: line -> share; lines with lists of all rows only."""
    whole = {entry.name: list(entry.lists().values()) for entry in table.entries if common_rows(entry) is None}
    return {
        name: statistics.mean(float(table.facts.met(kept["items"][:, 0].numpy()).mean()) for kept in lists)
        for name, lists in whole.items()
        if lists
    }


def accounts(table: Table) -> dict[str, str]:
    """Of rows of LSC4Rec: every line and policy over seeds, as `python -m recbole_llm.seeds` prints them."""
    return {
        entry.name: together(list(entry.folders.values()))
        for entry in table.entries
        if entry.row.settings.get("model") == "LSC4Rec" and entry.folders
    }


def markdown(benchmark: Benchmark, standings: Mapping[str, Mapping[str, Any]], machine: str, command: str) -> str:
    """Everything as Markdown: one section per data set."""
    changed = ", ".join(f"{key}={value}" for key, value in benchmark.changed.items())
    parts = [f"# {benchmark.name}{f' with {changed}' if changed else ''}", benchmark.what]
    takes = (
        f" It takes about {benchmark.minutes:g} minutes on two CPU cores, Knowledge there already."
        if benchmark.minutes
        else ""
    )
    parts.append(f"`{command}`{takes} Times and memory: {machine}.")
    for dataset, each in standings.items():
        parts += [f"## {dataset}", *section(each, benchmark.published.get(dataset, {}), benchmark.source)]
    for dataset, rows in benchmark.published.items():
        if dataset not in standings:
            parts += [f"## {dataset}, as published; **not run here**", published(rows, benchmark.source)]
    return "\n\n".join(parts) + "\n"


def section(standing: Mapping[str, Any], paper: Mapping[str, Any], source: str) -> list[str]:
    """The tables of one data set."""
    parts = [
        standing["protocol"],
        f"{standing['test_rows']:,} test rows of {standing['users']:,} users; mean ± standard deviation over seeds.",
        scores(standing),
    ]
    if standing["comparisons"]:
        parts += [
            f"Gains in {standing['metric']}, seeds averaged: 95 % intervals by paired bootstrap over users, p by Wilcoxon's signed "
            "ranks over users (of the seeds that both have; against a single run, the largest p of any run), Holm-corrected "
            f"among these {len(standing['comparisons'])}; *so far* where runs are missing. Seeds are no part of either: of one seed, "
            f"both tell of that training alone. The strongest baseline on validation is {standing['strongest']}.",
            gains(standing["comparisons"]),
        ]
    if standing["slices"]:
        parts += [f"{standing['metric']} by slices of the test rows:", *slices(standing["slices"])]
    if standing["overlap"]:
        body = [
            [name, each["teacher"], f"{each['before']:.1%}", f"{each['after']:.1%}"]
            for name, each in standing["overlap"].items()
        ]
        parts += [
            "Share of the teacher's 20 best items that are among the student's, before and after distillation:",
            table(["student", "teacher", "before", "after"], body),
        ]
    if any((met := standing.get("met_first", {})).values()):
        shares = [f"{name} {share:.1%}" for name, share in met.items()]
        parts.append(f"Share of test rows whose best item is one that the user had met before: {', '.join(shares)}.")
    for name, account in standing["accounts"].items():
        parts += [f"{name}, cloud and device:", f"```\n{account}\n```"]
    if paper:
        parts += [f"As published ({source}), under another protocol, not to be compared:", published(paper, "")]
    if partly := standing.get("partly"):
        rests = [f"{name} on {', '.join(seeds) or 'none of its runs'}" for name, seeds in partly.items()]
        parts.append(
            f"Runs of several machines, whose ranks are not published: slices and overlaps rest on seeds as follows, {'; '.join(rests)}; "
            "comparisons rest on no more runs, and are *so far*."
        )
    if apart := standing.get("uncompared"):
        said = [f"{name} against {other}" for name, other in apart]
        parts.append(f"Not compared, as no machine had the ranks of both: {'; '.join(said)}.")
    if standing["missing"]:
        parts.append(f"Not run yet: {', '.join(f'{name} (seed {seed})' for name, seed in standing['missing'])}.")
    parts += [f"Failed: {name} (seed {seed}): {said}" for name, seed, said in standing.get("failed", [])]
    return parts


def scores(standing: Mapping[str, Any]) -> str:
    """One line per row: metrics, validation, times, memory."""
    rows = standing["rows"]
    if not rows:
        return "No run has ended."
    metrics = list(next(iter(next(iter(rows.values()))["runs"].values()))["metrics"])
    body = []
    for name, each in rows.items():
        runs = list(each["runs"].values())
        valid = [run["valid"].get(standing["metric"]) for run in runs]
        body.append(
            [
                f"**{name}**" if each["role"] == "claim" else name,
                each["role"],
                str(len(runs)),
                f"{each['test_rows']:,}",
                "-" if None in valid else spread(valid),
                *[spread([run["metrics"][metric] for run in runs]) for metric in metrics],
                *[whole(each["seconds"][stage]) for stage in ("train", "label", "test")],
                whole(each["peak_mb"]),
            ]
        )
    head = [
        "row",
        "role",
        "seeds",
        "test rows",
        f"valid {standing['metric']}",
        *metrics,
        "train s",
        "label s",
        "test s",
        "peak MB",
    ]
    return table(head, body)


def gains(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """One line per comparison."""
    body = [
        [
            each["name"],
            each["against"],
            "n/a" if each["gain"] is None else f"{each['gain']:+.1%}",
            "n/a" if each["low"] is None else f"{each['low']:+.1%} to {each['high']:+.1%}",
            f"{each['p']:.3g}",
            each["verdict"],
        ]
        for each in comparisons
    ]
    return table(["row", "against", "gain", "95 %", "p", "verdict"], body)


def slices(groups: Mapping[str, Any]) -> list[str]:
    """A table per kind of slice: one line per row of the table of scores, one column per group."""
    tables = []
    for what, parts in groups.items():
        names = list(next(iter(parts.values()))["scores"])
        body = [[name, *[f"{each['scores'][name]:.4f}" for each in parts.values()]] for name in names]
        tables.append(table([what, *[f"{name} ({each['rows']:,} rows)" for name, each in parts.items()]], body))
    return tables


def published(rows: Mapping[str, Mapping[str, float]], source: str) -> str:
    """What a paper gives."""
    metrics = list(dict.fromkeys(metric for values in rows.values() for metric in values))
    body = [
        [name, *[f"{values[metric]:g}" if metric in values else "-" for metric in metrics]]
        for name, values in rows.items()
    ]
    return table(["row", *metrics], body) + (f"\n\n{source}" if source else "")


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def whole(value: float | None) -> str:
    """A number without decimals, or a dash."""
    return "-" if value is None else f"{value:,.0f}"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
