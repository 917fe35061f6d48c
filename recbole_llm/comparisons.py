"""Is one model better than another? Paired over users, corrected for how often that was asked.

Wilcoxon's signed ranks say whether there is a difference, a bootstrap over users how large it is, Holm's correction what is left of
it among several questions. Signed ranks compare what is distributed alike but for a shift: a mean of three runs has other values per
user than one run (1/3 where that has 0 or 1), and against it they would find a difference between a model and itself. So ranks
are taken of means over equally many runs, or of single runs.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import wilcoxon

from recbole_llm.report import paired_gain

ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """One model against another one.

    Args:
        name: The model.
        against: The other one.
        gain: Relative difference of their means; None, as its interval, where the other one has 0.
        low: Lower end of its 95 % interval, by bootstrap over users.
        high: Its upper end.
        p: Of Wilcoxon's signed-rank test over users, corrected by Holm among the comparisons of its table.
        users: How many users there are.
        missing: Runs of the two that it does not rest on: they are still to be made, or their ranks are on another machine.
        alone: P before the correction; None in files of older versions.
    """

    name: str
    against: str
    gain: float | None
    low: float | None
    high: float | None
    p: float
    users: int
    missing: int = 0
    alone: float | None = None

    @property
    def verdict(self) -> str:
        """`gain` or `loss` where interval and test agree, else that none is shown; `so far` while runs are missing."""
        if self.low is None or self.high is None:
            return "none shown"
        shown = {"gain": self.low > 0, "loss": self.high < 0}
        found = next((word for word, is_so in shown.items() if is_so and self.p < ALPHA), "none shown")
        return f"{found} so far" if self.missing and found != "none shown" else found


def per_user(values: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Sums over the rows of each user, users in the order of their names; values [R], users [R] -> [U].

    The ratio of two such sums' means is the ratio of the means over rows, and rows of one user are drawn together.
    """
    return np.bincount(np.unique(users, return_inverse=True)[1], weights=values)


@dataclass(frozen=True)
class Question:
    """What is asked of two models.

    Args:
        name: The model.
        against: The other one.
        ours: Seed -> metric of each user under the model [U].
        theirs: Seed -> metric of each user under the other one [U].
        missing: Runs of the two that are still to be made.
    """

    name: str
    against: str
    ours: Mapping[int, np.ndarray]
    theirs: Mapping[int, np.ndarray]
    missing: int = 0


def compare(questions: Sequence[Question]) -> list[Comparison]:
    """Answers to all questions of a table."""
    means = [[np.mean(list(runs.values()), axis=0) for runs in (each.ours, each.theirs)] for each in questions]
    raw = [
        ranked(each.ours, each.theirs, bool(ours.mean() > theirs.mean()))
        for each, (ours, theirs) in zip(questions, means, strict=True)
    ]
    return [
        Comparison(each.name, each.against, *told(*paired_gain(*pair)), p, len(pair[0]), each.missing, alone)
        for each, pair, p, alone in zip(questions, means, holm(raw), raw, strict=True)
    ]


def told(*values: float) -> list[float | None]:
    """Numbers as JSON knows them: None for what is none."""
    return [None if np.isnan(value) else value for value in values]


def ranked(ours: Mapping[int, np.ndarray], theirs: Mapping[int, np.ndarray], better: bool) -> float:
    """P of signed ranks of means over seeds, of those that both have if one has more; with one run of either, the largest of all pairs.

    Args:
        ours: Seed -> metric of each user under the one model [U].
        theirs: The other's.
        better: Which way the means differ.
    """
    common = sorted(ours.keys() & theirs.keys())
    if len(ours) != len(theirs) and len(common) > 1:
        ours, theirs = ({seed: runs[seed] for seed in common} for runs in (ours, theirs))
    if len(ours) == len(theirs):
        return signed_ranks(np.mean([*ours.values()], axis=0) - np.mean([*theirs.values()], axis=0), better)
    return max(signed_ranks(one - other, better) for one, other in itertools.product(ours.values(), theirs.values()))


def signed_ranks(differences: np.ndarray, better: bool) -> float:
    """P of Wilcoxon's signed-rank test, two-sided, users without a difference left out.

    Args:
        differences: Of each user [U].
        better: Which way the means differ; ranks that point the other way show nothing, and have 1, as differences of 0 have.
    """
    differences = np.round(differences, 12)  # of equal means in another order only rounding is left
    if not np.any(differences):
        return 1.0
    one_side = wilcoxon(differences, method="approx", alternative="greater" if better else "less").pvalue
    return min(1.0, 2 * float(one_side))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the chance that any of the tests is wrong stays below the level. Args: p-values, in any order."""
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(order))
    largest = 0.0
    for place, at in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p[at]))
        corrected[at] = largest
    return corrected.tolist()


def uncorrected(p: Sequence[float]) -> list[float]:
    """What p-values were before `holm`; where that cannot be told, at most so much: 1 stays 1. Args: all of a table, in any order."""
    found = np.ones(len(p))
    for place, at in enumerate(np.argsort(p, kind="stable")):
        found[at] = p[at] / (len(p) - place) if p[at] < 1 else 1.0
    return found.tolist()
