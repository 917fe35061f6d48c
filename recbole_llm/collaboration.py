"""How well cloud and device do together: the fusion that is chosen, who asks when, and what it costs.

Everything that is chosen here is chosen on one target of each user that nobody was trained on, with lists of every age that can be had
without asking a cloud about its own training targets; `lsc_threshold: test` is the authors' way, for reproduction alone.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recbole_llm.policies import SIGNALS, always, at_random, by_signal, gain_of, never, oracle, periodically
from recbole_llm.replay import Fusion, Outcome, Policy, Replay, Step
from recbole_llm.report import row_metric
from recbole_llm.request import CODE_GROUP, NORMS, Network, Threshold, code_fusion, fused
from recbole_llm.timeline import REAL_TIME

ALPHAS = tuple(round(0.1 * step, 1) for step in range(11))
FUSIONS: dict[str, Callable[[Sequence[float], str], Fusion]] = {
    "linear": lambda alpha, norm: (
        lambda cloud, device, there, age: fused(cloud, device, there, share_at(alpha, age), norm)
    ),
    "code": lambda alpha, norm: lambda cloud, device, there, age: code_fusion(cloud, device, there, 1.0),
}
"""How one score is made of two: of the cloud's share by the age of its list, and the scale of both; of the authors' the third formula."""
POLICIES = ("never", "always", "random", "periodic", *SIGNALS, "learned", "oracle")
FOLDS = 2


def share_at(alpha: Sequence[float], age: Tensor) -> Tensor:
    """The cloud's share in lists of some ages [B, 1]; beyond the last known age it falls as 1 / age.

    Args:
        alpha: By age from 0; a single one is that of all ages.
        age: [B].
    """
    known = torch.tensor(alpha, device=age.device)[age.clamp(max=len(alpha) - 1)]
    beyond = (len(alpha) - 1) / age.clamp_min(max(1, len(alpha) - 1)) if len(alpha) > 1 else 1.0
    return (known * beyond).unsqueeze(1)


class Trial:
    """What is expected of S steps, from one target of each user with lists of several ages.

    The age of a list grows by one with every step, and is 1 after a request; of every user it is known with which probability the list
    has which age. Lists older than `oldest` are taken as that old, which flatters policies that let lists grow old; what a device knows
    of their age and of the drift since is as it would be.

    Args:
        replay: Whose first targets are looked at.
        lag: Age of the list at the first step.
        steps: S.
    """

    def __init__(self, replay: Replay, lag: int, steps: int):
        self.replay, self.lag, self.steps = replay, lag, steps
        self._aged: dict[int, Step] = {}

    @property
    def ages(self) -> list[int]:
        """Ages that a list can have."""
        return [self.lag] if self.steps == 1 else sorted({self.lag, *range(1, self.lag + self.steps)})

    @property
    def oldest(self) -> int:
        """Age of the oldest view: older ones would be of histories whose next items the cloud was trained on."""
        return max(REAL_TIME, self.lag)

    @property
    def fresh(self) -> Step:
        """Right after a request."""
        return self.replay.fresh(0)

    def at(self, age: int) -> Step:
        """With a list of some age."""
        if age not in self._aged:
            self._aged[age] = self.replay.aged(age, min(age, self.oldest))
        return self._aged[age]

    def walk(
        self, chance: Callable[[int, int], Tensor], left: Callable[[Tensor], Tensor] = lambda asks: asks
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """How often a list of each age is at hand, and how often the cloud is asked then: age -> two sums over the steps [U].

        Args:
            chance: (age, number of the step) -> probability that each user asks [U].
            left: What a budget leaves of the probabilities of a step [U].
        """
        share = {self.lag: torch.ones(len(self.replay.targets))}
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for number in range(self.steps):
            later: dict[int, Tensor] = defaultdict(lambda: torch.zeros(len(self.replay.targets)))
            wish = {age: part * chance(age, number) * (age > 0) for age, part in share.items()}
            wished = sum(wish.values())
            kept = torch.where(wished > 0, left(wished) / wished.clamp_min(1e-12), 0.0)
            for age, part in share.items():
                asks = wish[age] * kept
                there, asked = found.get(age, (0.0, 0.0))
                found[age] = there + part, asked + asks
                later[1] += asks
                later[age + 1] += part - asks
            share = {age: part for age, part in later.items() if bool(part.any())}
        return found

    def run(self, policy: Policy, fusion: Fusion, metric: str, k: int) -> tuple[float, np.ndarray]:
        """Requests per recommendation under a policy, and the metric of each user [U], as expected."""
        known: dict[tuple[int, int], Tensor] = {}

        def chance(age: int, number: int) -> Tensor:
            key = age, number if policy.by_number else 0
            if key not in known:
                known[key] = policy.chance(self.at(age), self.fresh, number)
            return known[key]

        def value(step: Step) -> np.ndarray:
            return row_metric(step.rank(fusion).tolist(), metric, k)

        best, total, rate = value(self.fresh), np.zeros(len(self.replay.targets)), 0.0
        for age, (there, asked) in self.walk(chance, policy.expected).items():
            total += asked.numpy() * best + (there - asked).numpy() * value(self.at(age))
            rate += float(asked.mean())
        return rate / self.steps, total / self.steps

    def weights(self, policy: Policy, ages: Sequence[int]) -> np.ndarray:
        """Share of the recommendations that rest on lists of each age, if nobody looks at anything [A].

        Args:
            policy: One for which all lists are alike, such as asking at random.
            ages: From 0, which is right after a request; the last stands for all older ones.
        """
        found = np.zeros(len(ages))
        for age, (there, asked) in self.walk(lambda age, number: policy.chance(self.fresh, self.fresh, number)).items():
            found[0] += float(asked.mean())
            found[min(np.searchsorted(ages, age), len(ages) - 1)] += float((there - asked).mean())
        return found / self.steps

    def threshold(self, signal: Callable[[Step], Tensor], rate: float) -> Threshold:
        """The threshold under which a share `rate` of recommendations asks; with one step the quantile of the signals."""
        signals = {age: signal(self.at(age)) for age in self.ages}
        pooled = torch.cat([scores for age, scores in signals.items() if age or self.steps == 1])
        if self.steps == 1 or rate in (0, 1):
            return Threshold.for_rate(pooled, rate)

        def asks(threshold: Threshold) -> float:
            chances = {age: threshold.chance(scores) for age, scores in signals.items()}
            walked = self.walk(lambda age, number: chances[age])
            return sum(float(asked.mean()) for _, asked in walked.values()) / self.steps

        low, high = 0.0, 1.0
        for _ in range(16):
            middle = (low + high) / 2
            low, high = (low, middle) if asks(Threshold.for_rate(pooled, middle)) > rate else (middle, high)
        return Threshold.for_rate(pooled, low)


@dataclass(frozen=True)
class Fusions:
    """What was tried on validation, and what did best.

    Args:
        alpha: Share of the cloud by the age of its list, from 0, or a single one; None of the authors' fusion.
        norm: Scale of both scores; None of the authors' fusion.
        score: The metric with these, if as many ask as `lsc_rate` says, whoever they are.
        metric: Its name.
        curve: Scale -> age -> the metric at each of `ALPHAS`.
    """

    alpha: list[float] | None
    norm: str | None
    score: float
    metric: str
    curve: dict[str, dict[int, list[float]]]

    def sentence(self) -> str:
        """The choice, in words."""
        if not self.curve:
            return f"Fusion as in the authors' code: {self.metric} {self.score:.4f} on validation."
        parts = [
            f"{float(share_at(self.alpha, torch.tensor([age]))):.2g} in lists {age} behind (device's order {scores[0]:.4f}, cloud's "
            f"{scores[-1]:.4f}, best {max(scores):.4f})"
            for age, scores in self.curve[self.norm].items()
        ]
        return (
            f"Fusion: {self.metric} {self.score:.4f} on validation, on the scale {self.norm}; share of the cloud "
            f"{', '.join(parts)}."
        )


def best_fusion(trial: Trial, settings: Any, valid_metric: str) -> Fusions:
    """Choose the scale and the cloud's share, by the metric on validation targets.

    Args:
        trial: Of validation targets.
        settings: `lsc_*`.
        valid_metric: Such as NDCG@10.
    """
    name, _, k = valid_metric.partition("@")
    asks = {"never": never, "always": always}.get(settings.policy, at_random(settings.rate))
    if settings.fusion == "code":
        score = float(trial.run(asks, FUSIONS["code"]([], ""), name, int(k))[1].mean())
        return Fusions(None, None, score, valid_metric, {})
    steps = {0: trial.fresh} | {age: trial.at(age) for age in trial.ages if age <= trial.oldest}
    norms = NORMS if settings.norm == "auto" else (settings.norm,)
    found = {
        norm: np.array([
            [row_metric(step.rank(FUSIONS["linear"]([alpha], norm)).tolist(), name, int(k)).mean() for alpha in ALPHAS]
            for step in steps.values()
        ])
        for norm in norms
    }  # fmt: skip
    weight = trial.weights(asks, list(steps))

    def shares(norm: str) -> list[float]:
        """The cloud's share by age, or a single one for all."""
        if settings.alpha is not None:
            return [settings.alpha]
        if not settings.alpha_by_age:
            return [ALPHAS[int((weight @ found[norm]).argmax())]]
        best = dict(zip(steps, found[norm].argmax(axis=1), strict=True))
        # a list of an age that was not tried is fused as the next older one
        return [ALPHAS[best[min(known for known in steps if known >= age)]] for age in range(max(steps) + 1)]

    def score(norm: str) -> float:
        return float(trial.run(asks, FUSIONS["linear"](shares(norm), norm), name, int(k))[1].mean())

    scores = {norm: score(norm) for norm in norms}
    norm = max(norms, key=scores.__getitem__)
    curve = {
        norm: {age: scores.tolist() for age, scores in zip(steps, each, strict=True)} for norm, each in found.items()
    }
    return Fusions(shares(norm), norm, scores[norm], valid_metric, curve)


class Learned:
    """A policy that predicts from a step's features how much a request would bring; a ridge regression on validation targets.

    What is said of it on validation rests on predictions for users that were not fitted on (`out_of_fold`).

    Args:
        trial: Of validation targets.
        gain: What a request would bring.
        seed: Of the folds.
    """

    def __init__(self, trial: Trial, gain: Callable[[Step, Step], Tensor], seed: int = 0):
        from sklearn.linear_model import RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        steps = [trial.at(age) for age in trial.ages if age <= trial.oldest]
        features = [step.features() for step in steps]
        gains = [gain(step, trial.fresh).numpy() for step in steps]
        users = len(gains[0])
        self.fold = np.random.default_rng(seed).permutation(users) % FOLDS

        def fitted(chosen: np.ndarray) -> Any:
            model = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(-2, 4, 13)))
            parts = [np.concatenate([each[chosen] for each in columns]) for columns in (features, gains)]
            return model.fit(*parts)

        self.models = [fitted(self.fold != number) for number in range(FOLDS)]
        self.model = fitted(np.ones(users, bool))

    def __call__(self, step: Step) -> Tensor:
        """The signal of any users [U]."""
        return torch.from_numpy(self.model.predict(step.features())).float()

    def out_of_fold(self, step: Step) -> Tensor:
        """The signal of the users it was fitted on, each by the model that has not seen them [U]."""
        found = np.stack([model.predict(step.features()) for model in self.models])
        return torch.from_numpy(found[self.fold, np.arange(len(self.fold))]).float()


class Asks(NamedTuple):
    """A policy, and the same one on the users on whom it was set."""

    policy: Policy
    on_valid: Policy


def policy_of(
    name: str, rate: float, trial_of: Callable[[str], Trial], fusion: Fusion, settings: Any, config: Any
) -> Asks | str:
    """A policy at a rate, with its threshold; or why it means nothing.

    Args:
        name: One of `POLICIES`.
        rate: Requests per recommendation that it is set to.
        trial_of: Gives the trial on `valid` or `test` targets.
        fusion: How cloud and device are one.
        settings: `lsc_*`.
        config: For `valid_metric` and `seed`.
    """
    metric, _, k = config["valid_metric"].partition("@")
    trial, seed = trial_of("valid"), config["seed"]
    gain = gain_of(fusion, metric, int(k))
    free = {
        "never": never,
        "always": always,
        "random": at_random(rate),
        "periodic": periodically(rate, seed),
        "oracle": oracle(rate, gain),
    }
    if name == "periodic" and settings.steps == 1:
        return "one step has no period"
    if trial.steps == 1 and not trial.lag and name not in ("never", "always"):
        return "no list is behind"
    if name in free:
        return Asks(free[name], free[name])
    if name == "learned":
        if len(trial.replay.targets) < 2 * FOLDS:
            return "too few users to learn from"
        learned = Learned(trial, gain, seed)
        # models of half and of all users are not equally bold, so each has a threshold of its own
        signals = (learned, learned.out_of_fold)
        budget = rate if settings.budget else None
        return Asks(*(by_signal(signal, trial.threshold(signal, rate), budget=budget) for signal in signals))
    signal = partial(SIGNALS[name], measure=settings.measure)
    if name == "history-drift" and trial.fresh.moved is None:
        return "the device has no item vectors"
    if name == "invalid-count" and not any(bool(signal(trial.at(age)).any()) for age in trial.ages):
        return "no list lacks a candidate"
    group = CODE_GROUP if name == "consistency" and settings.measure == "code" else 1
    threshold = trial_of(settings.threshold).threshold(signal, rate)
    policy = by_signal(signal, threshold, group, rate if settings.budget else None)
    return Asks(policy, policy)


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
        """Means over all recommendations of a replay, by the names under which they stand beside RecBole's metrics.

        A user's first list is a call of the cloud, too: it is among `cloud_calls`, and neither a request nor among the bytes and times.
        """
        targets, asked = replay.targets, outcome.asked
        log = replay.log
        first = log.offsets[log.user_index(targets.flatten())].view(targets.shape)
        history = (targets - first).clamp(max=self.cloud_reads)
        sent = (replay.lists.at(targets.flatten())[0] > 0).sum(dim=1).view(targets.shape)
        up = self.network.up(asked, outcome.new_items, history).double()
        down = self.network.down(asked, sent).double()
        latency = self.network.latency_ms(asked, up, down, self.device_ms, self.cloud_ms)
        return {
            "request_rate": outcome.rate,
            "cloud_calls": outcome.rate + 1 / targets.shape[1],
            "candidate_recall": float(outcome.in_list.double().mean()),
            "staleness": float((targets - outcome.view).double().mean()),
            "up_bytes": float(up.mean()),
            "down_bytes": float(down.mean()),
            "latency_ms": float(latency.mean()),
            "latency_p95_ms": float(np.quantile(latency.numpy(), 0.95)),
        }
