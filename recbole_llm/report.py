"""Tables of finished runs: metrics per model, on how many rows they rest, their uncertainty, and the time they took.

`python -m recbole_llm.report OURS... --against THEIRS...` sets finished runs beside each other: folders of one run per seed.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from texttable import Texttable

from recbole_llm.artifacts import DamagedArtifact, read_json, write_json, write_text
from recbole_llm.item_text import shuffled_sentence

Z95 = 1.959964
SINGLE_TARGET = ("recall", "hit", "ndcg", "mrr")  # metrics whose value in a row follows from one rank


@dataclass
class Line:
    """One model's line of a table.

    Args:
        name: What the line shows.
        metrics: Test metrics over all of `ranks`, as RecBole's evaluator gives them.
        ranks: Rank of the target in each evaluated test row, from 0; -1 beyond the largest cut-off.
        rows: The test rows that were evaluated; None is all, in order.
        valid: Metrics of the selected epoch on validation rows.
        seconds: Stage -> seconds when it was run.
        cached: Whether the line was taken from a finished run's files.
        notes: Facts shown beside the table (legality of the LLM's outputs, source of the weights).
    """

    name: str
    metrics: dict[str, float]
    ranks: list[int]
    rows: list[int] | None = None
    valid: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cached: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the line as JSON into a run's folder."""
        write_json(folder / "metrics.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Line":
        """Read a finished run's line, marked as cached."""
        return cls(**{**read_json(folder / "metrics.json"), "cached": True})

    def on(self, rows: Sequence[int] | None) -> list[int]:
        """Ranks on some test rows that this line covers."""
        if rows is None:
            return self.ranks
        place = {row: at for at, row in enumerate(self.rows)} if self.rows is not None else None
        return [self.ranks[place[row] if place else row] for row in rows]


def row_metric(ranks: Sequence[int], metric: str, k: int) -> np.ndarray:
    """A metric of every row that has one relevant item. Returns [R].

    Args:
        ranks: Rank of the relevant item from 0, -1 if it was not found [R].
        metric: recall | hit | ndcg | mrr.
        k: Cut-off.
    """
    rank = np.asarray(ranks)
    found = (rank >= 0) & (rank < k)
    gain = {"recall": np.ones_like(rank, float), "hit": np.ones_like(rank, float)}
    safe = np.where(found, rank, 0)
    gain |= {"ndcg": 1 / np.log2(safe + 2), "mrr": 1 / (safe + 1.0)}
    return np.where(found, gain[metric.lower()], 0.0)


def half_width(values: np.ndarray) -> float:
    """Half of the 95 % interval of a mean over independent rows (normal approximation)."""
    return Z95 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else float("nan")


def in_brackets(gain: float, low: float, high: float) -> str:
    """A relative difference and its interval; n/a where there is nothing to compare with."""
    return "n/a" if math.isnan(gain) else f"{gain:+.1%} [{low:+.1%}, {high:+.1%}]"


def paired_gain(ours: np.ndarray, theirs: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Relative difference of two means over the same rows, and its 95 % bootstrap interval over rows.

    Returns:
        (gain, low, high) as fractions of `theirs`; nan where `theirs` has mean 0.
    """
    if not theirs.mean():
        return float("nan"), float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = np.empty((2, draws))
    for draw in range(draws):  # one by one: all of them at once would hold 2 GB for 50,000 rows
        pick = rng.integers(0, len(ours), len(ours))
        means[:, draw] = ours[pick].mean(), theirs[pick].mean()
    one, base = means[:, means[1] > 0]
    low, high = np.quantile(one / base - 1, [0.025, 0.975])
    return float(ours.mean() / theirs.mean() - 1), float(low), float(high)


def main_table(lines: Sequence[Line], metrics: Sequence[str], topk: Sequence[int]) -> str:
    """One line per model: rows, every metric at every cut-off, seconds, and where the line is from."""
    names = [f"{metric.lower()}@{k}" for k in topk for metric in metrics]
    head = ["model", "test rows", *names, "train s", "label s", "test s", "from"]
    body = [
        [
            line.name,
            str(len(line.ranks)),
            *[_number(line.metrics.get(name)) for name in names],
            _seconds(line.seconds.get("train")),
            _seconds(line.seconds.get("label")),
            _seconds(line.seconds.get("test")),
            "cache" if line.cached else "this run",
        ]
        for line in lines
    ]
    return draw(head, body)


def common_rows_table(lines: Sequence[Line], metrics: Sequence[str], topk: Sequence[int]) -> str:
    """The same models on the rows that all of them have, each metric with half of its 95 % interval."""
    subsets = [set(line.rows) for line in lines if line.rows is not None]
    rows = sorted(set.intersection(*subsets)) if subsets else None
    known = [metric for metric in metrics if metric.lower() in SINGLE_TARGET]
    body = []
    for line in lines:
        ranks = line.on(rows)
        cells = []
        for k in topk:
            for metric in known:
                values = row_metric(ranks, metric, k)
                cells.append(f"{values.mean():.4f} ±{half_width(values):.4f}")
        body.append([line.name, str(len(ranks)), *cells])
    return draw(["model", "test rows", *[f"{metric.lower()}@{k}" for k in topk for metric in known]], body)


def gain_sentence(ours: Sequence[Line], theirs: Sequence[Line], metric: str, k: int) -> str:
    """What one model gains over another on all rows, with its interval and its number of rows.

    Args:
        ours: Its line, or one line per seed, whose rows are averaged.
        theirs: Of the other one.
        metric: One of `SINGLE_TARGET`.
        k: Cut-off.
    """
    a, b = (np.mean([row_metric(line.ranks, metric, k) for line in lines], axis=0) for lines in (ours, theirs))
    gain, low, high = paired_gain(a, b)
    verdict = "a gain" if low > 0 else "a loss" if high < 0 else "no difference is shown"
    seeds = "one seed" if len(ours) == len(theirs) == 1 else f"seeds {len(ours)} and {len(theirs)}"
    return (
        f"{ours[0].name} against {theirs[0].name}, {metric}@{k} on {len(a)} test rows, {seeds}: {gain:+.1%} "
        f"(95 % by paired bootstrap over rows: {low:+.1%} to {high:+.1%}; {verdict})."
    )


def compared(ours: Sequence[Path], theirs: Sequence[Path]) -> str:
    """Finished runs of two models beside each other.

    Args:
        ours: Run folders, one per seed.
        theirs: Those of the other model.

    Raises:
        ValueError: A folder holds no finished run, or the runs were not tested alike.
    """
    lines, protocols, chosen = {}, {}, {}
    for folder in (*ours, *theirs):
        try:
            lines[folder], settings = Line.load(folder), read_json(folder / "config.json")
        except (FileNotFoundError, DamagedArtifact) as error:
            raise ValueError(f"{folder}: no finished run there ({error}). Name folders in saved/runs.") from error
        chosen[folder] = settings
        rows = lines[folder].rows
        protocols[folder] = {key: settings.get(key) for key in SAME} | {"test rows": rows or len(lines[folder].ranks)}
    first = protocols[ours[0]]
    for folder, protocol in protocols.items():
        if differ := [f"{key} ({protocol[key]}, not {first[key]})" for key in first if protocol[key] != first[key]]:
            raise ValueError(f"{folder}: was not tested as {ours[0]} was; what differs: {', '.join(differ)}.")
    metric, _, k = first["valid_metric"].partition("@")
    if metric.lower() not in SINGLE_TARGET:
        raise ValueError(
            f"valid_metric={first['valid_metric']}: does not follow from one rank per row; there is {', '.join(SINGLE_TARGET)}. Set "
            "valid_metric and run anew."
        )
    for folders in (ours, theirs):
        refuse_other_than_seeds([chosen[folder] for folder in folders], folders)
    groups = [[lines[folder] for folder in folders] for folders in (ours, theirs)]
    names = [f"{name.lower()}@{cut}" for cut in first["topk"] for name in first["metrics"]]
    means = []
    for group in groups:
        cells = [[line.metrics[name] for line in group] for name in names]
        means.append([group[0].name, str(len(group)), *map(_mean_of_seeds, cells)])
    said = [
        f"{group[0].name}: {shuffled_sentence(seed)}"
        for folders, group in zip((ours, theirs), groups, strict=True)
        if (seed := chosen[folders[0]].get("shuffle_text")) is not None
    ]
    return "\n".join([draw(["model", "seeds", *names], means), gain_sentence(*groups, metric, int(k)), *said])


def refuse_other_than_seeds(settings: Sequence[dict[str, Any]], folders: Sequence[Path]) -> None:
    """Refuse runs that are not one model under different seeds. Raises: ValueError."""
    first = settings[0]
    for folder, other in zip(folders[1:], settings[1:], strict=True):
        keys = sorted((first.keys() | other.keys()) - {"seed", *OF_A_MACHINE})
        if differ := [key for key in keys if first.get(key) != other.get(key)]:
            raise ValueError(
                f"{folder}: is no other seed of {folders[0]}; what differs: {', '.join(differ)}. Name runs of one model."
            )
    seeds = [each.get("seed") for each in settings]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seed={seeds}: a seed stands twice; there is one run per seed to name. Leave one out.")


OF_A_MACHINE = (
    "data_path",
    "checkpoint_dir",
    "threads",
    "device",
    "gpu_id",
    "use_gpu",
    "show_progress",
    "state",
    "resume",
    "keep_lists",
    "device_settings",  # made of the other settings
)
SAME = (
    "dataset", "eval_args", "seen_items", "topk", "metrics", "valid_metric", "val_interval", "user_inter_num_interval",
    "item_inter_num_interval",
)  # fmt: skip
"""Settings without which two runs cannot be compared row by row."""


def _mean_of_seeds(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ±{np.std(values, ddof=1):.4f}"


def legality_sentences(line: Line) -> list[str]:
    """What an LLM wrote on the test rows."""
    said = line.notes.get("legality")
    if not said:
        return []
    without = said["without_repeats"]
    return [
        f"{line.name} wrote on {said['rows']} test rows: {said['catalogue_titles']:.1%} catalogue titles, "
        f"{said['repeats_history']:.1%} repeats of the history, {said['distinct']:.1%} distinct outputs.",
        f"{line.name} without the {without['repeat_rows']} rows whose target is a repeat: "
        + ", ".join(f"{name} {value:.4f}" for name, value in without["metrics"].items())
        + f" on {without['rows']} rows.",
        f"{said['shared_titles']} items share their title with another one; in {said['twin_rows']} rows such an item is the target and "
        "counts as the first of its title.",
    ]


def model_sentences(line: Line) -> list[str]:
    """How a model was made where its paper leaves it open, and where its weights are from."""
    choices, weights = line.notes.get("choices"), line.notes.get("weights", {})
    sentences = []
    if choices:
        sentences.append(f"{line.name}: " + ", ".join(f"{name}={value}" for name, value in choices.items()) + ".")
    sources = sorted({str(source) for name, source in weights.items() if not name.endswith("digest")})
    return [*sentences, *([f"Weights: {'; '.join(sources)}."] if sources else [])]


def teaching_sentences(line: Line) -> list[str]:
    """On how many rows a teacher's line rests, and where its Knowledge is."""
    facts = line.notes.get("knowledge")
    if not facts:
        return []
    drawn = "" if facts["tuned"] == "all" else ", all drawn with its own seed"
    folds = ""
    if facts.get("folds"):
        folds = f"The labels are those of {facts['folds']} further teachers, each trained without the users whose rows it labels. "
    return [
        f"{line.name} was trained on {facts['tuned']} and labelled {facts['labelled']} of {facts['training_rows']} training rows, and was "
        f"tested on {len(line.ranks)} test rows{drawn}. {folds}Knowledge: {facts['folder']}"
    ]


def protocol_sentence(
    eval_args: dict[str, Any],
    seen_items: str,
    ties: float,
    note: str | None,
    shuffle_text: int | None = None,
    lengths: Sequence[int] = (),
) -> str:
    """How the lines were evaluated, and what has to be known of the data.

    Args:
        eval_args: RecBole's.
        seen_items: keep | mask.
        ties: Share of interactions that share their time with another one; nan where the data have no times.
        note: Of the data set, if it has one.
        shuffle_text: The seed by which texts were dealt out anew, if they were.
        lengths: Longest histories that the models read; told of a split by time, where one user has rows of many lengths.
    """
    if math.isnan(ties):
        tied = "The data have no times, so how many interactions share one is unknown; the files are the order."
    else:
        tied = f"{ties:.1%} of the interactions share their time with another one of the same user and keep the order of the file."
    seen = {"keep": "items of the history kept", "mask": "items of the user's whole history left out"}[seen_items]
    split = ", ".join(f"{kind}={how}" for kind, how in eval_args["split"].items())
    whole = ""
    if eval_args.get("group_by", "user") != "user":
        read = " to ".join(str(length) for length in dict.fromkeys([min(lengths), max(lengths)])) if lengths else ""
        whole = f" over all users at once (group_by: none){f', histories of at most {read} items' if read else ''}"
    return (
        f"Protocol: RecBole's split {split} in the order {eval_args['order']}{whole}, test mode {eval_args['mode']['test']}, {seen}; "
        f"students are selected on validation rows, LLMs by their answer loss there. {tied}{' ' + note if note else ''}"
        f"{'' if shuffle_text is None else ' ' + shuffled_sentence(shuffle_text)}"
    )


def summary(
    lines: Sequence[Line], metrics: Sequence[str], topk: Sequence[int], valid_metric: str, protocol: str = ""
) -> str:
    """All that is printed at the end of a run."""
    parts = [main_table(lines, metrics, topk)]
    if len(lines) > 1:
        parts += [
            "The same test rows for all lines, each with half of its 95 % interval:",
            common_rows_table(lines, metrics, topk),
        ]
        metric, _, k = valid_metric.partition("@")
        # other metrics of RecBole do not follow from one rank per row
        if metric.lower() in SINGLE_TARGET and lines[-1].rows == lines[-2].rows:
            parts.append(gain_sentence(lines[-1:], lines[-2:-1], metric, int(k)))
    for line in lines:
        parts += [*teaching_sentences(line), *legality_sentences(line), *model_sentences(line)]
    return "\n".join([*parts, protocol] if protocol else parts)


def write_run(folder: Path, settings: dict[str, Any], text: str, lines: Sequence[Line]) -> None:
    """Write a run's folder: config.json, results.json (all lines) and table.txt."""
    write_json(folder / "config.json", settings)
    write_json(folder / "results.json", {"lines": [asdict(line) for line in lines]})
    write_text(folder / "table.txt", text + "\n")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def draw(head: list[str], body: list[list[str]]) -> str:
    """A table as text: the first column to the left, all others to the right."""
    table = Texttable(max_width=0)
    table.set_deco(Texttable.HEADER | Texttable.BORDER | Texttable.VLINES)
    table.set_cols_dtype(["t"] * len(head))
    table.set_cols_align(["l"] + ["r"] * (len(head) - 1))
    table.add_rows([head, *body])
    return table.draw()


def main() -> None:
    """The command: finished runs beside each other."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("ours", nargs="+", type=Path, help="run folders of a model, one per seed")
    parser.add_argument("--against", nargs="+", type=Path, required=True, help="run folders of another one")
    asked = parser.parse_args()
    try:
        print(compared(asked.ours, asked.against))
    except ValueError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
