"""Pictures of an account of LSC4Rec: each as PNG, and as a page of HTML that can be moved about in."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recbole_llm.account import Account


@dataclass(frozen=True)
class Curve:
    """One line of a picture.

    Args:
        name: In the legend.
        x: [P].
        y: [P].
        half: Half of the 95 % interval at each point, or nothing.
        dashed: Whether it is a bound or a control, not something that can be had.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Picture:
    """What is drawn, by whatever draws it."""

    file: str
    title: str
    x: str
    y: str
    curves: list[Curve]


def pictures_of(account: Account) -> list[Picture]:
    """Quality over the rate of requests, the alpha curve, and quality over latency and bytes."""
    metric = account.chosen["metric"]
    by_policy: dict[str, list] = {}
    for row in account.rows:
        by_policy.setdefault(row.policy, []).append(row)

    def curves(cost: str, ends: bool) -> list[Curve]:
        made = []
        for name, rows in by_policy.items():
            rows = sorted(rows, key=lambda row: row.costs[cost])
            x, y, half = [row.costs[cost] for row in rows], [row.score for row in rows], [row.half for row in rows]
            if ends:
                x, y, half = [0.0, *x, 1.0], [account.never, *y, account.always], [0.0, *half, 0.0]
            made.append(Curve(name, x, y, half, name in ("random", "oracle")))
        return made

    title = f"{account.chosen['users']:,} users, {account.chosen['steps']} step{'s' if account.chosen['steps'] > 1 else ''} each"
    made = [
        Picture(
            "rate",
            f"Quality against requests ({title})",
            "requests per recommendation",
            metric,
            curves("request_rate", True),
        ),
        Picture(
            "latency",
            f"Quality against latency ({title})",
            "mean milliseconds a recommendation",
            metric,
            curves("latency_ms", False),
        ),
    ]
    for way in ("up", "down"):
        name = f"mean bytes {way} a recommendation"
        made.append(
            Picture(
                f"bytes_{way}", f"Quality against bytes {way} ({title})", name, metric, curves(f"{way}_bytes", False)
            )
        )
    if account.curve:
        axis, chosen = "alpha: 0 the device's order, 1 the cloud's", account.chosen["norm"]
        by_age = account.curve[chosen]
        ages = [
            Curve("fresh lists" if age == "0" else f"lists {age} behind", account.alphas, scores)
            for age, scores in by_age.items()
        ]
        oldest = list(by_age)[-1]
        norms = [Curve(norm, account.alphas, scores[oldest]) for norm, scores in account.curve.items()]
        made += [
            Picture("alpha", f"Fusion on validation, scale {chosen}", axis, metric, ages),
            Picture("scale", f"Fusion on validation, lists {oldest} behind", axis, metric, norms),
        ]
    return made


def draw_all(account: Account, folder: Path) -> list[Path]:
    """Write every picture into a folder; returns the files."""
    files = []
    for picture in pictures_of(account):
        files += [_png(picture, folder / f"{picture.file}.png"), _html(picture, folder / f"{picture.file}.html")]
    return files


def _png(picture: Picture, file: Path) -> Path:
    from matplotlib.figure import Figure  # no pyplot: it would choose a window system, and keep every figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(picture.curves):
        style = {
            "linestyle": "--" if curve.dashed else "-",
            "marker": "osD^vPX*"[number % 8],
            "markersize": 5,
            "color": f"C{number}",
        }
        axes.plot(curve.x, curve.y, label=curve.name, **style)
        if len(curve.half) and not curve.dashed:
            y, half = np.asarray(curve.y), np.asarray(curve.half)
            axes.errorbar(curve.x, y, half, fmt="none", ecolor=f"C{number}", alpha=0.3, capsize=2)
    axes.set(title=picture.title, xlabel=picture.x, ylabel=picture.y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file)
    return file


def _html(picture: Picture, file: Path) -> Path:
    import plotly.graph_objects as plotly

    figure = plotly.Figure()
    for curve in picture.curves:
        error = {"type": "data", "array": list(curve.half), "visible": True} if len(curve.half) else None
        line = {"dash": "dash"} if curve.dashed else {}
        figure.add_scatter(
            x=list(curve.x), y=list(curve.y), name=curve.name, mode="lines+markers", line=line, error_y=error
        )
    figure.update_layout(title=picture.title, xaxis_title=picture.x, yaxis_title=picture.y, template="plotly_white")
    # the script lies beside the pages, once, so that they open without a network
    figure.write_html(file, include_plotlyjs="directory")
    return file
