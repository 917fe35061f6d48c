"""Two finished models whose scores are added up: the control beside a student that learnt from a teacher.

A student that is better than both of them together has learnt more than to repeat its teacher; one that is not could have been had
without distillation, at the price of asking the teacher at every request. Weight and norm are chosen on validation rows. A split is
passed over once, batch by batch: each model scores a row once, whatever the number of weights that are tried.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.evaluator import Collector
from recbole.utils import get_model
from torch import Tensor

from recbole_llm.artifacts import DamagedArtifact, digest, file_digest, tensors_digest
from recbole_llm.checkpoint import read_checkpoint
from recbole_llm.config import shared
from recbole_llm.evaluation import KeepsRanks, seen_items_of
from recbole_llm.identity import log_digest
from recbole_llm.knowledge import Request
from recbole_llm.loaders import eval_loader
from recbole_llm.quick_start import Data, finished, label
from recbole_llm.report import Line
from recbole_llm.rows import chosen_rows
from recbole_llm.sequences import Log
from recbole_llm.teacher import Teacher, is_ready, log_probability
from recbole_llm.trainer import trainer_class

WEIGHTS = tuple(step / 10 for step in range(11))
"""Weights of the second model that are tried."""
ROWS_AT_ONCE, SCORES_AT_ONCE = 256, 2**22
"""Most rows of a batch, and most scores [rows, n_items] of one model that exist at a time."""
PROTOCOL = ("topk", "metrics", "valid_metric", "metric_decimal_place", "eval_args", "seen_items")
"""Settings of a run that shape its line."""

Choice = tuple[str, float]
"""A norm and a weight."""


def standard(scores: Tensor) -> Tensor:
    """Scores in standard deviations from their row's mean over all real items; -inf for the padding item.

    An item to which a model gives no finite score stands one below all to which it does.

    Args:
        scores: Of one model, column 0 is the padding item's [B, n_items].
    """
    real = scores[:, 1:].float()
    known = torch.isfinite(real)
    below = real.masked_fill(~known, torch.inf).amin(dim=1, keepdim=True) - 1
    real = torch.where(known, real, below)
    spread = real.std(dim=1, correction=0, keepdim=True).clamp_min(1e-12)
    real = (real - real.mean(dim=1, keepdim=True)) / spread
    return torch.cat([torch.full_like(real[:, :1], -torch.inf), real], dim=1)


NORMS = {"log-probability": log_probability, "standard": standard}
"""How the scores of two models are made comparable."""


def mixture(a: Tensor, b: Tensor, weight: float, norm: str) -> Tensor:
    """(1 - weight) * z(a) + weight * z(b); at weight 0 and 1 the one model's scores as they are, with their order and their ties.

    Args:
        a: Scores of the first model, column 0 is the padding item's [B, n_items].
        b: Scores of the second one [B, n_items].
        weight: From 0 (the first model alone) to 1 (the second one alone).
        norm: z, one of `NORMS`.

    Returns:
        A new tensor [B, n_items].
    """
    if weight in (0, 1):
        return (b if weight else a).clone()
    # RecBole puts the padding item at -inf, by which probabilities would not be told from other scores
    padding = torch.zeros(1, dtype=torch.long, device=a.device)
    za, zb = (NORMS[norm](scores.index_fill(1, padding, 0.0)) for scores in (a, b.to(a.device)))
    return (1 - weight) * za + weight * zb


def best(found: Mapping[Choice, float], bigger: bool) -> Choice:
    """The choice with the best value, the first among equals. Args: choice -> value; whether a larger value is better."""
    return max(found, key=lambda choice: found[choice] if bigger else -found[choice])


def batches(rows: Tensor, n_items: int) -> Iterator[Tensor]:
    """Row numbers [R] in pieces whose scores fit into `SCORES_AT_ONCE`. Args: row numbers; items, padding included."""
    yield from rows.split(max(1, min(ROWS_AT_ONCE, SCORES_AT_ONCE // n_items)))


@dataclass(frozen=True)
class Part:
    """A finished model.

    Args:
        name: What tables call it.
        config: Its own Config.
        file: Its checkpoint.
    """

    name: str
    config: Any
    file: Path


def part_of_run(folder: str | Path) -> Part:
    """The model of a finished run, under the name of its line.

    Args:
        folder: A run's folder in `saved/runs`.

    Raises:
        ValueError: No finished run is there, or it is one of LSC4Rec, which asks a cloud and has no scores of its own.
    """
    folder = Path(folder)
    file = folder / "model.safetensors"
    try:
        line, saved = Line.load(folder), read_checkpoint(file)
    except (FileNotFoundError, DamagedArtifact) as error:
        raise ValueError(
            f"folder={folder}: no finished run there ({error}); there is one when the command that makes it has ended. Name a folder in "
            "saved/runs."
        ) from error
    if saved["config"]["cloud"]:
        raise ValueError(
            f"folder={folder}: holds a run of LSC4Rec, whose device asks its cloud; there are runs of one model each. Name such a folder."
        )
    return Part(line.name, saved["config"], file)


def part_of_teacher(config: Any, data: Data) -> Part:
    """The teacher that the settings of a distilling model ask for.

    Args:
        config: Of the distilling model.
        data: RecBole's loaders under it.

    Raises:
        ValueError: It has not been trained to its end yet.
    """
    request = Request.of(config, data.train._dataset)
    file = Path(request.checkpoint or request.teacher_folder / "model.safetensors")
    if not (file.is_file() if request.checkpoint else is_ready(request.teacher_folder)):
        raise ValueError(
            f"teacher={config['teacher']}: no finished teacher of these settings in {file.parent}; there is one after a run that distils "
            "it. Run that first, or set teacher_checkpoint to its .safetensors file."
        )
    return Part(f"{label(config['teacher'])} (teacher)", request.config, file)


class Ranker:
    """A part at work: its model, and the rows of a run as its own Config wants them.

    Args:
        part: The finished model.
        data: RecBole's loaders of the run.

    Raises:
        ValueError: The checkpoint holds another model, or one of other items, other training rows or other texts.
    """

    def __init__(self, part: Part, data: Data):
        config, dataset = part.config, data.train._dataset
        # before the model, to which RecBole's loaders tell names of columns by way of the Config (BERT4Rec's mask)
        self.loaders = {"valid": eval_loader(config, data.valid), "test": eval_loader(config, data.test)}
        self.part = part
        model = get_model(config["model"])(config, dataset).to(config["device"])
        saved = read_checkpoint(part.file, model.device)
        refuse_foreign(part, saved, model, dataset)
        model.load_state_dict(saved["state_dict"])
        model.load_other_parameter(saved["other_parameter"])
        model.eval()
        self.trainer = trainer_class(config)(config, model)
        self.trainer.tot_item_num = dataset.item_num
        self.trainer.item_tensor = dataset.get_item_feature().to(model.device)

    def rows(self, split: str) -> Tensor:
        """Which rows of a split this model is evaluated on, ascending; a teacher that writes may have a sample only [R]."""
        dataset, config = self.loaders[split]._dataset, self.part.config
        count = config["teacher_eval_rows"] if isinstance(self.trainer.model, Teacher) else 0
        return chosen_rows(dataset, count or 0, config["teacher_seed"] or 0)

    def scored(self, split: str, rows: Tensor) -> tuple[Any, Tensor, Tensor, Tensor]:
        """Rows of a split as its trainer ranks them: the batch, scores [B, n_items], and the places and items of the targets [B]."""
        return self.trainer._full_sort_batch_eval(self.loaders[split].collate_fn(rows))


def refuse_foreign(part: Part, saved: Mapping[str, Any], model: Any, dataset: Any) -> None:
    """Refuse a checkpoint that does not fit its Config or the data.

    Args:
        part: Whose checkpoint it is.
        saved: From `read_checkpoint`.
        model: Of the part's Config.
        dataset: The training split of the run.

    Raises:
        ValueError: What does not fit.
    """
    meta = saved["meta"]
    fault = None
    if saved["config"]["model"] != type(model).__name__:
        fault = f"holds a {saved['config']['model']}, not a {type(model).__name__}"
    elif meta.get("items") and meta["items"] != [str(token) for token in dataset.field2id_token[dataset.iid_field]]:
        fault = "its items are not those of these data, or stand in another order"
    elif (known := meta.get("trained_on")) and known["log"] != log_digest(Log.from_dataset(dataset), dataset):
        fault = f"it was trained on {known['rows']} rows that are not this run's, and may know what is tested"
    elif isinstance(model, Teacher) and part.config["shuffle_text"] != dataset.config["shuffle_text"]:
        fault = f"it reads item texts under shuffle_text={part.config['shuffle_text']}, not {dataset.config['shuffle_text']}"
    if fault:
        raise ValueError(
            f"parts={part.name} ({part.file}): {fault}; there are models trained on the same files, filters and split. Name one of those."
        )


class Judge:
    """What RecBole says of rankings that come batch by batch: of each row it keeps which of the first places were hits.

    Args:
        config: The run's; its metrics, cut-offs and decimal places hold.
        train_data: RecBole's training loader.
    """

    def __init__(self, config: Any, train_data: Any):
        self.collector, self.evaluator = Collector(config), KeepsRanks(config)
        self.collector.data_collect(train_data)

    def add(self, scores: Tensor, batch: Any, places: Tensor, targets: Tensor) -> None:
        """Take rankings in. Args: scores [B, n_items]; the batch; the places and items of the targets [B]."""
        self.collector.eval_batch_collect(scores, batch, places, targets)

    def metrics(self) -> dict[str, float]:
        """Metrics over all that was added; then `ranks` are there, too."""
        return {key: float(value) for key, value in self.evaluator.evaluate(self.collector.get_data_struct()).items()}

    @property
    def ranks(self) -> list[int]:
        """Rank of each row's target from 0, -1 beyond the largest cut-off."""
        return self.evaluator.ranks


@torch.no_grad()
def judged(
    config: Any, data: Data, rankers: Sequence[Ranker], split: str, rows: Tensor, choices: Iterable[Choice]
) -> dict[Choice, Judge]:
    """Rank rows under several choices in one pass, in which each model scores each row once.

    Args:
        config: The run's.
        data: RecBole's loaders.
        rankers: Both models.
        split: valid | test.
        rows: Row numbers of that split [R].
        choices: Norms and weights.

    Raises:
        ValueError: `seen_items: mask` for data without whole histories.
    """
    judges = {choice: Judge(config, data.train) for choice in choices}
    masks = shared(config, "seen_items") == "mask"
    with seen_items_of(rankers[0].loaders[split]) if masks else nullcontext() as rank_last:
        for some in batches(rows, data.train._dataset.item_num):
            (batch, a, places, targets), (_, b, *_) = (ranker.scored(split, some) for ranker in rankers)
            for (norm, weight), judge in judges.items():
                scores = mixture(a, b, weight, norm)
                wanted = rank_last(batch, scores, targets) if masks else targets
                judge.add(scores, batch, places, wanted)
    return judges


def common_rows(rankers: Sequence[Ranker], split: str) -> Tensor:
    """The rows of a split on which all models are evaluated, ascending [R].

    Raises:
        ValueError: There is none.
    """
    sets = [set(ranker.rows(split).tolist()) for ranker in rankers]
    rows = sorted(set.intersection(*sets))
    if not rows:
        raise ValueError(
            f"parts={', '.join(ranker.part.name for ranker in rankers)}: their samples of {split} rows have no row in common; there is "
            "teacher_eval_rows=0, all rows. Set it for one of them."
        )
    return torch.tensor(rows)


def ensemble(config: Any, data: Data, parts: Sequence[Part], name: str, folder: Path) -> Line:
    """Two finished models as one, with weight and norm chosen on validation rows; from its folder if it is there.

    Args:
        config: The run's: protocol, metrics, `valid_metric`, `seen_items`, `resume`.
        data: RecBole's loaders under it, for full ranking.
        parts: Two models on the same data and split.
        name: What tables call both together.
        folder: Where the line is kept.

    Returns:
        Its line. `rows` are those of a part that is tested on a sample; `notes` has `weight` (of the second part), `norm`, `tried`
        (norm -> value of `valid_metric` on validation rows by weight) and `validation_rows`.

    Raises:
        ValueError: There are not two parts, they do not fit the data, or the rows are not ranked among all items.
    """
    refuse_setup(data, parts)
    folder, key = Path(folder), identity(config, data, parts)
    if config["resume"] and (line := finished(folder)) and line.notes.get("key") == key:
        return line
    began = perf_counter()
    rankers = [Ranker(part, data) for part in parts]
    rows = {split: common_rows(rankers, split) for split in ("valid", "test")}
    choices = [(norm, weight) for norm in NORMS for weight in WEIGHTS]
    found = {
        choice: judge.metrics()
        for choice, judge in judged(config, data, rankers, "valid", rows["valid"], choices).items()
    }
    values = {choice: metrics[config["valid_metric"].lower()] for choice, metrics in found.items()}
    norm, weight = chosen = best(values, config["valid_metric_bigger"])
    chose = perf_counter()
    judge = judged(config, data, rankers, "test", rows["test"], [chosen])[chosen]
    metrics = judge.metrics()
    sampled = len(rows["test"]) < len(data.test._dataset)
    line = Line(name, metrics, judge.ranks, rows["test"].tolist() if sampled else None, found[chosen])
    line.seconds |= {"choose": chose - began, "test": perf_counter() - chose}
    line.notes |= {
        "weight": weight,
        "norm": norm,
        "choices": {f"weight of {parts[1].name}": weight, "norm": norm},  # what tables say of a line
        "tried": {norm: [values[norm, weight] for weight in WEIGHTS] for norm in NORMS},
        "validation_rows": len(rows["valid"]),
        "parts": {part.name: str(part.file) for part in parts},
        "key": key,
    }
    line.save(folder)
    return line


def refuse_setup(data: Data, parts: Sequence[Part]) -> None:
    """Refuse what no ensemble can be made of. Raises: ValueError."""
    if len(parts) != 2:
        raise ValueError(
            f"parts={[part.name for part in parts]}: {len(parts)} models; there are ensembles of two. Name two."
        )
    if not all(isinstance(loader, FullSortEvalDataLoader) for loader in (data.valid, data.test)):
        raise ValueError(
            "eval_args: an ensemble is chosen on validation rows and ranks all items; there is mode full with a validation split. Set "
            "eval_args."
        )


def identity(config: Any, data: Data, parts: Sequence[Part]) -> str:
    """Hash of all that shapes an ensemble's line: the checkpoints, the protocol, the rows and what is tried."""
    targets = {
        f"{split}.{field}": loader._dataset.inter_feat[field]
        for split, loader in (("valid", data.valid), ("test", data.test))
        for field in (loader._dataset.uid_field, loader._dataset.iid_field)
    }
    keys = {
        "parts": [file_digest(part.file) for part in parts],
        "samples": [[part.config["teacher_eval_rows"], part.config["teacher_seed"]] for part in parts],
        "protocol": {key: config[key] for key in PROTOCOL},
        "targets": tensors_digest(targets),
        "tried": [list(NORMS), list(WEIGHTS)],
    }
    return digest(keys)
