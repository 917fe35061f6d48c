"""Pictures of a benchmark: every row's quality with its interval, and quality against what it costs to train and to serve."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_llm.artifacts import slug
from recbole_llm.report import half_width
from recbole_llm.runner import Entry, Table
from recbole_llm.standings import mean_of, metric_of, values_of

COLOURS = {"baseline": "C7", "teacher": "C1", "control": "C8", "claim": "C0"}


def draw_table(table: Table, folder: Path) -> list[Path]:
    """Draw one data set's pictures as PNG; returns the files."""
    metric, k = metric_of(table)
    points = []
    teachers = {entry.name: entry for entry in table.entries if entry.role == "teacher"}
    for entry in table.entries:
        values = values_of(entry, metric, k)
        points.append(
            {
                "name": entry.name,
                "role": entry.role,
                "score": float(values.mean()),
                "half": half_width(values),
                "train": training(entry, teachers),
                "serve": 1000 * seconds_of(entry, "test") / len(values),
            }
        )
    title = f"{metric.upper()}@{k} on {table.dataset}, test rows, 95 % intervals over rows"
    name = slug(table.dataset)
    return [
        _bars(points, title, folder / f"quality-{name}.png"),
        _against(
            points,
            "train",
            "seconds of training and labelling, the teacher's too",
            title,
            folder / f"training-{name}.png",
        ),
        _against(points, "serve", "milliseconds a test row", title, folder / f"serving-{name}.png"),
    ]


def seconds_of(entry: Entry, stage: str) -> float:
    """Mean over seeds; 0 where a stage is not known."""
    return mean_of([line.seconds.get(stage) for line in entry.lines.values()]) or 0.0


def training(entry: Entry, teachers: Mapping[str, Entry]) -> float:
    """Seconds of all that had to be trained and labelled for a line: of a taught one its teacher's, too. Args: it; name -> teacher."""
    lines = [entry, *([teachers[entry.taught_by]] if entry.taught_by in teachers else [])]
    return sum(seconds_of(each, stage) for each in lines for stage in ("train", "label"))


def _bars(points: list[Mapping[str, Any]], title: str, file: Path) -> Path:
    from matplotlib.figure import Figure  # no pyplot: it would choose a window system, and keep every figure

    figure = Figure(figsize=(9, 1.5 + 0.32 * len(points)), dpi=120, layout="constrained")
    axes = figure.subplots()
    places = range(len(points))
    axes.barh(
        places,
        [point["score"] for point in points],
        xerr=[point["half"] for point in points],
        color=[COLOURS[point["role"]] for point in points],
        ecolor="0.3",
        capsize=2,
    )
    axes.set_yticks(places, [point["name"] for point in points], fontsize="small")
    axes.invert_yaxis()
    axes.set_title(title, fontsize="medium", loc="right")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    roles = dict.fromkeys(point["role"] for point in points)
    figure.legend(  # beside the bars, none of which it may hide
        handles=[axes.barh([0], [0], color=COLOURS[role], label=role) for role in roles],
        fontsize="small",
        loc="outside lower center",
        ncols=len(roles),
    )
    figure.savefig(file)
    return file


def _against(points: list[Mapping[str, Any]], cost: str, label: str, title: str, file: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for point in points:
        if point[cost] > 0:
            place = point[cost], point["score"]
            axes.errorbar(*place, point["half"], fmt="o", color=COLOURS[point["role"]], alpha=0.8, capsize=2)
            axes.annotate(point["name"], place, xytext=(5, 3), textcoords="offset points", fontsize="x-small")
    axes.set(xscale="log", xlabel=label, ylabel=title.partition(" on ")[0])
    axes.set_title(title, fontsize="medium")
    axes.margins(x=0.25)  # room for the names of the points to the right
    axes.grid(alpha=0.3, which="both")
    figure.savefig(file)
    return file
