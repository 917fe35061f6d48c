"""The cloud: a recommender that was trained on historical rows only, and the candidate lists it gives, kept as a Knowledge.

A list belongs to a position of the log: it is what the cloud says of the history before that position. A stale view of a user and a
fresh one are two positions, so lists are made once, whatever asks for them.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.utils import get_model
from torch import Tensor

from recbole_llm.artifacts import DamagedArtifact, digest, file_digest, read_json, tensors_digest, write_json
from recbole_llm.attached import attach
from recbole_llm.checkpoint import read_checkpoint, read_weights
from recbole_llm.config import check_topk, shared
from recbole_llm.identity import data_digest, log_digest
from recbole_llm.knowledge import FORMAT, Knowledge
from recbole_llm.sequences import Log, latest
from recbole_llm.teacher import folder_of, identity, rank, ready
from recbole_llm.timeline import Timeline

HISTORY = 10
"""Last items that belong to the identity of a list."""
SHARD_ROWS, SHARD_ROWS_OF_A_PROMPTED_LLM = 2048, 64


@dataclass(frozen=True)
class Lists:
    """Candidates at positions of a log.

    Args:
        items: By internal id, best first, 0 for none [M, K].
        score: Higher = surer [M, K].
        index: Flat position of the log -> row of the lists, -1 for none [N].
    """

    items: Tensor
    score: Tensor
    index: Tensor

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates and their scores, each [R, K]; no candidates where there is no list. Args: positions [R]."""
        row = self.index[positions]
        there = (row >= 0).unsqueeze(1)
        return self.items[row.clamp_min(0)] * there, self.score[row.clamp_min(0)] * there


class Cloud:
    """A recommender on historical rows; it is loaded or trained at the first list that is not on disk yet.

    Args:
        config: Its own Config.
        timeline: Whose historical rows it is trained on.
        valid_data: Any evaluation loader of RecBole's.
        checkpoint: File of a cloud that was trained elsewhere.
        folder: Where lists are kept.

    Raises:
        ValueError: `checkpoint` was trained on other rows than the historical ones, or does not say on which.
    """

    def __init__(self, config: Any, timeline: Timeline, valid_data: Any, checkpoint: str | None, folder: str | Path):
        self.config, self.timeline, self.valid_data = config, timeline, valid_data
        self.checkpoint, self.folder = checkpoint, Path(folder)
        check_topk(config, timeline.log.n_items)
        self.history = timeline.split(timeline.train)
        if checkpoint:
            refuse_foreign(checkpoint, self.history)

    @property
    def file(self) -> Path:
        """Its checkpoint."""
        return Path(self.checkpoint or folder_of(self.config, self.history) / "model.safetensors")

    @cached_property
    def model(self) -> Any:
        """The trained model."""
        timeline = self.timeline
        # without historical validation targets, as where every user has a single historical one, nothing stops it early
        own = timeline.history_valid
        valid = timeline.loader(self.config, own, self.valid_data) if len(own) and self.valid_data else None
        return ready(self.config, self.history, valid, self.checkpoint, key="cloud_checkpoint")

    def lists(self, positions: Tensor, k: int, whole_histories: bool, what: str) -> Lists:
        """Its candidates at some positions, from disk or made now; a run that was killed goes on at its next shard.

        Args:
            positions: Flat positions of the timeline's log, none a user's first item [M].
            k: Candidates; fewer if the catalogue is smaller.
            whole_histories: Whether each position's history is read on its own, as long as the cloud reads; otherwise a causal cloud
                reads each user once, and the lists after its first window rest on shorter histories.
            what: What they are for, in the log.
        """
        log, config = self.timeline.log, self.config
        rows = torch.searchsorted(log.rows(), positions.unique())
        keys = {
            "cloud": identity(config, labelling=True),
            "trained on": data_digest(Log.from_dataset(self.history), self.history, config),
            "log": log_digest(log, self.timeline.dataset),
            "checkpoint": file_digest(self.checkpoint) if self.checkpoint else None,
            "rows": tensors_digest({"rows": rows}),
            "k": k,
            "whole": whole_histories,
            "format": FORMAT,
        }
        folder = self.folder / f"{config['model']}-{config['dataset']}-lists-{digest(keys)}"
        known = self._found(folder)
        if known is None:
            logging.getLogger().info(f"The cloud ({config['model']}) gives {len(rows)} lists: {what}.")
            prompted = bool(config["prompt_lead"])
            options = {
                "history": HISTORY,
                "shard_rows": SHARD_ROWS_OF_A_PROMPTED_LLM if prompted else SHARD_ROWS,
                "overlap": None if whole_histories else shared(config, "window_overlap"),
                "progress": config["show_progress"],
                "provenance": {"cloud": config["model"], "checkpoint": str(self.file), "settings": keys["cloud"]},
            }
            known = Knowledge.build(self.model, self.timeline.dataset, rows, k, folder, options)
        found = attach(known, self.timeline.dataset, k, HISTORY)
        return Lists(found.items, found.score, found.index)

    def _found(self, folder: Path) -> Knowledge | None:
        try:
            known = Knowledge.load(folder)
        except FileNotFoundError:
            return None
        except DamagedArtifact as error:
            logging.getLogger().warning(f"The lists in {folder} are damaged and are made again: {error}")
            (folder / "manifest.json").unlink(missing_ok=True)
            return None
        logging.getLogger().info(f"The cloud's lists are taken from {folder}.")
        return known

    def latency_ms(self, position: Tensor, k: int) -> float:
        """Median time of one list for one user, in milliseconds, measured once and kept beside the checkpoint. Args: position [1]."""
        file = self.file.with_name(f"{self.file.stem}-list-of-{k}.json")
        threads = torch.get_num_threads()
        try:
            known = read_json(file)
            if known["threads"] == threads and known["checkpoint"] == file_digest(self.file):
                return known["ms"]
        except (FileNotFoundError, DamagedArtifact, KeyError):
            pass
        items, length = self.timeline.log.history(position, self.config["MAX_ITEM_LIST_LENGTH"])
        spent = []
        for _ in range(5):
            began = perf_counter()
            proposed(self.model, items, length, k)
            spent.append(perf_counter() - began)
        write_json(file, {"ms": 1e3 * median(spent), "threads": threads, "checkpoint": file_digest(self.file)})
        return 1e3 * median(spent)


@torch.no_grad()
def proposed(model: Any, items: Tensor, length: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What a cloud says of some histories right now.

    Args:
        model: The cloud's model, in evaluation mode.
        items: Histories, padded on the right with 0 [B, L]; the last ones are read, as many as the model can.
        length: How many items are real [B]; at least 1.
        k: Candidates.

    Returns:
        Candidates by internal id, best first, 0 for none [B, K], and their scores [B, K].
    """
    kept = most_recent(items, length, model.max_seq_length)
    columns = {
        model.ITEM_SEQ: kept,
        model.ITEM_SEQ_LEN: length.clamp(max=model.max_seq_length),
        model.USER_ID: torch.zeros_like(length),
        model.ITEM_ID: torch.ones_like(length),  # a target that `rank` wants to score besides; nobody reads it
    }
    found, score, _ = rank(model, Interaction(columns).to(model.device), min(k, model.n_items - 1))
    return found.cpu(), score.float().cpu()


def most_recent(items: Tensor, length: Tensor, most: int) -> Tensor:
    """The last items of histories that are padded on the right, as long as `most` [B, most]. Args: items [B, L]; length [B]."""
    there = torch.arange(items.shape[1], device=items.device) < length.unsqueeze(1)
    kept, _ = latest(items.where(there, 0), most)
    return torch.nn.functional.pad(kept, (0, most - kept.shape[1]))


def refuse_foreign(checkpoint: str, history: Any) -> None:
    """Refuse a cloud that knows more, or other things, than the historical rows.

    Args:
        checkpoint: Its file.
        history: The split of the historical rows.

    Raises:
        ValueError: There is no such file, it does not say what it was trained on, or that is not the historical rows.
    """
    if not Path(checkpoint).is_file() or not checkpoint.endswith(".safetensors"):
        raise ValueError(
            f"cloud_checkpoint={checkpoint}: no such file of ours. Set cloud_checkpoint to a .safetensors file."
        )
    log = Log.from_dataset(history)
    _, meta = read_weights(checkpoint)
    known = meta.get("trained_on")
    if not known:
        raise ValueError(
            f"cloud_checkpoint={checkpoint}: does not say which rows it was trained on, so it may know what happened later. Leave "
            "cloud_checkpoint empty to have the cloud trained on the historical rows, or train it with this version."
        )
    if known["log"] != log_digest(log, history):
        raise ValueError(
            f"cloud_checkpoint={checkpoint}: it was trained on {known['rows']} rows that are not the {len(log.rows())} historical ones of "
            "this run (lsc_evaluation and lsc_steps say where history ends). Leave cloud_checkpoint empty to have the cloud trained "
            "on those."
        )


class Elsewhere:
    """What a model refers to and does not contain: its data set and its cloud. A copy of the model refers to the same."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.scorer: Any = None
        self._cloud: tuple[str, Any] | None = None

    def __deepcopy__(self, memo: dict) -> "Elsewhere":
        return Elsewhere(self.dataset)

    def cloud(self, file: str) -> Any:
        """The cloud whose checkpoint is a file, loaded at its first list.

        Raises:
            FileNotFoundError: It is not there.
        """
        if self._cloud is None or self._cloud[0] != file:
            if not Path(file).is_file():
                raise FileNotFoundError(
                    f"cloud_file={file}: the cloud that this model asks is not there. Set the model's cloud_file to where it is now, or "
                    "put it back; until then its device_model ranks alone."
                )
            saved = read_checkpoint(file)
            config = saved["config"]
            model = get_model(config["model"])(config, self.dataset).to(config["device"])
            model.load_state_dict(saved["state_dict"])
            model.load_other_parameter(saved["other_parameter"])
            self._cloud = file, model.eval()
        return self._cloud[1]
