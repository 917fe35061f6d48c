"""When a device asks the cloud again, how both orders become one, and what that costs: pure functions on tensors.

Paper: Lv et al., "Collaboration of Large Language Models and Small Recommendation Models for Device-Cloud Recommendation", KDD 2025
(arXiv 2501.05647), collaborative inference and collaborative-decision request.

Differs from the authors' code: disagreement is measured per user and over real candidates only, not over a batch of 16 users with
(4 + 0.3 Z)^2 added, Z being its invalid candidates (`code_score` is theirs); thresholds are quantiles of validation scores, not of
test scores; fusion weighs normalised scores instead of a rank and a raw sigmoid (`code_fusion` is theirs).

Lists are `items [B, K]` in the cloud's order, 0 for no candidate, all of them at the end or anywhere; scores are `[B, K]`, higher =
surer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST = float("-inf")
NORMS = ("rank", "minmax", "softmax", "zscore")


def places(score: Tensor, there: Tensor) -> Tensor:
    """Place of each candidate by its score, 0 is best; the earlier of two equals stands first, and no candidate behind all [B, K].

    Args:
        score: [B, K].
        there: Which are candidates [B, K].
    """
    order = score.masked_fill(~there, LOWEST).sort(dim=1, descending=True, stable=True).indices
    # a candidate may have the lowest of all scores itself
    order = order.gather(1, (~there).expand_as(order).gather(1, order).int().sort(dim=1, stable=True).indices)
    place = torch.empty_like(order)
    return place.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))


def normalised(score: Tensor, there: Tensor, norm: str) -> Tensor:
    """Scores of each list on one scale, 0 where there is no candidate [B, K].

    Args:
        score: [B, K].
        there: Which are candidates [B, K].
        norm: rank (1 best to 0 worst) | minmax (the same by score) | softmax (adds up to 1) | zscore (mean 0, deviation 1).
    """
    count = there.sum(dim=1, keepdim=True)
    if norm == "rank":
        made = 1 - places(score, there) / (count - 1).clamp_min(1)
    elif norm == "minmax":
        low = score.masked_fill(~there, float("inf")).amin(dim=1, keepdim=True)
        span = score.masked_fill(~there, LOWEST).amax(dim=1, keepdim=True) - low
        made = (score - low) / torch.where(span > 0, span, 1.0)
    elif norm == "softmax":
        made = score.masked_fill(~there, torch.finfo(score.dtype).min).softmax(dim=1)
    else:
        known = score.masked_fill(~there, 0.0)
        mean = known.sum(dim=1, keepdim=True) / count.clamp_min(1)
        apart = (known - mean) * there
        deviation = (apart.square().sum(dim=1, keepdim=True) / count.clamp_min(1)).sqrt()
        # of equal scores only the rounding of their mean is left
        rounding = 1e-6 * known.abs().amax(dim=1, keepdim=True)
        made = torch.where(deviation > rounding, apart / deviation, 0.0)
    return torch.where(there, made, 0.0)


def fused(cloud: Tensor, device: Tensor, there: Tensor, alpha: Tensor | float, norm: str) -> Tensor:
    """Alpha * cloud + (1 - alpha) * device on normalised scores, -inf where there is no candidate [B, K].

    Args:
        cloud: The cloud's scores, -inf for what it did not propose, which counts as its lowest [B, K].
        device: The device's scores of the same candidates [B, K].
        there: Which are candidates [B, K].
        alpha: 1 is the cloud's order, 0 the device's; one number, or one of each list [B, 1].
        norm: See `normalised`.
    """
    listed = there & (cloud > LOWEST)
    of_cloud = normalised(cloud, listed, norm)
    if norm == "zscore":  # of the other scales 0 is the lowest value
        of_cloud = torch.where(listed, of_cloud, of_cloud.amin(dim=1, keepdim=True))
    mixed = alpha * of_cloud + (1 - alpha) * normalised(device, there, norm)
    return mixed.masked_fill(~there, LOWEST)


def code_fusion(cloud: Tensor, device: Tensor, there: Tensor, weight: float) -> Tensor:
    """The authors' fusion: -j/K + weight * (sigmoid(device) - 1/2), j the cloud's place counted from 1, K slots [B, K]."""
    place = places(cloud, there) + 1
    return (weight * (device.sigmoid() - 0.5) - place / cloud.shape[1]).masked_fill(~there, LOWEST)


def footrule(first: Tensor, second: Tensor, there: Tensor) -> Tensor:
    """How far two orders of a list are apart: 0 equal, about 1 unrelated, about 1.5 reversed (more in lists of a few) [B].

    The mean |place in one - place in the other| (Spearman's footrule) over its expectation (m^2 - 1) / 3m for unrelated orders of
    m candidates; 0 for a list of one.
    """
    count = there.sum(dim=1)
    apart = (places(first, there) - places(second, there)).abs() * there
    expected = (count.double().square() - 1) / (3 * count.clamp_min(1))
    return torch.where(count > 1, apart.sum(dim=1) / count.clamp_min(1) / expected.clamp_min(1e-9), 0.0).float()


def disagreement_at(first: Tensor, second: Tensor, there: Tensor, k: int) -> Tensor:
    """Share of the k best of one order that are not among the k best of the other [B]; of as many as there are, if fewer."""
    of_first, of_second = (places(score, there) < k for score in (first, second))
    both = (of_first & of_second & there).sum(dim=1)
    return 1 - both / there.sum(dim=1).clamp(1, k)


CODE_GROUP = 16
"""Users who decide together in the authors' code."""


def code_score(first: Tensor, second: Tensor, there: Tensor, group: int = CODE_GROUP) -> Tensor:
    """The authors' inconsistency of a batch of users, given to each of them [B]: D + (4 + 0.3 Z)^2.

    D is the mean |place - place| over the candidates of all users of a group, Z the number of its slots without a candidate. Their
    device's places count all slots; here those without a candidate stand behind all others.
    """
    scores = []
    for begin in range(0, len(first), group):
        part = slice(begin, begin + group)
        apart = (places(first[part], there[part]) - places(second[part], there[part])).abs() * there[part]
        missing = (~there[part]).sum()
        score = apart.sum() / there[part].sum().clamp_min(1) + (4 + 0.3 * missing) ** 2
        scores.append(score.float().expand(len(first[part])))
    return torch.cat(scores) if scores else torch.zeros(0)


def uncertainty(score: Tensor, there: Tensor) -> Tensor:
    """1 minus the largest probability of a softmax over the list [B]."""
    return 1 - normalised(score, there, "softmax").amax(dim=1)


def drift(before: Tensor, since: Tensor) -> Tensor:
    """How far the interest has moved: 1 - cosine between the mean vectors of the items before and after the last contact [B].

    Args:
        before: Mean vector of what the cloud has seen [B, d].
        since: Mean vector of what came later [B, d]; a zero vector, if nothing did, gives 0.
    """
    moved = 1 - torch.nn.functional.cosine_similarity(before, since, dim=1)
    return torch.where(since.abs().sum(dim=1) > 0, moved, 0.0)


@dataclass(frozen=True)
class Threshold:
    """Ask where a score is above `above`, and of those that equal it a share, drawn at random.

    Args:
        above: The quantile.
        share: Of ties with it, 0 to 1.
    """

    above: float
    share: float

    @classmethod
    def for_rate(cls, scores: Tensor, rate: float) -> "Threshold":
        """The threshold that asks for a share `rate` of these scores.

        Args:
            scores: Of validation rows [R].
            rate: 0 to 1.

        Raises:
            ValueError: There are no scores, one is no number, or the rate is no share.
        """
        if not len(scores) or not 0 <= rate <= 1 or bool(scores.isnan().any()):
            raise ValueError(
                f"a threshold of {len(scores)} scores for the rate {rate}: needs scores that are numbers, and a rate from 0 to 1."
            )
        if rate in (0, 1):  # whatever other scores may come
            return cls(LOWEST, 1.0) if rate else cls(float("inf"), 0.0)
        wanted = rate * len(scores)
        ordered = scores.sort(descending=True).values
        above = float(ordered[min(len(scores), max(1, int(-(-wanted // 1)))) - 1])
        higher, ties = int((scores > above).sum()), int((scores == above).sum())
        return cls(above, min(1.0, max(0.0, (wanted - higher) / ties)))

    def chance(self, scores: Tensor) -> Tensor:
        """The probability that each asks [B]: 1 above, `share` of ties, 0 below. Args: scores [B]."""
        return (scores > self.above).float() + self.share * (scores == self.above).float()


def drawn(chance: Tensor, generator: torch.Generator, group: int = 1) -> Tensor:
    """Who asks, of the probability that each does [B].

    Args:
        chance: [B].
        generator: One number is drawn from it for each group, whatever its chance.
        group: Users, one after the other, who share a draw.
    """
    draw = torch.rand(-(-len(chance) // group), generator=generator).repeat_interleave(group)[: len(chance)]
    return draw.to(chance.device) < chance


def first_come(asked: Tensor, share: float, group: int = 1) -> Tensor:
    """Those who ask while fewer than a share of all groups have asked, as the authors spend their budget [B].

    Args:
        asked: Who wants to, alike within a group [B].
        share: Of the groups, rounded down.
        group: Users, one after the other, who ask together.
    """
    begins = asked[::group]
    # the share of a whole number of groups is that number, whatever its binary fraction
    allowed = begins & (begins.cumsum(0) <= int(share * len(begins) + 1e-9))
    return asked & allowed.repeat_interleave(group)[: len(asked)]


@dataclass(frozen=True)
class Network:
    """What a contact between device and cloud costs.

    Args:
        rtt_ms: Round trip.
        up_mbps: From the device, megabits a second.
        down_mbps: To the device.
        id_bytes: Of an item id.
        score_bytes: Of a candidate's score.
        header_bytes: Of a message each way.
        upload: delta (what happened since the last contact) | stateless (the whole history that the cloud reads).
    """

    rtt_ms: float
    up_mbps: float
    down_mbps: float
    id_bytes: int
    score_bytes: int
    header_bytes: int
    upload: str = "delta"

    def up(self, asked: Tensor, new_items: Tensor, history: Tensor) -> Tensor:
        """Bytes from the device for each recommendation, of the shape of `asked`.

        Args:
            asked: Whether the cloud was asked.
            new_items: Items since the last contact.
            history: Items of the history, as far as the cloud reads it.
        """
        items = new_items if self.upload == "delta" else history
        return asked * (self.header_bytes + self.id_bytes * items)

    def down(self, asked: Tensor, candidates: Tensor) -> Tensor:
        """Bytes to the device for each recommendation. Args: asked; candidates of the list that came."""
        return asked * (self.header_bytes + candidates * (self.id_bytes + self.score_bytes))

    def latency_ms(self, asked: Tensor, up: Tensor, down: Tensor, device_ms: float, cloud_ms: float) -> Tensor:
        """Time until a recommendation is shown: the device ranks once to decide, and again when a list has come.

        Args:
            asked: Whether the cloud was asked.
            up: Bytes from the device.
            down: Bytes to it.
            device_ms: Of one re-ranking.
            cloud_ms: Of one list.
        """
        on_the_way = 8e-3 * up / self.up_mbps + 8e-3 * down / self.down_mbps
        return device_ms + asked * (self.rtt_ms + cloud_ms + device_ms) + on_the_way
