"""On which terms cloud and device work together: the settings `lsc_*`, checked, after `lsc_mode` has filled the empty ones."""

from dataclasses import dataclass, fields
from typing import Any

from recbole_llm.collaboration import FUSIONS, POLICIES
from recbole_llm.config import check_range, choice
from recbole_llm.phases import PHASES
from recbole_llm.policies import MEASURES
from recbole_llm.request import NORMS, Network
from recbole_llm.timeline import REAL_TIME

CHOICES = {
    "independent_loss": ("softmax", "bce"),
    "independent_data": ("history", "real_time"),
    "cooperative_loss": ("listwise", "bce"),
    "hard": ("random", "popular", "device", "digits"),
    "inject": ("always", "never"),
    "fusion": tuple(FUSIONS),
    "norm": ("auto", *NORMS),
    "measure": tuple(MEASURES),
    "threshold": ("valid", "test"),
    "evaluation": ("static", "stream"),
    "policy": POLICIES,
    "device_size": ("small", "recbole"),
    "targets": ("all", "drawn"),
    "select": ("best", "last"),
    "upload": ("delta", "stateless"),
}
RANGES = {
    "steps": (1, None), "lag": (0, None), "candidates": (1, None), "own_candidates": (0, None), "users": (0, None),
    "independent_epochs": (1, None), "cooperative_epochs": (1, None), "retrain_epochs": (1, None), "stopping_step": (0, None),
    "cooperative_rate": (0.0, None), "retrain_rate": (0.0, None), "negatives": (1, None), "list": (2, None),
    "list_cloud": (0, None), "list_lag": (0, None), "list_rows": (0, None), "base_weight": (0.0, None), "replay": (0.0, None),
    "rate": (0.0, 1.0), "rtt_ms": (0.0, None), "up_mbps": (1e-9, None), "down_mbps": (1e-9, None), "id_bytes": (0, None),
    "score_bytes": (0, None), "header_bytes": (0, None),
}  # fmt: skip
AFTER_TRAINING = frozenset(
    f"lsc_{name}"
    for name in (
        "own_candidates", "fusion", "norm", "alpha", "alpha_by_age", "policy", "rate", "rates", "measure", "threshold", "budget",
        *(field.name for field in fields(Network)),
    )
)  # fmt: skip
"""Settings that no training depends on."""


@dataclass(frozen=True)
class Collaboration:
    """How cloud and device work together: the settings `lsc_*` after the mode has filled the empty ones."""

    phases: tuple[str, ...]
    evaluation: str
    steps: int
    lag: int
    candidates: int
    own_candidates: int
    users: int
    independent_loss: str
    independent_data: str
    cooperative_loss: str
    independent_epochs: int
    cooperative_epochs: int
    retrain_epochs: int
    stopping_step: int
    cooperative_rate: float
    retrain_rate: float
    negatives: int
    list: int
    list_cloud: int
    list_lag: int
    list_rows: int
    inject: str
    hard: str
    base_weight: float
    keep_better: bool
    replay: float
    targets: str
    draws: dict
    draws_batch: dict
    select: str
    train_padding: bool
    fusion: str
    norm: str
    alpha: float | None
    alpha_by_age: bool
    policy: str
    rate: float
    rates: tuple[float, ...]
    measure: str
    threshold: str
    budget: bool
    device_size: str
    upload: str
    rtt_ms: float
    up_mbps: float
    down_mbps: float
    id_bytes: int
    score_bytes: int
    header_bytes: int

    @classmethod
    def from_config(cls, config: Any) -> "Collaboration":
        """Read `lsc_*`; raises ValueError for a value that a setting cannot have."""
        mode = config["lsc_modes"][choice(config, "lsc_mode", config["lsc_modes"])]
        given = {field.name: config[f"lsc_{field.name}"] for field in fields(cls)}
        merged = {name: mode.get(name) if value is None else value for name, value in given.items()}
        if merged["list_lag"] == "lag":
            merged["list_lag"] = merged["lag"]
        for name in ("rates", "phases"):  # one of them alone needs no brackets
            merged[name] = merged[name] if isinstance(merged[name], list | tuple) else [merged[name]]
        named = {f"lsc_{name}": value for name, value in merged.items()}
        for name, allowed in CHOICES.items():
            choice(named, f"lsc_{name}", allowed)
        for name, (least, most) in RANGES.items():
            check_range(named, f"lsc_{name}", least, most)
        if merged["alpha"] is not None:
            check_range(named, "lsc_alpha", 0.0, 1.0)
        if merged["fusion"] == "code" and (merged["alpha"] is not None or merged["norm"] != "auto"):
            raise ValueError(
                "lsc_fusion=code: has neither an alpha nor a scale; there is lsc_fusion=linear. Set it, or neither lsc_alpha nor lsc_norm."
            )
        for name in ("keep_better", "alpha_by_age", "train_padding", "budget"):
            if not isinstance(merged[name], bool):
                raise ValueError(
                    f"lsc_{name}={merged[name]}: is neither true nor false; there are True and False. Set lsc_{name}."
                )
        for name in ("draws", "draws_batch"):
            if not isinstance(merged[name], dict) or set(merged[name]) != set(PHASES):
                raise ValueError(
                    f"lsc_{name}={merged[name]}: needs a number for each phase; there is {dict.fromkeys(PHASES, 1)}, say. Set lsc_{name}."
                )
            for phase, count in merged[name].items():
                check_range({f"lsc_{name}[{phase}]": count}, f"lsc_{name}[{phase}]", 1, None)
        if merged["train_padding"] and merged["cooperative_loss"] == "listwise":
            raise ValueError(
                "lsc_train_padding=True: a softmax over a list has one target and no padding; there is lsc_cooperative_loss=bce. Set it, "
                "or lsc_train_padding=False."
            )
        if merged["keep_better"] and merged["select"] == "last":
            raise ValueError(
                "lsc_select=last: nothing is validated, so nobody can say whether a phase got better; there is lsc_keep_better=False. Set "
                "it, or lsc_select=best."
            )
        if merged["targets"] == "drawn" and merged["replay"]:
            raise ValueError(
                f"lsc_replay={merged['replay']}: draws are of a user's last three targets alone; there is lsc_targets=all. Set it, or "
                "lsc_replay=0."
            )
        if merged["fusion"] == "code" and merged["own_candidates"]:
            raise ValueError(
                f"lsc_own_candidates={merged['own_candidates']}: the authors' fusion ranks the cloud's candidates alone; there is "
                "lsc_fusion=linear. Set lsc_fusion, or lsc_own_candidates=0."
            )
        for name in ("rates", "phases"):
            if not merged[name]:
                raise ValueError(
                    f"lsc_{name}=[]: needs one at least; there is {'0.2' if name == 'rates' else ', '.join(PHASES)}. Set lsc_{name}."
                )
        if merged["lag"] > REAL_TIME:
            raise ValueError(
                f"lsc_lag={merged['lag']}: lists that far behind the validation targets are of histories whose next items the cloud was "
                f"trained on; there is 0 to {REAL_TIME}. Set lsc_lag."
            )
        if merged["hard"] == "digits" and not merged["list_cloud"]:
            raise ValueError(
                "lsc_hard=digits: makes numbers of the pieces of the cloud's candidates, and lsc_list_cloud=0 takes none; there is "
                "lsc_hard=random. Set one of them."
            )
        for rate in merged["rates"]:
            check_range({"lsc_rates": rate}, "lsc_rates", 0.0, 1.0)
        for phase in merged["phases"]:
            choice({"lsc_phases": phase}, "lsc_phases", PHASES)
        phases = tuple(phase for phase in PHASES if phase in merged["phases"])
        if merged["evaluation"] == "static":
            merged["steps"] = 1
            if not merged["lag"] and merged["policy"] not in ("never", "always"):
                raise ValueError(
                    f"lsc_policy={merged['policy']}: means nothing where no list is behind; there is never and always with lsc_lag=0, "
                    "and all others with lsc_lag=1. Set one of them."
                )
            if merged["policy"] == "periodic":
                raise ValueError(
                    "lsc_policy=periodic: means nothing in one step; there is lsc_evaluation=stream, and other policies. Set one of them."
                )
        return cls(**merged | {"phases": phases, "rates": tuple(sorted(merged["rates"]))})

    @property
    def network(self) -> Network:
        """What a contact costs."""
        return Network(**{field.name: getattr(self, field.name) for field in fields(Network)})
