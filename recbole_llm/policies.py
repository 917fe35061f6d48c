"""Who asks the cloud again, and when; the decision falls before the list is shown, and only the oracle knows what would come.

Paper: Lv et al., KDD 2025 (arXiv 2501.05647), collaborative-decision request: `consistency`. The others are ours, to compare it with.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from recbole_llm.replay import Fusion, Policy, Step
from recbole_llm.report import row_metric
from recbole_llm.request import Threshold, code_score, disagreement_at, footrule, uncertainty

MEASURES = {
    "footrule": footrule,
    "overlap": lambda first, second, there: disagreement_at(first, second, there, 10),
    "code": code_score,
}
SIGNALS: dict[str, Callable[[Step, str], Tensor]] = {
    "consistency": lambda step, measure: MEASURES[measure](step.cloud, step.device, step.listed),
    "invalid-count": lambda step, measure: step.missing.float(),
    "confidence": lambda step, measure: uncertainty(step.device, step.listed),
    "history-drift": lambda step, measure: step.moved,
}
"""How much a device wants to ask, higher = more [U], of a step and a measure of disagreement."""


def at_random(rate: float) -> Policy:
    """Each asks with this probability."""
    return Policy(lambda now, fresh, number: torch.full((len(now.items),), float(rate)))


never, always = at_random(0.0), at_random(1.0)


def periodically(rate: float, seed: int = 0) -> Policy:
    """Each asks at every n-th step, with a phase of its own. Args: rate, 1 / n if n is a whole number, else near it; seed of the phases."""
    if not rate:
        return never
    period = max(1, round(1 / rate))

    def chance(now: Step, fresh: Step, number: int) -> Tensor:
        phase = torch.randint(period, (len(now.items),), generator=torch.Generator().manual_seed(seed))
        return ((number + phase) % period == 0).float()

    return Policy(chance, by_number=True)


def by_signal(
    signal: Callable[[Step], Tensor], threshold: Threshold, group: int = 1, budget: float | None = None
) -> Policy:
    """Those ask whose signal is above a threshold.

    Args:
        signal: Of a step [U].
        threshold: Of the signal.
        group: Users, one after the other, who decide together.
        budget: Largest share of the groups that may ask at a step, whoever comes first.
    """
    return Policy(lambda now, fresh, number: threshold.chance(signal(now)), group, budget=budget)


def oracle(rate: float, gain: Callable[[Step, Step], Tensor]) -> Policy:
    """Those ask who gain most by it at this step, which nobody can know; greedy, since it does not look at what follows.

    Args:
        rate: Share of the users who ask.
        gain: Of what is at hand and of what would come [U].
    """

    def chance(now: Step, fresh: Step, number: int) -> Tensor:
        gains = gain(now, fresh)
        return Threshold.for_rate(gains, rate).chance(gains)

    return Policy(chance)


def gain_of(fusion: Fusion, metric: str, k: int) -> Callable[[Step, Step], Tensor]:
    """What a request would bring: the metric with it less the metric without it [U]."""

    def gain(now: Step, fresh: Step) -> Tensor:
        with_it, without = (row_metric(step.rank(fusion).tolist(), metric, k) for step in (fresh, now))
        return torch.from_numpy(with_it - without)

    return gain
