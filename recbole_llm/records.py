"""One run of a benchmark as a file of results/NAME/runs, and whether it is still a run of the benchmark's file.

A machine holds some of a benchmark's runs, the committed files hold others. They belong into one table as long as their settings are
those of the file; what says so is a digest, not a name.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_llm.artifacts import digest, read_json, slug, write_json
from recbole_llm.benchmark import TEACHER_OF, Benchmark, Row, teaches
from recbole_llm.report import OF_A_MACHINE, SAME

if TYPE_CHECKING:
    from recbole_llm.runner import Entry

PROTOCOL = (
    *SAME,
    "benchmark_filename",
    "rm_dup_inter",
    "filter_inter_by_user_or_item",
    "threshold",
    "metric_decimal_place",
)
"""Settings in which rows of one table must not differ."""
OF_LSC = ("lsc_evaluation", "lsc_steps")
"""Those in which rows of LSC4Rec must not differ either: they say what is shown to whom, and other models do not have them."""


def taught_with(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a row that are its teacher's."""
    return {key: value for key, value in settings.items() if key == "dataset" or key.startswith("teacher")}


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Hash of settings, but for those of the machine that they were run on."""
    return digest({key: value for key, value in settings.items() if key not in OF_A_MACHINE})


def row_digest(benchmark: Benchmark, row: Row) -> str:
    """Hash of all that a row says of its runs: its settings, and of an ensemble those of the rows that it is made of."""
    rows = {other.name: other for other in benchmark.on(row.dataset)}
    parts = {part: settings_digest(rows[part.removeprefix(TEACHER_OF)].settings) for part in row.ensemble}
    return digest([settings_digest(row.settings), parts])


def teacher_digest(row: Row) -> str:
    """Hash of all that a row says of its teacher: the settings of both the teacher and the protocol."""
    protocol = {key: row.settings[key] for key in (*PROTOCOL, *OF_LSC) if key in row.settings}
    return digest([settings_digest(taught_with(row.settings)), protocol])


def record(benchmark: Benchmark, entry: "Entry", seed: int) -> dict[str, Any]:
    """What came out of one run; not the ranks, which are written together."""
    line, row, teacher = entry.lines[seed], entry.row, entry.role == "teacher"
    return {
        "row": entry.name,
        "dataset": row.dataset,
        "role": entry.role,
        "seed": seed,
        "metrics": line.metrics,
        "valid": line.valid,
        "test_rows": len(line.ranks),
        "seconds": line.seconds,
        "peak_mb": line.notes.get("peak_mb"),
        "settings": taught_with(row.settings) if teacher else row.settings,
        "digest": teacher_digest(row) if teacher else row_digest(benchmark, row),
        "chosen": line.notes.get("choices"),
    }


def write_run(folder: Path, benchmark: Benchmark, entry: "Entry", seed: int) -> None:
    """Write what came out of one run as JSON. Args: folder of the benchmark's results; the benchmark; the line; the seed."""
    file = folder / "runs" / slug(entry.row.dataset) / f"{slug(entry.name)}-{seed}.json"
    write_json(file, record(benchmark, entry, seed))


def row_of(benchmark: Benchmark, run: Mapping[str, Any]) -> Row | None:
    """The row of the benchmark that a written run is one of, of a teacher the first that it teaches; None if there is none any more."""
    for row in benchmark.on(run["dataset"]):
        if run["role"] == "teacher":
            known = "digest" in run
            wanted = teacher_digest(row) if known else settings_digest(taught_with(row.settings))
            # files of older versions have no digest, and may hold all settings of the row
            if teaches(row.settings) and wanted == (
                run["digest"] if known else settings_digest(taught_with(run["settings"]))
            ):
                return row
        elif row.name == run["row"] and run["seed"] in row.seeds:
            if "digest" in run:
                return row if run["digest"] == row_digest(benchmark, row) else None
            return row if settings_digest(run["settings"]) == settings_digest(row.settings) else None
    return None


def runs_written(folder: Path, benchmark: Benchmark) -> Iterator[tuple[Row, dict[str, Any]]]:
    """All written runs that are still runs of the benchmark, each with its row."""
    for file in sorted((folder / "runs").glob("*/*.json")):
        run = read_json(file)
        if row := row_of(benchmark, run):
            yield row, run
