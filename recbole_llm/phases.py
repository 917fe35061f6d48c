"""LSC4Rec's three phases of training a device model: on its own, on the cloud's lists, and on what happened since.

Every phase is a training of the plain RecBole model with a data window, a loss and a validation of its own; it begins with the best
weights of the phase before, and its checkpoint is one of that model.

Paper: LSC4Rec (arXiv 2501.05647), collaborative training. Lists hold real items only. Differs from the authors' code, which
`lsc_mode: code` brings back, where padding is never trained; every target is trained on once an epoch, not some of a user's last three; a
target that the cloud did not propose is not put into its list, since a device that finds it there each time learns to distrust the cloud; a
phase is stopped on validation rows of its own time, and kept only where it is better there than what it began with; the cooperative phase
may keep the independent loss beside its own (`lsc_base_weight`), without which a device forgets how to rank what no cloud proposes.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from recbole.utils import init_seed
from torch import Tensor
from torch.nn import functional

from recbole_llm.artifacts import file_digest, write_json
from recbole_llm.causality import is_causal
from recbole_llm.checkpoint import read_weights, split_other_parameter
from recbole_llm.cloud import Cloud, Lists
from recbole_llm.config import shared
from recbole_llm.device import Device
from recbole_llm.draws import DrawnLoader
from recbole_llm.identity import Names
from recbole_llm.loaders import train_loader
from recbole_llm.losses import by_popularity
from recbole_llm.policies import never
from recbole_llm.replay import Replay
from recbole_llm.sequences import Fields, Log, Windows, windows
from recbole_llm.teacher import is_ready, sample_of_rows, seconds_of
from recbole_llm.timeline import REAL_TIME, Timeline
from recbole_llm.trainer import SequenceTrainer
from recbole_llm.training_lists import digit_neighbours, list_loss

PHASES = ("independent", "cooperative", "retrain")


@dataclass(frozen=True)
class Phase:
    """One phase's data and losses.

    Args:
        name: One of `PHASES`.
        loss: softmax | bce | listwise.
        base: Loss that is added, or None.
        base_weight: Its weight.
        targets: Positions of the timeline's log that are trained on.
        real_time: Whether they are the last ones of each user's training log, the others being context.
        lists: The cloud's training lists, in the cooperative phase.
        valid: Positions that are validated on [V].
        valid_lists: The cloud's lists for them; None validates on the whole catalogue.
    """

    name: str
    loss: str
    base: str | None
    base_weight: float
    targets: Tensor
    real_time: bool
    lists: Lists | None
    valid: Tensor
    valid_lists: Lists | None


class PhaseTrainer(SequenceTrainer):
    """Trains a device model in one phase.

    Args:
        config: The device model's Config.
        scorer: The device model as a scorer of lists.
        phase: The phase.
        timeline: What its positions are of.
        settings: `lsc_*`.
    """

    wants_row_list = True

    def __init__(self, config: Any, scorer: Device, phase: Phase, timeline: Timeline, settings: Any):
        super().__init__(config, scorer.model)
        self.scorer, self.phase, self.timeline, self.settings = scorer, phase, timeline, settings
        self._places: Tensor | None = None
        self.start_score: float | None = None

    def fault_of_all(self):
        """The losses are made of the states of the model, where it has states that serve any list."""
        return (
            None
            if self.scorer.by_state
            else f"{type(self.model).__name__}'s scores are not its state times its item table"
        )

    def _prepare(self, train_data):
        super()._prepare(train_data)
        if self.settings.targets == "drawn":
            self.loader = self._drawn_loader()
        elif self.phase.lists is not None:
            self._places = self.timeline.places(Log.from_dataset(self.dataset))
        # what is drawn is drawn by the order of the tokens, which the order of a file does not change
        self._names = Names.of(self.timeline.dataset, self.timeline.log)
        items = self.dataset.inter_feat[self.dataset.iid_field]
        counts = torch.bincount(items, minlength=self.dataset.item_num)
        self.popularity = by_popularity(counts[self._names.internal])

    def _drawn_loader(self) -> DrawnLoader:
        """The authors' batches; their rows are positions of the timeline's log."""
        name, settings, fields = self.phase.name, self.settings, Fields.of(self.model)
        loader = DrawnLoader(
            self.timeline.log, self.phase.targets, fields, self.model.POS_ITEM_ID, self.model.max_seq_length, settings.draws[name],
            settings.draws_batch[name], self.config["seed"] or 0, self.dataset,
        )  # fmt: skip
        self.logger.info(
            f"Each epoch draws {settings.draws[name]} targets of each of {len(loader.users)} users, and where their histories begin."
        )
        return loader

    def has_to_beat_its_start(self, split: Any, saved: bool) -> None:
        """Let only better weights be kept than those the phase begins with, by its own validation; not asked anew by a resumed one.

        Args:
            split: What it will be trained on.
            saved: Whether the best weights are kept in a file.
        """
        if self._resumed is not None or self.phase.valid_lists is None:
            return
        self.dataset = split
        self.start_score, _ = self._valid_epoch(None)
        # the next number that is better, since RecBole keeps the later of two equals
        self.best_valid_score = math.nextafter(self.start_score, math.inf if self.valid_metric_bigger else -math.inf)
        self._save_checkpoint(-1, verbose=False)
        self.logger.info(
            f"Phase {self.phase.name} begins at {self.start_score:.6f} on validation, and is kept where it gets better."
        )

    def is_better_than_its_start(self) -> bool:
        """Whether the weights as they are now do better on the phase's validation; a phase without such a validation is."""
        if self.start_score is None:
            return True
        now, _ = self._valid_epoch(None)
        return now > self.start_score if self.valid_metric_bigger else now < self.start_score

    def windows_of(self, log: Log, length: int, overlap: int) -> Windows:
        """All windows, or one at each user's end with its loss on the real-time targets, and some of what was before (`lsc_replay`)."""
        if not self.phase.real_time:
            return super().windows_of(log, length, overlap)
        end = log.offsets[1:] - 1
        recent = Windows(torch.maximum(log.offsets[:-1], end - length), end, end - REAL_TIME + 1)
        wanted = round(self.settings.replay * REAL_TIME * len(end))
        if not wanted:
            return recent
        start, until, first = windows(log, length, overlap)
        until = torch.minimum(until, (end - REAL_TIME)[log.user_index(start)])
        kept = (until >= first).nonzero()[:, 0]
        kept = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(self.config["seed"]))]
        enough = (until - first + 1)[kept].cumsum(0)
        kept = kept[: int(torch.searchsorted(enough, wanted)) + 1]
        older = Windows(start[kept], until[kept], first[kept])
        return Windows(*(torch.cat(columns) for columns in zip(recent, older, strict=True)))

    def targets_of(self, batch):
        """Like SequenceTrainer's; a model that reads the candidate has no states."""
        if self.scorer.by_state:
            return super().targets_of(batch)
        return None, batch[self.model.POS_ITEM_ID], batch["row_list"]

    def batch_loss(self, batch):
        """Loss of the phase, and of the base beside it."""
        phase = self.phase
        hidden, target, row = self.targets_of(batch)
        main = self._loss(phase.loss, batch, hidden, target, row, phase.name == "cooperative")
        if not phase.base_weight:
            return main
        return main, phase.base_weight * self._loss(phase.base, batch, hidden, target, row, False)

    def _loss(self, kind: str, batch: Any, hidden: Tensor | None, target: Tensor, row: Tensor, by_list: bool) -> Tensor:
        if not by_list and kind == "softmax":
            if self.scorer.by_state:
                return self.item_loss(hidden, self.model.item_embedding.weight, target)
            scores = self.model.full_sort_predict(batch).view(len(target), -1)
            return functional.cross_entropy(scores.float(), target)
        if not by_list:
            others = self._random(len(target), self.settings.negatives, None)
            there = torch.ones(len(target), dtype=torch.bool)
        else:
            others, there = self._list(row.cpu(), target.cpu(), hidden, batch)
        others = others.to(target.device)
        if not self.settings.train_padding:
            others = others.masked_fill(others == target.unsqueeze(1), 0)
        items = torch.cat([target.unsqueeze(1), others], dim=1)
        scores = self.scorer.scores(batch, items, hidden)
        if not bool(there.all()):
            there = there.to(target.device)
            if not bool(there.any()):
                return scores.sum() * 0.0
            items, scores = items[there], scores[there]
        if self.settings.train_padding:
            return list_loss(scores, torch.ones_like(items, dtype=torch.bool), kind, items == items[:, :1])
        return list_loss(scores, items > 0, kind)

    def _list(self, row: Tensor, target: Tensor, hidden: Tensor | None, batch: Any) -> tuple[Tensor, Tensor]:
        """What stands against each target [T, C], 0 for nothing, and which targets have a list [T]."""
        settings, timeline, lists = self.settings, self.timeline, self.phase.lists
        if lists is None:  # nothing of the cloud's is wanted
            none = torch.zeros(len(row), 0, dtype=torch.long)
            return self._hard(settings.list - 1, none, hidden, batch), torch.ones(len(row), dtype=torch.bool)
        position = row if self._places is None else self._places[row]
        items, _ = lists.at(timeline.view(position, settings.list_lag))
        items = items[:, : min(settings.list_cloud, settings.list - 1)]
        there = (items > 0).any(dim=1)
        if settings.inject == "never":
            there &= (items == target.unsqueeze(1)).any(dim=1)
        hard = self._hard(settings.list - 1 - items.shape[1], items, hidden, batch)
        return torch.cat([items, hard], dim=1), there

    def _hard(self, count: int, items: Tensor, hidden: Tensor | None, batch: Any) -> Tensor:
        """Items that fill a training list up [T, count]. Args: count; the cloud's candidates [T, K]; states; the batch."""
        kind, n_items = self.settings.hard, self.model.n_items
        count = max(0, min(count, n_items - 1))
        if not count:
            return items[:, :0]
        generator = self.item_loss.generator
        if kind == "digits":
            made = digit_neighbours(self._names.number[items], count, generator)
            return self._names.internal[made * (made < n_items)]
        if kind == "device":
            with torch.no_grad():
                table = self.model.item_embedding.weight if self.scorer.by_state else None
                scores = (
                    hidden @ table.T if table is not None else self.model.full_sort_predict(batch).view(len(items), -1)
                )
                scores[:, 0] = float("-inf")
                return scores.topk(count, dim=1).indices.cpu()
        return self._random(len(items), count, self.popularity if kind == "popular" else None)

    def _random(self, rows: int, count: int, probability: Tensor | None) -> Tensor:
        """Items drawn with replacement [rows, count]; uniformly, or with a probability for each number of an item [n_items]."""
        generator = self.item_loss.generator
        if probability is None:
            drawn = torch.randint(1, self.model.n_items, (rows, count), generator=generator)
        else:
            drawn = torch.multinomial(probability, rows * count, replacement=True, generator=generator)
        return self._names.internal[drawn.view(rows, count)]

    def _valid_epoch(self, valid_data, show_progress=False):
        """The metric of the device's order of the cloud's lists, where the phase has some for validation; else as RecBole does."""
        phase, metric = self.phase, self.config["valid_metric"]
        if phase.valid_lists is None:
            return super()._valid_epoch(valid_data, show_progress)
        start = self.timeline.view(phase.valid, self.settings.lag)
        replay = Replay(
            self.timeline.log,
            self.scorer,
            phase.valid_lists,
            phase.valid.unsqueeze(1),
            start,
            self.timeline.seen if self.seen_items == "mask" else None,
        )
        name, _, k = metric.partition("@")
        score = float(replay.run(never, lambda cloud, device, there, age: device).metric(name, int(k)).mean())
        return score, {metric.lower(): score}


class Phases:
    """The phases of a run, one after the other; finished ones are taken from their folders.

    Args:
        settings: `lsc_*`.
        timeline: What happened when.
        cloud: The cloud.
        scorer: The device model as a scorer of lists; it is trained in place.
        make_config: Makes the device model's Config of settings that win over all others.
        folder: Where each phase has a folder of its own.
        valid_data: Any evaluation loader of RecBole's, or None: then no phase stops early.
        users: Users whose rows are validated on, as indices into the timeline's log.

    Attributes:
        popularity: How often each item is a historical target [n_items].
        weights: Phase -> the weights with which it ended.
        seconds: Phase -> how long it took when it was trained.
    """

    def __init__(
        self,
        settings: Any,
        timeline: Timeline,
        cloud: Cloud,
        scorer: Device,
        make_config: Callable[..., Any],
        folder: str | Path,
        valid_data: Any,
        users: Tensor,
    ):
        self.settings, self.timeline, self.cloud, self.scorer = settings, timeline, cloud, scorer
        self.make_config, self.folder, self.valid_data, self.users = make_config, Path(folder), valid_data, users
        self.seconds: dict[str, float | None] = {}
        self.popularity = torch.bincount(timeline.log.items[timeline.train], minlength=timeline.log.n_items)
        self.weights: dict[str, dict[str, Tensor]] = {}

    def run(self, saved: bool, verbose: bool, show_progress: bool, callback_fn: Callable | None) -> None:
        """Train every phase that `lsc_phases` names, and keep the weights each ends with."""
        for name in self.settings.phases:
            self._run(name, saved, verbose, show_progress, callback_fn)
            self.weights[name] = self._weights()

    def _weights(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.scorer.model.state_dict().items()}

    def load(self, name: str) -> None:
        """Give the device model the weights with which a phase ended."""
        self.scorer.model.load_state_dict(self.weights[name])

    def _run(self, name: str, saved: bool, verbose: bool, show_progress: bool, callback_fn: Callable | None) -> None:
        settings, folder, logger = self.settings, self.folder / name, logging.getLogger()
        rate = {"independent": 1.0, "cooperative": settings.cooperative_rate, "retrain": settings.retrain_rate}[name]
        config = self.make_config(epochs=getattr(settings, f"{name}_epochs"), stopping_step=settings.stopping_step)
        config["learning_rate"] *= rate
        if settings.targets == "drawn":
            config["positions"] = "last"  # a draw is a row
        if saved and is_ready(folder):
            self._take(folder / "model.safetensors")
            self.seconds[name] = seconds_of(folder)
            logger.info(f"Phase {name}: taken from {folder}.")
            return
        phase = self._phase(name)
        split = self._split(phase, config)
        validates = self.valid_data and len(phase.valid) and settings.select == "best"
        valid = self.timeline.loader(config, phase.valid, self.valid_data) if validates else None
        init_seed(config["seed"], config["reproducibility"])
        trainer = PhaseTrainer(config, self.scorer, phase, self.timeline, settings)
        if saved:
            trainer.keep_in(folder)
        logger.info(
            f"Phase {name}: {len(phase.targets)} targets, {phase.loss} loss, {len(phase.valid) if valid else 0} validation rows."
        )
        began = perf_counter()
        start = None
        if valid and settings.keep_better and self.weights:
            start = self._weights()
            trainer.has_to_beat_its_start(split, saved)
        trainer.fit(
            train_loader(config, split, valid and valid._dataset), valid, verbose, saved, show_progress, callback_fn
        )
        self.seconds[name] = perf_counter() - began
        # without files RecBole leaves the weights of the last epoch
        if not saved and start is not None and not trainer.is_better_than_its_start():
            self.scorer.model.load_state_dict(start)
        if saved:
            file = folder / "model.safetensors"
            self._take(file)
            write_json(folder / "done.json", {"checkpoint": file_digest(file), "seconds": self.seconds[name]})

    def _take(self, file: Path) -> None:
        state, meta = read_weights(file, self.scorer.model.device)
        state, other = split_other_parameter(state, meta)
        self.scorer.model.load_state_dict(state)
        self.scorer.model.load_other_parameter(other)

    def _phase(self, name: str) -> Phase:
        settings, timeline = self.settings, self.timeline
        real_time = name == "retrain" or name == "independent" and settings.independent_data == "real_time"
        if settings.targets == "drawn":
            targets = (timeline.real_time if real_time else timeline.last_historical).flatten()
            targets = targets[targets >= 0]
            if settings.select == "best":  # the last of them is validated on, and trains nobody
                targets = targets[~torch.isin(targets, timeline.history_valid)]
        else:
            targets = timeline.real_time.flatten() if real_time else timeline.train
        valid = self._of_users(timeline.valid if real_time else timeline.history_valid)
        # whoever reads one candidate at a time cannot be compared with the whole catalogue at every step
        independent = settings.independent_loss if self.scorer.ranks_all else "bce"
        lists, base, weight = None, None, 0.0
        if name == "cooperative":
            rows = sample_of_rows(len(targets), settings.list_rows, self.cloud.config["seed"])
            views = timeline.view(targets[rows], settings.list_lag)
            k = min(settings.list_cloud, timeline.log.n_items - 1)
            lists = (
                self.cloud.lists(views, k, False, f"training lists, {settings.list_lag} interactions behind")
                if k
                else None
            )
            base, weight = independent, settings.base_weight
        loss = settings.cooperative_loss if name == "cooperative" else independent
        by_list = name == "cooperative" or real_time or not self.scorer.ranks_all
        valid_lists = None
        if by_list and len(valid) and settings.select == "best":
            k = min(settings.candidates, timeline.log.n_items - 1)
            views = timeline.view(valid, settings.lag)
            valid_lists = self.cloud.lists(views, k, True, f"stale views of the rows that phase {name} is validated on")
        return Phase(name, loss, base, weight, targets, real_time, lists, valid, valid_lists)

    def _of_users(self, positions: Tensor) -> Tensor:
        return positions[torch.isin(self.timeline.log.user_index(positions), self.users)]

    def _split(self, phase: Phase, config: Any) -> Any:
        """The rows of a phase: its targets, or for windows that end in real time, all that came before as well."""
        timeline = self.timeline
        reads_windows = (
            shared(config, "positions") != "last" and self.scorer.by_state and is_causal(self.scorer.model)[0]
        )
        if not phase.real_time or self.settings.targets == "drawn":
            return timeline.split(phase.targets)
        if not reads_windows:
            count = round(self.settings.replay * len(phase.targets))
            older = (
                timeline.train[sample_of_rows(len(timeline.train), count, config["seed"])]
                if count
                else timeline.train[:0]
            )
            return timeline.split(torch.cat([phase.targets, older]).sort().values)
        log = timeline.log
        first = log.offsets[timeline.users] + 1
        return timeline.split(
            torch.cat([torch.arange(a, b) for a, b in zip(first.tolist(), timeline.valid.tolist(), strict=True)])
        )
