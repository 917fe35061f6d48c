"""RecBole's Trainer for sequential models: a loss at every position where the model allows it, and exact resume.

Differs from RecBole's Trainer in what is read from and written to disk (safetensors and JSON, never pickle) and in
where the training batches come from; the loops of training and evaluation are RecBole's.
"""

import shutil
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from recbole.trainer import Trainer
from recbole.utils import ModelType, get_local_time, get_trainer
from torch import Tensor

from recbole_llm import checkpoint
from recbole_llm.artifacts import DamagedArtifact
from recbole_llm.causality import fault_of_loss, forward_arguments, is_causal, states
from recbole_llm.checkpoint import config_from_settings, read_checkpoint, write_checkpoint
from recbole_llm.config import shared
from recbole_llm.evaluation import (
    CollectsHits,
    KeepsRanks,
    TopLists,
    refuse_unmaskable,
    scored_by_length,
    seen_items_of,
)
from recbole_llm.hooks import replaced
from recbole_llm.identity import log_digest
from recbole_llm.layers import fast_layers, fuse_optimizer
from recbole_llm.losses import CatalogueLoss
from recbole_llm.sequences import Fields, Log, WindowLoader, Windows, fitting, row_positions, windows

__all__ = ["SequenceTrainer", "config_from_settings", "read_checkpoint", "write_checkpoint"]


def trainer_class(config) -> type[Trainer]:
    """The trainer of a Config's model: its own, else SequenceTrainer where RecBole would take its basic one."""
    own = get_trainer(config["MODEL_TYPE"], config["model"])
    return SequenceTrainer if own is Trainer and config["MODEL_TYPE"] == ModelType.SEQUENTIAL else own


class SequenceTrainer(Trainer):
    """Trains any RecBole sequential model, on windows of the log if it is causal, else on RecBole's rows.

    Under `positions: all` a model reads a stretch of a user's sequence once and every position predicts the next item;
    under `last` it gets RecBole's rows and its own loss, number for number as under RecBole's Trainer; `auto` takes
    `all` where a check shows that both would train the same loss.

    Relations:
        Like RecBole's Trainer, but saves `<model>-<dataset>-<time>.safetensors` and `.json`, and `resume_checkpoint`
        continues exactly where the last evaluated epoch ended.

    Args:
        config: RecBole Config; reads `positions`, `window_overlap`, `loss_*`, `seen_items`, `threads`, `train_batch_size` (targets),
            `seed`, `MAX_ITEM_LIST_LENGTH`, and what RecBole's Trainer reads.
        model: The model, on its device.
    """

    wants_row_list = False
    """Whether batches of RecBole's rows need a column `row_list [B]`, the flat position of each row's target."""

    def __init__(self, config, model):
        super().__init__(config, model)
        self.saved_model_file = checkpoint.free_name(
            Path(self.checkpoint_dir), f"{config['model']}-{config['dataset']}-{get_local_time()}"
        )
        self.all_positions = False
        self.seen_items = shared(config, "seen_items")
        self.item_loss = CatalogueLoss(
            over=shared(config, "loss_over"),
            count=shared(config, "loss_negatives"),
            sampling=shared(config, "loss_sampling"),
            t=shared(config, "loss_gbce_t"),
            memory=shared(config, "loss_memory"),
            generator=torch.Generator().manual_seed(config["seed"] or 0),
        )
        self.loader = None
        self.dataset = None
        self._rows_loader = None
        self._writes_every_epoch = False
        self._resumed: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self.eval_collector, self.evaluator = CollectsHits(config), KeepsRanks(config)
        if config["threads"]:
            torch.set_num_threads(config["threads"])
        self.evaluated_rows: list[int] | None = None
        self._rank_last = None
        self.top_lists: TopLists | None = None
        self.state_folder: Path | None = None
        self._seconds_before, self._began = 0.0, perf_counter()

    @property
    def seconds(self) -> float:
        """How long this training has taken, in all processes that were at it."""
        return self._seconds_before + perf_counter() - self._began

    @contextmanager
    def keeping_lists(self, k: int) -> Iterator[TopLists]:
        """While this lasts, an evaluation's best `k` items of every row are kept."""
        with replaced(self, "top_lists", TopLists(k)):
            yield self.top_lists

    @property
    def ranks(self) -> list[int]:
        """Rank of the target in every row of the last evaluation, from 0; -1 beyond the largest cut-off."""
        return self.evaluator.ranks

    def keep_in(self, folder: str | Path, resume: bool = True, stages: Path | None = None) -> None:
        """Keep checkpoint and training state in a folder, and go on with the training whose state is there.

        Args:
            folder: Where `model.safetensors` and what belongs to it are kept.
            resume: Whether to go on; otherwise a state that is there is removed.
            stages: Where stages of a training have their own; within `folder` if it is not said.
        """
        folder = Path(folder)
        self.saved_model_file = str(folder / f"model{checkpoint.SUFFIX}")
        self.state_folder = stages or folder / "state"
        state = checkpoint.resume_file(self.saved_model_file)
        if not resume:
            state.unlink(missing_ok=True)
            shutil.rmtree(self.state_folder, ignore_errors=True)
        elif state.exists():
            try:
                self.resume_checkpoint(self.saved_model_file)
            except DamagedArtifact as error:
                self.logger.warning(f"The state of the training cannot be read, so it begins anew: {error}")

    @property
    def network(self):
        """The model whose forward makes the states, and whose `item_embedding` scores them."""
        return self.model

    def batch_loss(self, batch) -> Tensor | tuple[Tensor, ...]:
        """Loss of a batch, or several that RecBole adds up and logs one by one.

        Under `positions: all` the mean over the targets with loss; under `last` the model's own loss, unless `loss_over` asks for
        another one.
        """
        if not self.all_positions and self.item_loss.over == "all":
            return self.model.calculate_loss(batch)
        hidden, target, _ = self.targets_of(batch)
        return self.item_loss(hidden, self.network.item_embedding.weight, target)

    def targets_of(self, batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """States [T, d] and items [T] of the targets with loss, and their flat rows [T] where the batch has them."""
        network = self.network
        if self.all_positions:
            targets = batch["target_list"]
            counts = targets > 0
            return states(network, batch)[counts], targets[counts], batch["row_list"][counts]
        hidden = network(**forward_arguments(network, batch))
        return hidden, batch[network.POS_ITEM_ID], batch["row_list"] if self.wants_row_list else None

    def fault_of_all(self) -> str | None:
        """Why, apart from causality, `batch_loss` at all positions would not be the model's own loss; None if it is."""
        if self.config["loss_type"] != "CE":
            return f"loss_type={self.config['loss_type']} is no cross entropy over all items"
        if self.config["train_neg_sample_args"]["distribution"] != "none":
            return "train_neg_sample_args asks for sampled negatives"
        return fault_of_loss(self.model, self.network)

    def model_state(self) -> dict[str, Tensor]:
        """The state that a checkpoint holds."""
        return self.model.state_dict()

    def extra_meta(self) -> dict[str, Any]:
        """What a checkpoint's JSON shall hold besides (such as `titles` by internal item id)."""
        return {}

    def generator_states(self) -> dict[str, torch.Generator]:
        """Generators that an exact resume has to bring back, besides the global ones and the loader's."""
        return {"negatives": self.item_loss.generator}

    def refuse_early(self, eval_data) -> None:
        """Refuse an evaluation that would fail after an epoch's work. Args: a loader, or None. Raises: ValueError."""
        if eval_data and self.seen_items == "mask":
            refuse_unmaskable(eval_data)

    def _prepare(self, train_data) -> None:
        """Choose between windows and RecBole's rows, say so, and make the loader."""
        asked = shared(self.config, "positions")
        self.dataset, self._rows_loader = train_data._dataset, train_data
        items = self.dataset.inter_feat[self.dataset.iid_field]
        self.item_loss.prepare(torch.bincount(items, minlength=self.dataset.item_num))
        self.__dict__.pop("_catalogue", None)  # a checkpoint written before `fit` knew no items
        log, why = (None, "positions=last was asked for") if asked == "last" else self._log_or_fault()
        if asked == "all" and log is None:
            raise ValueError(
                f"positions=all: {why}; there is positions=last, on one row per target. "
                "Set positions to auto or last in a config file or on the command line."
            )
        self.all_positions = log is not None
        if log is None and self.item_loss.over != "all" and (fault := self.fault_of_all()):
            raise ValueError(
                f"loss_over={self.item_loss.over}: {fault}; there is loss_over=all, the model's own loss. "
                "Set loss_over in a config file or on the command line."
            )
        if log is None:
            self.loader = train_data
            if self.wants_row_list:
                self.dataset.inter_feat["row_list"] = row_positions(self.dataset)
            how = f"last position of {len(self.dataset)} rows"
        else:
            length, overlap = self._window_size()
            cut = self.windows_of(log, length, overlap)
            self.loader = WindowLoader(
                log,
                cut,
                Fields.of(self.network),
                self.config["train_batch_size"],
                self.config["seed"] or 0,
                self.config["shuffle"] is not False,
                self.dataset,
            )
            size = f"{len(cut.start)} windows of up to {length} items (overlap {overlap}), {int(cut.targets().sum())} targets"
            how = f"all positions of {size}"
            fuse_optimizer(self.optimizer)
        self.logger.info(f"Training on the {how}: {why}. CPU threads: {torch.get_num_threads()}.")

    def windows_of(self, log: Log, length: int, overlap: int) -> Windows:
        """The windows that are trained on; see `sequences.windows`."""
        return windows(log, length, overlap)

    def _log_or_fault(self) -> tuple[Log | None, str]:
        """The log to cut windows from, or None; and why."""
        if not self.config["single_spec"]:
            return None, "several processes share the training"
        if self.config["transform"]:
            return None, f"transform={self.config['transform']} changes RecBole's rows"
        causal, why = is_causal(self.network)
        fault = self.fault_of_all() if causal else why
        if fault:
            return None, fault
        try:
            return Log.from_dataset(self.dataset), why
        except ValueError as error:
            return None, str(error)

    def _window_size(self) -> tuple[int, int]:
        """Items of a window, and how many of them are context only; `windows` refuses what was set and does not fit."""
        length, overlap = self.config["MAX_ITEM_LIST_LENGTH"], shared(self.config, "window_overlap")
        return length, overlap if "window_overlap" in self.config.external_config_dict else fitting(overlap, length)

    def fit(self, train_data, valid_data=None, verbose=True, saved=True, show_progress=False, callback_fn=None):
        """Train as RecBole does, from where `resume_checkpoint` says if that was called.

        Args:
            train_data: RecBole's training loader.
            valid_data: RecBole's validation loader; without it there is no early stopping.
            verbose: Whether epochs are logged.
            saved: Whether checkpoint and resume state are written.
            show_progress: Whether there are progress bars.
            callback_fn: Called with (epoch, validation score) after each evaluation, when the resume state is on disk.

        Returns:
            Best validation score and result.

        Raises:
            ValueError: `positions: all` for a model that cannot; the message says why.
        """
        self.refuse_early(valid_data)
        self._prepare(train_data)
        done = self._resumed is not None and self._continue_exactly(bool(valid_data))
        self._writes_every_epoch = saved and (not valid_data or self.eval_step <= 0)

        def after_evaluation(epoch, score):
            if saved:
                self._write_resume(epoch)
            if callback_fn:
                callback_fn(epoch, score)

        # RecBole would begin by overwriting the best checkpoint of a training that has ended
        return super().fit(train_data, valid_data, verbose, saved and not done, show_progress, after_evaluation)

    def _train_epoch(self, train_data, epoch_idx, loss_func=None, show_progress=False):
        loader = train_data if self.loader is None else self.loader
        # recbole/model/sequential_recommender/sine.py switches anomaly detection on for every model, and it doubles the
        # time of a small step; a loss that is not a number is found by RecBole's loop itself
        faster = fast_layers(self.model) if self.all_positions else nullcontext()
        with torch.autograd.set_detect_anomaly(False), faster:
            return super()._train_epoch(loader, epoch_idx, loss_func or self.batch_loss, show_progress)

    @torch.no_grad()
    def evaluate(self, eval_data, load_best_model=True, model_file=None, show_progress=False):
        """Evaluate as RecBole does; `model_file` may be a checkpoint of ours or of RecBole.

        Raises:
            ValueError: `seen_items: mask` for data or a ranking that has no whole histories to mask.
        """
        file = model_file or self.saved_model_file
        if eval_data and load_best_model and checkpoint.is_ours(file):
            state, meta = checkpoint.read_weights(file, self.device)
            state, other = checkpoint.split_other_parameter(state, meta)
            self.model.load_state_dict(state)
            self.model.load_other_parameter(other)
            self.logger.info(f"Loading model structure and parameters from {file}")
            load_best_model = False
        if not eval_data or self.seen_items == "keep":
            return super().evaluate(eval_data, load_best_model, model_file, show_progress)
        with seen_items_of(eval_data) as rank_last, replaced(self, "_rank_last", rank_last):
            return super().evaluate(eval_data, load_best_model, model_file, show_progress)

    def _full_sort_batch_eval(self, batched_data):
        """Like RecBole's, but histories of like length are read together, and seen items are not ranked if that was asked for."""
        rank = super()._full_sort_batch_eval
        batch, history, users, positives = batched_data
        if self.all_positions:  # only then is it proved that padding means nothing to the model
            columns = self.model.ITEM_SEQ, self.model.ITEM_SEQ_LEN
            with fast_layers(self.model):
                scores = scored_by_length(batch, *columns, lambda piece: rank((piece, history, users, positives))[1])
        else:
            batch, scores, users, positives = rank(batched_data)
        if self._rank_last:
            positives = self._rank_last(batch, scores, positives)
        if self.top_lists is not None:
            self.top_lists.add(scores)
        return batch, scores, users, positives

    def _save_checkpoint(self, epoch, verbose=True, **kwargs):
        file = kwargs.get("saved_model_file", self.saved_model_file)
        if not checkpoint.is_ours(file):
            return super()._save_checkpoint(epoch, verbose=verbose, **kwargs)
        if not self.config["single_spec"] and self.config["local_rank"] != 0:
            return None
        tensors, values = checkpoint.other_parameter(self.model)
        meta = {
            "format": "recbole_llm checkpoint 1",
            "model": self.config["model"],
            "dataset": self.config["dataset"],
            "epoch": epoch,
            "cur_step": self.cur_step,
            "best_valid_score": self.best_valid_score,
            "settings": checkpoint.settings_of(self.config),
            "external": self.config.external_config_dict,
            "other_parameter": values,
            **self._catalogue,
        }
        write_checkpoint(file, self.model_state() | tensors, meta | self.extra_meta())
        if self._writes_every_epoch:
            self._write_resume(epoch)
        if verbose:
            self.logger.info(f"Saving current: {file}")
        return None

    @cached_property
    def _catalogue(self) -> dict[str, Any]:
        """What a checkpoint says of the items and of the rows it was trained on; nothing where no data have been seen."""
        if self.dataset is None:
            return {"items": []}
        try:
            log = Log.from_dataset(self.dataset)
            trained_on = {"rows": len(log.rows()), "log": log_digest(log, self.dataset)}
        except ValueError:  # rows that are no prefixes of a log
            trained_on = None
        return checkpoint.catalogue(self.dataset) | {"trained_on": trained_on}

    def resume_checkpoint(self, resume_file):
        """Let the next `fit` go on where the training that wrote this checkpoint was after its last evaluated epoch.

        The weights, optimizer and random numbers are brought back by `fit`, once the model has its final shape; a
        training that had ended stays as it is, and its best checkpoint too. A checkpoint of RecBole (`.pth`) is resumed
        as RecBole does.

        Raises:
            FileNotFoundError: There is no state of a training beside the checkpoint.
        """
        if not checkpoint.is_ours(resume_file):
            own_file = self.saved_model_file
            super().resume_checkpoint(resume_file)
            self.saved_model_file = own_file
            self._save_checkpoint(self.start_epoch - 1, verbose=False)
            return
        self._resumed = tensors, values = checkpoint.read_resume(resume_file)
        self.saved_model_file = str(resume_file)
        self.start_epoch = values["epoch"] + 1
        self.cur_step = values["cur_step"]
        self.best_valid_score = values["best_valid_score"]
        best = values["best_valid_result"]
        self.best_valid_result = None if best is None else OrderedDict(best)
        self.train_loss_dict = {int(epoch): loss for epoch, loss in values["train_loss"].items()}
        self._seconds_before = values.get("seconds", 0.0)
        self.logger.info(f"Resuming {resume_file} from epoch {self.start_epoch}")

    def resume_values(self) -> dict[str, Any]:
        """What an exact resume has to know besides."""
        return {}

    def _write_resume(self, epoch: int) -> None:
        """Write all that the next epoch depends on."""
        if not checkpoint.is_ours(self.saved_model_file):
            return
        optimizer, optimizer_values = checkpoint.pack_optimizer(self.optimizer)
        random, random_values = checkpoint.random_state()
        tensors = checkpoint.under("model", self.model.state_dict()) | checkpoint.under("optimizer", optimizer)
        tensors |= checkpoint.under("random", random)
        tensors |= {f"generator.{name}": generator.get_state() for name, generator in self._generators().items()}
        values = {
            "epoch": epoch,
            "cur_step": self.cur_step,
            "best_valid_score": self.best_valid_score,
            "best_valid_result": self.best_valid_result and dict(self.best_valid_result),
            "train_loss": self.train_loss_dict,
            "seconds": self.seconds,
            "optimizer": optimizer_values,
            "random": random_values,
            "all_positions": self.all_positions,
            "loader": self.loader.state() if isinstance(self.loader, WindowLoader) else None,
        }
        checkpoint.write_resume(self.saved_model_file, tensors, values | self.resume_values())

    def _continue_exactly(self, validates: bool) -> bool:
        """Bring back what `_write_resume` wrote; whether the training had ended already."""
        tensors, values = self._resumed
        self._resumed = None
        if values["all_positions"] != self.all_positions:
            was, now = ("all", "last") if values["all_positions"] else ("last", "all")
            raise ValueError(
                f"positions={now}: the training to be resumed, {self.saved_model_file}, was on positions={was}. Set "
                f"positions={was}, or train anew."
            )
        self.model.load_state_dict(checkpoint.within("model", tensors))
        checkpoint.unpack_optimizer(self.optimizer, checkpoint.within("optimizer", tensors), values["optimizer"])
        for name, generator in self._generators().items():
            if (state := tensors.get(f"generator.{name}")) is not None:  # older states know fewer generators
                generator.set_state(state)
        if isinstance(self.loader, WindowLoader):
            self.loader.set_state(values["loader"])
        checkpoint.set_random_state(checkpoint.within("random", tensors), values["random"])
        if validates and self.cur_step > self.stopping_step:
            self.start_epoch = self.epochs
        if self.start_epoch >= self.epochs:
            self.logger.info(f"{self.saved_model_file}: this training had ended; its best checkpoint stays as it is.")
        return self.start_epoch >= self.epochs

    def _generators(self) -> dict[str, torch.Generator]:
        """Every generator that the next epoch draws from, besides the global ones."""
        rows = getattr(self._rows_loader, "generator", None)
        return ({} if rows is None else {"rows": rows}) | self.generator_states()
