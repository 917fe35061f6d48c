"""The account of a run of LSC4Rec: what cloud, device and both together reach, what every policy makes of its requests, and their price.

All of it is one replay after the other of the same users, so every difference is paired; intervals are by bootstrap over users, whose
steps are averaged first.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.artifacts import read_json, write_json
from recbole_llm.collaboration import ALPHAS, POLICIES, policy_of
from recbole_llm.policies import always, never
from recbole_llm.replay import Fusion, Replay, mean_over
from recbole_llm.report import Line, draw, half_width, in_brackets, paired_gain, row_metric
from recbole_llm.request import LOWEST

RANDOM_SEEDS = 5
DRAWS = 1000


@dataclass
class Row:
    """A policy at a rate.

    Args:
        policy: Its name.
        wished: The rate that it was set to.
        score: The metric on the test steps, mean over users.
        half: Half of its 95 % interval.
        kept: Share of the gain of always asking, its 95 % interval; nan where there is no gain to share.
        over: What it gains over the strongest of cloud and device alone, its 95 % interval.
        valid: The metric that is expected on the validation targets.
        valid_rate: Requests per recommendation that are expected there.
        costs: What `Costs.of` says, the request rate among it.
    """

    policy: str
    wished: float
    score: float
    half: float
    kept: tuple[float, float, float]
    over: tuple[float, float, float]
    valid: float
    valid_rate: float
    costs: dict[str, float]


@dataclass
class Account:
    """Everything that is said of a run.

    Args:
        lines: The table: cloud, device and both together.
        rows: The policies.
        nothing: Policies that mean nothing here, and why.
        differences: Both together against each line of theirs: metric -> gain and its 95 % interval, over users.
        sentences: What follows from them.
        areas: Policy -> area between its curve of quality over rate and that of asking at random, and its 95 % interval.
        curve: Scale -> age of a list -> the metric on validation at each alpha of `ALPHAS`.
        chosen: alpha by the age of a list, scale, metric, costs of one contact.
        never: The metric without a request.
        always: The metric with a request before each recommendation.
    """

    lines: list[Line]
    rows: list[Row]
    nothing: dict[str, str]
    differences: dict[str, dict[str, tuple[float, float, float]]]
    sentences: list[str]
    areas: dict[str, tuple[float, float, float]]
    curve: dict[str, dict[str, list[float]]]
    chosen: dict[str, Any]
    never: float
    always: float
    alphas: list[float] = field(default_factory=lambda: list(ALPHAS))

    def save(self, folder: Path) -> None:
        """Write it as JSON into a run's folder."""
        write_json(folder / "account.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Account":
        """Read a finished run's account; its lines are marked as cached."""
        known = read_json(folder / "account.json")
        lines = [Line(**{**line, "cached": True}) for line in known.pop("lines")]
        rows = [Row(**row) for row in known.pop("rows")]
        return cls(lines, rows, **known)

    def text(self) -> str:
        """The table of policies, and the sentences."""
        metric = self.chosen["metric"].lower()
        head = [
            "policy", "rate set", "requests", metric, "of the gain kept", "over the best alone", "valid", "calls", "target in list",
            "staleness", "bytes up", "bytes down", "ms", "ms p95",
        ]  # fmt: skip
        body = []
        for row in self.rows:
            costs = row.costs
            body.append([
                row.policy,
                f"{row.wished:.0%}",
                f"{costs['request_rate']:.1%}",
                f"{row.score:.4f} ±{row.half:.4f}",
                "-" if np.isnan(row.kept[0]) else f"{row.kept[0]:.0%} [{row.kept[1]:.0%}, {row.kept[2]:.0%}]",
                in_brackets(*row.over),
                f"{row.valid:.4f} at {row.valid_rate:.1%}",
                f"{costs['cloud_calls']:.2f}",
                f"{costs['candidate_recall']:.1%}",
                f"{costs['staleness']:.1f}",
                f"{costs['up_bytes']:.0f}",
                f"{costs['down_bytes']:.0f}",
                f"{costs['latency_ms']:.1f}",
                f"{costs['latency_p95_ms']:.1f}",
            ])  # fmt: skip
        for policy, why in self.nothing.items():
            body.append([f"{policy}: n/a, {why}", *["-"] * (len(head) - 1)])
        names = list(next(iter(self.differences.values())))
        against = [[name, *[in_brackets(*gain) for gain in gains.values()]] for name, gains in self.differences.items()]
        return "\n".join([
            "Both together, never asked, against the others (95 % by paired bootstrap over users):",
            draw(["against", *names], against),
            "Requests, per recommendation:",
            draw(head, body),
            *self.sentences,
        ])  # fmt: skip


class Accountant:
    """Draws up the account of a trained LSC4Rec.

    Args:
        trainer: An LSC4RecTrainer after `fit`.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.settings, self.config = trainer, trainer.settings, trainer.config
        self.metric, _, cut = self.config["valid_metric"].partition("@")
        self.k = int(cut)
        self.fusion: Fusion = trainer.model.fusion
        self.costs = trainer.costs

    def draw_up(self) -> Account:
        """Replay everything, on validation and on test steps."""
        replay = self.trainer.replay("test")
        cloud_order: Fusion = lambda cloud, device, there, age: cloud.masked_fill(~there, LOWEST)  # noqa: E731
        device_order: Fusion = lambda cloud, device, there, age: device.masked_fill(cloud == LOWEST, LOWEST)  # noqa: E731
        cloud, device = self.config["cloud"], self.config["device_model"]
        views = "as stale as a view can be" if replay.steps > 1 else f"{self.settings.lag} interactions behind"
        orders = {
            f"{cloud} in the cloud, {views}": (never, cloud_order),
            f"{cloud} in the cloud, up to date": (always, cloud_order),
            f"{device} on the device, re-ranking": (never, device_order),
            "both (LSC4Rec), never asked": (never, self.fusion),
            "both (LSC4Rec), always asked": (always, self.fusion),
        }
        lines, valid = [], {}
        for name, (asks, order) in orders.items():
            outcome = replay.run(asks, order)
            lines.append(self._line(name, outcome.rank))
            valid[name] = self._valid(asks, order)
        names = list(orders)
        alone, alone_valid = self._alone(replay)
        lines[3:3] = alone
        valid |= alone_valid
        stale, both, fresh = (next(line for line in lines if line.name == names[at]) for at in (0, 3, 4))
        reranking = next(line for line in lines if line.name == names[2])
        base, most = self._users(both), self._users(fresh)
        strongest = max((stale, reranking, *alone), key=lambda line: valid[line.name])
        rows, areas, nothing = self._policies(replay, base, most, self._users(strongest))
        differences = {other.name: self._gains(both, other) for other in (stale, fresh, reranking, *alone)}
        sentences = [
            f"Of {stale.name}, {reranking.name} and the device alone, the strongest on validation is {strongest.name} "
            f"({valid[strongest.name]:.4f} there).",
            self._difference(both, strongest),
            self._difference(fresh, strongest),
            self._difference(fresh, both),
            *self._bounds(replay),
            *self._kept_sentences(rows),
            *self._area_sentences(areas),
            *self._prices(replay),
        ]
        if not self.trainer.model.scorer.ranks_all:
            sentences.append(f"{device} alone on the whole catalogue: n/a, it scores one item at a time.")
        fusions = self.trainer.fusions
        chosen = {"alpha": fusions.alpha, "norm": fusions.norm, "metric": self.config["valid_metric"]}
        chosen |= {
            "device_ms": self.costs.device_ms,
            "cloud_ms": self.costs.cloud_ms,
            "device_bytes": self.costs.device_bytes,
        }
        chosen |= {"users": len(replay.targets), "steps": replay.steps, "left_out": self.trainer.timeline.left_out}
        return Account(
            lines,
            rows,
            nothing,
            differences,
            [fusions.sentence(), *sentences],
            areas,
            {norm: {str(age): scores for age, scores in curves.items()} for norm, curves in fusions.curve.items()},
            chosen,
            float(base.mean()),
            float(most.mean()),
        )

    def _line(self, name: str, rank: Tensor) -> Line:
        ranks = rank.flatten().tolist()
        metrics = {
            f"{metric.lower()}@{k}": float(row_metric(ranks, metric, k).mean())
            for k in self.config["topk"]
            for metric in self.config["metrics"]
        }
        return Line(name, metrics, ranks)

    def _users(self, line: Line) -> np.ndarray:
        """The metric of each user of a line [U]."""
        steps = self.trainer.replay("test").steps
        return row_metric(line.ranks, self.metric, self.k).reshape(-1, steps).mean(axis=1)

    def _valid(self, asks: Any, order: Fusion) -> float:
        return float(self.trainer.trial("valid").run(asks, order, self.metric, self.k)[1].mean())

    def _alone(self, replay: Replay) -> tuple[list[Line], dict[str, float]]:
        """The device on the whole catalogue, after each phase: lines, and the metric on validation; none for models of single items."""
        phases, log, scorer = self.trainer.phases, replay.log, self.trainer.model.scorer
        lines, valid = [], {}
        last = {name: value.clone() for name, value in scorer.model.state_dict().items()}
        for phase in phases.weights:
            phases.load(phase)
            rank = scorer.rank_of(log, replay.targets.flatten(), replay.seen)
            if rank is None:
                break
            name = f"{self.config['device_model']} alone, whole catalogue, after phase {phase}"
            lines.append(self._line(name, rank))
            lines[-1].seconds["train"] = phases.seconds.get(phase)
            own = scorer.rank_of(log, self.trainer.replay("valid").targets.flatten(), replay.seen)
            valid[name] = float(row_metric(own.tolist(), self.metric, self.k).mean())
        scorer.model.load_state_dict(last)
        return lines, valid

    def _policies(
        self, replay: Replay, base: np.ndarray, most: np.ndarray, strongest: np.ndarray
    ) -> tuple[list[Row], dict[str, tuple], dict[str, str]]:
        """Every policy at every rate, the areas of their curves, and which mean nothing."""
        rows, curves, nothing = [], {}, {}
        for name in POLICIES[2:]:
            points = [(np.zeros(len(base)), base)]
            for rate in self.settings.rates:
                asks = policy_of(name, rate, self.trainer.trial, self.fusion, self.settings, self.config)
                if isinstance(asks, str):
                    nothing[name] = asks
                    break
                seeds = range(RANDOM_SEEDS) if name == "random" else [self.config["seed"]]
                outcomes = [replay.run(asks.policy, self.fusion, seed) for seed in seeds]
                valid_rate, valid = self.trainer.trial("valid").run(asks.on_valid, self.fusion, self.metric, self.k)
                users = mean_over(outcomes, self.metric, self.k)
                asked = np.mean([outcome.asked.float().mean(dim=1).numpy() for outcome in outcomes], axis=0)
                points.append((asked, users))
                costs = [self.costs.of(outcome, replay) for outcome in outcomes]
                rows.append(
                    Row(
                        name,
                        rate,
                        float(users.mean()),
                        half_width(users),
                        share_kept(users, base, most),
                        paired_gain(users, strongest),
                        float(valid.mean()),
                        valid_rate,
                        {key: float(np.mean([cost[key] for cost in costs])) for key in costs[0]},
                    )
                )
            if len(points) > 1:
                curves[name] = [*points, (np.ones(len(base)), most)]
        areas = {name: area_over(curves[name], curves["random"]) for name in curves if name != "random"}
        return rows, areas, nothing

    def _gains(self, ours: Line, theirs: Line) -> dict[str, tuple[float, float, float]]:
        """What one line gains over another in every metric, with its interval; metrics that are the same at 1 stand once."""
        gains, steps = {}, self.trainer.replay("test").steps
        for k in self.config["topk"]:
            for metric in self.config["metrics"][: 1 if k == 1 else None]:
                users = (row_metric(line.ranks, metric, k).reshape(-1, steps).mean(axis=1) for line in (ours, theirs))
                gains[f"{metric.lower()}@{k}"] = paired_gain(*users)
        return gains

    def _difference(self, ours: Line, theirs: Line) -> str:
        gain, low, high = paired_gain(self._users(ours), self._users(theirs))
        verdict = "a gain" if low > 0 else "a loss" if high < 0 else "no difference is shown"
        metric = self.config["valid_metric"].lower()
        return f"{ours.name} against {theirs.name}, {metric}: {gain:+.1%} (95 % {low:+.1%} to {high:+.1%}; {verdict})."

    def _kept_sentences(self, rows: list[Row]) -> list[str]:
        """What the policy that did best on validation keeps at each rate, oracles left out."""
        sentences = []
        for rate in self.settings.rates:
            able = [row for row in rows if row.wished == rate and row.policy != "oracle"]
            if able:
                best = max(able, key=lambda row: row.valid)
                kept = (
                    "has no gain to keep"
                    if np.isnan(best.kept[0])
                    else f"keeps {best.kept[0]:.0%} of the gain of always asking"
                )
                bounds = "" if np.isnan(best.kept[0]) else f" (95 % {best.kept[1]:.0%} to {best.kept[2]:.0%})"
                asks = f"asks at {best.costs['request_rate']:.1%}"
                over, low, high = best.over
                sentences.append(
                    f"Set to {rate:.0%}, {best.policy} is the best on validation, {asks}, and {kept}{bounds}; over the strongest alone: "
                    f"{over:+.1%} (95 % {low:+.1%} to {high:+.1%})."
                )
        return sentences

    def _bounds(self, replay: Replay) -> list[str]:
        """How often the target is a candidate at all."""
        recall = {
            name: float(replay.run(asks, self.fusion).in_list.double().mean())
            for name, asks in (("stale", never), ("fresh", always))
        }
        own = f" and the device's own {replay.own}" if replay.own else ""
        bounds = [
            f"The target is among the {replay.lists.items.shape[1]} candidates{own} in {recall['stale']:.1%} of stale and "
            f"{recall['fresh']:.1%} of fresh lists."
        ]
        oldest = self.trainer.trial("valid").oldest
        if replay.steps > 1:
            bounds.append(
                f"On validation, lists that are more than {oldest} interactions old are taken as {oldest} old, since the cloud was trained "
                "on what came next after older ones."
            )
        return bounds

    def _area_sentences(self, areas: dict[str, tuple[float, float, float]]) -> list[str]:
        metric = self.config["valid_metric"].lower()
        return [
            f"Area of {metric} over the rate, {name} less random: {area:+.5f} (95 % {low:+.5f} to {high:+.5f})."
            for name, (area, low, high) in areas.items()
        ]

    def _prices(self, replay: Replay) -> list[str]:
        costs, network = self.costs, self.costs.network
        k = replay.lists.items.shape[1]
        one = network.header_bytes + k * (network.id_bytes + network.score_bytes)
        size, threads = costs.device_bytes, torch.get_num_threads()
        besides = f", and finds its own {replay.own} in the whole catalogue," if replay.own else ""
        return [
            f"The device model has {size / 1e6:.2f} MB and re-ranks {k} candidates{besides} in {costs.device_ms:.2f} ms (median); the "
            f"cloud takes {costs.cloud_ms:.1f} ms a list, {threads} threads. Sent once after its last training, the model is "
            f"{size / replay.steps:,.0f} bytes a recommendation, as much as {size / max(1, one):,.0f} lists. "
            f"A user's first list, {one} bytes, is a call and no request."
        ]


def share_kept(users: np.ndarray, base: np.ndarray, most: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Share of the gain of always asking that a policy keeps, and its 95 % interval; nan where the gain has no interval above 0.

    Args:
        users: The metric of each user under the policy [U].
        base: Never asking [U].
        most: Always asking [U].
        seed: Of the bootstrap.
    """
    counts = resamples(len(users), seed)
    gains = counts @ (most - base)
    if np.quantile(gains, 0.025) <= 0:
        return float("nan"), float("nan"), float("nan")
    shares = (counts @ (users - base)) / np.where(gains > 0, gains, np.nan)
    low, high = np.nanquantile(shares, [0.025, 0.975])
    return float((users - base).mean() / (most - base).mean()), float(low), float(high)


def area_over(
    curve: list[tuple[np.ndarray, np.ndarray]], other: list[tuple[np.ndarray, np.ndarray]], seed: int = 0
) -> tuple:
    """Area between two curves of quality over rate, and its 95 % interval.

    Args:
        curve: Points, in the order of their rates: requests per recommendation, and the metric, of each user [U].
        other: The curve that is subtracted.
        seed: Of the bootstrap.
    """
    counts = resamples(len(curve[0][0]), seed)

    def areas(points: list[tuple[np.ndarray, np.ndarray]], weight: np.ndarray) -> np.ndarray:
        x, y = (weight @ np.stack(columns, axis=1) for columns in zip(*points, strict=True))
        order = np.argsort(x, axis=1, kind="stable")
        x, y = np.take_along_axis(x, order, 1), np.take_along_axis(y, order, 1)
        return ((x[:, 1:] - x[:, :-1]) * (y[:, 1:] + y[:, :-1]) / 2).sum(axis=1)

    whole = np.full((1, counts.shape[1]), 1 / counts.shape[1])
    low, high = np.quantile(areas(curve, counts) - areas(other, counts), [0.025, 0.975])
    return float((areas(curve, whole) - areas(other, whole))[0]), float(low), float(high)


def resamples(users: int, seed: int) -> np.ndarray:
    """Weights of users under a bootstrap: each row adds up to 1 [DRAWS, users]."""
    picks = np.random.default_rng(seed).multinomial(users, np.full(users, 1 / users), size=DRAWS)
    return picks / users
