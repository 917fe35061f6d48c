"""What a teacher is, and how one gets ready: taken from its checkpoint, or trained once and kept.

Any of RecBole's sequential models is a teacher, too: it ranks by `full_sort_predict`, and its item table are its vectors.
"""

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import get_model, init_seed
from recbole.utils.argument_list import training_arguments
from torch import Tensor

from recbole_llm.artifacts import DamagedArtifact, digest, file_digest, read_json, write_json
from recbole_llm.config import read_yaml, recbole_yaml
from recbole_llm.identity import data_digest, model_folders, order_digest
from recbole_llm.loaders import eval_loader, train_loader
from recbole_llm.model import PROPERTIES
from recbole_llm.prompts import PREAMBLE, Words, answer, prompt
from recbole_llm.sequences import Log
from recbole_llm.trainer import read_checkpoint, trainer_class

# Settings that change how much is looked at, but neither the trained teacher nor its labels.
NOT_IDENTITY = {
    "teacher_eval_rows", "eval_batch_size", "eval_step", "loss_decimal_place", "generate_tokens_per_batch",
}  # fmt: skip
# Settings of RecBole that choose which epoch of a training is kept.
OF_VALIDATION = {"valid_metric", "eval_args", "seen_items", "eval_step", "metric_decimal_place"}
# Settings of overall.yaml that shape a model trained on the log; an LLM's training reads none of them.
OF_THE_LOG = {
    "positions", "window_overlap", "loss_over", "loss_negatives", "loss_sampling", "loss_gbce_t",
}  # fmt: skip
LABELLING = ("generate_", "ground_")  # settings that change the labels, but not the training


class Teacher(SequentialRecommender):
    """A recommender that others learn from; ranks like any RecBole sequential model."""

    scores_are = "log-probability"
    """What its scores are: log-probability (over the catalogue) | distance (minus one)."""
    label: str | None = None
    """What tables call it; None is the name of its class."""
    learns_users: str | None = None
    """What it learns of each user by id, in words; None if it knows users by their histories alone."""
    knows_by_token: bool = False
    """Whether its state stands by tokens or texts, so that it means the same where the files' order gives other internal ids."""

    @property
    def history_length(self) -> int:
        """Most history items it looks at."""
        return self.max_seq_length

    def work(self, histories: Tensor) -> Tensor:
        """How much work each history is, so that labelling can put equals together; histories [B, L] -> [B]."""
        return (histories > 0).sum(dim=1)

    def trained_on(self, n_rows: int) -> Tensor:
        """Which of the training rows it was tuned on, so that their labels are memorised; bool [n_rows]."""
        return torch.ones(n_rows, dtype=torch.bool)

    def item_embeddings(self) -> Tensor:
        """One vector per item by internal id, row 0 padding [n_items, d]."""
        raise NotImplementedError

    def candidates(self, batch: Any, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """What `rank` gives of it. A teacher only some of whose items have a score of their own overrides this.

        A teacher that re-weights its ranking (`plain_scores`) is asked for the scores before that: they say how sure it is.

        Returns:
            items [B, k], best first, 0 where there is no further candidate; their score [B, k], finite, that of the last candidate
            where there is none; score of the target [B].
        """
        scores = self.full_sort_predict(batch).view(len(batch), -1).float()
        return best_of(scores, batch[self.ITEM_ID], k, getattr(self, "plain_scores", None))


def rank(model: SequentialRecommender, batch: Any, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A model's best items for every row of a batch.

    Args:
        model: Any sequential recommender with `full_sort_predict`.
        batch: Interaction of B rows that also names the target item.
        k: Items per row, at most the size of the catalogue.

    Returns:
        items [B, k], their score [B, k], score of the target [B]; only a Teacher may have fewer candidates, and then 0 among the items.
        What RecBole's own models say is known up to a number per row only, and becomes a log-probability; a few (RepeatNet) say
        probabilities already.
    """
    if isinstance(model, Teacher):
        return model.candidates(batch, k)
    scores = log_probability(model.full_sort_predict(batch).view(len(batch), -1))
    return best_of(scores, batch[model.ITEM_ID], k)


def best_of(scores: Tensor, target: Tensor, k: int, plain: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The k best real items by `scores` [B, n_items], their `plain` score (the same, if there is none) and that of the target [B]."""
    scores = scores.index_fill(1, torch.zeros(1, dtype=torch.long, device=scores.device), float("-inf"))
    items = scores.topk(k, dim=1).indices
    plain = scores if plain is None else plain
    return items, plain.gather(1, items), plain.gather(1, target.unsqueeze(1)).squeeze(1)


def log_probability(scores: Tensor) -> Tensor:
    """Log softmax over real items, -inf for the padding item; probabilities keep their ratios. Args: scores [B, n_items].

    Probabilities are told by a batch none of whose scores is negative and none of whose rows sums to more than 1 (to less, where a
    model has set some items to 0).
    """
    scores = scores.float()
    total = scores.sum(dim=1)
    if bool((scores >= 0).all()) and bool(((total > 0) & (total < 1 + 1e-3)).all()):
        scores = scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
    scores = scores.index_fill(1, torch.zeros(1, dtype=torch.long, device=scores.device), float("-inf"))
    return torch.log_softmax(scores, dim=1)


def scores_of(model: SequentialRecommender) -> str:
    """What the scores of a Knowledge by this model are."""
    return model.scores_are if isinstance(model, Teacher) else Teacher.scores_are


def item_table(model: SequentialRecommender) -> Tensor:
    """A teacher's item vectors [n_items, d]: its own `item_embeddings`, or a RecBole model's item table; [n_items, 0] if it has none."""
    if isinstance(model, Teacher):
        return model.item_embeddings()
    if not has_vectors(model):
        return torch.zeros(model.n_items, 0)
    return model.item_embedding.weight.detach()[: model.n_items].clone()


def has_vectors(model: SequentialRecommender) -> bool:
    """Whether a model can give item vectors."""
    weight = getattr(getattr(model, "item_embedding", None), "weight", None)
    return isinstance(model, Teacher) or weight is not None and len(weight) >= model.n_items


def refuse_without_vectors(model: SequentialRecommender) -> None:
    """Refuse a teacher whose item vectors are wanted and that has none.

    Raises:
        ValueError: It has none; the message says what there is instead.
    """
    if not has_vectors(model):
        raise ValueError(
            f"teacher_embedding=auto: {type(model).__name__} has no item table whose rows could be item vectors; there is any text "
            "encoder by name or folder, and distill_embedding=none. Set one of them, or another teacher."
        )


def refuse_memorised(model: SequentialRecommender, n_rows: int) -> None:
    """Refuse a teacher all of whose labels would be dropped as memorised, before it is trained.

    Raises:
        ValueError: It is trained on every row.
    """
    if not isinstance(model, Teacher) or bool(model.trained_on(n_rows).all()):
        raise ValueError(NOTHING_LEFT)


NOTHING_LEFT = (
    "teacher_trained_rows=drop: the teacher was trained on every row it labelled, so no row is left for the ranking term; there is "
    "teacher_folds=2 (teachers that were not), teacher_trained_rows=drop_target or keep, teacher=BIGRec (tuned on a sample of rows), and "
    "distill_ranking=none to use its item vectors only. Set one of them."
)


def sample_of_rows(n_rows: int, count: int, seed: int) -> Tensor:
    """A seeded sample of rows without repetition, ascending; all of them if `count` is 0 or too large. Returns [count]."""
    if not 0 < count < n_rows:
        return torch.arange(n_rows)
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def identity(config: Any, labelling: bool) -> dict[str, Any]:
    """The settings that make a teacher what it is, and with `labelling` those that shape its labels, too."""
    name = config["model"]
    keys = set(read_yaml(PROPERTIES / "model" / f"{name}.yaml")) or set(read_yaml(recbole_yaml(name)))
    if "prompt_lead" not in keys:
        keys |= OF_THE_LOG
    by_ranking = (
        "prompt_lead" not in keys or config["ground_reweight"] != "none"
    )  # an LLM is stopped by the loss of its answers
    keys = (keys | {*training_arguments, "seed", "title_field"}) - NOT_IDENTITY | (
        OF_VALIDATION if by_ranking else set()
    )
    if "teacher_history" not in keys:  # what has a history of its own does not depend on the student's rows
        keys.add("MAX_ITEM_LIST_LENGTH")
    if not labelling and config["ground_reweight"] in (None, "none"):  # gamma is chosen when the teacher is trained
        keys = {key for key in keys if not key.startswith(LABELLING)}
    settings = {"model": name, **{key: config[key] for key in sorted(keys)}}
    if config["prompt_lead"]:  # the template itself stands in code
        words = Words(config["prompt_instruction"], config["prompt_lead"], config["prompt_preamble"] or PREAMBLE)
        settings["prompt"] = [prompt(words, ["first", "second"]), answer("third")]
    if config["shuffle_text"] is not None:  # texts are part of the data's hash, too, but only their titles
        settings["shuffle_text"] = config["shuffle_text"]
    return settings | {"folders": model_folders(settings)}


def teacher_folder(config: Any, data: str, order: str) -> Path:
    """Where the teacher with these settings is kept.

    Args:
        config: The teacher's own Config.
        data: Hash of what it is trained on, see `data_digest`.
        order: Hash of the internal ids, see `order_digest`: most models hold a vector per internal id.
    """
    keys = {**identity(config, labelling=False), "data": data}
    if not getattr(get_model(config["model"]), "knows_by_token", False):
        keys["order"] = order
    return Path(config["checkpoint_dir"]) / "teachers" / f"{config['model']}-{config['dataset']}-{digest(keys)}"


def ready(
    config: Any, dataset: Any, valid_data: Any, checkpoint: str | None = None, key: str = "teacher_checkpoint"
) -> SequentialRecommender:
    """The trained teacher: from `checkpoint`, from its own folder, or trained now (and resumed, if it was stopped).

    Args:
        config: The teacher's own Config.
        dataset: RecBole's training split, which the teacher reads by loaders of its own.
        valid_data: RecBole's validation loader.
        checkpoint: File of a teacher trained elsewhere.
        key: The setting that names it.

    Raises:
        ValueError: `checkpoint` names no file, another model, or one whose items have other internal ids.
    """
    # before the model, to which RecBole's loaders tell names of columns by way of the Config (BERT4Rec's mask)
    valid = valid_data and eval_loader(config, valid_data)
    train = train_loader(config, dataset, valid and valid._dataset)
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, dataset).to(config["device"])
    if checkpoint:
        if not Path(checkpoint).is_file():
            raise ValueError(f"{key}={checkpoint}: no such file. Set {key} to a .safetensors file of ours.")
        return _loaded(model, checkpoint, key, dataset)
    folder = folder_of(config, dataset)
    file = folder / "model.safetensors"
    trainer = trainer_class(config)(config, model)
    if is_ready(folder):
        trainer.logger.info(f"The teacher is taken from {folder}.")
        return _loaded(model, file)
    trainer.keep_in(folder)
    began = perf_counter()
    trainer.fit(train, valid, saved=True, show_progress=config["show_progress"])
    loaded = _loaded(model, file)
    write_json(folder / "done.json", {"checkpoint": file_digest(file), "seconds": perf_counter() - began})
    return loaded


def folder_of(config: Any, dataset: Any) -> Path:
    """Where the teacher with these settings on this training split is kept."""
    return teacher_folder(config, data_digest(Log.from_dataset(dataset), dataset, config), order_digest(dataset))


def is_ready(folder: Path) -> bool:
    """Whether a folder holds a teacher that was trained to its end and is whole."""
    try:
        done = read_json(folder / "done.json")
        return file_digest(folder / "model.safetensors") == done["checkpoint"]
    except (FileNotFoundError, DamagedArtifact, KeyError):
        return False


def seconds_of(folder: Path) -> float | None:
    """How long the training of the teacher in a folder took; None if it was not trained there."""
    try:
        return read_json(folder / "done.json")["seconds"]
    except FileNotFoundError:
        return None


def _loaded(
    model: SequentialRecommender, file: str | Path, key: str = "teacher_checkpoint", dataset: Any = None
) -> SequentialRecommender:
    state = read_checkpoint(file, model.device)
    if state["config"]["model"] != type(model).__name__:
        raise ValueError(
            f"{key}={file}: holds a {state['config']['model']}, not a {type(model).__name__}. Set {key.partition('_')[0]} to "
            f"{state['config']['model']} or name another file."
        )
    if dataset is not None and not getattr(model, "knows_by_token", False):
        refuse_other_items(file, state["meta"].get("items"), dataset, key)
    model.load_state_dict(state["state_dict"])
    model.load_other_parameter(state.get("other_parameter"))
    return model.eval()


def refuse_other_items(file: str | Path, tokens: list[str] | None, dataset: Any, key: str) -> None:
    """Refuse a checkpoint whose vectors would be taken for those of other items.

    Args:
        file: The checkpoint.
        tokens: Its items by internal id; nothing is refused where it does not say them.
        dataset: The data it is to teach on.
        key: The setting that names it.

    Raises:
        ValueError: The items are others, or stand in another order.
    """
    here = [str(token) for token in dataset.field2id_token[dataset.iid_field]]
    if not tokens or tokens == here:
        return
    others = len(set(tokens) ^ set(here))
    fault = (
        f"{others} of its items are not in both"
        if others
        else "its items have other internal ids, as files in another order give"
    )
    raise ValueError(
        f"{key}={file}: was trained on other data: {fault}, so its vectors would be taken for those of other items. Set {key} to a "
        "checkpoint trained on these files, or leave it empty to have one trained."
    )
