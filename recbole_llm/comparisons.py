"""Is one model better than another? Paired over users, corrected for how often that was asked.

Wilcoxon's signed ranks say whether there is a difference, a bootstrap over users how large it is, Holm's correction what is left of
it among several questions.
"""

from collections.abc import Sequence
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
        gain: Relative difference of their means.
        low: Lower end of its 95 % interval, by bootstrap over users.
        high: Its upper end.
        p: Of Wilcoxon's signed-rank test over users, corrected by Holm among the comparisons of its table.
        users: How many users there are.
    """

    name: str
    against: str
    gain: float
    low: float
    high: float
    p: float
    users: int

    @property
    def verdict(self) -> str:
        """`gain` or `loss` where interval and test agree, else that none is shown."""
        if self.p < ALPHA and self.low > 0:
            return "gain"
        return "loss" if self.p < ALPHA and self.high < 0 else "none shown"


def per_user(values: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Sums over the rows of each user, users in the order of their names; values [R], users [R] -> [U].

    The ratio of two such sums' means is the ratio of the means over rows, and rows of one user are drawn together.
    """
    return np.bincount(np.unique(users, return_inverse=True)[1], weights=values)


def compare(questions: Sequence[tuple[str, str, np.ndarray, np.ndarray]]) -> list[Comparison]:
    """Answers to all questions of a table.

    Args:
        questions: (model, other model, metric of each user under the one [U], under the other [U]).
    """
    raw = [signed_ranks(ours - theirs) for _, _, ours, theirs in questions]
    return [
        Comparison(name, against, *paired_gain(ours, theirs), p, len(ours))
        for (name, against, ours, theirs), p in zip(questions, holm(raw), strict=True)
    ]


def signed_ranks(differences: np.ndarray) -> float:
    """P of Wilcoxon's signed-rank test, users without a difference left out; 1 where nobody has one. Args: differences [U]."""
    if not np.any(differences):
        return 1.0
    return float(wilcoxon(differences, method="approx").pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the chance that any of the tests is wrong stays below the level. Args: p-values, in any order."""
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(order))
    largest = 0.0
    for place, at in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p[at]))
        corrected[at] = largest
    return corrected.tolist()
