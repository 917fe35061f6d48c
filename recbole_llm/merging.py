"""What was run on this machine and what is published already as one: nothing that still belongs to the benchmark is lost.

The scores of every row follow from the written runs, wherever they were made. Comparisons, slices and overlaps need the ranks and
lists of the test rows, which are not committed: of a row whose runs are not all here they stay as they were published.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.benchmark import Benchmark, Row
from recbole_llm.comparisons import Comparison, holm, uncorrected
from recbole_llm.runner import ORDER, Table
from recbole_llm.standings import frame_of, numbers_of, of_ranks, pairs, standing, strongest_baseline

Standing = Mapping[str, Any]


def merged(
    benchmark: Benchmark,
    dataset: str,
    table: Table | None,
    published: Standing | None,
    runs: Sequence[tuple[Row, Mapping[str, Any]]],
) -> dict[str, Any] | None:
    """The standing of one data set.

    Args:
        benchmark: What is shown.
        dataset: Its name.
        table: What was run here; None where nothing was looked for.
        published: The standing that is written already, if there is one.
        runs: Of `records.runs_written`, those of this data set.

    Returns:
        As `standings.standing`; further `partly` (row -> the seeds that its slices and overlaps rest on, if not on all; comparisons
        rest on no more) and `uncompared` (pairs of rows whose ranks are nowhere together). None if nothing is known.

    Raises:
        ValueError: What is published is of other data.
    """
    rows = rows_of(benchmark, dataset, runs)
    here = seeds_here(table, rows)
    there = seeds_published(published, rows)
    if table is not None and all(set(row["runs"]) <= here.get(name, set()) for name, row in rows.items()):
        return standing(table)
    if table is None and (published is None or not there and not published.get("failed")):
        return None
    frame = published if table is None else frame_of(table)
    if published and there:
        refuse_other_data(dataset, frame, published)
    strongest = strongest_baseline(rows, frame["metric"])
    wanted = pairs(rows, strongest)
    now = {} if table is None else standing(table, wanted)
    # of a row that is partly here, what rests on more of its runs
    own = {name for name, seeds in here.items() if seeds >= there.get(name, set()) or len(seeds) > len(there[name])}
    rests = {name: sorted(here[name] if name in own else there.get(name, ())) for name in rows}
    answers = compared(benchmark, dataset, wanted, now, published or {}, own, there)
    answered = {(each["name"], each["against"]) for each in answers}
    failed = (now or published).get("failed", [])
    failed = [each for each in failed if str(each[1]) not in rows.get(each[0], {"runs": ()})["runs"]]
    # and of one that is wholly here as published, what is not here: its overlap with lists, or its slices, of a teacher elsewhere
    kept = {name for name, seeds in there.items() if name not in own or seeds == here[name]}
    sides = [(now, own), (published or {}, kept)]
    return {
        **{key: frame[key] for key in ("protocol", "test_rows", "users", "metric")},
        "rows": rows,
        "strongest": strongest,
        "comparisons": answers,
        "slices": sliced(sides, list(rows)),
        **{what: chosen(sides, what, list(rows)) for what in ("overlap", "met_first", "accounts")},
        "missing": missing(benchmark, dataset, rows, failed),
        "failed": failed,
        "partly": {name: seeds for name, seeds in rests.items() if len(seeds) < len(rows[name]["runs"])},
        "uncompared": [list(pair) for pair in wanted if pair not in answered],
    }


def rows_of(
    benchmark: Benchmark, dataset: str, runs: Sequence[tuple[Row, Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """The lines of a table from the written runs, in the order in which a table has them."""
    place = {row.name: at for at, row in enumerate(benchmark.on(dataset))}
    lines: dict[str, tuple[Row, str, dict[int, Mapping[str, Any]]]] = {}
    for row, run in runs:
        role = "teacher" if run["role"] == "teacher" else row.role
        lines.setdefault(run["row"], (row, role, {}))[2][run["seed"]] = run
    ordered = sorted(lines.items(), key=lambda line: (ORDER[line[1][1]], place[line[1][0].name]))
    return {name: numbers_of(role, row.against, dict(sorted(of.items()))) for name, (row, role, of) in ordered}


def seeds_here(table: Table | None, rows: Mapping[str, Standing]) -> dict[str, set[str]]:
    """Row -> the seeds that were run here."""
    entries = table.entries if table else []
    return {entry.name: set(map(str, entry.lines)) for entry in entries if entry.name in rows}


def seeds_published(published: Standing | None, rows: Mapping[str, Standing]) -> dict[str, set[str]]:
    """Row -> the seeds that its published comparisons and slices rest on; only rows of which each run is still the one that is written."""
    known = (published or {}).get("rows", {})
    partly = (published or {}).get("partly", {})
    return {
        name: set(partly.get(name, row["runs"]))
        for name, row in known.items()
        if name in rows
        and partly.get(name, row["runs"])
        and all(
            of_ranks(run["metrics"]) == rows[name]["runs"].get(seed, {}).get("metrics")
            for seed, run in row["runs"].items()
        )
    }


def refuse_other_data(dataset: str, now: Standing, published: Standing) -> None:
    """Refuse to show rows of different test rows as one table. Raises: ValueError."""
    if differ := [
        f"{key} ({now[key]}, not {published[key]})"
        for key in ("test_rows", "users", "metric")
        if now[key] != published[key]
    ]:
        raise ValueError(
            f"{dataset}: what is published was run on other data; what differs: {', '.join(differ)}. Set --data_path to the same files, or "
            "move the folder of results away; the runs themselves are kept."
        )


def compared(
    benchmark: Benchmark,
    dataset: str,
    wanted: Sequence[tuple[str, str]],
    here: Standing,
    published: Standing,
    own: set[str],
    there: Mapping[str, set[str]],
) -> list[dict[str, Any]]:
    """Answers to all pairs that have one, of both sides: from here where both rows are, else as published; corrected together."""
    now = {(each["name"], each["against"]): each for each in here.get("comparisons", [])}
    old = published.get("comparisons", [])
    before = uncorrected([each["p"] for each in old])
    old = {
        (each["name"], each["against"]): each | {"alone": p if each.get("alone") is None else each["alone"]}
        for each, p in zip(old, before, strict=True)
        if each["name"] in there and each["against"] in there
    }
    seeds = {row.name: len(row.seeds) for row in benchmark.on(dataset)}
    found = []
    for pair in wanted:
        if pair in now and (set(pair) <= own or pair not in old):
            found.append(now[pair])
        elif pair in old:
            # teachers have one run, whatever the seeds of the row that they teach
            lacking = sum(max(0, seeds.get(name, 0) - len(there[name])) for name in pair)
            found.append(old[pair] | {"missing": lacking})
    answers = []
    for each, p in zip(found, holm([each["alone"] for each in found]), strict=True):
        answer = Comparison(**{key: value for key, value in each.items() if key != "verdict"} | {"p": p})
        answers.append(vars(answer) | {"verdict": answer.verdict})
    return answers


def chosen(sides: Sequence[tuple[Standing, set[str]]], what: str, order: Sequence[str]) -> dict[str, Any]:
    """A part of several standings that is told line by line. Args: as `sliced`; the part; the order of all lines."""
    found = [{name: value for name, value in side.get(what, {}).items() if name in names} for side, names in sides]
    return {
        name: next(part[name] for part in found if name in part)
        for name in order
        if any(name in part for part in found)
    }


def sliced(sides: Sequence[tuple[Standing, set[str]]], order: Sequence[str]) -> dict[str, Any]:
    """Slices of several standings, of each some lines; their groups are the same, but for those of a teacher's confidence.

    Args:
        sides: Standings, and the lines that are taken of each; of two that have a line, or other groups, the first one holds.
        order: Of all lines.
    """
    found: dict[str, Any] = {}
    for side, names in sides:
        for what, groups in side.get("slices", {}).items():
            sizes = [group["rows"] for group in groups.values()]
            taken = [
                {line: score for line, score in group["scores"].items() if line in names} for group in groups.values()
            ]
            if not any(taken):
                continue
            known = found.setdefault(
                what, {name: {"rows": size, "scores": {}} for name, size in zip(groups, sizes, strict=True)}
            )
            if [group["rows"] for group in known.values()] == sizes:
                for group, scores in zip(known.values(), taken, strict=True):
                    group["scores"] = scores | group["scores"]
    for group in (group for groups in found.values() for group in groups.values()):
        group["scores"] = {line: group["scores"][line] for line in order if line in group["scores"]}
    return found


def missing(
    benchmark: Benchmark, dataset: str, rows: Mapping[str, Standing], failed: Sequence[Sequence[Any]]
) -> list[list[Any]]:
    """Rows and seeds that are in no written run and did not fail, ensembles last."""
    ended = {(name, int(seed)) for name, row in rows.items() for seed in row["runs"]}
    ended |= {(name, seed) for name, seed, _ in failed}
    ordered = sorted(benchmark.on(dataset), key=lambda row: bool(row.ensemble))
    return [[row.name, seed] for row in ordered for seed in row.seeds if (row.name, seed) not in ended]
