"""Users replayed step by step: the device sees everything, the cloud what it saw at its last contact, a policy decides between them.

One step with a stale view is the paper's evaluation; several are a stream, in which a request renews the list for what follows. The
decision falls before the list is shown. Beside what the cloud proposes, a device may rank the best of the whole catalogue by itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.cloud import Lists
from recbole_llm.device import Device, Seen
from recbole_llm.evaluation import POINTER
from recbole_llm.report import row_metric
from recbole_llm.request import LOWEST, disagreement_at, drawn, drift, first_come, footrule, places, uncertainty
from recbole_llm.sequences import Log
from recbole_llm.timeline import Timeline

Fusion = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Cloud's scores (-inf for what it did not propose), device's scores, which are candidates (each [B, K]), and how many interactions the
list is behind [B] -> scores [B, K]."""
RECENT = 10
"""Items of a history whose mean vector stands for the interest at the last contact."""


@dataclass
class Step:
    """What a device knows when it decides, for all users at one step.

    Args:
        items: The list at hand, 0 for no candidate [U, K].
        cloud: Its scores by the cloud, -inf for what the device alone proposes [U, K].
        device: Its scores by the device, on all that has happened [U, K].
        there: Which are candidates [U, K].
        new_items: What has happened since the last contact [U].
        moved: How far the interest has moved since [U]; None if the device has no item vectors.
        target: The item that will be met [U]; for oracles and for the account alone.
    """

    items: Tensor
    cloud: Tensor
    device: Tensor
    there: Tensor
    new_items: Tensor
    moved: Tensor | None
    target: Tensor

    @property
    def listed(self) -> Tensor:
        """Which candidates are the cloud's [U, K]."""
        return self.there & (self.cloud > LOWEST)

    @property
    def missing(self) -> Tensor:
        """Slots of the cloud's list without a candidate [U]."""
        return (~self.there & (self.cloud > LOWEST)).sum(dim=1)

    def rank(self, fusion: Fusion) -> Tensor:
        """Place of the target in the fused list, from 0; -1 where it is no candidate, or its score is -inf [U]."""
        scores = fusion(self.cloud, self.device, self.there, self.new_items)
        shown = self.there & (scores > LOWEST)
        place = places(scores, shown)
        hit = (self.items == self.target.unsqueeze(1)) & shown
        return torch.where(hit.any(dim=1), (place * hit).sum(dim=1), -1)

    def features(self) -> np.ndarray:
        """What a learned policy decides on [U, F]."""
        listed = self.listed
        moved = torch.zeros(len(self.items)) if self.moved is None else self.moved
        columns = [
            footrule(self.cloud, self.device, listed),
            disagreement_at(self.cloud, self.device, listed, 10),
            disagreement_at(self.cloud, self.device, listed, 1),
            uncertainty(self.device, listed),
            uncertainty(self.cloud, listed),
            moved,
            self.new_items,
            self.missing,
        ]
        return torch.stack([column.float() for column in columns], dim=1).numpy()


@dataclass(frozen=True)
class Policy:
    """Who asks the cloud.

    Args:
        chance: (what is at hand, what a request would bring, number of the step from 0) -> probability that each user asks [U]. Only an
            oracle looks at what would come.
        group: Users, one after the other, who share a draw.
        by_number: Whether the number of the step matters.
        budget: Largest share of the groups that may ask at a step, whoever comes first; None is no limit.
    """

    chance: Callable[[Step, Step, int], Tensor]
    group: int = 1
    by_number: bool = False
    budget: float | None = None

    def drawn(self, now: "Step", fresh: "Step", number: int, generator: torch.Generator) -> Tensor:
        """Who asks at a step [U]. Args: see `chance`; generator of what is drawn."""
        asked = drawn(self.chance(now, fresh, number), generator, self.group)
        return asked if self.budget is None else first_come(asked, self.budget, self.group)

    def expected(self, chance: Tensor) -> Tensor:
        """What a budget leaves of chances to ask at a step [U]; a group has what is expected to be left by those before. Args: [U]."""
        if self.budget is None:
            return chance
        wish = chance[:: self.group]
        room = int(self.budget * len(wish) + 1e-9) - (wish.cumsum(0) - wish)
        share = torch.where(wish > 0, torch.minimum(wish, room.clamp_min(0)) / wish, 0.0)
        return chance * share.repeat_interleave(self.group)[: len(chance)]


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
        seen: Gives what users had met before some positions, where that is no candidate.
        own: How many of the device's own best items are candidates beside the cloud's.
    """

    def __init__(
        self,
        log: Log,
        device: Device,
        lists: Lists,
        targets: Tensor,
        start: Tensor,
        seen: Seen | None = None,
        own: int = 0,
    ):
        self.log, self.device, self.lists = log, device, lists
        self.targets, self.start, self.seen, self.own = targets, start, seen, own
        self._own: dict[int, tuple[Tensor, Tensor]] = {}
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

    def step(self, number: int, view: Tensor) -> Step:
        """What stands at a step if the cloud has seen the histories before some positions. Args: step; view [U]."""
        target = self.targets[:, number]
        items, cloud = self.candidates(target, view)
        if self._states is None:
            scores = self.device.rerank(self.log, target, items)
        else:
            scores = self.device.of_states(self._states[:, number], items)
        items, cloud, scores = self._with_own(number, items, cloud, scores)
        moved = self._moved(view, target)
        return Step(items, cloud, scores, items > 0, target - view, moved, self.log.items[target])

    def _with_own(self, number: int, items: Tensor, cloud: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A list and the best of the catalogue by the device, which the cloud has no score of where it did not propose them."""
        if not self.own:
            return items, cloud, scores
        if number not in self._own:
            self._own[number] = self.device.best(self.log, self.targets[:, number], self.own, self.seen)
        return with_own(items, cloud, scores, *self._own[number])

    def candidates(self, target: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        """The list of each view, and the cloud's scores, at the time of a target [R, K]; a masked item is none. Args: [R], [R]."""
        items, cloud = self.lists.at(view)
        if self.seen is not None:
            row, met = self.seen(target)
            here = torch.arange(len(items)).unsqueeze(1) * self.log.n_items + items
            items = items.masked_fill(torch.isin(here, row * self.log.n_items + met), 0)
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
        # what the device knows of an older contact is to be had
        moved = self._moved(torch.maximum(target - age, first), target)
        return replace(step, new_items=torch.full_like(target, age), moved=moved)

    def run(self, policy: Policy, fusion: Fusion, seed: int = 0) -> Outcome:
        """Replay all steps under a policy.

        Args:
            policy: Who asks.
            fusion: How cloud and device are one.
            seed: Of what is drawn where a policy is not sure.
        """
        generator = torch.Generator().manual_seed(seed)
        view, columns = self.start, []
        for number in range(self.steps):
            now = self.first() if number == 0 else self.step(number, view)
            fresh = self.fresh(number)
            asked = policy.drawn(now, fresh, number, generator) & (now.new_items > 0)
            stale_rank, fresh_rank = now.rank(fusion), fresh.rank(fusion)
            target = self.targets[:, number]
            view = torch.where(asked, target, view)
            there = torch.where(asked.unsqueeze(1), fresh.there, now.there)
            rank = torch.where(asked, fresh_rank, stale_rank)
            columns.append((rank, asked, now.new_items, rank >= 0, there.sum(dim=1), view))
        return Outcome(*(torch.stack(column, dim=1) for column in zip(*columns, strict=True)))


def mean_over(outcomes: Sequence[Outcome], metric: str, k: int) -> np.ndarray:
    """A metric of each user, averaged over replays with other seeds [U]."""
    return np.mean([outcome.metric(metric, k) for outcome in outcomes], axis=0)


def with_own(
    items: Tensor, cloud: Tensor, scores: Tensor, own: Tensor, own_scores: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of the cloud with a device's own best behind them; what both have stands once.

    Args:
        items: The cloud's, 0 for no candidate [B, K].
        cloud: Its scores [B, K].
        scores: The device's [B, K].
        own: The device's best [B, N].
        own_scores: Its scores of those [B, N].

    Returns:
        Items, scores by the cloud (-inf where it has none) and by the device, each [B, K + N].
    """
    twice = (own.unsqueeze(2) == items.unsqueeze(1)).any(dim=2)
    return (
        torch.cat([items, own.masked_fill(twice, 0)], dim=1),
        torch.cat([cloud, torch.full_like(own_scores, LOWEST)], dim=1),
        torch.cat([scores, own_scores], dim=1),
    )


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

    def of(self, pointers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates and their scores, each [B, K], and how far lists are behind [B], of rows told by their place in the data set's log."""
        target = self.timeline.of_pointers(pointers)
        view = self.view[target]
        return *self.replay.candidates(target, view), target - view

    def met(self, batch: Interaction) -> tuple[Tensor, Tensor]:
        """What is no candidate because it was met before: pairs of a row's number in a batch and an item; none if that matters not."""
        if self.replay.seen is None:
            return torch.zeros(2, 0, dtype=torch.long).unbind()
        return self.replay.seen(self.timeline.of_pointers(batch[POINTER].cpu()))
