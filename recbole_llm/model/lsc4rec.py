"""LSC4Rec: a cloud LLM and a small device model; three phases of training, candidates from the cloud, the last word on the device.

Paper: Lv et al., "Collaboration of Large Language Models and Small Recommendation Models for Device-Cloud Recommendation", KDD 2025
(arXiv 2501.05647): collaborative training (phases.py), collaborative inference, intelligent requests (request.py).

Differs from the authors' code: the cloud and the first two phases see historical rows only (timeline.py says what that is), training
lists are as stale as those at inference, every choice is made on validation, and requests are decided per user. `lsc_mode: code` brings
back their losses, real-time data in the first phase, targets and starts of histories as they draw them (draws.py), fixed numbers of epochs
and the last weights, training lists (fresh, with the target, digit negatives, trained padding), fusion, one decision per 16 users at a
threshold from test scores, and a budget that is spent on whoever comes first. In both modes the cloud sees historical rows only and
proposes real items only (theirs writes ids that may not exist, and trains those that pieces of digits make), its training lists are made of
whole histories, negatives are drawn of all items, digit negatives with replacement, chance asks for each user, users with fewer than S + 6
items are counted out, and device models are RecBole's: causal, with dropout, of the sizes and history in their settings (theirs have width
32, ten items, no dropout; SASRec four heads, an inner width of 128 and no mask). The full text of the paper was not at hand.
"""

from collections import OrderedDict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from recbole.model.abstract_recommender import AbstractRecommender, SequentialRecommender
from recbole.utils import InputType, get_model
from torch import Tensor

from recbole_llm.checkpoint import config_from_settings, read_checkpoint, settings_of
from recbole_llm.cloud import Cloud, Elsewhere, Lists, most_recent, proposed
from recbole_llm.collaboration import FUSIONS, Costs, Trial, best_fusion, policy_of
from recbole_llm.config import check_topk, needs_more, role_config
from recbole_llm.device import Device, best_of, draw_by_token
from recbole_llm.evaluation import POINTER
from recbole_llm.loaders import cut_to
from recbole_llm.phases import Phases
from recbole_llm.replay import AtHand, Outcome, Replay, with_own
from recbole_llm.request import places
from recbole_llm.teacher import Teacher, sample_of_rows
from recbole_llm.terms import Collaboration
from recbole_llm.timeline import REAL_TIME, Timeline
from recbole_llm.trainer import SequenceTrainer


def cloud_config(config: Any) -> Any:
    """The cloud's Config: it reads what a batch has of a history less the lag, unless it is told otherwise. Args: LSC4Rec's."""
    return role_config(
        config, "cloud", {"MAX_ITEM_LIST_LENGTH": max(1, config["MAX_ITEM_LIST_LENGTH"] - config["lsc_lag"])}
    )


def device_config(config: Any, **fixed: Any) -> Any:
    """The device model's Config; of a saved model the one that was saved, so that no data are asked for.

    Args:
        config: LSC4Rec's.
        **fixed: Settings that win over all others.
    """
    if config["device_settings"] and not fixed:
        return config_from_settings(config["device_settings"])
    sizes = config["lsc_device_sizes"] if config["lsc_device_size"] == "small" else {}
    own = {"seed": config["seed"], "train_neg_sample_args": None, **fixed}  # the phases draw their own negatives
    made = role_config(config, "device", sizes.get(config["device_model"]), own)
    if not fixed:
        config["device_settings"] = settings_of(made)
    return made


class LSC4Rec(SequentialRecommender):
    """A device model, and the rule by which its scores and those of a cloud's candidates are one.

    It ranks what the cloud proposes: of what it saw at its last contact while a trainer evaluates, otherwise of the history less its
    last `lsc_lag` items; and its own `lsc_own_candidates` best. Other items follow by popularity, below all candidates. Until there is
    a cloud, the device ranks alone.

    Args:
        config: RecBole Config; `cloud` and `device_model` name the two, `lsc_*` say how they work together.
        dataset: RecBole's dataset.

    Raises:
        ValueError: A setting is impossible.
    """

    input_type = InputType.POINTWISE

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        check_topk(config, dataset.item_num)
        self.settings = Collaboration.from_config(config)
        self._refuse_roles(config)
        self.device_model = get_model(config["device_model"])(device_config(config), dataset)
        if not any(True for _ in self.device_model.parameters()):
            raise ValueError(
                f"device_model={config['device_model']}: it counts, and a device is trained in phases; there is SASRec. Set device_model."
            )
        draw_by_token(self.device_model, dataset)
        self.register_buffer("popularity", torch.zeros(self.n_items))
        self.alpha = [0.5 if self.settings.alpha is None else self.settings.alpha]
        self.norm = "minmax" if self.settings.norm == "auto" else self.settings.norm
        self.cloud_file: str | None = None
        self.other_parameter_name = ["alpha", "norm", "cloud_file"]
        self.at_hand: AtHand | None = None
        self._elsewhere = Elsewhere(dataset)

    @staticmethod
    def _refuse_roles(config) -> None:
        """Refuse models that can be neither of the two. Raises: ValueError."""
        for key in ("cloud", "device_model"):
            if config[key] == "LSC4Rec":
                raise ValueError(
                    f"{key}=LSC4Rec: is cloud and device together and cannot be one of them; there is SASRec, say. Set {key}."
                )
        name = config["device_model"]
        if name == "DLLM2Rec" or issubclass(get_model(name), Teacher):
            raise ValueError(
                f"device_model={name}: has a training of its own, which the phases are not; there is SASRec, say. Set "
                "device_model."
            )
        if own := needs_more(name):
            raise ValueError(
                f"device_model={name}: it has {own} and takes more than item sequences, which is all that a device here "
                "knows; there is SASRec, GRU4Rec, DIN, NARM, STAMP, Caser or LightSANs, say. Set device_model."
            )

    @property
    def fusion(self):
        """How cloud and device are one: a function of their scores, of which are candidates, and of the age of the list."""
        return FUSIONS[self.settings.fusion](self.alpha, self.norm)

    def load_other_parameter(self, para):
        """Take what was chosen; a model of before shares had ages has a single one."""
        super().load_other_parameter(para)
        self.alpha = self.alpha if isinstance(self.alpha, list) else [self.alpha]

    def forward(self, *args):
        """The device model's own forward."""
        return self.device_model(*args)

    def calculate_loss(self, interaction):
        """The device model's own loss; the trainer's phases have theirs."""
        return self.device_model.calculate_loss(interaction)

    def full_sort_predict(self, interaction):
        """Score of every item [B, n_items]: candidates by their place in the fused order, above 0; others by popularity, below."""
        history, length = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        most = self.device_model.max_seq_length
        own = {self.ITEM_SEQ: most_recent(history, length, most), self.ITEM_SEQ_LEN: length.clamp(max=most)}
        batch = type(interaction)(interaction.interaction | own)
        found = self._candidates(interaction)
        if found is None:
            return self._alone(batch)
        items, cloud, age = found
        if self.settings.own_candidates:
            known = self.at_hand is not None and POINTER in interaction
            whole = self.scorer.whole(batch, self.at_hand.met if known else None)
            own = best_of(whole, self.settings.own_candidates)
            items, cloud, device = with_own(items, cloud, whole.gather(1, items), *own)
        else:
            device = self.scorer.scores(batch, items)
        there = items > 0
        place = places(self.fusion(cloud, device, there, age), there)
        # popularity is at most the number of rows, so that this lies between -2 and -1
        rest = self.popularity / (self.popularity.max() + 1) - 2
        scores = rest.expand(len(items), -1).clone()
        shown = torch.where(there, 1 - place / items.shape[1], scores.gather(1, items))
        scores.scatter_(1, items, shown)
        scores[:, 0] = -3.0
        return scores

    def predict(self, interaction):
        """Score of the batch's own items [B]."""
        return self.full_sort_predict(interaction).gather(1, interaction[self.ITEM_ID].unsqueeze(1)).squeeze(1)

    @property
    def scorer(self) -> Device:
        """The device model as a scorer of lists."""
        if self._elsewhere.scorer is None:
            self._elsewhere.scorer = Device(self.device_model)
        return self._elsewhere.scorer

    def _alone(self, interaction) -> Tensor:
        if not self.scorer.ranks_all:
            return self.popularity.expand(len(interaction), -1) - torch.arange(
                self.n_items, device=self.popularity.device
            )
        return self.device_model.full_sort_predict(interaction)

    def _candidates(self, interaction) -> tuple[Tensor, ...] | None:
        """The list of each row [B, K], the cloud's scores, how far it is behind [B]; None while there is no cloud."""
        device = self.popularity.device
        if self.at_hand is not None and POINTER in interaction:
            found = self.at_hand.of(interaction[POINTER].cpu())
        elif self.cloud_file is None:
            return None
        else:
            history, length = interaction[self.ITEM_SEQ].cpu(), interaction[self.ITEM_SEQ_LEN].cpu()
            known = (length - self.settings.lag).clamp_min(1)
            lists = proposed(self._elsewhere.cloud(self.cloud_file), history, known, self.settings.candidates)
            found = *lists, length - known
        return tuple(each.to(device) for each in found)


class LSC4RecTrainer(SequenceTrainer):
    """Gets the cloud and its lists, trains the device model in phases, chooses the fusion on validation; evaluates under `lsc_policy`.

    Relations:
        Like SequenceTrainer, but a call of `fit` is several trainings, each with its own exact resume in the run's folder; what
        `evaluate` returns also has the rate of requests, what they cost, and the share of targets among the candidates.
    """

    def __init__(self, config, model):
        super().__init__(config, model)
        self.settings: Collaboration = model.settings
        self.timeline: Timeline | None = None
        self.cloud: Cloud | None = None
        self.phases: Phases | None = None
        self._replays: dict[str, Replay] = {}
        self._trials: dict[str, Trial] = {}
        self.outcome: Outcome | None = None

    def refuse_early(self, eval_data) -> None:
        """Refuse data that do not say what happened when. Raises: ValueError."""
        super().refuse_early(eval_data)
        split = self.config["eval_args"]["split"]
        if split != {"LS": "valid_and_test"} or self.config["eval_args"]["mode"]["test"] != "full":
            raise ValueError(
                f"eval_args={self.config['eval_args']}: LSC4Rec cuts every user's interactions itself; there is split: {{LS: "
                "valid_and_test}} with mode full. Set eval_args."
            )
        scorer, config = self.model.scorer, self.config
        if self.settings.hard == "device" and not scorer.ranks_all:
            raise ValueError(
                f"lsc_hard=device: {config['device_model']} scores one item at a time, so its best wrong items are not to be had; there is "
                "random, popular and digits. Set lsc_hard."
            )
        if self.settings.own_candidates and not scorer.ranks_all:
            raise ValueError(
                f"lsc_own_candidates={self.settings.own_candidates}: {config['device_model']} scores one item at a time, so its best of "
                "the whole catalogue are not to be had; there is SASRec, say. Set device_model, or lsc_own_candidates=0."
            )
        if self.settings.policy == "history-drift" and scorer.item_vectors() is None:
            raise ValueError(
                f"lsc_policy=history-drift: {config['device_model']} has no item vectors; there is consistency, say. Set lsc_policy."
            )
        most = self.model.device_model.max_seq_length
        if most > config["MAX_ITEM_LIST_LENGTH"]:
            raise ValueError(
                f"device_MAX_ITEM_LIST_LENGTH={most}: batches hold the last {config['MAX_ITEM_LIST_LENGTH']} items of a history only. Set "
                "MAX_ITEM_LIST_LENGTH to that much or device_MAX_ITEM_LIST_LENGTH to less."
            )
        if get_model(config["cloud"]).full_sort_predict is AbstractRecommender.full_sort_predict:
            raise ValueError(
                f"cloud={config['cloud']}: scores one item at a time, and a cloud has to choose among all; there is LiteLLM4Rec, P5, "
                "BIGRec and SASRec, say. Set cloud."
            )
        if eval_data:
            self._know(eval_data)

    def _know(self, data: Any) -> None:
        """Cut the timeline, and find out who the cloud is. Args: a loader of RecBole's."""
        if self.timeline is not None:
            return
        settings, config = self.settings, self.config
        self.timeline = Timeline.of(data._dataset, settings.steps)
        if self.timeline.left_out:
            self.logger.warning(
                f"{self.timeline.left_out} users have fewer than the {settings.steps + REAL_TIME + 3} interactions that this evaluation "
                f"takes, and are counted out; {len(self.timeline.users)} are left."
            )
        folder = Path(config["checkpoint_dir"]) / "knowledge"
        self.cloud = Cloud(cloud_config(config), self.timeline, data, config["cloud_checkpoint"], folder)

    @property
    def chosen(self) -> Tensor:
        """Users who are evaluated, as places among those of the timeline, in the order of their tokens [u]."""
        return sample_of_rows(len(self.timeline.users), self.settings.users, self.config["cloud_seed"])

    def targets(self, part: str) -> Tensor:
        """Positions that are shown at the end (`test` [u, S]) or validated on (`valid` [u, 1])."""
        timeline = self.timeline
        return (timeline.shown if part == "test" else timeline.valid.unsqueeze(1))[self.chosen]

    def lists(self) -> Lists:
        """The cloud's lists for every view that a replay or a trial can have."""
        timeline, lag = self.timeline, self.settings.lag
        valid, shown = self.targets("valid")[:, 0], self.targets("test")
        ages = range(max(REAL_TIME, lag) + 1) if self.settings.steps > 1 else (0, lag)
        views = [timeline.view(valid, age) for age in ages] + [shown.flatten(), timeline.view(shown[:, 0], lag)]
        k = min(self.settings.candidates, timeline.log.n_items - 1)
        return self.cloud.lists(torch.cat(views), k, True, f"views of {len(self.chosen)} users, on whole histories")

    def replay(self, part: str) -> Replay:
        """The users of an evaluation, ready to be replayed with the device model as it is. Args: valid | test."""
        if part not in self._replays:
            targets = self.targets(part)
            start = self.timeline.view(targets[:, 0], self.settings.lag)
            seen = self.timeline.seen if self.seen_items == "mask" else None
            self._replays[part] = Replay(
                self.timeline.log, self.model.scorer, self.lists(), targets, start, seen, self.settings.own_candidates
            )
        return self._replays[part]

    def trial(self, part: str) -> Trial:
        """What is chosen and calibrated on: the validation target of each user; or the first one shown, as the authors do."""
        if part not in self._trials:
            self._trials[part] = Trial(self.replay(part), self.settings.lag, self.settings.steps)
        return self._trials[part]

    def _forget(self) -> None:
        """Replays hold scores of the device model as it was."""
        self._replays.clear()
        self._trials.clear()

    def fit(self, train_data, valid_data=None, verbose=True, saved=True, show_progress=False, callback_fn=None):
        """Train in phases.

        Args:
            train_data: RecBole's training loader; only its data set is used, which is cut anew.
            valid_data: RecBole's validation loader; without it no phase stops early.
            verbose: Whether epochs are logged.
            saved: Whether checkpoints and states are written.
            show_progress: Whether there are progress bars.
            callback_fn: Called with (epoch, validation score) after each evaluation of each phase.

        Returns:
            The fused ranking's metric on the validation targets, and all metrics there.

        Raises:
            ValueError: The data, or a cloud that is given, do not fit.
        """
        self.refuse_early(valid_data)
        self._know(train_data)
        self.dataset = train_data._dataset
        model, timeline, settings = self.model, self.timeline, self.settings
        folder = self.state_folder or Path(self.saved_model_file.removesuffix(".safetensors") + "-phases")
        make = partial(device_config, self.config)
        users = timeline.users[self.chosen]
        self.phases = Phases(settings, timeline, self.cloud, model.scorer, make, folder, valid_data, users)
        model.popularity.copy_(self.phases.popularity)
        self.phases.run(saved, verbose, show_progress, callback_fn)
        if saved or self.cloud.checkpoint:
            model.cloud_file = str(self.cloud.file)
        self._forget()
        self.fusions = best_fusion(self.trial("valid"), settings, self.config["valid_metric"])
        if self.fusions.curve:
            model.alpha, model.norm = self.fusions.alpha, self.fusions.norm
        self.logger.info(self.fusions.sentence())
        self.best_valid_score = self.fusions.score
        self.best_valid_result = OrderedDict({self.config["valid_metric"].lower(): self.fusions.score})
        if saved:
            self._save_checkpoint(-1, verbose=verbose)
        return self.best_valid_score, self.best_valid_result

    def evaluate(self, eval_data, load_best_model=True, model_file=None, show_progress=False):
        """Evaluate as RecBole does, on the users who have enough interactions, under `lsc_policy`.

        Returns:
            RecBole's metrics of the last step; and over all steps `request_rate`, `cloud_calls`, `candidate_recall`, `staleness`,
            `up_bytes`, `down_bytes`, `latency_ms`, `latency_p95_ms`, and `short_lists`, the share of lists with fewer candidates than the
            largest cut-off, which are filled up by popularity.

        Raises:
            ValueError: The policy means nothing here, or the rows are none that this evaluation knows.
        """
        self._know(eval_data)
        if load_best_model:
            self._load(model_file or self.saved_model_file)
        timeline, settings = self.timeline, self.settings
        dataset = cut_to(self.config, eval_data._dataset)
        at = timeline.of_pointers(dataset.row_pointers)
        part = next((part for part in ("test", "valid") if bool(torch.isin(self.targets(part)[:, -1], at).any())), None)
        if part is None:
            raise ValueError(
                "evaluate: these rows are neither the last step nor the validation target of this evaluation (in a stream RecBole's "
                "validation rows are shown); there are the test rows. Evaluate on those, or set lsc_evaluation=static."
            )
        replay = self.replay(part)
        asks = policy_of(settings.policy, settings.rate, self.trial, self.model.fusion, settings, self.config)
        if isinstance(asks, str):
            raise ValueError(
                f"lsc_policy={settings.policy}: means nothing here, since {asks}; there is consistency, confidence, random, never and "
                "always. Set lsc_policy."
            )
        self.outcome = replay.run(
            asks.policy if part == "test" else asks.on_valid, self.model.fusion, self.config["seed"]
        )
        view = torch.full((len(timeline.log.items),), -1, dtype=torch.long)
        view[replay.targets] = self.outcome.view
        self.model.at_hand = AtHand(timeline, replay, view)
        rows = torch.isin(at, replay.targets[:, -1]).nonzero()[:, 0]
        self.evaluated_rows = rows.tolist() if len(rows) < len(dataset) else None
        loader = timeline.loader(self.config, at[rows], eval_data)
        loader._dataset.pointer_column = POINTER
        result = super().evaluate(loader, False, None, show_progress)
        short = float((self.outcome.candidates < max(self.config["topk"])).double().mean())
        return OrderedDict(result | self.costs.of(self.outcome, replay) | {"short_lists": short})

    def _load(self, file: str) -> None:
        saved = read_checkpoint(file, self.device)
        self.model.load_state_dict(saved["state_dict"])
        self.model.load_other_parameter(saved["other_parameter"])
        self._forget()
        self.logger.info(f"Loading model structure and parameters from {file}")

    @cached_property
    def costs(self) -> Costs:
        """What recommendations cost, with times as they are measured here."""
        replay, k = self.replay("test"), min(self.settings.candidates, self.timeline.log.n_items - 1)
        position = replay.targets[:1, -1]
        items, _ = replay.lists.at(position)
        device_ms = self.model.scorer.latency_ms(self.timeline.log, position, items, self.settings.own_candidates)
        cloud_reads = self.cloud.config["teacher_history"] or self.cloud.config["MAX_ITEM_LIST_LENGTH"]
        return Costs(
            self.settings.network, device_ms, self.cloud.latency_ms(position, k), cloud_reads, self.model.scorer.size()
        )
