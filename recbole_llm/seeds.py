"""Runs of LSC4Rec under several seeds as one table: `python -m recbole_llm.seeds saved/runs/LSC4Rec-...`, one folder a seed."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recbole_llm.account import Account
from recbole_llm.artifacts import DamagedArtifact, read_json
from recbole_llm.item_text import shuffled_sentence
from recbole_llm.report import draw, paired_gain, refuse_other_than_seeds, row_metric


def together(folders: Sequence[Path]) -> str:
    """Mean and standard deviation over seeds of every line and policy, and differences on users whose seeds are averaged.

    Args:
        folders: Run folders, one per seed.

    Raises:
        ValueError: A folder holds no finished run, or the runs are not one model under different seeds.
    """
    accounts, settings = [], []
    for folder in folders:
        try:
            accounts.append(Account.load(folder))
            settings.append(read_json(folder / "config.json"))
        except (FileNotFoundError, DamagedArtifact) as error:
            raise ValueError(
                f"{folder}: no finished run of LSC4Rec there ({error}). Name folders in saved/runs."
            ) from error
    refuse_other_than_seeds(settings, folders)
    names = [line.name for line in accounts[0].lines]
    metrics = list(accounts[0].lines[0].metrics)
    metric, _, cut = accounts[0].chosen["metric"].partition("@")
    steps = accounts[0].chosen["steps"]
    users: dict[str, np.ndarray] = {}
    body = []
    for at, name in enumerate(names):
        lines = [account.lines[at] for account in accounts]
        body.append([name, *[spread([line.metrics[key] for line in lines]) for key in metrics]])
        each = [row_metric(line.ranks, metric, int(cut)).reshape(-1, steps).mean(axis=1) for line in lines]
        users[name] = np.mean(each, axis=0)
    parts = [f"{len(folders)} seeds, {accounts[0].chosen['users']} users:", draw(["model", *metrics], body)]
    for ours in (name for name in names if name.startswith("both")):
        for theirs in (name for name in names if not name.startswith("both")):
            gain, low, high = paired_gain(users[ours], users[theirs])
            parts.append(
                f"{ours} against {theirs}, {metric.lower()}@{cut}: {gain:+.1%} (95 % {low:+.1%} to {high:+.1%})."
            )
    if (seed := settings[0].get("shuffle_text")) is not None:
        parts.append(shuffled_sentence(seed))
    return "\n".join([*parts, policies(accounts)])


def policies(accounts: Sequence[Account]) -> str:
    """Every policy at every rate: rate, metric and share of the gain over seeds."""
    head = [
        "policy",
        "rate set",
        "requests",
        accounts[0].chosen["metric"].lower(),
        "of the gain kept",
        "over the best alone",
        "area less random",
    ]
    body = []
    for rows in zip(*(account.rows for account in accounts), strict=True):
        name, areas = rows[0].policy, [account.areas.get(rows[0].policy, (float("nan"),))[0] for account in accounts]
        rates = spread([row.costs["request_rate"] for row in rows], "{:.1%}")
        kept = spread([row.kept[0] for row in rows], "{:.0%}")
        score, over = spread([row.score for row in rows]), spread([row.over[0] for row in rows], "{:+.1%}")
        body.append([name, f"{rows[0].wished:.0%}", rates, score, kept, over, spread(areas, "{:+.5f}")])
    return draw(head, body)


def spread(values: Sequence[float], form: str = "{:.4f}") -> str:
    """Mean and standard deviation, or a dash where one is no number."""
    if np.isnan(values).any():
        return "-"
    mean = form.format(np.mean(values))
    return mean if len(values) == 1 else f"{mean} ±{form.replace('+', '').format(np.std(values, ddof=1))}"


def main() -> None:
    """The command: accounts of several seeds."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders of LSC4Rec, one per seed")
    try:
        print(together(parser.parse_args().folders))
    except ValueError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
