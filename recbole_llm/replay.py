"""Users replayed step by step: the device sees everything, the cloud what it saw at its last contact, a policy decides between them.

One step with a stale view is the paper's evaluation; several are a stream, in which a request renews the list for what follows. The
decision falls before the list is shown, and only a policy that is called an oracle looks at the target.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from recbole_llm.cloud import Lists
from recbole_llm.device import Device
from recbole_llm.report import row_metric
from recbole_llm.request import (
    Threshold,
    code_score,
    disagreement_at,
    drift,
    footrule,
    places,
    uncertainty,
)
from recbole_llm.sequences import Log
from recbole_llm.timeline import Timeline

Fusion = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Cloud's scores, device's scores, which are candidates (each [B, K]) -> scores [B, K]."""
RECENT = 10
"""Items of a history whose mean vector stands for the interest at the last contact."""
MEASURES = {
    "footrule": footrule,
    "overlap": lambda first, second, there: disagreement_at(first, second, there, 10),
    "code": code_score,
}


@dataclass
class Step:
    """What a device knows when it decides, for all users at one step.

    Args:
        items: The list at hand, 0 for no candidate [U, K].
        cloud: Its scores by the cloud [U, K].
        device: Its scores by the device, on all that has happened [U, K].
        there: Which are candidates [U, K].
        new_items: What has happened since the last contact [U].
        moved: How far the interest has moved since [U]; None if the device has no item vectors.
        target: The item that will be met [U]; for oracles and for the account alone.
        number: Of the step, from 0.
    """

    items: Tensor
    cloud: Tensor
    device: Tensor
    there: Tensor
    new_items: Tensor
    moved: Tensor | None
    target: Tensor
    number: int = 0

    def rank(self, fusion: Fusion) -> Tensor:
        """Place of the target in the fused list, from 0; -1 where it is none of the candidates [U]."""
        place = places(fusion(self.cloud, self.device, self.there), self.there)
        hit = (self.items == self.target.unsqueeze(1)) & self.there
        return torch.where(hit.any(dim=1), (place * hit).sum(dim=1), -1)

    def features(self) -> np.ndarray:
        """What a learned policy decides on [U, F]."""
        moved = torch.zeros(len(self.items)) if self.moved is None else self.moved
        columns = [
            footrule(self.cloud, self.device, self.there),
            disagreement_at(self.cloud, self.device, self.there, 10),
            disagreement_at(self.cloud, self.device, self.there, 1),
            uncertainty(self.device, self.there),
            uncertainty(self.cloud, self.there),
            moved,
            self.new_items.float(),
            (~self.there).sum(dim=1).float(),
        ]
        return torch.stack([column.float() for column in columns], dim=1).numpy()


SIGNALS: dict[str, Callable[[Step, str], Tensor]] = {
    "consistency": lambda step, measure: MEASURES[measure](step.cloud, step.device, step.there),
    "invalid-count": lambda step, measure: (~step.there).sum(dim=1).float(),
    "confidence": lambda step, measure: uncertainty(step.device, step.there),
    "history-drift": lambda step, measure: step.moved,
}
"""How much a device wants to ask, higher = more [U], of a step and a measure of disagreement."""

Policy = Callable[[Step, Step, torch.Generator], Tensor]
"""What is at hand, what a request would bring (for oracles), a source of random numbers -> who asks [U]."""


@dataclass
class Outcome:
    """What came of a replay, each [U, S].

    Args:
        rank: Of the target in what was shown, from 0, -1 if it was not in the list.
        asked: Whether the cloud was asked.
        new_items: What had happened since the last contact, before a request.
        in_list: Whether the target was a candidate.
        candidates: How many candidates were shown.
        view: What the cloud had seen: position of the log whose history that is.
    """

    rank: Tensor
    asked: Tensor
    new_items: Tensor
    in_list: Tensor
    candidates: Tensor
    view: Tensor

    @property
    def rate(self) -> float:
        """Requests per recommendation."""
        return float(self.asked.float().mean())

    def metric(self, name: str, k: int) -> np.ndarray:
        """A metric of each user, averaged over the steps [U]."""
        shape = tuple(self.rank.shape)
        return row_metric(self.rank.flatten().tolist(), name, k).reshape(shape).mean(axis=1)


class Replay:
    """Users at some of their steps, with the lists that they may have had.

    Args:
        log: Every interaction of every user.
        device: The model on the device.
        lists: The cloud's, at every position that can be a view.
        targets: Positions that are shown, step by step [U, S].
        start: What the cloud has seen before the first step: positions [U].
        mask_seen: Whether items that the user has met before are no candidates.
    """

    def __init__(self, log: Log, device: Device, lists: Lists, targets: Tensor, start: Tensor, mask_seen: bool = False):
        self.log, self.device, self.lists = log, device, lists
        self.targets, self.start, self.mask_seen = targets, start, mask_seen
        self._fresh: dict[int, Step] = {}
        self._stale: Step | None = None

    @property
    def steps(self) -> int:
        """S."""
        return self.targets.shape[1]

    @cached_property
    def _states(self) -> Tensor | None:
        """What the device makes of each step's history [U, S, d], if a state serves any list."""
        device = self.device
        if not device.by_state:
            return None
        return device.states(self.log, self.targets.flatten()).view(*self.targets.shape, -1)

    @cached_property
    def _travelled(self) -> Tensor | None:
        """Sums of the device's item vectors over the log up to each position [N + 1, d]."""
        vectors = self.device.item_vectors()
        if vectors is None:
            return None
        sums = torch.zeros(len(self.log.items) + 1, vectors.shape[1], dtype=torch.float64)
        torch.cumsum(vectors[self.log.items].double(), 0, out=sums[1:])
        return sums

    @cached_property
    def _met(self) -> tuple[Tensor, Tensor]:
        """Every user's every item as a number, ascending, and where in the log it was met first."""
        log = self.log
        user = log.user_index(torch.arange(len(log.items)))
        key, inverse = torch.unique(user * log.n_items + log.items, return_inverse=True)
        first = torch.full((len(key),), len(log.items), dtype=torch.long)
        return key, first.scatter_reduce(0, inverse, torch.arange(len(log.items)), "amin")

    def _seen(self, positions: Tensor, items: Tensor) -> Tensor:
        """Which items each user had met before a position [U, K]. Args: positions [U]; items [U, K]."""
        key, first = self._met
        wanted = self.log.user_index(positions).unsqueeze(1) * self.log.n_items + items
        at = torch.searchsorted(key, wanted).clamp(max=len(key) - 1)
        return (key[at] == wanted) & (first[at] < positions.unsqueeze(1))

    def step(self, number: int, view: Tensor) -> Step:
        """What stands at a step if the cloud has seen the histories before some positions. Args: step; view [U]."""
        target = self.targets[:, number]
        items, cloud = self.candidates(target, view)
        if self._states is None:
            scores = self.device.rerank(self.log, target, items)
        else:
            scores = self.device.of_states(self._states[:, number], items)
        return Step(
            items, cloud, scores, items > 0, target - view, self._moved(view, target), self.log.items[target], number
        )

    def candidates(self, target: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        """The list of each view, and the cloud's scores, at the time of a target [R, K]; a masked item is none. Args: [R], [R]."""
        items, cloud = self.lists.at(view)
        if self.mask_seen:
            items = items.masked_fill(self._seen(target, items), 0)
        return items, cloud

    def _moved(self, view: Tensor, target: Tensor) -> Tensor | None:
        sums = self._travelled
        if sums is None:
            return None
        begin = torch.maximum(self.log.offsets[self.log.user_index(view)], view - RECENT)
        return drift(sums[view] - sums[begin], sums[target] - sums[view]).float()

    def fresh(self, number: int) -> Step:
        """A step right after a request."""
        if number not in self._fresh:
            self._fresh[number] = self.step(number, self.targets[:, number])
        return self._fresh[number]

    def first(self) -> Step:
        """The first step without any request."""
        if self._stale is None:
            self._stale = self.step(0, self.start)
        return self._stale

    def aged(self, age: int, view_age: int) -> Step:
        """The first step with a list of some age.

        Args:
            age: Interactions since the last contact.
            view_age: Interactions that the list is behind by; fewer than `age`, where older lists are not to be had.
        """
        target = self.targets[:, 0]
        first = self.log.offsets[self.log.user_index(target)] + 1
        step = self.step(0, torch.maximum(target - view_age, first))
        return replace(step, new_items=torch.full_like(target, age))

    def run(self, policy: Policy, fusion: Fusion, seed: int = 0) -> Outcome:
        """Replay all steps under a policy.

        Args:
            policy: Who asks.
            fusion: How cloud and device are one.
            seed: Of what the policy draws.
        """
        generator = torch.Generator().manual_seed(seed)
        view, columns = self.start, []
        for number in range(self.steps):
            now = self.first() if number == 0 else self.step(number, view)
            fresh = self.fresh(number)
            asked = policy(now, fresh, generator) & (now.new_items > 0)
            stale_rank, fresh_rank = now.rank(fusion), fresh.rank(fusion)
            target = self.targets[:, number]
            view = torch.where(asked, target, view)
            there = torch.where(asked.unsqueeze(1), fresh.there, now.there)
            rank = torch.where(asked, fresh_rank, stale_rank)
            columns.append((rank, asked, now.new_items, rank >= 0, there.sum(dim=1), view))
        return Outcome(*(torch.stack(column, dim=1) for column in zip(*columns, strict=True)))


def never(now: Step, fresh: Step, generator: torch.Generator) -> Tensor:
    """Nobody asks."""
    return torch.zeros(len(now.items), dtype=torch.bool)


def always(now: Step, fresh: Step, generator: torch.Generator) -> Tensor:
    """Everybody asks."""
    return torch.ones(len(now.items), dtype=torch.bool)


def at_random(rate: float) -> Policy:
    """Each asks with this probability."""
    return lambda now, fresh, generator: torch.rand(len(now.items), generator=generator) < rate


def periodically(rate: float, seed: int = 0) -> Policy:
    """Each asks at every 1 / rate-th step, with a phase of its own. Args: rate; seed of the phases."""
    period = max(1, round(1 / rate)) if rate else None

    def policy(now: Step, fresh: Step, generator: torch.Generator) -> Tensor:
        if period is None:
            return never(now, fresh, generator)
        phase = torch.randint(period, (len(now.items),), generator=torch.Generator().manual_seed(seed))
        return (now.number + phase) % period == 0

    return policy


def by_signal(signal: Callable[[Step], Tensor], threshold: Threshold, group: int = 1) -> Policy:
    """Those ask whose signal is above a threshold. Args: signal; threshold; users who decide together, one after the other."""
    return lambda now, fresh, generator: threshold.asks(signal(now), generator, group)


def oracle(rate: float, gain: Callable[[Step, Step], Tensor]) -> Policy:
    """Those ask who gain most by it at this step, which nobody can know; greedy, since it does not look at what follows.

    Args:
        rate: Share of the users who ask.
        gain: Of what is at hand and of what would come [U].
    """

    def policy(now: Step, fresh: Step, generator: torch.Generator) -> Tensor:
        gains = gain(now, fresh)
        return Threshold.for_rate(gains, rate).asks(gains, generator)

    return policy


def gain_of(fusion: Fusion, metric: str, k: int) -> Callable[[Step, Step], Tensor]:
    """What a request would bring: the metric with it less the metric without it [U]."""

    def gain(now: Step, fresh: Step) -> Tensor:
        with_it, without = (row_metric(step.rank(fusion).tolist(), metric, k) for step in (fresh, now))
        return torch.from_numpy(with_it - without)

    return gain


def mean_over(outcomes: Sequence[Outcome], metric: str, k: int) -> np.ndarray:
    """A metric of each user, averaged over replays with other seeds [U]."""
    return np.mean([outcome.metric(metric, k) for outcome in outcomes], axis=0)


@dataclass
class AtHand:
    """The list that each evaluated row has.

    Args:
        timeline: What the positions are of.
        replay: Whose lists they are.
        view: Position that is shown -> position whose history the cloud had seen, -1 for others [N].
    """

    timeline: Timeline
    replay: Replay
    view: Tensor

    def of(self, pointers: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates and their scores of rows that are told by their place in the data set's own log. Args: pointers [B]."""
        target = self.timeline.of_pointers(pointers)
        return self.replay.candidates(target, self.view[target])
