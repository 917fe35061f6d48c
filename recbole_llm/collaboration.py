"""How well cloud and device do together: the fusion that is chosen, who asks when, and what it costs.

Everything that is chosen here is chosen on validation rows; `lsc_threshold: test` is the authors' way, for reproduction alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from recbole_llm.replay import (
    SIGNALS,
    Fusion,
    Learned,
    Outcome,
    Policy,
    Replay,
    always,
    at_random,
    by_signal,
    calibrated,
    gain_of,
    never,
    oracle,
    periodically,
)
from recbole_llm.request import NORMS, Network, code_fusion, fused

ALPHAS = tuple(round(0.1 * step, 1) for step in range(11))
FUSIONS: dict[str, Callable[[float, str], Fusion]] = {
    "linear": lambda alpha, norm: partial(fused, alpha=alpha, norm=norm),
    "code": lambda alpha, norm: partial(code_fusion, weight=1.0),  # the authors' third formula
}
"""How one score is made of two: of the cloud's share and the scale of both."""
POLICIES = ("never", "always", "random", "periodic", *SIGNALS, "learned", "oracle")


@dataclass(frozen=True)
class Fusions:
    """What was tried on validation, and what did best.

    Args:
        alpha: Share of the cloud.
        norm: Scale of both scores.
        score: The metric with these.
        metric: Its name.
        curve: Scale -> the metric at each of `ALPHAS`.
    """

    alpha: float
    norm: str
    score: float
    metric: str
    curve: dict[str, list[float]]

    def sentence(self) -> str:
        """The choice, in words."""
        if not self.curve:
            return f"Fusion as in the authors' code: {self.metric} {self.score:.4f} on validation."
        ends = self.curve[self.norm]
        return (
            f"Fusion: alpha={self.alpha:g} of the cloud on the scale {self.norm}, {self.metric} {self.score:.4f} on validation (device "
            f"alone {ends[0]:.4f}, cloud alone {ends[-1]:.4f})."
        )


def best_fusion(replay: Replay, settings: Any, valid_metric: str) -> Fusions:
    """Choose the scale and the cloud's share, by the metric on validation steps.

    Args:
        replay: Of validation steps.
        settings: `lsc_*`.
        valid_metric: Such as NDCG@10.
    """
    name, _, k = valid_metric.partition("@")
    # a stream is fused at views of every age, so some requests are made there
    asks = never if replay.steps == 1 else at_random(settings.rate)

    def score(alpha: float, norm: str) -> float:
        fusion = FUSIONS[settings.fusion](alpha, norm)
        return float(replay.run(asks, fusion, seed=0).metric(name, int(k)).mean())

    if settings.fusion == "code":
        return Fusions(0.5, "rank", score(0.5, "rank"), valid_metric, {})
    norms = NORMS if settings.norm == "auto" else (settings.norm,)
    curve = {norm: [score(alpha, norm) for alpha in ALPHAS] for norm in norms}
    if settings.alpha is not None:
        own = {norm: score(settings.alpha, norm) for norm in norms}
        norm = max(own, key=own.__getitem__)
        return Fusions(settings.alpha, norm, own[norm], valid_metric, curve)
    norm, at = max(
        ((norm, at) for norm in norms for at in range(len(ALPHAS))), key=lambda pair: curve[pair[0]][pair[1]]
    )
    return Fusions(ALPHAS[at], norm, curve[norm][at], valid_metric, curve)


def policy_of(
    name: str, rate: float, replay_of: Callable[[str], Replay], fusion: Fusion, settings: Any, config: Any
) -> Policy | None:
    """A policy at a rate, with its threshold; None where it means nothing: no invalid candidates, no item vectors, no second step.

    Args:
        name: One of `lsc_policy`'s.
        rate: Requests per recommendation that it is set to.
        replay_of: Gives the replay of `valid` or `test` steps.
        fusion: How cloud and device are one.
        settings: `lsc_*`.
        config: For `valid_metric` and `seed`.
    """
    metric, _, k = config["valid_metric"].partition("@")
    if name in ("never", "always"):
        return never if name == "never" else always
    if name == "random":
        return at_random(rate)
    if name == "periodic":
        return periodically(rate) if settings.steps > 1 else None
    gain = gain_of(fusion, metric, int(k))
    if name == "oracle":
        return oracle(rate, gain)
    if name == "learned":
        signal: Callable = Learned(replay_of("valid"), fusion, gain, config["seed"])
    else:
        signal = partial(SIGNALS[name], measure=settings.measure)
    threshold = calibrated(replay_of(settings.threshold), signal, rate, fusion, config["seed"])
    return None if threshold is None else by_signal(signal, threshold)


@dataclass(frozen=True)
class Costs:
    """What recommendations cost.

    Args:
        network: Between device and cloud.
        device_ms: Median time of one re-ranking.
        cloud_ms: Median time of one list.
        cloud_reads: Items of a history that the cloud reads.
        device_bytes: Of the device model, which is sent once after the re-training.
    """

    network: Network
    device_ms: float
    cloud_ms: float
    cloud_reads: int
    device_bytes: int

    def of(self, outcome: Outcome, replay: Replay) -> dict[str, float]:
        """Means over all recommendations of a replay, by the names under which they stand beside RecBole's metrics."""
        targets, asked = replay.targets, outcome.asked
        log = replay.log
        first = log.offsets[log.user_index(targets.flatten())].view(targets.shape)
        history = (targets - first).clamp(max=self.cloud_reads)
        up = self.network.up(asked, outcome.new_items, history).double()
        down = self.network.down(asked, outcome.candidates).double()
        latency = self.network.latency_ms(asked, up, down, self.device_ms, self.cloud_ms)
        return {
            "request_rate": outcome.rate,
            "candidate_recall": float(outcome.in_list.double().mean()),
            "staleness": float((targets - outcome.view).double().mean()),
            "up_bytes": float(up.mean()),
            "down_bytes": float(down.mean()),
            "latency_ms": float(latency.mean()),
            "latency_p95_ms": float(np.quantile(latency.numpy(), 0.95)),
        }
